"""The networks of `potential/rebuild.py` and what Meunier et al. (2022) print about them."""

from __future__ import annotations

from potential.training import Job
from tf_lyapunov.models.lipschitz import FAMILIES, KEPT_FAMILIES

SIZES = ("S", "M", "L", "XL")
# Clean and certified accuracy at 36, 72, 108 over 255 (percent); seconds per epoch on their GPU.
TABLE_2 = {
    "CPL-S": (75.6, 62.3, 46.9, 32.2, 21.9),
    "CPL-M": (76.8, 63.3, 47.5, 32.5, 40.0),
    "CPL-L": (77.7, 63.9, 48.1, 32.9, 93.4),
    "CPL-XL": (78.5, 64.4, 48.0, 33.0, 163),
    "Cayley (KW3)": (74.6, 61.4, 46.4, 32.1, 30.8),
    "SOC-10": (77.6, 62.0, 45.0, 29.5, 33.4),
    "SOC-20": (78.0, 62.7, 46.0, 30.3, 52.2),
    "SOC+-10": (76.2, 62.6, 47.7, 34.2, None),
    "SOC+-20": (76.3, 62.6, 48.7, 36.0, None),
}
TABLE_3 = {
    "CPL-S": (44.0, 29.9, 19.1, 11.0, 22.4),
    "CPL-M": (45.6, 31.1, 19.3, 11.3, 40.7),
    "CPL-L": (46.7, 31.8, 20.1, 11.7, 93.8),
    "CPL-XL": (47.8, 33.4, 20.9, 12.6, 164),
    "Cayley (KW3)": (43.3, 29.2, 18.8, 11.0, 31.3),
    "SOC-10": (48.2, 34.3, 22.7, 14.0, 33.8),
    "SOC-20": (48.3, 34.4, 22.7, 14.2, 52.7),
    "SOC+-10": (47.1, 34.5, 23.5, 15.7, None),
    "SOC+-20": (47.8, 34.8, 23.7, 15.8, None),
}
# Batch sizes 64, 128, 256.
TABLE_4 = {
    "S": ((76.5, 62.9, 47.3, 32.0, 48), (76.1, 62.8, 47.1, 32.3, 31), (75.6, 62.3, 46.9, 32.2, 22)),
    "M": ((77.4, 63.6, 47.4, 32.1, 77), (77.2, 63.5, 47.5, 32.1, 50), (76.8, 63.2, 47.4, 32.4, 40)),
    "L": (
        (78.4, 64.2, 47.8, 32.2, 162),
        (78.2, 64.3, 47.9, 32.5, 109),
        (77.6, 63.9, 48.1, 32.7, 93),
    ),
    "XL": (
        (78.9, 64.2, 47.2, 31.2, 271),
        (78.9, 64.2, 47.5, 31.8, 198),
        (78.5, 64.4, 47.8, 32.4, 163),
    ),
}
TABLE_5 = {
    "S": ((45.6, 30.8, 19.3, 11.2, 47), (44.9, 30.7, 19.2, 11.0, 31), (44.0, 29.9, 19.1, 10.9, 23)),
    "M": ((46.6, 31.6, 19.6, 11.6, 78), (46.3, 31.1, 19.7, 11.5, 55), (45.6, 31.1, 19.3, 11.3, 41)),
    "L": (
        (48.1, 32.7, 20.3, 11.7, 163),
        (47.4, 32.3, 20.0, 11.8, 116),
        (46.8, 31.8, 20.1, 11.7, 95),
    ),
    "XL": (
        (49.0, 33.7, 21.1, 12.0, 293),
        (48.0, 33.7, 21.0, 12.1, 209),
        (47.8, 33.4, 20.9, 12.6, 164),
    ),
}
BATCH_SIZES = (64, 128, 256)
# Appendix D.2: step h -> clean accuracy and accuracy under PGD at 36/255.
RELAXED = {1.0: (85.10, 61.45), 0.1: (82.23, 62.99), 0.01: (78.53, 60.98)}
DEPTHS = (100, 300, 500, 700, 1000)
MARGINS = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5)
# LipKernel paper, Table 1, 2C2F on MNIST.
MNIST = {
    "cayley": (94.6, 92.9, 91.0, 88.3),
    "sandwich": (97.3, 96.3, 95.2, 93.8),
    "LipKernel": (96.6, 95.6, 94.3, 92.6),
}
PUBLISHED_EPOCHS = 200
MULTI_MARGIN = {"name": "multi_margin", "margin": 0.7}
# The temperature lets bounded logits fit; the margin is what certified radii are made of.
MNIST_LOSS = {"name": "cross_entropy", "temperature": 0.1, "margin": 1.0}
# What two cores can train.
SMALL_POTENTIAL = {
    "name": "convex_potential",
    "size": None,
    "head": "normalized",
    "depth": 8,
    "channels": 30,
    "dense_depth": 2,
    "units": 256,
}
# As published for SOC; one for all in comparisons.
CIFAR_LOSS = {"name": "cross_entropy", "temperature": 0.25, "margin": 0.35}


def two_conv(family, name, part, **options) -> Job:
    """2C2F with last-layer normalisation on MNIST."""
    model = {"name": "two_conv_two_dense", "family": family}
    settings = {"learning_rate": 5e-3, "published": MNIST.get(family), **options}
    return Job(name, family, part, "mnist", model, MNIST_LOSS, **settings)


def mnist_jobs(quick: bool) -> list[Job]:
    """The long run."""
    if quick:
        return [two_conv("sandwich", "mnist_sandwich", "mnist", epochs=2, train=4000, test=500)]
    return [two_conv("sandwich", "mnist_sandwich", "mnist", epochs=30)]


def family_jobs(quick: bool) -> list[Job]:
    """Every family of layers for as many epochs."""
    options = {"epochs": 4, "train": 12000, "test": 2000, "attacked": 0}
    if quick:
        options = {"epochs": 1, "train": 2000, "test": 500, "attacked": 200}
    return [
        two_conv(f, f"epochs_{f}", "equal_epochs", **options) for f in (*FAMILIES, *KEPT_FAMILIES)
    ]


def equal_time_jobs(quick: bool, records: dict) -> list[Job]:
    """Every family for the CPU time that the epochs of the median family took."""
    jobs = family_jobs(quick)
    cost = {j.label: records[j.name]["seconds"]["cpu_per_epoch"] for j in jobs if j.name in records}
    budget = jobs[0].epochs * sorted(cost.values())[len(cost) // 2] if cost else 0.0
    options = {"train": jobs[0].train, "test": jobs[0].test, "attacked": jobs[0].attacked}
    return [
        two_conv(f, f"time_{f}", "equal_time", epochs=max(1, round(budget / s)), **options)
        for f, s in cost.items()
    ]


def small_cifar_jobs(quick: bool) -> list[Job]:
    """Networks of table 2's kinds that two cores train on a part of CIFAR-10."""
    options = {"epochs": 20, "train": 10000, "test": 2000, "attacked": 500}
    if quick:
        options = {"epochs": 1, "train": 512, "test": 128, "attacked": 32}
    kw = {"name": "kw_large", "family": "cayley", "channels": 16, "units": 256}
    soc = {"name": "lip_conv_net", "family": "skew", "depth": 5, "channels": 16}
    resnet = {"name": "liresnet", "family": "spectral", "blocks": 4, "channels": 32}
    models = {
        "CPL, 8 layers of 30 channels": ("cpl", SMALL_POTENTIAL),
        "Cayley, KWLarge of 16 channels": ("cayley", kw),
        "SOC, LipConvNet-5 of 16 channels": ("soc", soc),
        "spectral, LiResNet of 32 channels": ("liresnet", resnet),
    }
    return [
        Job(f"cifar_small_{name}", label, "cifar_small", "cifar10", model, CIFAR_LOSS,
            augment=True, **options)
        for label, (name, model) in models.items()
    ]  # fmt: skip


def cifar_jobs(part: str, quick: bool, epochs: int) -> list[Job]:
    """Networks of one of the paper's tables and figures on CIFAR-10 or CIFAR-100."""
    jobs = {
        "table_2": lambda: _comparison("table_2", "cifar10", TABLE_2, "truncated"),
        "table_3": lambda: _comparison("table_3", "cifar100", TABLE_3, "normalized"),
        "table_4": lambda: _batch_sizes("table_4", "cifar10", TABLE_4),
        "table_5": lambda: _batch_sizes("table_5", "cifar100", TABLE_5),
        "figure_3": _depths,
        "figures_4_5": _margins,
        "relaxed": _relaxed,
    }[part]()
    options = {"epochs": epochs}
    if quick:
        jobs = jobs[:1]
        options = {"epochs": 1, "train": 512, "test": 128, "attacked": 32}
    return [Job(**{**job, **options}) for job in jobs]


def _cpl(name, label, part, dataset, published=None, *, head, loss=MULTI_MARGIN, **options):
    """A convex potential network trained as published; `options` of the model and of the job."""
    known = ("batch_size", "learning_rate", "seed")
    return {
        "name": name,
        "label": label,
        "part": part,
        "dataset": dataset,
        "model": {
            "name": "convex_potential",
            "head": head,
            **{k: v for k, v in options.items() if k not in known},
        },
        "loss": loss,
        "augment": True,
        "published": None if published is None else published[:4],
        "published_seconds": None if published is None else published[4],
        **{k: v for k, v in options.items() if k in known},
    }


def _comparison(part, dataset, table, head):
    """CPL of four sizes, Cayley and SOC; SOC+ was not trained by the authors either."""
    jobs = [
        _cpl(f"{part}_cpl_{s.lower()}", f"CPL-{s}", part, dataset, table[f"CPL-{s}"],
             head=head, size=s)
        for s in SIZES
    ]  # fmt: skip
    common = {"part": part, "dataset": dataset, "augment": True}
    head = "normalized" if head == "normalized" else "bounded"
    kw = {"name": "kw_large", "family": "cayley", "channels": 96, "head": head}
    models = {"Cayley (KW3)": ("cayley_kw3", kw, MULTI_MARGIN)}
    for depth in (10, 20):
        spec = {"name": "lip_conv_net", "family": "skew", "depth": depth, "head": head}
        models[f"SOC-{depth}"] = (f"soc_{depth}", spec, CIFAR_LOSS)
    for label, (name, model, loss) in models.items():
        row = table[label]
        found = {"name": f"{part}_{name}", "label": label, "model": model, "loss": loss}
        jobs.append({**common, **found, "published": row[:4], "published_seconds": row[4]})
    return jobs


def _batch_sizes(part, dataset, table):
    return [
        _cpl(f"{part}_{s.lower()}_{n}", f"CPL-{s}, batch {n}", part, dataset, row,
             head="normalized", size=s, batch_size=n)
        for s in SIZES for n, row in zip(BATCH_SIZES, table[s], strict=True)
    ]  # fmt: skip


def _depths():
    return [
        _cpl(f"figure_3_{n}", f"{n} layers", "figure_3", "cifar10", head="truncated",
             size="S", depth=n, channels=30)
        for n in DEPTHS
    ]  # fmt: skip


def _margins():
    return [
        _cpl(f"figure_4_{name}_{m}".replace(".", "_"), f"{name}, margin {m}", "figures_4_5", name,
             head="normalized", size="S", loss={"name": "multi_margin", "margin": m})
        for name in ("cifar10", "cifar100") for m in MARGINS
    ]  # fmt: skip


def _relaxed():
    return [
        _cpl(f"relaxed_{h}".replace(".", "_"), f"h = {h}", "relaxed", "cifar10",
             head="truncated", size="S", norm=None, step=h)
        for h in RELAXED
    ]  # fmt: skip
