"""`.keras` files that may be damaged or hostile: what they declare is checked before it is made."""

from .loading import load_model, save_model

__all__ = ["load_model", "save_model"]
