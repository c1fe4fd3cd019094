"""Certified radii from class margins: `certify`."""

import math

import numpy as np

from tf_lyapunov.bounds.choice import METHODS, network_gain
from tf_lyapunov.bounds.composition import (
    contributions,
    lipschitz_constants,
    model_assumptions,
    rounding_errors,
)
from tf_lyapunov.certification.balls import check_balls
from tf_lyapunov.certification.certificate import Certificate
from tf_lyapunov.certification.proofs import Proof, kept_inputs
from tf_lyapunov.certification.widening import Widening, checked
from tf_lyapunov.program import rounding
from tf_lyapunov.program.graph import is_graph
from tf_lyapunov.program.logits import (
    PRECISIONS,
    Float64Logits,
    LogitsModel,
    batches,
    with_rounded_settings,
)
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.validation import validate

# Float64 entries held at once in blocks of inputs × classes, and of input entries.
_BLOCK = 2**22
# Loss of median radius to the model's own rounding that is not worth an evaluation in float64.
_AFFORDABLE_LOSS = 0.05
# Inputs that decide whether it is worth one.
_SAMPLE = 256
_SQRT2_UP = float(rounding.up(np.sqrt(2.0)))


def certify(
    model,
    x,
    y=None,
    *,
    method="composition",
    batch_size=None,
    precision="auto",
    time_budget=60.0,
    norm="l2",
    bounds=None,
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
        model: a built Keras model of supported layers (see `read_network`) with one input tensor
            and logits or probabilities (n, K).
        x: array (n, …), `keras.utils.PyDataset`, tf.data, or an iterable of batches `(x, y)`;
            finite numbers. Read once, in its own order.
        y: class numbers (n,) or one-hot rows (n, K); `None` takes the data set's labels, or, if it
            has none, certifies the model's own decisions.
        method: `"composition"`, the product of the layers' gains over the graph. For the dense
            layers (and small convolutions) before the logits, tighter and never above it:
            `"liplt"` (norms of products of layers), `"closed_form"` and `"eclipse"` (multipliers
            layer by layer), `"lipsdp"` (one semidefinite program, and one per pair of classes),
            `"dissipativity"` (the cone of the network's (δ, ν)), `"local"` (slopes on the ball
            around each input, ReLU and leaky ReLU), `"linear"` (relaxations on the ball around each
            input, on any graph; see `tf_lyapunov.local`), `"auto"` (per input the best of
            `"linear"` and the tightest of lipsdp, eclipse and closed form within `time_budget`;
            the certificate says which).
        batch_size: inputs evaluated at once; by default chosen from the input's size.
        precision: `"model"` computes the logits as the model does; `"float64"` with the same
            weights in float64, whose rounding error is negligible, at several times the cost;
            `"auto"` chooses float64 where a float32 model's rounding would cost a typical input
            more than 5% of its radius, and keeps the precision of float16 and bfloat16 models.
        time_budget: seconds that the search for multipliers may take, about.
        norm: `"l2"`, `"linf"` or `"l1"`, in which radii are measured.
        bounds: `(low, high)` of valid inputs, numbers or arrays: radii by `"linear"` then concern
            changes that stay within them alone. None for all of real space.

    Returns:
        `Certificate`.

    Raises:
        UnsupportedLayerError: naming a layer without a proven gain.
        ValueError: for NaN or infinite inputs or weights, wrong shapes, labels out of range.

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
    if not time_budget > 0:
        raise ValueError(
            f"`time_budget` must be a positive number of seconds. Received: {time_budget!r}."
        )
    bounds = checked(norm, bounds)
    network = logits_model = constants = None
    parts = []
    for inputs, labels in batches(x, y):
        if network is None:
            shape = _input_shape(model, inputs)
            network = with_rounded_settings(read_network(model, [shape]))
            constants = lipschitz_constants(network)
            widening = Widening(network, method, norm, bounds, time_budget)
        cast, norms, moved = _checked_inputs(inputs, network.graph.inputs[0])
        widening.check(inputs)
        size = batch_size or int(np.clip(2**20 // max(cast[0].size, 1), 32, 1024))
        if logits_model is None:
            digest = network.digest()
            validation, own_logits, own_parts = validate(network, [cast]), LogitsModel(network), []
            logits_model, logits = _first_logits(network, constants, cast, norms, size, precision)
        else:
            logits = logits_model.predict(cast, size)
        _check_logits(logits, network)
        errors = rounding_errors(network, norms, network.logits, logits_model.precision)
        own = decisions(logits)
        if logits_model.precision == "float64":
            # A radius is about the class that the model itself decides for.
            own = decisions(own_logits.predict(cast, size))
        kept = cast if widening.reads_inputs or sum(map(len, own_parts)) < _SAMPLE else None
        own_parts.append(own)
        parts.append((logits, errors, moved, norms, labels, kept, inputs))
    logits, errors, moved, norms = (np.concatenate([p[i] for p in parts]) for i in range(4))
    given = [p[4] for p in parts]
    if any(g is None for g in given) and not all(g is None for g in given):
        raise ValueError("Some batches have labels and some have none.")
    predictions = np.concatenate(own_parts)
    labels = predictions
    if given[0] is not None:
        labels = checked_labels(np.concatenate(given), *logits.shape)
    bound = network_gain(network, constants, method, time_budget=widening.gain_seconds)
    gain = bound.gain_upper_bound
    head = _head(network, constants)
    radius, margins = certified_radii(logits, labels, gain, errors, head, bound.pairs)
    size = math.prod(network.graph.inputs[0].shape[1:])
    overall = widening.converted(radius, size)

    def allowance(i, extra):
        reached = norms[i : i + 1] + extra
        return float(rounding_errors(network, reached, network.logits, logits_model.precision)[0])

    cast = np.concatenate([p[5] for p in parts]) if widening.reads_inputs else None
    radius, found = widening.radii(cast, logits, labels, errors, radius, allowance)
    sentences = [*bound.sentences, *found]
    # Radii are about the cast input; the given one lies `moved` away from it.
    moved = widening.moved(moved, size)
    radius, overall = (
        np.where(moved > 0, np.maximum(rounding.down(r - moved), 0.0), r) for r in (radius, overall)
    )
    tried = np.concatenate([p[5] for p in parts if p[5] is not None])[:_SAMPLE]
    check_balls(network, tried, labels, widening.l2(radius, size), own_logits, bounds)
    certificate = Certificate(
        radius=radius,
        predictions=predictions,
        labels=labels,
        margins=margins,
        gain_upper_bound=gain,
        contributions=contributions(network, constants, network.logits),
        assumptions=tuple(
            widening.sentences(
                _assumptions(network, logits.shape[1], norms, head, logits_model.precision)
            )
            + sentences
            + [validation.sentence()]
        ),
        method=method,
        verdict="PROVED" if np.any(radius > 0) else "NOT_PROVED",
        float_allowance=float(np.max(errors)),
        model_digest=digest,
        norm=norm,
    )
    if network.digest() != digest:
        raise ValueError(
            "A model must stay as it is while it is certified. Received: model "
            f"{model.name!r}, whose weights or settings changed meanwhile. Certify it again."
        )
    proof = Proof(network, bound.proof, kept_inputs([p[6] for p in parts]), overall)
    object.__setattr__(certificate, "proof", proof)
    return certificate


def _first_logits(network, constants, x, norms, size, precision):
    """How to compute the logits, chosen by a sample of the first batch, and its logits."""
    own = None
    if network.graph.traced or precision != "float64":
        own = LogitsModel(network)
        sample = slice(None)
        if precision == "auto" and len(x) >= 4 * _SAMPLE:
            sample = slice(None, None, len(x) // _SAMPLE)  # else most are computed twice
        logits = own.predict(x[sample], size)
        _check_logits(logits, network)
        if precision == "model" or (
            precision == "auto" and _is_affordable(network, constants, logits, norms[sample])
        ):
            return own, logits if len(logits) == len(x) else own.predict(x, size)
    try:
        exact = Float64Logits(network)
    except ValueError:  # the backend or a layer has no float64
        if precision == "float64":
            raise
        return own, logits if len(logits) == len(x) else own.predict(x, size)
    return exact, exact.predict(x, size)


def _is_affordable(network, constants, logits, norms):
    """Whether the model's own rounding costs a typical input little of its radius."""
    dtypes = {c.outputs[0].dtype for c in network.graph.calls}
    if dtypes & {"float16", "bfloat16"}:
        return True  # its own decisions may differ visibly from those in float64
    errors = rounding_errors(network, norms, network.logits)
    settings = decisions(logits), constants[network.logits]
    head = _head(network, constants)
    proved, _ = certified_radii(logits, *settings, errors, head)
    ideal, _ = certified_radii(logits, *settings, np.zeros_like(errors), head)
    return np.median(proved) >= (1 - _AFFORDABLE_LOSS) * np.median(ideal)


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
        head: `(L_h, W)` with the gain to the last dense layer's input and its matrix (features,
            K), or None.
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
        distance = gain
        if head is not None:
            norm = rounding.euclidean_norms_up(head[1].T)[0]
            distance = min(gain, rounding.product_up(head[0], norm))
        if pairs is not None:
            distance = min(distance, float(pairs[0, 0]))
        wins = (logits[:, 0] > 0) == (labels == 1)
        lower = np.where(wins, rounding.down(margins - errors), -np.inf)
        return _quotient_down(lower, np.full(n, distance)), margins
    allowances = rounding.up(_SQRT2_UP * errors)
    rows = max(_BLOCK // classes, 1)
    for label in np.unique(labels):
        distances = _pair_distances(label, classes, gain, head)
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


def _pair_distances(label, classes, gain, head):
    """Bounds on the gain of f_label - f_j, for every j."""
    distances = np.full(classes, rounding.product_up(_SQRT2_UP, gain))
    if head is not None:
        through, matrix = head
        columns = matrix.T
        step = max(_BLOCK // max(matrix.shape[0], 1), 1)
        for start in range(0, classes, step):
            block = columns[start : start + step]
            # One more rounding, of the difference, than in the norm itself.
            norms = rounding.euclidean_norms_up(columns[label] - block) * (1 + 2.0**-51)
            pairs = np.where(norms * through == 0, 0.0, rounding.up(through * norms))
            distances[start : start + step] = np.minimum(distances[start : start + step], pairs)
    return distances


def _quotient_down(lower, distances):
    """lower/distances from below: 0 for lower ≤ 0, infinite where the gap cannot change."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = rounding.down(lower / distances)
    quotient = np.where(distances == 0, np.inf, quotient)
    return np.where(lower > 0, np.maximum(quotient, 0.0), 0.0)


def checked_labels(y, n, classes):
    """Labels as int64 (n,) from class numbers or one-hot rows; refuses anything else.

    Args:
        y: integers (n,) or (n, 1), or one-hot rows (n, classes).
        n: number of inputs.
        classes: number of logits; a single logit has the two classes 0 and 1.
    """
    y = np.asarray(y)
    limit = 2 if classes == 1 else classes
    if y.dtype.kind not in "iufb" or not np.all(np.isfinite(y.astype(np.float64))):
        raise ValueError(
            f"`y` must hold class numbers or one-hot rows. Received: dtype {y.dtype}, or NaN."
        )
    if y.ndim == 2 and y.shape[1] == limit and y.shape[1] > 1:
        if not (np.all((y == 0) | (y == 1)) and np.all(y.sum(axis=1) == 1)):
            raise ValueError(
                "One-hot rows of `y` must hold a single 1 and zeros. "
                "Received: rows with other numbers. Certificates need one class per input."
            )
        y = np.argmax(y, axis=1)
    elif y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (n,):
        raise ValueError(
            f"`y` must have shape ({n},) or ({n}, {limit}). Received: shape {y.shape}."
        )
    if np.any(y != np.floor(y)) or np.any(y < 0) or np.any(y >= limit):
        raise ValueError(
            f"`y` must hold whole numbers from 0 to {limit - 1}, one class per input. "
            f"Received: values from {y.min()} to {y.max()}."
        )
    return y.astype(np.int64)


def _input_shape(model, x):
    """Shape of the first batch with the model's batch axis, checked against the model."""
    declared = None
    if hasattr(model, "built") and model.built and is_graph(model):
        if len(model.inputs) != 1:
            raise ValueError(
                f"`certify` needs a model with one input. Received: {len(model.inputs)} inputs. "
                "Concatenate them inside the model; `lipschitz_upper_bound` takes several."
            )
        declared = tuple(model.inputs[0].shape)
    if x.ndim < 1 or len(x) == 0:
        raise ValueError(f"`x` must hold at least one input. Received: shape {x.shape}.")
    if declared is not None and (
        len(declared) != x.ndim
        or any(d is not None and d != s for d, s in zip(declared[1:], x.shape[1:], strict=False))
    ):
        raise ValueError(
            f"`x` must have the model's input shape {declared}. Received: shape {x.shape}. "
            "The first axis counts the inputs."
        )
    return (declared[0] if declared else None, *x.shape[1:])


def _checked_inputs(x, tensor):
    """Inputs cast to the model's dtype, their norms, and how far the cast moved them."""
    if x.dtype.kind not in "iufb" and x.dtype.name != "bfloat16":
        raise ValueError(f"`x` must hold real numbers. Received: dtype {x.dtype}.")
    if x.shape[1:] != tensor.shape[1:] or len(x) == 0:
        raise ValueError(
            f"All batches of `x` must have the shape (n, {str(tensor.shape[1:])[1:]} with n ≥ 1. "
            f"Received: shape {x.shape}."
        )
    dtype = np.float32 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype)
    with np.errstate(over="ignore"):  # what overflows is refused below
        cast = x.astype(dtype, copy=False)
    norms, moved = np.zeros(len(x)), np.zeros(len(x))
    rows = max(_BLOCK // max(cast[0].size, 1), 1)
    for start in range(0, len(x), rows):
        block = slice(start, start + rows)
        if not (np.all(np.isfinite(cast[block])) and np.all(np.isfinite(x[block]))):
            raise ValueError(
                f"`x` must be finite in the model's input dtype {tensor.dtype}. "
                "Received: NaN or infinity. Remove these inputs first."
            )
        norms[block] = rounding.euclidean_norms_up(cast[block])
        if cast.dtype != x.dtype:
            difference = x[block].astype(np.float64) - cast[block].astype(np.float64)
            moved[block] = rounding.euclidean_norms_up(difference)
    if dtype.kind in "iub" and np.any(moved > 0):
        raise ValueError(
            f"The model takes {tensor.dtype} inputs. Received: values that this dtype cannot hold."
        )
    return cast, norms, moved


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


def _head(network, constants):
    """`(gain to its input, matrix)` of the dense layer that makes the logits, or None."""
    node = network[network.logits]
    while node.kind == "identity":
        node = network[node.inputs[0]]
    if node.matrix is None or len(node.output_shape) != 2:
        return None
    return constants[node.inputs[0]], node.matrix


def _assumptions(network, classes, norms, head, precision):
    sentences = model_assumptions(network)
    if classes == 1:
        sentences.append("A single logit: class 1 where it is positive, class 0 elsewhere.")
    else:
        sentences.append("The decision is the class with the largest logit.")
    if network.decision is not None:
        sentences.append(
            f"The final {network.decision} is looked through: it keeps the order of the classes"
            + (" (and 1/2 stands for logit 0)." if classes == 1 else ".")
        )
    if head is not None:
        sentences.append(
            "Pairs of classes use the distance between their columns of the last dense layer."
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
