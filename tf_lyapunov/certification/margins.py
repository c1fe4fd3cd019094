"""Certified radii from class margins: `certify`."""

import math

import numpy as np

from tf_lyapunov.bounds.choice import METHODS, network_gain
from tf_lyapunov.bounds.composition import (
    Allowance,
    claim_digest,
    contributions,
    lipschitz_constants,
    model_assumptions,
    rounding_errors,
)
from tf_lyapunov.certification import onregions
from tf_lyapunov.certification.balls import check_balls, without_flushing, without_overflow
from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.certification.heads import heads, pair_distances
from tf_lyapunov.certification.inputs import checked_inputs, input_shapes
from tf_lyapunov.certification.proofs import KeptInputs, Proof
from tf_lyapunov.certification.widening import Widening, checked
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.jobs import checked_jobs
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.program import rounding
from tf_lyapunov.program.feeding import blocks, is_arrays
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.logits import (
    PRECISIONS,
    Float64Logits,
    LogitsModel,
    check_single_output,
    with_rounded_settings,
)
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.restoring import leaves_unchanged
from tf_lyapunov.program.validation import validate
from tf_lyapunov.progress import reports_progress, stage
from tf_lyapunov.theory.arguments import checked_seconds

# Float64 entries held at once in blocks of inputs × classes, and of input entries.
_BLOCK = 2**22
# Loss of median radius to the model's own rounding that is not worth an evaluation in float64.
_AFFORDABLE_LOSS = 0.05
# Inputs that decide whether it is worth one.
_SAMPLE = 256
_SQRT2_UP = float(rounding.up(np.sqrt(2.0)))


@takes_networks
@reports_progress
@leaves_unchanged
def certify(
    model,
    x,
    y=None,
    *,
    method="composition",
    perturbed=None,
    batch_size=None,
    precision="auto",
    time_budget=60.0,
    norm="l2",
    bounds=None,
    jobs=1,
    state=None,
    progress=None,
):
    """Radii within which a classifier's decision provably stays, for every input.

    With logits f, decision c = argmax f, l2 gain L of the logits, gain L_h of the last dense
    layer's input and that layer's columns w, no change e of the input with ‖e‖ ≤ r alters c, for

        r = min_{j≠c} (f_c - f_j) / min(√2·L, L_h·‖w_c - w_j‖),                          (6.1)

    a sufficient condition, valid over all of real space. f is computed in the model's precision;
    a proven bound on its rounding error is taken off every margin (see `Certificate`). A single
    logit decides by its sign, r = |f|/L. A final softmax, log-softmax or sigmoid is looked
    through: it keeps the order of the classes.

    Args:
        model: a Keras model of supported layers (see `read_network`) with logits or probabilities
            (n, K); one that is not built yet is built on `x`, if that is an array.
        x: array (n, …), or for a model with several inputs a list, tuple or dict of arrays, as
            Keras takes them; `keras.utils.PyDataset`, tf.data, or an iterable of batches `(x, y)`;
            finite numbers. Read once, in its own order, a few megabytes at a time.
        y: class numbers (n,) or one-hot rows (n, K), of a single output also -1 and 1; `None` takes
            the data set's labels, or, if it has none, certifies the model's own decisions.
        method: `"composition"`, the product of the layers' gains over the graph. For the linear
            layers before the logits (dense, convolutions, average pools, padding; what is beyond
            2²² entries by norms of products alone), tighter and never above it:
            `"liplt"` (norms of products of layers), `"closed_form"` and `"eclipse"` (multipliers
            layer by layer), `"lipsdp"` (one semidefinite program, and one per pair of classes; one
            for all branches where these meet),
            `"dissipativity"` (the cone of the network's (δ, ν)), `"local"` (slopes on the ball
            around each input, ReLU and leaky ReLU), `"linear"` (relaxations on the ball around each
            input, on any graph with one input; alone in reading products of two signals, attention,
            `SimpleRNN`, `GRU` and `LSTM`, of the exact function of the weights), `"box"` (boxes of
            every signal, without a search, for networks trained through them), `"auto"` (per input
            the best of `"linear"` and the tightest of lipsdp, eclipse and closed form within
            `time_budget`; the first three inputs tell whether the latter may take more than 10%
            from the former; the certificate says which).
        perturbed: which input of several may change: its name or position, or a list of them, the
            others held fixed at the values given, as the model's dtype holds them. The norm is
            that of these inputs together; `None` perturbs all, in the norm of their concatenation.
        batch_size: inputs evaluated at once; by default chosen from the input's size.
        precision: `"model"` computes the logits as the model does; `"float64"` with the same
            weights in float64, whose rounding error is negligible, at several times the cost;
            `"auto"` chooses float64 where a float32 model's rounding would cost a typical input
            more than 5% of its radius, and keeps the precision of float16 and bfloat16 models.
        time_budget: seconds that the search for bounds may take; what does not fit is not begun.
        norm: `"l2"`, `"linf"` or `"l1"`, in which radii are measured.
        bounds: `(low, high)` of valid inputs, numbers or arrays: radii by `"linear"` and `"box"`
            then concern changes that stay within them alone. None for all of real space.
        jobs: processes that search around inputs (`"local"`, `"linear"`, `"auto"`; other methods
            need none), by joblib: 1 for this one alone, -1 for one per core, None as
            `joblib.parallel_config` says, whose backend is used (loky, dask, ray). Radii are the
            same bit for bit on processors of one kind, as far as `time_budget` ends no search.
        state: file in which finished searches around inputs are kept, replaced whole each time, so
            that a call that was killed or ran out of time continues where it was. Keep it as safe
            as the certificate: its radii are taken over.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook. Ctrl-C leaves the model as it was.

    Returns:
        `Certificate`.

    Raises:
        UnsupportedLayerError: naming a layer without a proven gain.
        ValueError: for NaN or infinite inputs or weights, wrong shapes, another number or other
            names of inputs, labels out of range; if `state` is damaged, or belongs to another
            model, other inputs or other settings.
        DistributionError: if workers are lost again and again; `state` keeps what is finished.

    Example:

    >>> import keras, numpy as np
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> proof = certify(model, np.array([[3.0, 1.0]]))
    >>> print(proof.verdict, round(float(proof.radius[0]), 4))
    PROVED 1.4142

    Reference: Tsuzuku et al. (2018), Proposition 1, and Meunier et al. (2022), section 4, in
    sound form (upper bounds in place of power iteration).
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: method={method!r}.")
    if batch_size is not None and (int(batch_size) != batch_size or batch_size < 1):
        raise ValueError(
            f"`batch_size` must be a positive integer. Received: batch_size={batch_size!r}."
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"`precision` must be one of {PRECISIONS}. Received: precision={precision!r}."
        )
    time_budget = checked_seconds("time_budget", time_budget)
    jobs = checked_jobs(jobs)
    given = Inputs.of(model)
    chosen = given.chosen(perturbed)
    bounds = checked(norm, bounds)
    if method in ("local", "linear", "box") and given.several:
        raise UnsupportedLayerError(
            f"method={method!r} needs a model with one input. Received: model "
            f"{given.model!r} with the inputs {', '.join(map(repr, given.names))}. Use "
            "method='auto'."
        )
    network = logits_model = constants = None
    parts, held = [], KeptInputs(is_arrays(x))
    for inputs, labels in blocks(x, y, given):
        if network is None:
            shapes = input_shapes(given, inputs)
            on_region = method == "linear"
            network = with_rounded_settings(read_network(model, shapes, on_region=on_region))
            if network.products:
                precision = _exact(network, precision)
            sources = tuple(
                name for name, moves in zip(network.inputs, chosen, strict=True) if moves
            )
            constants = lipschitz_constants(network, sources)
            head = heads(network, constants, sources)
            widening = Widening(network, method, norm, bounds, time_budget, jobs, state)
        cast, norms, moved = checked_inputs(inputs, network, given, chosen)
        widening.check(inputs)
        size = batch_size or int(np.clip(2**20 // max(entries(cast), 1), 32, 4096))
        if logits_model is None:
            digest = claim_digest(network, chosen)
            with stage("comparing the model with its reading"):
                validation = validate(network, cast)
            own_logits, own_parts = LogitsModel(network), []
            ideal = constants[network.logits], head
            logits_model, logits = _first_logits(network, ideal, cast, norms, size, precision)
        else:
            logits = logits_model.predict(cast, size)
        _check_logits(logits, network)
        if network.products:
            errors = onregions.evaluation_errors(network, cast)
        else:
            errors = rounding_errors(network, norms, network.logits, logits_model.precision)
        own = decisions(logits)
        if logits_model.precision == "float64":
            # A radius is about the class that the model itself decides for.
            own = decisions(own_logits.predict(cast, size))
        kept = cast if widening.reads_inputs else None
        if kept is None and sum(map(len, own_parts)) < _SAMPLE:
            kept = [a[:_SAMPLE].copy() for a in cast]
        own_parts.append(own)
        parts.append((logits, errors, moved, norms, labels, kept))
        held.add(inputs)
    logits, errors, moved = (np.concatenate([p[i] for p in parts]) for i in range(3))
    norms = {name: np.concatenate([p[3][name] for p in parts]) for name in network.inputs}
    known = [p[4] for p in parts]
    if any(g is None for g in known) and not all(g is None for g in known):
        raise ValueError("Some batches have labels and some have none.")
    predictions = np.concatenate(own_parts)
    check_single_output(network, own_logits, cast, logits)
    labels = predictions
    if known[0] is not None:
        labels = class_numbers(np.concatenate(known), *logits.shape)
    allowance = Allowance(network.bare(), network.logits, norms, sources, logits_model.precision)
    if network.products:
        allowance = onregions.Exact(len(logits))
    cast = np.concatenate([p[5][0] for p in parts]) if widening.reads_inputs else None
    widening.open(digest, cast, labels, allowance)
    size = sum(math.prod(t.shape[1:]) for t in network.graph.inputs if t.producer in sources)
    composed, _ = certified_radii(logits, labels, constants[network.logits], errors, head)
    widening.learn(cast, logits, labels, composed, size, allowance)
    bound = network_gain(
        network, constants, method, time_budget=widening.gain_seconds, sources=sources
    )
    gain = bound.gain_upper_bound
    radius, margins = certified_radii(logits, labels, gain, errors, head, bound.pairs)
    radius = without_flushing(
        network,
        norms,
        radius,
        sources,
        lambda rows, lost: certified_radii(
            logits[rows], labels[rows], gain, errors[rows] + lost, head, bound.pairs
        )[0],
    )
    overall = widening.converted(radius, size)
    with stage("bounds around every input"):
        radius, found = widening.radii(cast, logits, labels, errors, radius, size, allowance)
    sentences = [*bound.sentences, *found]
    # Overflow and tries concern l2 balls around what is claimed, and within it.
    ends = widening.l2_around(radius, size)
    if network.products:
        ends = onregions.without_overflow(network, [cast], ends)
    else:
        ends = without_overflow(network, norms, ends, sources)
    radius, overall = (np.minimum(r, widening.converted(ends, size)) for r in (radius, overall))
    moved = widening.moved(moved, size)
    # Radii are about the cast input; the given one lies `moved` away from it.
    radius, overall = (
        np.where(moved > 0, np.maximum(rounding.down(r - moved), 0.0), r) for r in (radius, overall)
    )
    tried = zip(*(p[5] for p in parts if p[5] is not None), strict=True)
    tried = [np.concatenate(arrays)[:_SAMPLE] for arrays in tried]
    with stage("trying the radii on the model"):
        within = widening.l2_within(radius, size)
        check_balls(network, tried, labels, within, own_logits, chosen, bounds)
    names = given.chosen_names(chosen)
    certificate = Certificate(
        radius=radius,
        predictions=predictions,
        labels=labels,
        margins=margins,
        gain_upper_bound=gain,
        contributions=contributions(network, constants, network.logits),
        assumptions=tuple(
            widening.sentences(
                _assumptions(network, names, logits.shape[1], norms, head, logits_model.precision)
                if not network.products
                else _on_region(network, names, logits.shape[1], cast)
            )
            + sentences
            + [validation.sentence()]
        ),
        method=method,
        verdict="PROVED" if np.any(radius > 0) else "NOT_PROVED",
        float_allowance=float(np.max(errors)),
        model_digest=digest,
        perturbed=names,
        norm=norm,
        within=widening.within,
    )
    if claim_digest(network, chosen) != digest:
        raise ValueError(
            "A model must stay as it is while it is certified. Received: model "
            f"{model.name!r}, whose weights or settings changed meanwhile. Certify it again."
        )
    proof = Proof(
        network, bound.proof, held.joined(), overall, widening.records, widening.kept_bounds
    )
    object.__setattr__(certificate, "proof", proof)
    return certificate


def entries(arrays):
    """Numbers of one input, of all arrays together."""
    return sum(a[0].size for a in arrays)


def _first_logits(network, ideal, x, norms, size, precision):
    """How to compute the logits, chosen by a sample of the first batch, and its logits."""
    own, count = None, len(x[0])
    if network.graph.traced or precision != "float64":
        own = LogitsModel(network)
        sample = slice(None)
        if precision == "auto" and count >= 4 * _SAMPLE:
            sample = slice(None, None, count // _SAMPLE)  # else most are computed twice
        logits = own.predict([a[sample] for a in x], size)
        _check_logits(logits, network)
        if precision == "model" or (
            precision == "auto"
            and _is_affordable(
                network, ideal, logits, {name: norm[sample] for name, norm in norms.items()}
            )
        ):
            return own, logits if len(logits) == count else own.predict(x, size)
    try:
        exact = Float64Logits(network)
    except ValueError:  # the backend or a layer has no float64
        if precision == "float64":
            raise
        return own, logits if len(logits) == count else own.predict(x, size)
    return exact, exact.predict(x, size)


def _is_affordable(network, ideal, logits, norms):
    """Whether the model's own rounding costs a typical input little of its radius."""
    dtypes = {c.outputs[0].dtype for c in network.graph.calls}
    if dtypes & {"float16", "bfloat16"}:
        return True  # its own decisions may differ visibly from those in float64
    errors = rounding_errors(network, norms, network.logits)
    gain, head = ideal
    own = decisions(logits)
    proved, _ = certified_radii(logits, own, gain, errors, head)
    exact, _ = certified_radii(logits, own, gain, np.zeros_like(errors), head)
    return np.median(proved) >= (1 - _AFFORDABLE_LOSS) * np.median(exact)


def decisions(logits):
    """Class numbers int64 (n,): the largest logit, or the sign of a single one."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).astype(np.int64)
    return np.argmax(logits, axis=1).astype(np.int64)


def certified_radii(logits, labels, gain, errors, head=None, pairs=None):
    """Radii (6.1) and margins, rounded down.

    Args:
        logits: float64 (n, K) as computed.
        labels: int64 (n,).
        gain: upper bound L on the l2 gain to the logits.
        errors: float64 (n,), bounds on the l2 error of the computed logits.
        head: as `heads` gives them, or None: the last dense layer, or several whose sum it is.
        pairs: float64 (K, K), gains of f_i - f_j from the model's input (of f_0 itself if K = 1),
            or None.

    Returns:
        `(radius, margins)`, float64 (n,).

    Example:

    >>> logits, errors = np.array([[2.0, 1.0, 0.0]]), np.zeros(1)
    >>> radius, margins = certified_radii(logits, np.array([0]), 1.0, errors)
    >>> float(margins[0]), bool(0.7071 < radius[0] < 2**-0.5)
    (1.0, True)
    """
    n, classes = logits.shape
    radius, margins = np.zeros(n), np.zeros(n)
    if classes == 1:
        margins = np.where(labels == 1, logits[:, 0], -logits[:, 0])
        distance = float(pair_distances(0, 1, gain, head)[0])
        if pairs is not None:
            distance = min(distance, float(pairs[0, 0]))
        wins = (logits[:, 0] > 0) == (labels == 1)
        lower = np.where(wins, rounding.down(margins - errors), -np.inf)
        return _quotient_down(lower, np.full(n, distance)), margins
    allowances = rounding.up(_SQRT2_UP * errors)
    rows = max(_BLOCK // classes, 1)
    for label in np.unique(labels):
        distances = pair_distances(label, classes, gain, head)
        if pairs is not None:
            distances = np.minimum(distances, pairs[label])
        mine = np.flatnonzero(labels == label)
        for start in range(0, len(mine), rows):
            index = mine[start : start + rows]
            gaps = logits[index, label][:, None] - logits[index]
            gaps[:, label] = np.inf
            margins[index] = gaps.min(axis=1)
            lower = rounding.down(rounding.down(gaps) - allowances[index][:, None])
            radius[index] = _quotient_down(lower, distances).min(axis=1)
    return radius, margins


def _quotient_down(lower, distances):
    """lower/distances from below: 0 for lower ≤ 0, infinite where the gap cannot change."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = rounding.down(lower / distances)
    quotient = np.where(distances == 0, np.inf, quotient)
    return np.where(lower > 0, np.maximum(quotient, 0.0), 0.0)


def _check_logits(logits, network):
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(
            "`certify` needs a classifier with outputs (n, classes). "
            f"Received: outputs of shape {('n', *logits.shape[1:])}. For other models use "
            "`lipschitz_upper_bound`."
        )
    if logits.shape[1] == 1 and network.decision in ("softmax", "log_softmax"):
        raise ValueError(
            "A softmax over one unit is constant. Received: a model with one output. Use a "
            "sigmoid, or two units."
        )
    if not np.all(np.isfinite(logits)):
        raise ValueError(
            "The model's logits must be finite. Received: NaN or infinity, so its weights or "
            "these inputs are too large."
        )


def _exact(network, precision):
    """The precision of models that multiply signals."""
    if precision == "model":
        raise ValueError(
            "The rounding of a model that multiplies signals has no bound by gains. Received: "
            f"precision='model' and the products {', '.join(network.products[:5])}. Use 'auto' or "
            "'float64', which concern the same weights in exact arithmetic."
        )
    return "float64"


def _on_region(network, perturbed, classes, x):
    """Assumptions of claims about a model that multiplies signals."""
    dtypes = ", ".join(sorted({c.outputs[0].dtype for c in network.graph.calls}))
    errors = onregions.evaluation_errors(network, [x], "model")
    return _decisions(network, perturbed, classes) + onregions.sentences(network, errors, dtypes)


def _decisions(network, perturbed, classes):
    sentences = model_assumptions(network, perturbed)
    if classes == 1:
        sentences.append("A single logit: class 1 where it is positive, class 0 elsewhere.")
    else:
        sentences.append("The decision is the class with the largest logit.")
    if network.decision is not None:
        sentences.append(
            f"The final {network.decision} is looked through: it keeps the order of the classes"
            + (" (and 1/2 stands for logit 0)." if classes == 1 else ".")
        )
    return sentences


def _assumptions(network, perturbed, classes, norms, head, precision):
    sentences = _decisions(network, perturbed, classes)
    if head:
        sentences.append(
            "Pairs of classes use the distance between their columns of the last dense "
            + ("layer." if len(head[0]) == 1 else "layers.")
        )
    dtypes = ", ".join(sorted({c.outputs[0].dtype for c in network.graph.calls}))
    own = np.max(rounding_errors(network, norms, network.logits))
    used = np.max(rounding_errors(network, norms, network.logits, precision))
    sentences.append(
        f"The logits were computed in {dtypes if precision == 'model' else 'float64'}, within "
        f"{used:.3g} of the exact ones, because products are summed up in some order (not by "
        "Winograd, FFT or Strassen algorithms), activations are accurate to 16 units in the last "
        "place of 1 + |input|, and nothing under- or overflows."
    )
    if precision == "float64":
        if network.program.declared:
            names = ", ".join(network.program.declared)
            sentences.append(f"Keras evaluated, in their own precision, the declared: {names}.")
        sentences.append(
            f"The model itself computes in {dtypes}, within {own:.3g} of the exact logits; where "
            "the best two logits are closer than twice that, its own decision may differ."
        )
    elif rounding.operand_roundoff() > 0:
        sentences.append(
            "This device may round the operands of float32 products "
            f"to {rounding.operand_roundoff():.2g} (TF32 or bfloat16); that is included."
        )
    return sentences
