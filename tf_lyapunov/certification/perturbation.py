"""(5) Lower bounds on the minimal adversarial perturbation of every input, from back to front."""

import dataclasses
import math
import time

import numpy as np

from tf_lyapunov.bounds.composition import lipschitz_constants, rounding_errors
from tf_lyapunov.certification.heads import heads
from tf_lyapunov.certification.inputs import checked_inputs, input_shapes
from tf_lyapunov.certification.margins import (
    _check_logits,
    certified_radii,
    decisions,
)
from tf_lyapunov.certification.stacks import SLACK, Signals, dense_stacks
from tf_lyapunov.errors import UnsupportedLayerError
from tf_lyapunov.local.linear import linear_radii
from tf_lyapunov.losses.classes import class_numbers
from tf_lyapunov.program import rounding
from tf_lyapunov.program.feeding import blocks
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.logits import with_rounded_settings
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.restoring import leaves_unchanged
from tf_lyapunov.program.weights import inference_value
from tf_lyapunov.progress import reports_progress, steps
from tf_lyapunov.spectral.arguments import count
from tf_lyapunov.theory import perturbation as theory
from tf_lyapunov.theory.arguments import checked_seconds
from tf_lyapunov.theory.perturbation import Curvature

RULES = ("sound", "published")


@dataclasses.dataclass(frozen=True)
class RuleWarning:
    """Why a published rule is no bound.

    Attributes:
        layer: name of the layer it was used for.
        theorem: of the paper.
        counterexample: a case in which it fails.
    """

    layer: str
    theorem: str
    counterexample: str

    def __str__(self):
        return f"{self.layer}: {self.theorem} is not proved. {self.counterexample}"


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """κ_l: by how much the input of one layer has to move, for every input of the model.

    Attributes:
        name: of the layer (or of the first of a stack).
        rule: the rule that gave it.
        bound: float64 (n,).
    """

    name: str
    rule: str
    bound: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class PerturbationBound:
    """Lower bounds on the l2 norm of any perturbation that changes the decision.

    Attributes:
        bound: float64 (n,), in units of the model's input; 0 where the model does not choose the
            label. The larger of the input layer's in `per_layer` and of `around`.
        per_layer: tuple of `LayerBound`, from the input to the output layer.
        warnings: tuple of `RuleWarning`; empty for sound rules.
        rules: `"sound"` or `"published"`. Published rules are no certificate.
        labels, predictions: int64 (n,).
        around: float64 (n,), by relaxations on the ball around each input, as far as time allowed;
            None where they do not apply.
    """

    bound: np.ndarray
    per_layer: tuple
    warnings: tuple
    rules: str
    labels: np.ndarray
    predictions: np.ndarray
    around: np.ndarray | None = None

    @property
    def is_sound(self):
        return self.rules == "sound"

    def __len__(self):
        return len(self.bound)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.bound, dtype=dtype)


@takes_networks
@reports_progress
@leaves_unchanged
def minimal_perturbation_lower_bound(
    model,
    x,
    y=None,
    *,
    rules="sound",
    perturbed=None,
    batch_size=256,
    time_budget=10.0,
    progress=None,
):
    """No perturbation r of x_i with ‖r‖ < bound_i changes the decision (sound rules).

    The decision is that of exact arithmetic on the stored weights. The model as it runs rounds:
    near a tie, in half precision or behind large biases, its own decision may change below the
    bound (`certify(precision="model")` leaves room for that).

    From the exact output-layer rule κ = min_j (f_c - f_j)/‖w_c - w_j‖ back to the input: a layer,
    or a block between two places where the network is a single line, of gain L divides κ by L; a
    stack of dense layers with smooth activations gives the larger of κ/L and

        2κ / (‖J(x)‖ + √(‖J(x)‖² + 2Mκ)),                                              (5.1)

    J its Jacobian at x and M a bound on its Hessians. For models with one input the radius by
    relaxations on the ball around it (`certify(method="linear")`) replaces it where it is larger,
    as far as `time_budget` allows. Published rules are computed to be compared:
    they are false, say so in `warnings`, and no certificate accepts them.

    Args:
        model: a built Keras model of supported layers with logits or probabilities (n, K).
        x: array (n, …), or a list, tuple or dict of arrays for several inputs;
            `keras.utils.PyDataset`, tf.data, or an iterable of batches.
        y: labels; `None` takes the data set's, or the model's own decisions.
        rules: `"sound"` or `"published"` (a chain of dense layers, convolutions, pooling, batch
            and local response normalization).
        perturbed: which input of several may change, as for `certify`.
        batch_size: inputs evaluated at once.
        time_budget: seconds for the relaxations, 0 for none.
        progress: as for `certify`.

    Returns:
        `PerturbationBound`; `numpy.asarray` gives its `bound`.

    Raises:
        UnsupportedLayerError: naming a layer without a rule.
        ValueError: for NaN or infinite inputs or weights, wrong shapes, labels out of range.

    Example:

    >>> import keras
    >>> identity = keras.layers.Dense(2, kernel_initializer="identity")
    >>> model = keras.Sequential([keras.Input((2,)), identity])
    >>> lower = minimal_perturbation_lower_bound(model, np.array([[3.0, 1.0]]))
    >>> float(lower.bound[0]).__round__(6), lower.per_layer[0].rule
    (1.414214, 'output layer, exact')

    Reference: Peck et al., Lower bounds on the robustness to adversarial perturbations (2017);
    sound forms of Theorems 1-6.
    """
    if rules not in RULES:
        raise ValueError(f"`rules` must be one of {RULES}. Received: rules={rules!r}.")
    time_budget = checked_seconds("time_budget", time_budget, zero=True)
    batch_size = count("batch_size", batch_size)
    deadline = time.monotonic() + time_budget
    taken = Inputs.of(model)
    chosen = taken.chosen(perturbed)
    network, parts, around = None, [], []
    for inputs, labels in blocks(x, y, taken):
        if network is None:
            shapes = input_shapes(taken, inputs)
            network = with_rounded_settings(read_network(model, shapes))
            walk = (_Sound if rules == "sound" else _Published)(network, taken, chosen)
            balls = None
            if rules == "sound" and time_budget and not taken.several:
                balls = _Balls(network, taken, chosen, deadline)
        for start in steps(range(0, len(inputs[0]), batch_size), "batches"):
            here = slice(start, start + batch_size)
            given = None if labels is None else labels[here]
            some = [a[here] for a in inputs]
            parts.append(walk.bounds(some, given))
            around.append(None if balls is None else balls.radii(some, *parts[-1][1:3]))
    layers = [[part[0][i] for part in parts] for i in range(len(parts[0][0]))]
    per_layer = tuple(
        LayerBound(layer[0].name, layer[0].rule, np.concatenate([s.bound for s in layer]))
        for layer in reversed(layers)
    )
    bound, labels, predictions = (np.concatenate([p[k] for p in parts]) for k in (1, 2, 3))
    around = None if any(a is None for a in around) else np.concatenate(around)
    if around is not None:
        bound = np.maximum(bound, around)
    return PerturbationBound(bound, per_layer, walk.warnings, rules, labels, predictions, around)


class _Balls:
    """Radii by relaxations on balls around inputs, while time lasts."""

    def __init__(self, network, inputs, chosen, deadline):
        self.network, self.inputs, self.chosen = network, inputs, chosen
        self.deadline = deadline
        self.classes = math.prod(network[network.logits].output_shape[1:])

    def radii(self, x, known, labels):
        """Float64 (n,), 0 where they are not larger than what is known, or None."""
        cast, _, moved = checked_inputs(x, self.network, self.inputs, self.chosen)
        found = cast[0].astype(np.float64) if cast[0].dtype.kind in "iub" else cast[0]
        try:
            radius, *_ = linear_radii(
                self.network, found, labels, self.classes, known, lambda i, r: 0.0,
                deadline=self.deadline, keep=False,
            )  # fmt: skip
        except UnsupportedLayerError:  # a step that only the whole model evaluates
            return None
        wider = np.maximum(rounding.down(radius - moved), 0.0)
        return np.where(radius > known, np.where(moved > 0, wider, radius), 0.0)


class _Walk:
    """What sound and published rules share: the line of nodes and the output layer."""

    def __init__(self, network, inputs, chosen):
        self.network, self.inputs, self.chosen = network, inputs, chosen
        self.warnings = ()
        moving = [name for name, moves in zip(network.inputs, chosen, strict=True) if moves]
        self.sources = tuple(moving)
        self.constants = lipschitz_constants(network, self.sources)
        ways = heads(network, self.constants, self.sources)
        # Of the dense layer that makes the logits, the part that reads what may change.
        self.head = next((way[0][1:] for way in ways if len(way) == 1), None)
        self.line = _line(network, self.constants, self.sources)
        if not self.line:  # nothing that changes reaches the logits
            return
        last = network[network.logits]
        if self.head is not None:  # κ refers to the input of the output layer
            while last.matrix is None:
                last = network[last.inputs[0]]
            last = network[last.inputs[0]]
        # Identities in front of the layer may read what several earlier nodes make together.
        names = [node.name for node in self.line]
        if last.name not in names:
            self.head, last = None, network[network.logits]
        self.line = self.line[: names.index(last.name) + 1]

    def _evaluated(self, x, y, *, errors):
        """`(norms, moved, signals, labels, decisions, κ)` of one batch."""
        cast, norms, moved = checked_inputs(x, self.network, self.inputs, self.chosen)
        logits, signals = self.signals.evaluate(cast)
        _check_logits(logits, self.network)
        predictions = decisions(logits)
        labels = predictions if y is None else class_numbers(y, len(logits), logits.shape[1])
        allowance = np.zeros(len(logits))
        if errors:
            allowance = rounding_errors(self.network, norms, self.network.logits, "float64")
        gain, head = 1.0 if self.line else 0.0, None
        if self.line and self.head is not None:
            gain, head = np.inf, (((np.ones(1), *self.head),),)
        kappa, _ = certified_radii(logits, labels, gain, allowance, head)
        return norms, moved, signals, labels, predictions, kappa

    def _gain(self, start, target):
        """Gain from a node of the line, or from what changes, to a later node."""
        if self.line[start].kind == "input":
            return self.constants[target]
        return lipschitz_constants(self.network, self.line[start].name)[target]

    def _output_step(self, kappa):
        if self.head is None:
            return LayerBound(self.network.logits, "logits, margin/√2", kappa)
        return LayerBound(self.network.logits, "output layer, exact", kappa)


class _Sound(_Walk):
    def __init__(self, network, inputs, chosen):
        super().__init__(network, inputs, chosen)
        self.stacks = dense_stacks(network, self.line, theory.smooth_activations())
        self.signals = Signals(network, [stack.call for stack in self.stacks.values()])
        self.curved = {
            name: theory.hessian_norm_bounds(
                stack.weights, [Curvature.of(a) for a in stack.activations]
            )
            for name, stack in self.stacks.items()
        }

    def bounds(self, x, y):
        norms, moved, signals, labels, predictions, kappa = self._evaluated(x, y, errors=True)
        steps = [self._output_step(kappa)]
        end = len(self.line) - 1
        while end > 0:
            stack = next(
                (s for s in self.stacks.values() if s.nodes[-1].name == self.line[end].name), None
            )
            if stack is None:
                kappa, rule = self._by_gain(end, kappa)
                name, end = self.line[end].name, end - 1
                if rule == "1":
                    continue
            else:
                kappa = self._by_taylor(stack, kappa, signals[stack.call], norms)
                rule, name = "smooth stack (5.1)", stack.nodes[0].name
                end -= len(stack.nodes)
            steps.append(LayerBound(name, rule, kappa))
        rounded = np.maximum(rounding.down(kappa - moved), 0.0)
        bound = np.where((moved > 0) & (kappa < np.inf), rounded, kappa)
        return steps, bound, labels, predictions

    def _by_gain(self, end, kappa):
        gain = self._gain(end - 1, self.line[end].name)
        if gain == 1.0:
            return kappa, "1"
        return _quotient(kappa, gain), f"κ/{gain:.6g}"

    def _by_taylor(self, stack, kappa, z, norms):
        bends, lipschitz = self.curved[stack.nodes[0].name]
        bend = float(np.linalg.norm(bends)) * SLACK
        # The Jacobian was taken at z as computed, a little beside the exact one.
        reads = stack.nodes[0].inputs[0]
        beside = rounding_errors(self.network, norms, reads, "float64")
        jacobian = stack.jacobian_norms(z.reshape(len(z), -1)) + bend * beside
        jacobian = jacobian + lipschitz * 1e-9
        source, target = reads, stack.nodes[-1].name
        gain = min(lipschitz, lipschitz_constants(self.network, source)[target])
        return theory.smooth_lower_bound(kappa, jacobian, bend, gain)


class _Published(_Walk):
    def __init__(self, network, inputs, chosen):
        super().__init__(network, inputs, chosen)
        if not network.is_chain or self.head is None:
            raise UnsupportedLayerError(
                "The published rules concern chains that end with a dense layer. Received: model "
                f"{network.model.name!r}. Use rules='sound'."
            )
        self.stacks = dense_stacks(network, self.line, theory.CURVATURES_AS_PUBLISHED)
        watched = [s.call for s in self.stacks.values()]
        watched += [n.call for n in self.line if type(n.layer).__name__ in _NORMALIZATIONS]
        self.signals = Signals(network, watched)

    def bounds(self, x, y):
        _, _, signals, labels, predictions, kappa = self._evaluated(x, y, errors=False)
        steps, warnings, end = [self._output_step(kappa)], [], len(self.line) - 1
        while end > 0:
            node = self.line[end]
            stack = next((s for s in self.stacks.values() if s.nodes[-1].name == node.name), None)
            if stack is not None:
                node, theorem = stack.nodes[0], "Theorem 1"
                kappa = self._stack(stack, kappa, signals[stack.call])
                end -= len(stack.nodes)
            else:
                theorem, kappa = self._layer(node, kappa, signals)
                end -= 1
            if theorem is None:
                continue
            steps.append(LayerBound(node.name, f"{theorem}, as published", kappa))
            case = theorem
            if stack is not None:
                case = next((a for a in stack.activations if a in _COUNTEREXAMPLES), theorem)
            warnings.append(RuleWarning(node.name, theorem, _COUNTEREXAMPLES[case]))
        self.warnings = tuple(reversed(warnings))
        return steps, kappa, labels, predictions

    @staticmethod
    def _stack(stack, kappa, z):
        pairs = [theory.CURVATURES_AS_PUBLISHED[a] for a in stack.activations]
        m = theory.second_derivative_bound_as_published(stack.weights, pairs)
        norms = stack.jacobian_norms(z.reshape(len(z), -1))
        return theory.dense_bound_as_published(kappa, norms, m, len(stack.weights[-1]))

    def _layer(self, node, kappa, signals):
        layer, name = node.layer, type(node.layer).__name__
        if node.kind in ("activation", "identity", "reshape", "input"):
            return None, kappa
        if name in ("Conv1D", "Conv2D", "Conv3D"):
            kernel = inference_value(layer.kernel, layer.compute_dtype)
            return "Theorem 2", theory.convolution_bound_as_published(kappa, kernel)
        side = node.output_shape[1]
        if name in ("MaxPooling2D", "AveragePooling2D"):
            return "Theorem 4", theory.pooling_bound_as_published(kappa, side)
        if name == "LpPooling2D":
            window = layer.pool_size[0]
            return "Theorem 4", theory.pooling_bound_as_published(kappa, side, window, layer.p)
        if name in _NORMALIZATIONS:
            rule = _NORMALIZATIONS[name]
            each = zip(kappa, signals[node.call], strict=True)
            return rule[0], np.array([rule[1](layer, k, z) for k, z in each])
        raise UnsupportedLayerError(
            "The paper has no rule for this layer. Received: layer "
            f"{node.name!r} of type {name}. Use rules='sound'."
        )


def _batch_normalization(layer, kappa, z):
    def spread(variable, fallback):
        value = fallback if variable is None else inference_value(variable, "float64")
        return np.broadcast_to(value, z.shape).ravel()

    return theory.batch_normalization_bound_as_published(
        kappa,
        z.ravel(),
        spread(layer.gamma, 1.0),
        spread(layer.beta, 0.0),
        spread(layer.moving_mean, 0.0),
        spread(layer.moving_variance, 1.0),
        layer.epsilon,
    )


def _response_normalization(layer, kappa, z):
    window = 2 * layer.depth_radius + 1
    return theory.response_normalization_bound_as_published(
        kappa, z, layer.bias, layer.alpha, layer.beta, window
    )


_NORMALIZATIONS = {
    "BatchNormalization": ("Theorem 5", _batch_normalization),
    "LocalResponseNormalization": ("Theorem 6", _response_normalization),
}
_COUNTEREXAMPLES = {
    "Theorem 1": "h(x) = (Σx_i)²/2 has second derivatives 1 but a Hessian of norm d: from x = 0 it "
    "claims √d times what suffices. (With Algorithm 4.1's M it holds for sigmoid and softplus.)",
    "tanh": "max|tanh''| is twice the table's: from x = -1 with κ = tanh(-.4) - tanh(-1) it claims "
    ".69 where .6 suffices.",
    "relu": "ReLU has no second derivative: from x = 0- with κ = .5 it claims 1 where .5 suffices.",
    "Theorem 2": "All-ones 5×5 on 28×28: R = 1 moves the output by 4.29·‖W‖·‖R‖.",
    "Theorem 4": "It assumes ‖h(x+r)‖ = ‖h(x)‖ + κ: outputs (1, 0) and (0, 1) have equal norms and "
    "different classes. (Its value holds, up to t times too small.)",
    "Theorem 5": "γ = (1, .01), variance 1, x = (1, 1), κ = .5: it claims 78, (.5, 0) suffices.",
    "Theorem 6": "Channels (30, .001) with window 1: it takes the small channel's bound.",
}


def _line(network, constants, sources):
    """Nodes that every path from what changes to the logits passes, in order.

    The first stands for the changing inputs, together where there are several. Nodes of gain 0
    (`constants`) are held fixed; without a way to the logits there are none.
    """
    if constants[network.logits] == 0:
        return []
    names = [node.name for node in network.nodes]
    end = names.index(network.logits)
    kept, reach = [], 0
    if len(sources) > 1:
        kept.append(dataclasses.replace(network[sources[0]], name=" and ".join(sources)))
    positions = {name: i for i, name in enumerate(names)}
    consumers = network.consumers()
    for i, node in enumerate(network.nodes[: end + 1]):
        if constants[node.name] == 0:
            continue
        together = node.kind == "input" and len(sources) > 1
        if reach <= i and not together:  # no earlier tensor is read by a later node
            kept.append(node)
        last = [positions[c] for c in consumers[node.name] if positions[c] <= end]
        reach = max([reach, *last])
    return kept


def _quotient(kappa, gain):
    if gain == 0:
        return np.where(kappa > 0, np.inf, 0.0)
    return np.where(kappa < np.inf, np.maximum(rounding.down(kappa / gain), 0.0), np.inf)
