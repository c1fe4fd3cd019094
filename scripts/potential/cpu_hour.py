"""The equal-time table of `potential/rebuild.py`: every family for as many minutes of CPU.

Of every family and data set settings are drawn at random, the first of them the same for all, and
trained for `--trial-minutes` each; those that prove most of the validation images (the last of the
training set) at the radius in `AIMS`, or `--aim`, are kept. With them it is trained for `--minutes`
on all training images, once for every seed, and the three that proved most of validation for
`--long-minutes` too. The test set is read when a training has ended, once. Then the best family is
searched again with each loss alone, for as long: what the loss does by itself.

Time is that of the process on all cores, compilation and proofs aside; with `--device-minutes` it
is what passed, for one accelerator. How many epochs fit is measured before each training, once, so
that a run that continues after an interruption has the same schedule. Every trial is a line of
`search.jsonl`, every training one of `runs.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path

import keras
import numpy as np

from potential.training import Clock, fit_to_end, load, start_over
from tf_lyapunov import callbacks, datasets, losses, models
from tf_lyapunov.attacks import PGD
from tf_lyapunov.certification import certify
from tf_lyapunov.errors import DatasetNotFound
from tf_lyapunov.evaluation.wording import percent, percent_down
from tf_lyapunov.experiments.augmentation import AugmentedBatches
from tf_lyapunov.experiments.objectives import PiecewiseLinear
from tf_lyapunov.models.lipschitz import FAMILIES, KEPT_FAMILIES
from tf_lyapunov.optimizers import Stiefel, is_marked
from tf_lyapunov.theory.balls import L2
from tf_lyapunov.writing import write_text

# Families of convolutions, and shifts in their place.
ENTRIES = (*FAMILIES, *KEPT_FAMILIES, "lipnext")
# l2 radii of the table, pixels in [0, 1]; what the search looks at.
RADII = {
    "mnist": (36 / 255, 0.3, 1.58),
    "fashion_mnist": (36 / 255, 0.3, 1.58),
    "cifar10": (36 / 255, 72 / 255, 108 / 255),
}
AIMS = {"mnist": 0.3, "fashion_mnist": 0.3, "cifar10": 36 / 255}
LOSSES = ("cross_entropy", "efficient_margin")
BATCH, LONG = 256, 3
# Jumps of the margin.
RAMP = 10
# Steps of the clock's trial, the first of which compile.
_TIMED = (4, 12)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the search chooses.

    Attributes:
        learning_rate: largest of Adam, in a triangular schedule.
        width: of the network, relative to `network`'s.
        loss: one of `LOSSES`.
        temperature: of either loss.
        margin: of `TemperatureCrossEntropy`, in units of max(1, 1.5·aim); of `EfficientMargin`
            the radius, relative to the aim.
        aim: radius that the search looks at; not drawn.
    """

    learning_rate: float = 3e-3
    width: int = 1
    loss: str = "cross_entropy"
    temperature: float = 0.1
    margin: float = 1.0
    aim: float = 0.3


def drawn(rng, allowed=LOSSES, aim=0.3) -> Settings:
    """Settings at random."""
    return Settings(
        learning_rate=float(np.round(10 ** rng.uniform(-3.3, -2.0), 5)),
        width=int(rng.choice([1, 2])),
        loss=str(rng.choice(allowed)),
        temperature=float(rng.choice([0.05, 0.1, 0.25])),
        margin=float(rng.choice([0.5, 1.0, 1.5])),
        aim=aim,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how often, and how time is taken.

    Attributes:
        minutes, long_minutes, trial_minutes: of trainings.
        trials: settings of every family.
        seeds: of the trainings of `minutes`; the long ones take the first.
        clock: "cpu" or "wall".
        entries: families.
        aim: radius that settings are chosen for; None for that of the data set.
        validation: images.
        attacked: images of the test set.
        losses_apart: whether the best family is trained with each loss alone.
    """

    minutes: float = 10.0
    long_minutes: float = 60.0
    trial_minutes: float = 2.0
    trials: int = 4
    seeds: tuple = (0, 1, 2)
    clock: str = "cpu"
    entries: tuple = ENTRIES
    aim: float | None = None
    validation: int = 5000
    attacked: int = 1000
    losses_apart: bool = True


def network(entry, dataset, settings, shape, classes, seed) -> keras.Model:
    """The network of a family for a data set."""
    wide = settings.width
    if entry == "lipnext":
        size = (3, 32 * wide) if dataset != "cifar10" else (4, 64 * wide)
        spec = {"name": "lipnext", "size": size, "patch": 4}
    elif dataset != "cifar10":
        sizes = {"filters": [16 * wide, 32 * wide], "widths": [100 * wide]}
        spec = {"name": "two_conv_two_dense", "family": entry, **sizes}
    else:
        sizes = {"channels": 16 * wide, "units": 128 * wide}
        spec = {"name": "kw_large", "family": entry, **sizes}
    return models.build(spec, shape, classes, seed=seed)


def compiled(entry, dataset, settings, x, y, steps, seed):
    """`(model, callbacks)`, ready for so many steps."""
    model = network(entry, dataset, settings, x.shape[1:], int(y.max()) + 1, seed)
    peak, more = settings.learning_rate, []
    rate = PiecewiseLinear([0, 0.4 * steps, 0.8 * steps, steps], [0, peak, peak / 20, 0])
    optimizer = keras.optimizers.Adam(rate)
    if any(is_marked(v) for v in model.trainable_variables):
        optimizer = Stiefel(optimizer)
    if settings.loss == "cross_entropy":
        loss = losses.TemperatureCrossEntropy(
            settings.temperature, settings.margin * max(1.0, 1.5 * settings.aim)
        )
    else:
        radius = settings.margin * settings.aim
        loss = losses.EfficientMargin(radius, model, temperature=settings.temperature)
        # JAX compiles at every jump, which counts.
        more = [callbacks.MarginRamp(loss, levels=RAMP)]
    metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
    model.compile(optimizer, loss, metrics=metrics)
    return model, more


def batches_of(dataset, x, y, seed):
    """Batches of an epoch, augmented for natural images."""
    if dataset == "cifar10":
        return AugmentedBatches(x, y, crop=4, flip=True, batch_size=BATCH, seed=seed)
    return datasets.Batches(x, y, batch_size=BATCH, seed=seed)


def seconds_per_step(entry, dataset, settings, x, y, clock) -> float:
    """Seconds of one training step, compilation aside."""
    model, _ = compiled(entry, dataset, settings, x, y, 1000, 0)
    now = time.process_time if clock == "cpu" else time.perf_counter
    for steps in _TIMED:
        count = min(BATCH * steps, len(x))
        started = now()
        model.fit(x[:count], y[:count], batch_size=BATCH, verbose=0)
        found = (now() - started) / -(-count // BATCH)
    return found


def trained(entry, dataset, settings, x, y, minutes, seed, folder: Path, clock):
    """`(model, seconds)` after so many minutes; continues where an interrupted run stopped."""
    mark, final = folder / "settings.json", folder / "final.weights.h5"
    asked = {"entry": entry, "dataset": dataset, "settings": dataclasses.asdict(settings)}
    asked |= {"minutes": minutes, "seed": seed, "images": len(x), "clock": clock}
    plan = json.loads(mark.read_text()) if mark.exists() else {}
    if {k: plan.get(k) for k in asked} != asked:
        start_over(folder, mark)
        epoch = seconds_per_step(entry, dataset, settings, x, y, clock) * -(-len(x) // BATCH)
        plan = {**asked, "epochs": max(round(60 * minutes / epoch), 1)}
        write_text(mark, json.dumps(plan, indent=1) + "\n")
    batches = batches_of(dataset, x, y, seed)
    steps = plan["epochs"] * len(batches)
    model, more = compiled(entry, dataset, settings, x, y, steps, seed)
    timer = Clock(folder / "epochs.jsonl")
    if final.exists():
        model.load_weights(final)
    else:
        fit_to_end(model, batches, plan["epochs"], [*more, timer], folder / "checkpoints", final)
    return model, sum(line[clock] for line in timer.lines)


def proved(model, x, y, radii, attacked=0) -> dict:
    """Accuracy, what is proved at radii, and how often PGD contradicts a proof."""
    proof = certify(model, x, y)
    found = {
        "images": len(x),
        "clean": proof.accuracy,
        "certified": [proof.certified_accuracy(r) for r in radii],
        "gain_upper_bound": proof.gain_upper_bound,
        "attacked": [],
        "broken": 0,
    }
    for radius in radii if attacked else ():
        attack = PGD(L2(radius), steps=10, step=radius / 4, batch_size=500)
        wrong = np.asarray(attack(model, x[:attacked], y[:attacked]).success)
        found["attacked"].append(float(np.mean(~wrong)))
        held = proof.radius[:attacked] >= radius * (1 + 1e-4)
        found["broken"] += int(np.sum(wrong & held))
    return found


class Lines:
    """Finished records, a line of JSON each; what was asked for names them."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text() if path.exists() else ""
        self.records = [json.loads(line) for line in text.splitlines()]

    def find(self, asked):
        """The record of what is asked for, or None."""
        return next((r for r in self.records if r["asked"] == asked), None)

    def add(self, asked, found):
        """Keeps a record."""
        record = {"asked": asked, **found}
        self.records.append(record)
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
        return record


class Table:
    """Trials and trainings of one data set.

    Args:
        dataset: name.
        data: (x, y, x_test, y_test).
        plan: `Plan`.
        out: folder of the records.
        say: function of a line of progress.
    """

    def __init__(self, dataset, data, plan, out: Path, say=print):
        self.dataset, self.data, self.plan, self.say = dataset, data, plan, say
        self.aim = AIMS[dataset] if plan.aim is None else plan.aim
        self.cache = out / "cache"
        self.trials, self.runs = Lines(out / "search.jsonl"), Lines(out / "runs.jsonl")

    def search(self, entry, allowed=LOSSES):
        """`(settings, share of validation that they prove)`, of those that prove most."""
        x, y = self.data[:2]
        split, rng, best = len(x) - self.plan.validation, np.random.default_rng(0), None
        # Of one loss alone the first settings have it.
        first = Settings(loss=allowed[0], aim=self.aim)
        for number in range(self.plan.trials):
            settings = drawn(rng, allowed, self.aim) if number else first
            asked = self._asked(entry, settings, self.plan.trial_minutes, 0)
            record = self.trials.find(asked)
            if record is None:
                model, seconds = self._trained(
                    f"trial_{number}_{'_'.join(allowed)}", entry, settings, x[:split], y[:split],
                    self.plan.trial_minutes, 0,
                )  # fmt: skip
                found = proved(model, x[split:], y[split:], [self.aim])
                record = self.trials.add(asked, {"validation": found, "seconds": seconds})
            share = record["validation"]["certified"][0]
            self.say(
                f"{self.dataset}, {entry}, trial {number}: {percent_down(share)} of validation"
            )
            if best is None or share > best[1]:
                best = settings, share
        return best

    def train(self, entry, settings, minutes, seed):
        """The record of one training on all training images."""
        asked = self._asked(entry, settings, minutes, seed)
        record = self.runs.find(asked)
        if record is None:
            x, y, x_test, y_test = self.data
            name = f"run_{settings.loss}_{minutes:g}_{seed}"
            model, seconds = self._trained(name, entry, settings, x, y, minutes, seed)
            found = proved(model, x_test, y_test, RADII[self.dataset], self.plan.attacked)
            size = int(sum(np.prod(v.shape) for v in model.trainable_variables))
            record = self.runs.add(asked, {**found, "parameters": size, "seconds": seconds})
        shares = "/".join(percent_down(v) for v in record["certified"])
        self.say(
            f"{self.dataset}, {entry}, {minutes:g} minutes, seed {seed}: "
            f"{percent(record['clean'])}, {shares}, {record['seconds']:.0f} s"
        )
        return record

    def rows(self):
        """Everything: the families, the longest, and each loss alone."""
        plan, chosen = self.plan, {entry: self.search(entry) for entry in self.plan.entries}
        for entry, (settings, _) in chosen.items():
            for seed in plan.seeds:
                self.train(entry, settings, plan.minutes, seed)
        order = sorted(chosen, key=lambda entry: -chosen[entry][1])
        for entry in order[:LONG] if plan.long_minutes else ():
            self.train(entry, chosen[entry][0], plan.long_minutes, plan.seeds[0])
        apart = {}
        for loss in LOSSES if plan.losses_apart else ():
            settings, _ = self.search(order[0], (loss,))
            apart[loss] = settings
            for seed in plan.seeds:
                self.train(order[0], settings, plan.minutes, seed)
        return {"chosen": chosen, "order": order, "apart": apart}

    def records(self, entry, settings, minutes):
        """Finished trainings of a row of the table."""
        seeds = self.plan.seeds
        found = [self.runs.find(self._asked(entry, settings, minutes, seed)) for seed in seeds]
        return [record for record in found if record is not None]

    def _asked(self, entry, settings, minutes, seed):
        settings = dataclasses.asdict(settings)
        return {"dataset": self.dataset, "entry": entry, "settings": settings, "minutes": minutes,
                "seed": seed, "clock": self.plan.clock, "images": len(self.data[0])}  # fmt: skip

    def _trained(self, name, entry, settings, x, y, minutes, seed):
        folder = self.cache / f"{self.dataset}_{self.aim:.4g}_{entry}_{name}"
        return trained(entry, self.dataset, settings, x, y, minutes, seed, folder, self.plan.clock)


def text_of(table, rows) -> str:
    """The table of a data set in Markdown."""
    radii = " | ".join(f"proved at {r:.3g}" for r in RADII[table.dataset])
    unit = "CPU" if table.plan.clock == "cpu" else "device"
    head = f"| family | {unit} minutes | seeds | right | {radii} | s | loss | settings |"
    lines = [f"## {table.dataset}", head, "|" + "---|" * (7 + len(RADII[table.dataset]))]
    plan, wanted = table.plan, []
    for entry in rows["order"]:
        wanted.append((entry, rows["chosen"][entry][0], plan.minutes))
    for entry in rows["order"][:LONG] if plan.long_minutes else ():
        wanted.append((entry, rows["chosen"][entry][0], plan.long_minutes))
    wanted += [
        (rows["order"][0], settings, plan.minutes)
        for settings in rows["apart"].values()
        if settings != rows["chosen"][rows["order"][0]][0]
    ]
    for entry, settings, minutes in wanted:
        held = table.records(entry, settings, minutes)
        if not held:
            continue
        clean = _spread([r["clean"] for r in held], percent)
        shares = [
            _spread([r["certified"][i] for r in held], percent_down)
            for i in range(len(RADII[table.dataset]))
        ]
        own = f"rate {settings.learning_rate:g}, width {settings.width}, " \
              f"temperature {settings.temperature:g}, margin {settings.margin:g}"  # fmt: skip
        seconds = f"{statistics.mean(r['seconds'] for r in held):.0f}"
        row = [entry, f"{minutes:g}", len(held), clean, *shares, seconds, settings.loss, own]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    trials = [r for r in table.trials.records if r["asked"]["dataset"] == table.dataset]
    broken = sum(r["broken"] for r in table.runs.records if r["asked"]["dataset"] == table.dataset)
    lines += [
        "",
        f"Settings: the best of {plan.trials} for each family, {plan.trial_minutes:g} minutes "
        f"each, by the share of {plan.validation} validation images proved at "
        f"{table.aim:.3g}; {sum(r['seconds'] for r in trials):.0f} s of search in all, "
        f"apart from the table's. PGD of ten steps on {plan.attacked} test images at these radii "
        f"broke {broken} certificates.",
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _spread(values, shown):
    """Mean of several, and their range."""
    mean = shown(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({shown(min(values))} to {shown(max(values))})"


def measure(directories, plan: Plan, out: Path, facts: dict, names, limit=None, say=print) -> int:
    """Writes the tables of data sets; the number of broken certificates.

    Args:
        directories: of data sets by name.
        plan: `Plan`.
        out: folder of records and table.
        facts: machine and date.
        names: of data sets.
        limit: images of the training set, or None for all.
        say: function of a line of progress.
    """
    (out / "cache").mkdir(parents=True, exist_ok=True)
    write_text(out / "cache" / ".gitignore", "*\n")
    parts = [
        "# Certified accuracy at equal time",
        f"`python scripts/potential/rebuild.py --only cpu_hour`, {facts['date']}, "
        f"{facts['machine']['cores']} cores of {facts['machine']['cpu'] or 'an unnamed CPU'}, "
        f"Keras {facts['machine']['keras']} on {facts['machine']['backend']}. Radii are l2, pixels "
        "in [0, 1]; proved by `certify` from the weights as stored, rounding included. The test "
        "set was read once for every training, after it.",
    ]
    broken = 0
    for name in names:
        try:
            data = load(name, directories.get(name))
        except DatasetNotFound as error:
            say(f"{name}: left out. {error}")
            parts.append(f"## {name}\n\nLeft out: the data set is not there.")
            continue
        if limit is not None:
            data = (data[0][:limit], data[1][:limit], data[2][: limit // 5], data[3][: limit // 5])
        table = Table(name, data, plan, out, say)
        parts.append(text_of(table, table.rows()))
        broken += sum(r["broken"] for r in table.runs.records if r["asked"]["dataset"] == name)
        write_text(out / "RESULTS.md", "\n\n".join(parts) + "\n")
    write_text(out / "RESULTS.md", "\n\n".join(parts) + "\n")
    return broken
