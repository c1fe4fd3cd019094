"""An upper bound on a model's l2 Lipschitz constant: `lipschitz_upper_bound`."""

import contextlib
import dataclasses
import json

import keras

from tf_lyapunov.bounds.choice import METHODS, network_gain
from tf_lyapunov.bounds.composition import (
    claim_digest,
    contributions,
    encode,
    layer_table,
    lipschitz_constants,
    model_assumptions,
    numbered,
    table,
)
from tf_lyapunov.digits import at_most
from tf_lyapunov.program.graph import is_graph
from tf_lyapunov.program.holding import takes_networks
from tf_lyapunov.program.inputs import Inputs
from tf_lyapunov.program.network import read_network
from tf_lyapunov.program.restoring import leaves_unchanged
from tf_lyapunov.program.validation import validate_on_probes
from tf_lyapunov.progress import reports_progress, stage
from tf_lyapunov.showing import Page, Shown
from tf_lyapunov.theory.arguments import checked_seconds
from tf_lyapunov.theory.norms import tolerated

# What needs inputs, and not a model alone.
_WITH_INPUTS = ("local", "box")


@dataclasses.dataclass(frozen=True, repr=False)
class GainBound(Shown):
    """An upper bound on a model's l2 gain, with every layer's contribution; `float` is the bound.

    Attributes:
        gain_upper_bound: float; ‖f(u) - f(v)‖ ≤ gain·‖u - v‖ for all inputs u, v.
        contributions: tuple of `Contribution`, in the order of the graph.
        assumptions: tuple of sentences under which the bound holds.
        model_digest: SHA-256 of the model's layers and weights, and of what is perturbed if that
            is not everything.
        method: how the bound was found.
        perturbed: names of the inputs that u and v differ in, the others being equal; None if
            they may differ in all.
    """

    gain_upper_bound: float
    contributions: tuple
    assumptions: tuple
    model_digest: str
    method: str = "composition"
    perturbed: tuple | None = None

    def explain(self):
        """Plain-text table of every layer's contribution, and the assumptions."""
        what = "the input"
        if self.perturbed is not None:
            what = ", ".join(map(repr, self.perturbed))
        bound = at_most(self.gain_upper_bound, 6)
        title = f"No change of {what} is amplified by more than {bound} (l2)"
        return "\n".join([title, "", *table(self.contributions), "", *numbered(self.assumptions)])

    def __str__(self):
        return self.explain()

    def __float__(self):
        return float(self.gain_upper_bound)

    def _page(self):
        facts = (
            ("gain", f"≤ {at_most(self.gain_upper_bound, 4)}"),
            ("method", self.method),
            ("layers", len(self.contributions)),
        )
        return Page("GainBound", facts, (layer_table(self.contributions),), self.assumptions)

    def to_json(self):
        """JSON text with all fields."""
        return json.dumps(encode(dataclasses.asdict(self)), allow_nan=False)


@takes_networks
@reports_progress
@leaves_unchanged
def lipschitz_upper_bound(
    model,
    *,
    method="composition",
    perturbed=None,
    outputs="logits",
    input_shapes=None,
    time_budget=60.0,
    tol=0.0,
    progress=None,
):
    """Upper bound on the l2 Lipschitz constant of a Keras model at inference.

    Over the graph, L(input) = 1 and, for a layer of gain g that reads the nodes k,

        L = g·L_k,   L = Σ w_k L_k (Add, Subtract),   L = √Σ L_k² (Concatenate, Maximum, Minimum),

    so that a residual block x + f(x) has 1 + L_f. Sufficient, and valid for all inputs; not the
    smallest such constant. Outputs may have any shape (classes, numbers, images, sequences); their
    norm is that of all entries together. With several inputs the distance is that of their
    concatenation, or of the chosen ones, and never more than √Σ L_i², L_i of each alone.

    Args:
        model: a built Keras model of supported layers (see `read_network`).
        method: as for `certify`; other methods than `"composition"` bound the linear layers before
            the outputs together, and what comes before and after by composition. `"local"` needs
            inputs, hence `certify`.
        perturbed: name or position of the one input that changes, or a list of them; None for
            all. The others are held fixed, at any values.
        outputs: `"logits"` stops before a final softmax or sigmoid, `"model"` includes it. A model
            with several outputs is bounded with all that it includes.
        input_shapes: list of shapes with the batch axis, to fix sizes that the model leaves open.
        time_budget: seconds that the search for multipliers may take, about.
        tol: float ≥ 0, relative: by how much the norm of each kernel may be bounded too high, in
            exchange for time. The bound holds for any.
        progress: whether to show how far it is, after two seconds; `None`: in a terminal and a
            notebook.

    Returns:
        `GainBound`.

    Raises:
        UnsupportedLayerError: naming a layer without a proven gain, or that the method needs.
        UnfaithfulReading: naming the first step at which the model contradicts its reading.
        ValueError: if the model is not built, `method`, `perturbed` or `outputs` is unknown, or
            `tol` is negative.

    Example:

    >>> import keras
    >>> dense = keras.layers.Dense(1, kernel_initializer="ones")
    >>> model = keras.Sequential([keras.Input((4,)), dense])
    >>> round(lipschitz_upper_bound(model).gain_upper_bound, 9)
    2.0

    Reference: composition rules, sound form (theory of the product bound: Szegedy et al., 2014).
    """
    if outputs not in ("logits", "model"):
        raise ValueError(f"`outputs` must be 'logits' or 'model'. Received: outputs={outputs!r}.")
    if method not in METHODS or method in _WITH_INPUTS:
        known = tuple(m for m in METHODS if m not in _WITH_INPUTS)
        raise ValueError(
            f"`method` must be one of {known}. Received: method={method!r}."
            + (" It bounds the ball around each input: use `certify`."
               if method in _WITH_INPUTS else "")
        )  # fmt: skip
    time_budget = checked_seconds("time_budget", time_budget)
    with tolerated(tol):
        return _bounded(model, method, perturbed, outputs, input_shapes, time_budget, float(tol))


def _bounded(model, method, perturbed, outputs, input_shapes, time_budget, tol):
    inputs = Inputs.of(model)
    chosen = inputs.chosen(perturbed)
    with _one_output(model) as single:
        network = read_network(single, input_shapes)
    joined = single is not model
    name = network.output if joined or outputs == "model" else network.logits
    with stage("comparing the model with its reading"):
        validation = validate_on_probes(network)
    sources = tuple(n for n, moves in zip(network.inputs, chosen, strict=True) if moves)
    constants = lipschitz_constants(network, sources)
    bound = network_gain(
        network, constants, method, time_budget=time_budget, sources=sources, target=name
    )
    names = inputs.chosen_names(chosen)
    assumptions = [*model_assumptions(network, names), *bound.sentences]
    if joined:
        assumptions.append(
            f"The norm is that of the {len(model.outputs)} outputs' concatenation, final "
            "functions included."
        )
    if tol:
        assumptions.append(
            f"Norms of kernels may be bounded too high, by a share of up to {tol:.3g}."
        )
    return GainBound(
        bound.gain_upper_bound,
        contributions(network, constants, name),
        (*assumptions, validation.sentence()),
        claim_digest(network, chosen),
        method,
        names,
    )


@contextlib.contextmanager
def _one_output(model):
    """The model, or one that gives the concatenation of its outputs; layers are left as found."""
    is_several = isinstance(model, keras.Model) and model.built and is_graph(model)
    if not is_several or len(model.outputs) < 2:
        yield model
        return
    producers = {id(t._keras_history.operation): t._keras_history.operation for t in model.outputs}
    counts = [(op, len(op._outbound_nodes)) for op in producers.values()]
    flat = [
        keras.layers.Flatten(name=f"flat_output_{i}", data_format="channels_last")(t)
        for i, t in enumerate(model.outputs)
    ]
    joined = keras.layers.Concatenate(name="joined_outputs")(flat)
    try:
        yield keras.Model(model._inputs_struct, joined, name=f"{model.name}_joined")
    finally:
        for operation, count in counts:
            del operation._outbound_nodes[count:]
