"""What a `.mat` file of this library holds, and the names of its fields."""

from __future__ import annotations

import dataclasses

from tf_lyapunov.design import Design

FORMAT, VERSION = "tf_lyapunov.mat", 1
CERTIFICATE_NUMBERS = ("gain_upper_bound", "float_allowance")
CERTIFICATE_TEXTS = ("method", "verdict", "model_digest")
CONTRIBUTION_NUMBERS = ("gain_upper_bound", "lipschitz_upper_bound")
CONTRIBUTION_TEXTS = ("name", "kind", "method", "assumption")


@dataclasses.dataclass(frozen=True)
class MatFile:
    """What a `.mat` file of this library holds; parts that it lacks are `None`.

    Attributes:
        design: `Design`, proved again from its numbers when it was read.
        certificate: `Certificate`, as written: it concerns the model of its `model_digest` only.
        weights: dict from Keras variable paths to float64 arrays in Keras' layout, or `None`.
        model_digest: SHA-256 of the exported model's layers and weights, or `None`.
    """

    design: Design | None = None
    certificate: object | None = None
    weights: dict | None = None
    model_digest: str | None = None

    def assign_to(self, model):
        """Writes the file's weights into a Keras model of the same architecture.

        Weights edited in MATLAB void every certificate of the exported model: certify again.

        Args:
            model: built Keras model with the same variables (paths and shapes).

        Returns:
            The same model.

        Raises:
            ValueError: if the file holds no weights, or a variable is missing or has another
                shape. No weight is changed then.
        """
        if self.weights is None:
            raise ValueError("This file holds no weights. Export it with `model=`.")
        variables = {v.path: v for v in model.variables if is_float(v)}
        wrong = sorted(set(variables) ^ set(self.weights))
        if wrong:
            raise ValueError(
                "The model and the file must have the same variables. "
                f"Received: {wrong[:4]} in one of them only. Load the model that was exported."
            )
        for path, variable in variables.items():
            if tuple(variable.shape) != self.weights[path].shape:
                raise ValueError(
                    f"The file's {path!r} must have shape {tuple(variable.shape)}. "
                    f"Received: {self.weights[path].shape}."
                )
        for path, variable in variables.items():
            variable.assign(self.weights[path])
        return model


def is_float(variable):
    return "float" in str(variable.dtype)
