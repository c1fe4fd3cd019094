"""Exceptions and warnings of the library.

Every message states the rule that was broken, `Received: ...`, and what to do. "Not proved" is
a verdict carried by results, never an exception.
"""


class UnsupportedLayerError(ValueError):
    """A layer or activation has no proven gain, so no certificate can include it."""


class DesignInfeasible(ValueError):
    """No layer budgets can satisfy the claim under the chosen rule.

    Attributes:
        nearest: tuple of feasible claims (`Indices`) closest to the refused one.
    """

    def __init__(self, message: str, nearest: tuple = ()):
        super().__init__(message)
        self.nearest = tuple(nearest)


class SolverFailure(RuntimeError):
    """A numerical solver returned no usable answer where a verdict cannot be returned.

    Attributes:
        solver: name of the solver.
        status: the status it reported.
    """

    def __init__(self, message: str, solver: str = "", status: str = ""):
        super().__init__(message)
        self.solver = solver
        self.status = status


class ConfigError(ValueError):
    """A configuration file has an unknown key, a wrong type or an impossible value."""


class DatasetNotFound(ValueError):
    """A data set is unknown, or its files are not where they were looked for."""


class ModelFileError(ValueError):
    """A model file is truncated, corrupt, or holds code that is not allowed to run."""


class ProofFileError(ValueError):
    """A proof file is missing, truncated, corrupt, of another version, or no proof file."""


class OutputFileError(OSError):
    """A result cannot be written where it was asked for; what was there before is untouched.

    Attributes:
        errno: the system's error number, or None.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


class RunDirectoryError(ValueError):
    """A run directory cannot be written, or holds another run that must not be overwritten."""


class DistributionError(RuntimeError):
    """A worker did not come, was lost, or holds other weights than the chief."""


class UnfaithfulReading(ValueError):
    """The model computes something else than what was read of it; no claim about it is made.

    Attributes:
        step: name of the first step that differs.
    """

    def __init__(self, message, step=""):
        super().__init__(message)
        self.step = step


class UnfaithfulExport(ValueError):
    """A file would compute something else than the model; it is not written.

    Attributes:
        step: name of the first step that differs.
    """

    def __init__(self, message, step=""):
        super().__init__(message)
        self.step = step


class CostWarning(UserWarning):
    """A computation that was asked for takes long, or much memory; said before it begins."""
