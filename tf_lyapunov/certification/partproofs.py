"""Multipliers that the verifier accepts: what a search found, in its units, grown a little."""

from tf_lyapunov.verification import graphs, inequalities
from tf_lyapunov.verification.contents import Part
from tf_lyapunov.verification.inequalities import Multipliers

# Growth of multipliers and gains tried until the verifier's own rounding fits.
GROWTHS = (1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


def accepted(whole, start, rules=inequalities):
    """`Multipliers` with which the verifier proves the gain of a chain or graph, or None.

    Those towards the input grow more, as every term must be paid by the one before it.

    Args:
        whole: what `rules` bounds.
        start: `Multipliers` that prove it but for rounding.
        rules: `inequalities` of chains or `graphs`.
    """
    depth = len(start.values)
    for growth in GROWTHS:
        grown = Multipliers(
            start.squared * (1 + growth) ** (depth + 1),
            tuple(v * (1 + growth) ** (depth - k) for k, v in enumerate(start.values)),
            start.sectors,
        )
        if rules.proves_gain(whole, grown):
            return grown
    return None


def accepted_parts(network, proofs):
    """`contents.Part` of every `PartProof` that the verifier reads as it was meant.

    What it reads otherwise is left out: the radii that then do not follow are refused later on.

    Args:
        network: `verification.network.Network`.
        proofs: of `PartProof`.
    """
    found = []
    for proof in proofs:
        try:
            graph = graphs.read(network, proof.start, proof.end)
        except (ValueError, KeyError):
            continue
        if sorted(graph.names) != sorted(proof.names):
            continue
        whole = accepted(graph, _ordered(graph, proof.names, proof.whole), graphs)
        if whole is None:
            continue
        pairs = {
            pair: accepted(
                graph.output_difference(*pair), _ordered(graph, proof.names, own), graphs
            )
            for pair, own in proof.pairs.items()
        }
        pairs = {pair: own for pair, own in pairs.items() if own is not None}
        found.append(Part(proof.start, proof.end, whole, pairs))
    return tuple(found)


def _ordered(graph, names, multipliers):
    """Multipliers in the order of the graph's signals, in sectors that hold its slopes."""
    place = {name: k for k, name in enumerate(names)}
    order = [place[name] for name in graph.names]
    sectors = []
    for k, (low, high) in zip(order, graph.slopes, strict=True):
        alpha, beta = multipliers.sectors[k]
        if -low > high and not -alpha > beta:  # φ and the next layer had changed sign together
            alpha, beta = -beta, -alpha
        sectors.append((min(low, alpha), max(high, beta)))
    return Multipliers(
        multipliers.squared, tuple(multipliers.values[k] for k in order), tuple(sectors)
    )
