"""How the bound of a chain was found, for certificates and their proof files."""

import dataclasses

from tf_lyapunov.verification.inequalities import Multipliers

# How the sentence about residual blocks begins.
RESIDUAL = "Residual blocks were bounded as wholes"
# How the sentence about a graph that is one problem begins.
JOINT = "Branches were bounded together"
# How the sentence about layers that are not written out begins.
OPERATORS = "Layers too large for matrices were bounded as operators"


@dataclasses.dataclass(frozen=True, eq=False)
class PartProof:
    """How the gain of a part of a network in which branches meet was found.

    Attributes:
        start, end: names of the nodes that it reads and that hold its result.
        names: of the nodes of its elementwise functions.
        whole: `Multipliers` of the gain between them.
        pairs: dict (i, j), i > j -> `Multipliers` of f_i - f_j.
    """

    start: str
    end: str
    names: tuple
    whole: Multipliers
    pairs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class ChainProof:
    """How the gain of the dense chain before the logits was found.

    Attributes:
        start: name of the node that the chain reads, or None without a chain.
        whole: `ChainBound` of all logits, or None.
        pairs: dict (i, j), i > j -> `ChainBound` of f_i - f_j.
        indices: `NetworkIndices`, or None.
        sectors: of the chain's hidden layers, as `indices` counts them.
        widths: of the chain.
        parts: tuple of `PartProof`.
    """

    start: str | None = None
    whole: object = None
    pairs: dict = dataclasses.field(default_factory=dict)
    indices: object = None
    sectors: tuple = ()
    widths: tuple = ()
    parts: tuple = ()
