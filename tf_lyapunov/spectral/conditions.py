"""Branches that are taken in Python where the condition is a number already."""

import importlib

import keras
from keras import ops


def cond(predicate, true_fn, false_fn):
    """`keras.ops.cond`, which JAX outside of compiled code compiles anew in every call.

    A condition that is known there, and not traced, is asked in Python instead.

    Args:
        predicate: boolean scalar.
        true_fn, false_fn: functions without arguments, of results of the same structure.

    Example:

    >>> float(cond(ops.ones(()) > 0, lambda: ops.ones(()), lambda: ops.zeros(())))
    1.0
    """
    if keras.backend.backend() == "jax":
        jax = importlib.import_module("jax")
        if isinstance(predicate, jax.Array) and not isinstance(predicate, jax.core.Tracer):
            return true_fn() if bool(predicate) else false_fn()
    return ops.cond(predicate, true_fn, false_fn)
