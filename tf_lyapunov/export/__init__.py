"""Models without this library: every layer written out in Keras's own ones."""

from tf_lyapunov.export.model import export_plain
from tf_lyapunov.layers.condensing import condense

__all__ = ["condense", "export_plain"]
