"""Which claims of paper 3 hold in the records of `localized/rebuild.py`, said plainly."""

from __future__ import annotations

from localized.models import METHODS
from lyapunov.tables import yes
from tf_lyapunov.evaluation.measures import SuiteResult
from tf_lyapunov.evaluation.wording import number, percent, round_up

RIVALS = ("parseval", "laplacian", "pgd", "l2nn")
PAPER = ("vanilla", *RIVALS)


def _alpha(record, key):
    found = next(c for c in record["curves"] if (c["outputs"], c["norm"]) == ("softmax", "l2"))
    return [row["radius"] for row in found["rows"]], [float(row[key]) for row in found["rows"]]


def _saturation(record, key):
    """First radius at which a curve is within 10% of its largest value."""
    radii, values = _alpha(record, key)
    return next(r for r, v in zip(radii, values, strict=True) if v >= 0.9 * max(values))


def order(values):
    """Names from the smallest value to the largest, in words."""
    return " < ".join(METHODS[n] for n in sorted(values, key=values.get))


def agreement(a, b):
    """Share of the pairs of names that two tables of numbers put in the same order."""
    names = list(a)
    pairs = [(m, n) for i, m in enumerate(names) for n in names[i + 1 :]]
    same = [(a[m] - a[n]) * (b[m] - b[n]) > 0 for m, n in pairs]
    return sum(same) / len(pairs)


def findings(records, settings):
    """Sentences, one a claim."""
    lines = []
    lines += _pairs(records, settings)
    if all(n in records for n in PAPER):
        models = {n: records[n] for n in PAPER}
        lines += _curves(models) + _suites(models)
    if "pgd_spectral" in records and "vanilla" in records:
        lines += _ours(records)
    return lines


def _pairs(records, settings):
    lines = []
    for name in ("pairs_l2", "pairs_linf"):
        if name not in records:
            continue
        record, norm = records[name], {"pairs_l2": "l2", "pairs_linf": "l∞"}[name]
        needed = record["needed_slope"]
        lines.append(
            f"“A small global Lipschitz constant (below about 4) keeps the training error from "
            f"zero” (Figure 1, their CIFAR-10), {norm} here: {yes(needed > 4)}; all pairs fit from "
            f"α = {round_up(needed)} on."
        )
        shares = {d: n / record["opposite_pairs"] for d, n in record["within"].items()}
        first = min(shares, key=float)
        lines.append(
            f"“Few pairs are left within a small d, so that a locally robust classifier is "
            f"possible” (Figure 3), {norm}: {yes(shares[first] < 0.01)}; of the opposite-class "
            "pairs, "
            + ", ".join(f"{percent(s)} are closer than {d}" for d, s in shares.items())
            + "."
        )
    return lines


def _curves(models):
    lines = []
    for key, words in (("monte_carlo", "sampled"), ("gradient", "by ascent")):
        curves = {n: _alpha(r, key)[1] for n, r in models.items()}
        top = {n: max(v) for n, v in curves.items()}
        rising = all(b >= a * 0.98 for v in curves.values() for a, b in zip(v, v[1:], strict=False))
        if key == "monte_carlo":
            lines.append(
                f"“α_lim grows with r for all methods” (Figure 5), {words}: {yes(rising)}."
            )
        lines.append(
            f"“Vanilla saturates at the largest value”, {words}: "
            f"{yes(max(top, key=top.get) == 'vanilla')}; {order(top)} ("
            + ", ".join(number(top[n], 3) for n in sorted(top, key=top.get))
            + ")."
        )
        below = {n: all(a <= b for a, b in zip(curves[n], curves["vanilla"], strict=True))
                 for n in RIVALS}  # fmt: skip
        lines.append(
            f"“All others grow more slowly than vanilla” (below it at every radius), {words}: "
            f"{yes(all(below.values()))}; "
            + ", ".join(f"{METHODS[n]} {'yes' if b else 'no'}" for n, b in below.items())
            + "."
        )
        lowest = sorted(top, key=top.get)[:2]
        lines.append(
            f"“L2NN and PGD saturate lowest”, {words}: {yes(set(lowest) == {'l2nn', 'pgd'})}."
        )
        flat = max(curves["l2nn"]) / min(curves["l2nn"])
        lines.append(
            f"“L2NN remains almost constant over r” (within a factor of 1.5), {words}: "
            f"{yes(flat < 1.5)}; its largest value is {number(flat, 3)} times its smallest."
        )
        where = {n: _saturation(r, key) for n, r in models.items()}
        later = all(where[n] > where["vanilla"] for n in ("parseval", "laplacian"))
        lines.append(
            f"“P and L saturate at larger r than vanilla” (within 10% of the largest value), "
            f"{words}: {yes(later)}; at r = "
            + ", ".join(f"{METHODS[n]} {number(r)}" for n, r in where.items())
            + "."
        )
    return lines


def _suites(models):
    suites = {n: SuiteResult(r["cells"]) for n, r in models.items()}
    clean = {n: r["clean"] for n, r in models.items()}
    corrupted = {n: s.corrupted_error for n, s in suites.items()}
    lines = [
        f"“P alone has a better clean error than vanilla” (Table 2): "
        f"{yes(all((clean[n] > clean['vanilla']) == (n == 'parseval') for n in RIVALS))}; "
        + ", ".join(f"{METHODS[n]} {percent(1 - c)}" for n, c in clean.items())
        + ".",
        f"“L2NN has the worst clean error”: {yes(min(clean, key=clean.get) == 'l2nn')}.",
        f"“PGD has the smallest corrupted error”: {yes(min(corrupted, key=corrupted.get) == 'pgd')}"
        "; " + ", ".join(f"{METHODS[n]} {percent(c)}" for n, c in corrupted.items()) + ".",
    ]
    scores = {n: s.summary(suites["vanilla"])["relative_mce"] for n, s in suites.items()}
    if None not in scores.values():
        right = scores["pgd"] < scores["l2nn"] < scores["laplacian"] < 100 <= scores["parseval"]
        lines.append(
            "“Relative mCE: PGD < L2NN < L < 100 ≤ P” (30, 39, 92, 103 there): "
            f"{yes(right)}; "
            + ", ".join(f"{METHODS[n]} {number(s, 3)}" for n, s in scores.items())
            + "."
        )
    levels = sorted({row["level"] for row in suites["vanilla"].of_kind("noise")})
    errors = {
        n: sum(row["error"] for row in s.of_kind("noise")) / len(levels) for n, s in suites.items()
    }
    lines.append(
        f"“All four beat vanilla under Gaussian noise” (Figure 4, mean over the ratios): "
        f"{yes(all(errors[n] < errors['vanilla'] for n in RIVALS))}; errors "
        + ", ".join(f"{METHODS[n]} {percent(e)}" for n, e in errors.items())
        + "."
    )
    for key, words in (("monte_carlo", "sampled"), ("gradient", "by ascent")):
        top = {n: max(_alpha(r, key)[1]) for n, r in models.items()}
        same = agreement(errors, top)
        lines.append(
            f"“The order under noise is that of α_lim” (Figures 4 and 5), {words}: "
            f"{yes(same == 1)}; {percent(same)} of the pairs of methods agree."
        )
    return lines


def _ours(records):
    ours, base = records["pgd_spectral"], records["vanilla"]
    a, b = (max(_alpha(r, "gradient")[1]) for r in (ours, base))
    radius = next(iter(ours["certified"]))
    proved = percent(ours["certified"][radius])
    return [
        f"Beyond the paper: PGD training with our spectral bounds proves {proved} of the test "
        f"images at l2 radius {radius} (vanilla: {percent(base['certified'][radius])}), at "
        f"{percent(ours['clean'])} clean accuracy (vanilla: {percent(base['clean'])}); largest "
        f"α_lim by ascent {number(a, 3)} (vanilla: {number(b, 3)}).",
    ]
