"""Largest eigenvalues from above, against exact ones, and the routes that norms take to them."""

import threading

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_lyapunov.theory import eigenvalues, norms
from tf_lyapunov.theory.eigenvalues import (
    Grams,
    cholesky_error,
    is_below,
    largest_banded,
    largest_eigenvalue,
    largest_of_formed,
    largest_of_stack,
)
from tf_lyapunov.theory.norms import norm_upper_bound
from tf_lyapunov.theory.operators import (
    LinearMap,
    as_convolution,
    block_gram,
    block_matrices,
    block_matrix,
    convolution_axes,
    convolution_matrix,
    entries_of_block,
)

U = 2.0**-53


def largest(stack):
    return max(np.linalg.norm(a, 2) ** 2 for a in stack)


def drawn(rng, count, rows, side, is_complex):
    stack = rng.normal(size=(count, rows, side))
    if is_complex:
        stack = stack + 1j * rng.normal(size=stack.shape)
    return stack * 10.0 ** rng.uniform(-3, 3, size=(count, 1, 1))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(0, 10),
    st.booleans(),
)
def test_the_bound_of_many_matrices_lies_above_the_largest_eigenvalue_by_rounding(
    seed, count, side, more, is_complex
):
    stack = drawn(np.random.default_rng(seed), count, side + more, side, is_complex)
    truth = largest(stack)
    # Forming G and its factor: γ of the terms and of the side, times the trace.
    room = 12 * (2 * side + more + 10) * side * U + 2.0**-41
    for t in (
        largest_eigenvalue(Grams(count, stack.__getitem__, side + more)),
        largest_of_stack(stack, side + more),
    ):
        assert truth * (1 - 4 * side * U) <= t <= truth * (1 + room)


@pytest.mark.parametrize("side", [5, 200])
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_the_order_of_the_matrices_changes_the_work_and_not_the_bound(side, order):
    rng = np.random.default_rng(side)
    stack = rng.normal(size=(6, side, side)) * np.linspace(1, 2, 6)[:, None, None]
    chosen = range(6) if order == "rising" else range(5, -1, -1)
    t = largest_eigenvalue(Grams(6, stack.__getitem__, side, chosen))
    assert largest(stack) <= t <= largest(stack) * (1 + 1e-9)


def test_slack_is_room_that_the_bound_may_use_and_never_more():
    stack = np.random.default_rng(0).normal(size=(3, 50, 40))
    t = largest_eigenvalue(Grams(3, stack.__getitem__, 50), tol=0.01)
    assert largest(stack) <= t <= largest(stack) * (1.01 + 1e-9)


@pytest.mark.parametrize("is_complex", [False, True])
def test_no_factorisation_passes_a_number_below_the_largest_eigenvalue(is_complex):
    rng = np.random.default_rng(3)
    a = drawn(rng, 1, 30, 30, is_complex)[0]
    gram = np.asfortranarray(np.conj(a.T) @ a)
    top = np.linalg.eigvalsh(gram)[-1]
    assert is_below(gram, top * (1 + 1e-9))
    assert not is_below(gram, top * (1 - 1e-12))
    assert not is_below(gram, 0.0)
    assert not is_below(np.full((2, 2), np.nan, order="F"), 1.0)


@pytest.mark.parametrize("side", [1, 7, 8, 23])
def test_large_matrices_are_factorised_in_their_other_triangle(side, monkeypatch):
    a = np.random.default_rng(side).normal(size=(side + 3, side))
    gram = np.tril(a.T @ a).copy(order="F")
    top = np.linalg.norm(a, 2) ** 2
    answers = [is_below(gram, t) for t in (top * (1 + 1e-9), top * (1 - 1e-9), 2 * top)]
    assert answers == [True, False, True]
    monkeypatch.setattr(eigenvalues, "_IN_PLACE", 1)
    monkeypatch.setattr(eigenvalues, "_STRIP", 8)
    held = gram.copy(order="F")
    # Again and again: the triangle that is read, diagonal and all, stays as it was.
    for _ in range(2):
        found = [is_below(held, t) for t in (top * (1 + 1e-9), top * (1 - 1e-9), 2 * top)]
        assert found == answers
        assert np.array_equal(np.tril(held), gram)
    t = largest_eigenvalue(Grams(1, lambda i: a, side + 3))
    assert top * (1 - 1e-14) <= t <= top * (1 + 1e-9)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("order", ["rising", "falling"])
def test_many_formed_matrices_are_bounded_as_one_by_one(is_complex, order, monkeypatch):
    monkeypatch.setattr(eigenvalues, "_STACKED", 5 * 30**2)  # calls of five and of the rest
    stack = drawn(np.random.default_rng(1), 23, 30, 30, is_complex)
    grams = np.triu(np.conj(stack.swapaxes(1, 2)) @ stack)
    traces = np.trace(grams, axis1=1, axis2=2).real
    chosen = np.argsort(traces if order == "rising" else -traces)
    forming = np.full(23, 1e-13 * traces.max())
    before = grams.copy()
    t = largest_of_formed(grams, traces, forming, chosen)
    assert largest(stack) <= t <= largest(stack) * (1 + 1e-9)
    assert np.array_equal(grams, before)
    assert largest_of_formed(grams, traces, forming, chosen, 2 * t) == 2 * t
    traces[7] = np.nan
    assert largest_of_formed(grams, traces, forming, chosen) == np.inf


@pytest.mark.parametrize("side", [3, 30])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_has_no_bound(side, bad):
    stack = np.ones((2, side, side))
    stack[1, 0, 0] = bad
    with np.errstate(invalid="ignore"):
        assert largest_eigenvalue(Grams(2, stack.__getitem__, side)) == np.inf
        assert largest_of_stack(stack, side) == np.inf


def test_entries_near_one_are_not_scaled_and_others_are(monkeypatch):
    monkeypatch.setattr(norms, "SMALLEST_SIDE", 20)
    monkeypatch.setattr(norms, "SVD_SIZE", 1)
    kernel = np.random.default_rng(0).normal(size=(30, 25))
    truth = np.linalg.norm(kernel, 2)
    for power in (0, 20, -40, 200, -300, -1050):
        norms.forget()
        own = np.ldexp(kernel, power)
        exact = np.linalg.norm(np.ldexp(own, -power), 2) if power > -1000 else None
        value = norm_upper_bound(own, LinearMap("dense", (30,))).value
        if exact is None:  # subnormal numbers, rounded when they were scaled down
            exact = np.linalg.norm(np.ldexp(own, 1000), 2)
            assert value >= np.ldexp(exact, -1000) * (1 - 1e-14)
            continue
        assert np.ldexp(truth, power) * (1 - 1e-14) <= value <= np.ldexp(truth, power) * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 60), st.integers(0, 5))
def test_banded_matrices_agree_with_full_ones(seed, side, width):
    rng = np.random.default_rng(seed)
    offsets = list(range(min(width, side - 1) + 1))
    diagonals = [rng.normal(size=side - k) for k in offsets]
    matrix = scipy.sparse.diags(diagonals, offsets, shape=(side, side)).tocsr()
    truth = np.linalg.norm(matrix.toarray(), 2) ** 2
    t = largest_banded((matrix.T @ matrix).tocsr(), side)
    # Margins cover what ARPACK's residual leaves of the eigenvalue.
    assert truth * (1 - 1e-14) <= t <= truth * (1 + 1e-8)


def test_the_error_of_a_factorisation_grows_with_the_square_of_the_side():
    assert cholesky_error(100, 1.0) == pytest.approx(100 * 103 * U, rel=0.06)
    assert cholesky_error(100, 1.0, True) == pytest.approx(400 * 103 * U, rel=0.06)


@pytest.mark.parametrize(
    "taps, size, options",
    [
        ((3, 3), (7, 6), {"padding": "same"}),
        ((3, 2), (7, 6), {"padding": "same", "strides": (2, 2)}),
        ((4,), (9,), {"strides": (3,)}),
        ((3,), (9,), {"padding": "causal", "dilation": (3,)}),
        ((7, 5), (3, 2), {"padding": "same"}),  # taps that join nothing
        ((3,), (4,), {"padding": "same", "dilation": (3,)}),
        ((3,), (7,), {"padding": "same", "strides": (4,)}),  # inputs that are not read
        ((7, 7), (11, 11), {"strides": (2, 2)}),
        ((3, 3, 2), (4, 5, 4), {"padding": "same"}),
    ],
)
def test_gram_matrices_by_products_of_taps_are_those_of_the_matrix(taps, size, options):
    kernel = np.random.default_rng(0).normal(size=(*taps, 2, 3))
    blocks, axes = as_convolution(kernel, LinearMap("conv", (*size, 2), **options))
    matrix, gram = block_matrix(blocks[0], axes), block_gram(blocks[0], axes)
    np.testing.assert_allclose(gram.toarray(), (matrix.T @ matrix).toarray(), atol=1e-13)
    assert entries_of_block(blocks[0].shape, axes) == matrix.nnz


ROUTES = [
    ("svd", LinearMap("dense", (6,)), (6, 5)),
    ("gram", LinearMap("dense", (150,)), (150, 120)),
    ("pointwise", LinearMap("conv", (4, 4, 6)), (1, 1, 6, 5)),
    ("pointwise", LinearMap("conv", (1, 1, 6), padding="same"), (3, 3, 6, 5)),
    ("pointwise", LinearMap("conv", (4, 4, 6), groups=3, strides=(2, 2)), (1, 1, 2, 6)),
    ("pointwise", LinearMap("depthwise", (1, 1, 40), padding="same"), (3, 3, 40, 2)),
    ("materialised", LinearMap("depthwise", (4, 4, 9), padding="same"), (3, 3, 9, 1)),
    ("materialised", LinearMap("depthwise", (9, 9, 7), padding="same"), (3, 3, 7, 1)),
    ("materialised", LinearMap("depthwise", (9, 9, 3), strides=(2, 2)), (3, 3, 3, 2)),
    ("materialised", LinearMap("conv", (7, 7, 8), groups=2, padding="same"), (3, 3, 4, 8)),
    ("materialised", LinearMap("conv", (60, 60, 1), padding="same"), (3, 3, 1, 1)),
    ("materialised", LinearMap("conv_transpose", (5, 5, 4), strides=(2, 2)), (3, 3, 2, 4)),
]


@pytest.mark.parametrize("method,linear_map,shape", ROUTES)
def test_every_route_to_an_exact_norm_gives_that_of_the_materialised_matrix(
    method, linear_map, shape
):
    kernel = np.random.default_rng(1).normal(size=shape)
    bound = norm_upper_bound(kernel, linear_map)
    assert (bound.method, bound.exact) == (method, True)
    matrix = convolution_matrix(kernel, linear_map)
    truth = scipy.sparse.linalg.svds(matrix, k=1, return_singular_vectors=False, rng=0)[0]
    side = min(matrix.shape)
    assert truth * (1 - 1e-12) <= bound.value <= truth * (1 + 1e-9 + 8 * side**2 * U)


def test_bounds_by_frequencies_are_those_of_the_circulant_and_long_axes_are_sampled():
    rng = np.random.default_rng(4)
    kernel = rng.normal(size=(3, 30, 28))
    short = LinearMap("conv", (40, 30), padding="same")
    bound = norm_upper_bound(kernel, short, method="frequency")
    hats = np.fft.fft(kernel, 41, axis=0)
    truth = np.linalg.norm(hats, 2, axis=(1, 2)).max()
    assert truth * (1 - 1e-13) <= bound.value <= truth * (1 + 1e-9)
    long = norm_upper_bound(kernel, LinearMap("conv", (5000, 30), padding="same")).value
    supremum = np.linalg.norm(np.fft.fft(kernel, 2000, axis=0), 2, axis=(1, 2)).max()
    # 1/cos(π/100), the size that one axis of 50 points a degree may miss.
    assert supremum * (1 - 1e-6) <= long <= supremum * 1.0006


@pytest.mark.parametrize("stride", [1, 2])
def test_dense_matrices_of_small_groups_are_the_sparse_ones(stride):
    rng = np.random.default_rng(5)
    blocks = rng.normal(size=(4, 3, 2, 2, 3))
    axes = convolution_axes(
        (3, 2, 2, 3), LinearMap("conv", (5, 4, 2), (stride, stride), padding="same")
    )
    stack = block_matrices(blocks, axes)
    for block, matrix in zip(blocks, stack, strict=True):
        np.testing.assert_array_equal(matrix, block_matrix(block, axes).toarray())


def test_a_bound_is_remembered_by_the_bytes_of_its_kernel(monkeypatch):
    kernel = np.random.default_rng(6).normal(size=(8, 8))
    linear_map = LinearMap("dense", (8,))
    first = norm_upper_bound(kernel, linear_map)
    calls = []
    monkeypatch.setattr(norms, "_norm_upper_bound", lambda *a: calls.append(a) or first)
    assert norm_upper_bound(kernel.copy(), linear_map) is first
    assert not calls
    for other in (kernel * 2, kernel.reshape(4, 16)):
        norm_upper_bound(other, linear_map)
    norm_upper_bound(kernel, LinearMap("conv", (8,)), method="size_free")
    norm_upper_bound(kernel, linear_map, tol=0.1)
    assert len(calls) == 4


def test_memory_is_bounded_and_shared_by_threads(monkeypatch):
    monkeypatch.setattr(norms, "REMEMBERED", 5)
    linear_map, failures = LinearMap("dense", (2,)), []

    def ask(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            kernel = rng.integers(1, 4, size=(2, 2)).astype(float)
            truth = np.linalg.norm(kernel, 2)
            if (
                not truth * (1 - 1e-14)
                <= norm_upper_bound(kernel, linear_map).value
                <= truth * (1 + 1e-13)
            ):
                failures.append(kernel)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(norms._memory) <= 5


def test_a_negative_slack_is_refused():
    with pytest.raises(ValueError, match="tol"):
        norm_upper_bound(np.ones((2, 2)), LinearMap("dense", (2,)), tol=-0.1)


@pytest.mark.parametrize("method", ["auto", "materialised", "frequency", "size_free"])
@pytest.mark.parametrize(
    "linear_map, shape",
    [
        (LinearMap("conv", (2, 2), dilation=(3,), padding="same", groups=2), (4, 1, 2)),
        (LinearMap("depthwise", (2, 2), dilation=(3,), padding="same"), (4, 2, 1)),
        (LinearMap("conv_transpose", (2, 1), dilation=(3,), padding="same"), (4, 1, 1)),
    ],
)
def test_taps_that_join_nothing_do_not_hide_those_that_do(linear_map, shape, method):
    kernel = np.full(shape, 1e140)  # on two positions 3 apart a tap joins each to itself
    kernel[1] = 1e-104
    norm = np.linalg.norm(convolution_matrix(kernel, linear_map).toarray(), 2)
    assert norm == 1e-104
    # The grid of frequencies costs 0.5%.
    assert norm <= norm_upper_bound(kernel, linear_map, method=method).value < 1.006 * norm


def test_the_largest_number_has_a_bound():
    largest = np.finfo(float).max
    for kernel in (np.array([[largest]]), np.full((2, 2), largest), np.full((1, 1, 1), largest)):
        linear_map = LinearMap("dense" if kernel.ndim == 2 else "conv", (5, 1))
        assert norm_upper_bound(kernel, linear_map).value >= largest
    half = largest / 2
    assert half <= norm_upper_bound(np.array([[half]]), LinearMap("dense")).value < largest
