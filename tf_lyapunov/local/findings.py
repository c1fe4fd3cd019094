"""What a search around one input found, and such searches for many inputs."""

import dataclasses

from tf_lyapunov.jobs import each
from tf_lyapunov.progress import stage


@dataclasses.dataclass(frozen=True, eq=False)
class Finding:
    """The result of a search around one input.

    Attributes:
        start: float, radius that was proved before.
        radius: float, proved now; at least `start`.
        record: what proves a radius beyond `start`, or None.
        is_final: whether the search ended by itself, not because time was up.
    """

    start: float
    radius: float
    record: object = None
    is_final: bool = True

    def serves(self, start):
        """Whether another search from this radius would be one too many.

        What is proved stays so; only a search that began higher and found nothing may be worth
        less than one that begins lower.
        """
        return self.radius > self.start or start >= self.start


def every(search, task, starts, name, *, jobs=1, kept=None, known=None):
    """`Finding`s of all inputs, as far as time allows, by number, in this order.

    Args:
        search: function of a task, see `jobs.each`.
        task: function of an input's number, see `jobs.each`.
        starts: radius that is proved already, per input.
        name: what is done, in words.
        jobs: see `jobs.each`.
        kept: `certification.state.Kept` or the like, whose `findings` of an earlier call are taken
            over where they serve, and whose `add` is told of new ones; or None.
        known: dict of other `Finding`s that are taken over where they serve, or None.

    Yields:
        `(number, Finding)`, those taken over first.
    """
    known = dict(known or {}) | ({} if kept is None else kept.findings)
    known = {i: f for i, f in known.items() if f.serves(starts[i])}
    with stage(name, len(starts)) as entered:
        for number in sorted(known):
            entered.advance()
            yield number, known[number]
        missing = [i for i in range(len(starts)) if i not in known]
        for number, finding in each(search, task, missing, jobs):
            if kept is not None:
                kept.add(number, finding)
            entered.advance()
            yield number, finding
