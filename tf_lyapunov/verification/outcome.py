"""What every outcome of `verify` has in common."""

import numpy as np

from tf_lyapunov.verification.contents import differences, quoted


class Outcome:
    """An outcome with `holds`, `reasons` and `notes`, and a text by `explain`."""

    def __bool__(self):
        return self.holds

    def __str__(self):
        return self.explain()

    def closing(self, where):
        """The last lines of `explain`.

        Args:
            where: what the model was called on beside random probes, in words.
        """
        lines = []
        if self.holds:
            lines.append(
                f"Tested, not proved: called on {where} and on random probes, the model agrees "
                "with what was read of it, within the rounding of its dtypes."
            )
        if self.notes:
            lines.append("The file says of itself, unchecked and in its own words:")
            lines += [f"  > {note}" for note in self.notes]
        return lines


def reasons_against(layers, network, check):
    """Sentences on why a file's claims do not follow, empty if they do.

    Args:
        layers: as the file names them.
        network: `network.Network`, as the model has them.
        check: function without arguments that gives sentences, called if the layers are the same.
    """
    found = list(differences(layers, network.layers))
    if found:
        return found
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return list(check())
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        # Whatever a file holds, it is not proved, and why is said.
        return [f"A bound could not be computed: {quoted(error)}."]
