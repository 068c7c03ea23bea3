"""Quantising with error feedback: against its reference, and against quantising without."""

import numpy as np
import pytest

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.feedback import factors
from gguf_tools.feedback.factors import invert_moments
from gguf_tools.feedback.moments import Moments, prepare
from gguf_tools.feedback.quantising import loss, make_blocks, quantize_with_moments
from gguf_tools.feedback.reference import round_rows_reference
from gguf_tools.feedback.rounding import round_rows
from gguf_tools.quants import QUANTS, QuantType, by_name
from gguf_tools.quants.levels import Parts
from tests.quants.samples import bell, hard_matrix, hard_rows, plain_rows

FED_BACK = [quant for quant in QUANTS if quant.levels is not None]
N = 512

each = pytest.mark.parametrize("quant", FED_BACK, ids=lambda quant: quant.name)


def correlated(n: int, *, seed: int = 5) -> np.ndarray:
    """Second moments of n columns of which each has something of its neighbours and of a few."""
    inputs = bell(3 * n * n, seed=seed).reshape(3 * n, n)
    inputs *= np.float32(2) ** (np.arange(n) % 5 - 2).astype(np.float32)
    inputs += np.float32(0.6) * np.roll(inputs, 3, axis=1) + np.float32(0.4) * inputs[:, [7]]
    return inputs.T @ inputs / np.float32(len(inputs))


@pytest.fixture(scope="module")
def moments() -> Moments:
    return Moments(correlated(N))


def hard() -> np.ndarray:
    """(n_rows, N): each hard row beside another."""
    rows = hard_matrix()
    return np.concatenate([rows, rows[::-1]], axis=1)


def test_the_types() -> None:
    names = [
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
    ]
    assert {quant.name for quant in FED_BACK} == set(names)


@each
def test_levels_describe_the_blocks(quant: QuantType) -> None:
    """Blocks packed of any parts mean scale * level - minimum."""
    levels = quant.levels
    assert levels.block_size == quant.block_size
    rng, n = np.random.default_rng(3), 40
    d, dmin = (rng.normal(size=n).astype(np.float16).astype(np.float32) for _ in range(2))
    dmin *= levels.has_minimum
    shape = n, levels.n_groups
    scales = rng.integers(levels.lowest_scale, levels.highest_scale + 1, shape).astype(np.int16)
    lowest = 0 if levels.n_groups > 1 else 1
    minima = rng.integers(lowest, levels.highest_scale + 1, shape).astype(np.int16)
    q = rng.integers(levels.lowest, levels.highest + 1, (n, quant.block_size)).astype(np.int8)
    if levels.values:
        q = rng.choice(np.array(levels.values, np.int8), q.shape)
    q[0], q[1] = levels.lowest, levels.highest
    scales[2], scales[3] = levels.lowest_scale, levels.highest_scale
    data = levels.pack(Parts(d, dmin, scales, minima, q)).view(np.uint8).reshape(n, -1)
    groups = q.reshape(*shape, levels.group).astype(np.float32)
    expected = (d[:, None] * scales)[:, :, None] * groups - (dmin[:, None] * minima)[:, :, None]
    np.testing.assert_array_equal(quant.dequantize(data), expected.reshape(n, -1))


@each
def test_kernel_equals_reference(quant: QuantType, moments: Moments) -> None:
    rows = np.concatenate([plain_rows(21, N), hard()])
    feedback = moments.feedback(quant.levels)
    fast = make_blocks(quant.levels, rows, feedback, round_rows)
    slow = make_blocks(quant.levels, rows, feedback, round_rows_reference)
    assert np.flatnonzero((fast != slow).any(axis=1)).tolist() == []


@each
def test_less_is_lost(quant: QuantType, moments: Moments) -> None:
    weights = bell(96 * N, seed=9).reshape(96, N) * np.float32(0.02)
    weights[::7, ::37] *= 5
    importance = moments.moments.diagonal().copy()
    plain = loss(quant, weights, quant.quantize(weights), moments.moments)
    weighted = loss(quant, weights, quant.quantize(weights, importance), moments.moments)
    fed_back = loss(
        quant, weights, quantize_with_moments(quant, weights, moments, threads=1), moments.moments
    )
    assert fed_back < 0.6 * plain
    assert fed_back < 0.6 * weighted


@each
def test_no_worse_without_correlation(quant: QuantType) -> None:
    """Then nothing is fed back; what is left is the search for scales."""
    weights = bell(96 * N, seed=10).reshape(96, N)
    importance = np.float32(2) ** (np.arange(N) % 7 - 3).astype(np.float32)
    moments = np.diag(importance)
    weighted = loss(quant, weights, quant.quantize(weights, importance), moments)
    fed_back = quantize_with_moments(quant, weights, moments, threads=1)
    assert loss(quant, weights, fed_back, moments) < 1.02 * weighted


@each
def test_threads_and_other_rows_make_no_difference(quant: QuantType, moments: Moments) -> None:
    weights = plain_rows(150, N)
    one = quantize_with_moments(quant, weights, moments, threads=1)
    assert one.shape == (150, quant.row_bytes(N)) and one.dtype == np.uint8
    np.testing.assert_array_equal(quantize_with_moments(quant, weights, moments, threads=3), one)
    some = quantize_with_moments(quant, weights[37:60:2], moments.moments, threads=2)
    np.testing.assert_array_equal(some, one[37:60:2])


@each
def test_any_weights_make_valid_blocks(quant: QuantType, moments: Moments) -> None:
    data = quantize_with_moments(quant, hard(), moments, threads=1)
    weights = quant.dequantize(data)
    assert np.isfinite(weights).all()
    names = list(hard_rows())
    both = [names.index("zeros"), len(names) - 1 - names.index("zeros")]
    zeros = weights.reshape(len(names), 2, -1)[both, [0, 1]]
    # Only those that go first are sure to stay: the others take up errors.
    assert np.abs(zeros).max() < 1e6


@each
def test_sizes(quant: QuantType) -> None:
    """One block, one row, no row, and widths that are no whole panel."""
    size = quant.block_size
    wide = [(9 * size, 17)] if size < 256 else []
    for n_columns, n_rows in [(size, 1), (size, 0), (2 * size, 3), *wide]:
        weights = plain_rows(max(n_rows, 1), n_columns)[:n_rows]
        moments = Moments(correlated(n_columns))
        data = quantize_with_moments(quant, weights, moments, threads=1)
        feedback = moments.feedback(quant.levels)
        assert data.shape == (n_rows, quant.row_bytes(n_columns))
        if n_rows:
            slow = make_blocks(quant.levels, weights, feedback, round_rows_reference)
            np.testing.assert_array_equal(data, slow)


@each
def test_constants(quant: QuantType) -> None:
    moments = Moments(np.eye(256, dtype=np.float32))
    for value in (0.0, 0.5, -0.5, 0.02, -3.0):
        weights = np.full((1, 256), value, np.float32)
        data = quantize_with_moments(quant, weights, moments, threads=1)
        np.testing.assert_allclose(quant.dequantize(data), weights, rtol=0.01)


def test_the_factor() -> None:
    """U^T U is the inverse, damped, of the moments in the order of rounding."""
    moments = correlated(320)
    levels = by_name("Q4_0").levels
    feedback = prepare(moments, levels)
    assert sorted(feedback.order) == list(range(320))
    blocks = feedback.order.reshape(-1, 32)
    assert (blocks // 32 == blocks[:, :1] // 32).all()
    importance = moments.diagonal()[blocks]
    assert (np.diff(importance, axis=1) <= 0).all()
    assert (np.diff(importance.mean(axis=1)) <= 0).all()
    ordered = moments[np.ix_(feedback.order, feedback.order)].astype(np.float64)
    ordered = ordered / ordered.diagonal().mean() + 0.01 * np.eye(320)
    upper = feedback.strips.transpose(1, 0, 2).reshape(320, 320).astype(np.float64)
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper.T @ upper @ ordered, np.eye(320), atol=1e-3)
    np.testing.assert_allclose(feedback.pivots * upper.diagonal(), 1, rtol=1e-6)
    ones = np.linalg.solve(upper[32:64, 32:64].T, -np.ones(32))
    np.testing.assert_allclose(feedback.ones[32:64], ones, rtol=1e-5)


@pytest.mark.parametrize("n", [8, 40, 256, 300, 700])
@pytest.mark.parametrize("rows", [96, 2048])
def test_u_is_found_in_the_memory_of_the_moments(
    monkeypatch: pytest.MonkeyPatch, n: int, rows: int
) -> None:
    """Against NumPy's own, in several blocks of columns and of rows."""
    monkeypatch.setattr(factors, "ROWS", rows)
    moments = correlated(n).astype(np.float64)
    damped = moments / moments.diagonal().mean() + 0.01 * np.eye(n)
    expected = np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1])
    upper = moments.copy()
    invert_moments(upper)
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper, expected, atol=1e-9 * np.abs(expected).max())


def test_moments_that_need_more_damping_are_begun_with_anew() -> None:
    """The first columns, which come last, are what is not positive definite."""
    moments = correlated(600).astype(np.float64)
    moments /= moments.diagonal().mean()
    moments[:20, :20] -= 0.5 * np.linalg.eigvalsh(moments)[-1] * np.eye(20)
    mean = moments.diagonal().mean()
    damping = 0.01
    while np.linalg.eigvalsh(moments / mean + damping * np.eye(600)).min() <= 0:
        damping *= 10
    assert damping > 0.01
    upper = moments.copy()
    invert_moments(upper)
    product = upper.T @ upper @ (moments / mean + damping * np.eye(600))
    np.testing.assert_allclose(product, np.eye(600), atol=1e-8)


def test_the_factor_is_made_once() -> None:
    moments = Moments(correlated(512))
    made = moments.feedback(by_name("Q4_0").levels)
    assert moments.feedback(by_name("Q8_0").levels) is made
    assert moments.feedback(by_name("Q4_K").levels) is not made


def test_size_of_the_moments_makes_no_difference() -> None:
    moments, weights = correlated(256), plain_rows(16, 256)
    quant = by_name("Q4_1")
    expected = quantize_with_moments(quant, weights, moments, threads=1)
    for size in (2.0**-60, 2.0**60):
        data = quantize_with_moments(quant, weights, moments * np.float32(size), threads=1)
        np.testing.assert_array_equal(data, expected)


def test_moments_with_little_in_them() -> None:
    """Columns without data, no data at all, too few inputs, and what no inputs can give."""
    quant, weights = by_name("Q5_0"), bell(8 * 64, seed=4).reshape(8, 64)
    dead = correlated(64)
    dead[10:30], dead[:, 10:30] = 0, 0
    one_input = bell(64, seed=3)
    indefinite = correlated(64) - 3 * np.eye(64, dtype=np.float32)
    for moments in (
        dead,
        np.zeros((64, 64), np.float32),
        np.outer(one_input, one_input),
        indefinite,
    ):
        restored = quant.dequantize(quantize_with_moments(quant, weights, moments, threads=1))
        assert np.abs(restored - weights).max() < 2
    still_good = quant.dequantize(
        quantize_with_moments(quant, weights, np.zeros((64, 64), np.float32), threads=1)
    )
    assert np.abs(still_good - weights).max() < 0.2


def test_refusals() -> None:
    q4_k, weights, moments = by_name("Q4_K"), plain_rows(2, 256), correlated(256)
    with pytest.raises(UnsupportedQuantError, match=r"F16 cannot .* Q4_0, Q4_1"):
        quantize_with_moments(by_name("F16"), weights, moments, threads=1)
    with pytest.raises(UnsupportedQuantError, match="row of 320"):
        quantize_with_moments(q4_k, plain_rows(2, 320), correlated(320), threads=1)
    with pytest.raises(ValueError, match="rows of 256 weights need"):
        quantize_with_moments(q4_k, weights, correlated(320), threads=1)
    with pytest.raises(ValueError, match="square matrix"):
        Moments(moments[:3])
    for wrong in (weights.astype(np.float64), weights[0]):
        with pytest.raises(ValueError, match="rows of float32"):
            quantize_with_moments(q4_k, wrong, moments, threads=1)
    for value in (np.nan, np.inf):
        broken = weights.copy()
        broken[1, 3] = value
        with pytest.raises(ValueError, match="found NaN or infinity"):
            quantize_with_moments(q4_k, broken, moments, threads=1)
        broken = moments.copy()
        broken[1, 3] = value
        with pytest.raises(ValueError, match="found NaN or infinity"):
            Moments(broken)
