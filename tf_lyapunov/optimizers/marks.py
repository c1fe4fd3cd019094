"""Which variables an optimizer is to keep orthogonal: a mark that the layer that owns them sets."""

_ATTRIBUTE = "_tf_lyapunov_orthogonal"


def mark_orthogonal(variable):
    """Marks a variable as one that `Stiefel` keeps orthogonal, and returns it.

    The last two axes hold a matrix Q; the leading ones, if any, a stack of them. Of the smaller
    side n every Q keeps QᵀQ = I (orthonormal columns), or QQᵀ = I if it is wide. To be called in
    the `build` of a layer, which a saved model runs again: files hold no marks.

    Args:
        variable: `keras.Variable` of rank 2 or more, without a constraint.

    Returns:
        The same variable.

    Raises:
        ValueError: if it has less than two axes, or a constraint, which would move it off again.

    Example:

    >>> import keras
    >>> layer = keras.layers.Dense(3, kernel_initializer="orthogonal")
    >>> layer.build((None, 5))
    >>> is_marked(mark_orthogonal(layer.kernel)), is_marked(layer.bias)
    (True, False)
    """
    if len(variable.shape) < 2:
        raise ValueError(
            "Only a matrix, or a stack of matrices, can be kept orthogonal. Received: variable "
            f"{_name(variable)!r} of shape {tuple(variable.shape)}."
        )
    check_unconstrained(variable)
    setattr(variable, _ATTRIBUTE, True)
    return variable


def is_marked(variable):
    """Whether `mark_orthogonal` has marked this variable.

    Example:

    >>> import keras
    >>> is_marked(keras.Variable([[1.0, 0.0]]))
    False
    """
    return bool(getattr(variable, _ATTRIBUTE, False))


def check_unconstrained(variable):
    """Raises if a variable that is to stay orthogonal has a constraint too."""
    constraint = getattr(variable, "constraint", None)
    if constraint is not None:
        raise ValueError(
            "A kernel is kept orthogonal or held by a constraint, not both: the constraint acts "
            f"last and would move it off. Received: variable {_name(variable)!r} with the "
            f"constraint {type(constraint).__name__}. Remove `kernel_constraint`, or use a layer "
            "whose kernel is not marked."
        )


def _name(variable):
    return getattr(variable, "path", getattr(variable, "name", "?"))
