"""Answers in the format of the VNN-COMP, and numbers as exact decimals."""

from decimal import Decimal
from fractions import Fraction


def decimal(value):
    """The decimal that equals a finite float or a `Fraction` with a power of two below, exactly.

    Example:

    >>> decimal(0.1)
    '0.1000000000000000055511151231257827021181583404541015625'
    >>> decimal(Fraction(-3, 8)), decimal(2.0**70)
    ('-0.375', '1180591620717411303424.0')
    """
    value = Fraction(value)
    places = value.denominator.bit_length() - 1
    if value.denominator != 1 << places:
        raise ValueError(
            f"Only numbers with a power of two below are finite decimals. Received: {value}."
        )
    whole = abs(value.numerator) * 5**places
    digits = str(Decimal(whole)).rjust(places + 1, "0")
    text = digits[: len(digits) - places] + "." + (digits[len(digits) - places :] or "0")
    return ("-" if value < 0 else "") + text


def result_text(answer, x=None, y=None):
    """The lines of a result file: the answer, and behind `sat` its counterexample.

    Args:
        answer: `sat`, `unsat`, `unknown`, `timeout` or `error`.
        x, y: flat inputs and outputs of a counterexample.

    Example:

    >>> print(result_text("sat", [0.5], [2.0, -1.0]), end="")
    sat
    ((X_0 0.5)
    (Y_0 2.0)
    (Y_1 -1.0))
    """
    lines = [f"(X_{i} {decimal(float(v))})" for i, v in enumerate([] if x is None else x)]
    lines += [f"(Y_{j} {decimal(float(v))})" for j, v in enumerate([] if y is None else y)]
    return "\n".join([answer] + (["(" + "\n".join(lines) + ")"] if lines else [])) + "\n"
