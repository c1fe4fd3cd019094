"""Gram symbols at every frequency: formed, and interpolated from a few."""

import math

import numpy as np
import pytest

from tf_lyapunov.theory.eigenvalues import largest_eigenvalue
from tf_lyapunov.theory.gram_symbols import FormedGrams, InterpolatedGrams, gram_symbols
from tf_lyapunov.theory.operators import Axis, LinearMap, as_convolution
from tf_lyapunov.theory.symbols import Symbol, circulant, halved, partners

CASES = {
    "tall": ((3, 3, 30, 26), {"input_shape": (12, 9, 30)}),
    "wide": ((3, 3, 26, 30), {"input_shape": (12, 9, 26)}),
    "uneven": ((2, 4, 27, 27), {"input_shape": (15, 10, 27), "padding": "valid"}),
    "dilated": ((3, 2, 26, 28), {"input_shape": (11, 14, 26), "dilation": 2}),
    "a sampled line": ((4, 30, 30), {"input_shape": (400, 30)}),
}


def _symbol(shape, options, change=None):
    kernel = np.random.default_rng(0).normal(size=shape)
    kernel = kernel if change is None else change(kernel)
    axes, periods, _ = circulant((found := as_convolution(kernel, LinearMap("conv", **options)))[1])
    return Symbol(found[0], axes, periods)


def _exact(symbol):
    """Largest square of a norm, and Gram matrices by products of their own."""
    matrices = symbol.at(slice(None))[:, 0]
    top = max(np.linalg.svd(a, compute_uv=False)[0] for a in matrices) ** 2
    return top, np.conj(matrices.swapaxes(-1, -2)) @ matrices


@pytest.mark.parametrize("case", CASES)
def test_interpolated_gram_matrices_are_those_that_are_formed_within_their_error(case):
    symbol = _symbol(*CASES[case])
    grams, (top, expected) = InterpolatedGrams(symbol), _exact(symbol)
    seen = set()
    for i in grams.order:
        triangle, trace, forming = grams.formed(i)
        lower = np.tril(triangle) + np.conj(np.tril(triangle, -1)).T  # of G or its conjugate
        off = min(np.linalg.norm(lower - g, 2) for g in (expected[i], np.conj(expected[i])))
        assert off <= forming <= 1e-10 * top
        assert np.trace(expected[i]).real <= trace
        seen.add(i)
    assert seen == set(range(len(symbol.frequencies)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [FormedGrams, InterpolatedGrams])
def test_their_largest_eigenvalue_is_bounded_from_above_and_tightly(case, kind):
    symbol = _symbol(*CASES[case])
    bound, (top, _) = largest_eigenvalue(kind(symbol)), _exact(symbol)
    assert top * (1 - 1e-12) <= bound <= top * (1 + 1e-9)


def test_a_kernel_whose_gram_matrix_vanishes_at_frequencies_is_bounded():
    """Differences of neighbours: the Gram matrix at frequency zero is nothing but rounding."""
    symbol = _symbol((3, 3, 26, 26), {"input_shape": (9, 9, 26)}, lambda k: k - k.mean(axis=(0, 1)))
    bound, (top, _) = largest_eigenvalue(InterpolatedGrams(symbol)), _exact(symbol)
    assert top * (1 - 1e-12) <= bound <= top * (1 + 1e-9)


def test_the_cheaper_of_the_two_is_chosen():
    blocks = np.ones((1, 3, 3, 64, 64))

    def kind(size, stride=1):
        axes = [Axis(3, stride, 1, size, size // stride, 1)] * 2
        return type(gram_symbols(Symbol(blocks, axes, [size + size % stride] * 2)))

    assert kind(56) is InterpolatedGrams
    assert kind(5) is FormedGrams
    assert kind(56, stride=2) is FormedGrams  # aliases: its matrices are no such polynomial


@pytest.mark.parametrize("grid", [(1,), (4,), (5,), (3, 4), (5, 5), (2, 3, 2)])
def test_of_every_pair_of_opposite_frequencies_one_is_kept(grid):
    kept, other = partners(grid)
    assert set(kept) | set(other) == set(range(math.prod(grid)))
    assert len(kept) == len(halved(grid)) <= math.prod(grid) // 2 + 2 ** len(grid)
    for f, rank, partner in zip(halved(grid), kept, other, strict=True):
        assert np.ravel_multi_index(tuple(f), grid) == rank <= partner
        assert np.ravel_multi_index(tuple(-f % grid), grid) == partner
