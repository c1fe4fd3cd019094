"""Processes forked after TensorFlow was used: its threads are gone, and its next step hangs."""

import os
import sys

_forked = {"dead": False}


def _note():
    """In a child: whether the parent had started TensorFlow's runtime by then."""
    module = sys.modules.get("tensorflow.python.eager.context")
    context = getattr(module, "_context", None)
    if getattr(context, "_context_handle", None) is not None:
        _forked["dead"] = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note)


def refuse_dead_fork(name):
    """Raises where TensorFlow would hang.

    Args:
        name: what was asked for.

    Raises:
        RuntimeError: in a process forked after TensorFlow was used.

    Example:

    >>> refuse_dead_fork("certify")
    """
    if _forked["dead"]:
        raise RuntimeError(
            "TensorFlow hangs in a process that was forked after it was used. Received: "
            f"`{name}` in process {os.getpid()}, forked from {os.getppid()}. Start processes with "
            "multiprocessing.get_context('spawn'), or fork before the first model is built."
        )
