"""Quantising with an importance matrix, against ggml's recorded answers and itself."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.quants import QUANTS, QuantType, by_name
from tests.quants.samples import hard_matrix, hard_rows, importance, plain_rows

ANSWERS = Path(__file__).resolve().parent.parent / "data" / "quants" / "ggml-weighted.npz"
MADE = [quant for quant in QUANTS if quant.quantize is not None]
RECORDED = [quant for quant in MADE if quant.name != "F32"]
INDIFFERENT = ("F32", "F16", "BF16", "Q8_0")


def each(quants):
    return pytest.mark.parametrize("quant", quants, ids=lambda quant: quant.name)


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    with np.load(ANSWERS) as stored:
        return dict(stored)


def check_hard_rows(data: np.ndarray, expected: np.ndarray) -> None:
    different = (data != expected).any(axis=1)
    assert [name for name, bad in zip(hard_rows(), different, strict=True) if bad] == []


@each(RECORDED)
def test_reference_equals_ggml(quant: QuantType, answers: dict[str, np.ndarray]) -> None:
    hard = quant.quantize_reference(hard_matrix(), importance(256))
    check_hard_rows(hard, answers[f"{quant.name} hard"])
    few = quant.quantize_reference(plain_rows(12, 512), importance(512))
    np.testing.assert_array_equal(few, answers[f"{quant.name} few"])


@each(RECORDED)
def test_fast_equals_ggml(quant: QuantType, answers: dict[str, np.ndarray]) -> None:
    hard = quant.quantize(hard_matrix(), importance(256))
    check_hard_rows(hard, answers[f"{quant.name} hard"])
    many = quant.quantize(plain_rows(700, 1024, seed=3), importance(1024))
    digest = hashlib.sha256(many.tobytes()).digest()
    assert digest == answers[f"{quant.name} many"].tobytes()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1, 1e25])
@each(MADE)
def test_fast_equals_reference(quant: QuantType, size: float) -> None:
    """Also where sums overflow or lose their last bits."""
    rows = hard_matrix()
    columns = importance(256) * np.float32(size)
    check_hard_rows(quant.quantize(rows, columns), quant.quantize_reference(rows, columns))


@each(MADE)
def test_numbers_of_rows(quant: QuantType) -> None:
    k = 5 * max(quant.block_size, 32)
    for n_rows in (0, 1, 3, 7, 16, 33):
        weights = plain_rows(n_rows, k, seed=11 + n_rows)
        data = quant.quantize(weights, importance(k))
        assert data.shape == (n_rows, quant.row_bytes(k))
        np.testing.assert_array_equal(data, quant.quantize_reference(weights, importance(k)))
    cube = plain_rows(6, k).reshape(2, 3, k)
    for quantize in (quant.quantize, quant.quantize_reference):
        flat = quantize(cube.reshape(6, k), importance(k))
        np.testing.assert_array_equal(quantize(cube, importance(k)).reshape(6, -1), flat)
        np.testing.assert_array_equal(quantize(cube[1, 2], importance(k)), flat[5])
        np.testing.assert_array_equal(quantize(cube[:, ::2], importance(k))[1, 1], flat[5])


@each(RECORDED)
def test_many_rows(quant: QuantType) -> None:
    """Rows are weighed and quantised a few at a time; which ones together makes no difference."""
    k = 3 * 256  # 3 blocks, or 24
    weights = plain_rows(200, k)
    data = quant.quantize(weights, importance(k))
    parts = [quant.quantize(weights[i : i + 7], importance(k)) for i in range(0, 200, 7)]
    np.testing.assert_array_equal(data, np.concatenate(parts))


@each(MADE)
def test_no_importance_at_all(quant: QuantType) -> None:
    """A tensor whose inputs were all zeros: any bytes, but the same and of numbers."""
    weights, nothing = plain_rows(5, 512), np.zeros(512, np.float32)
    data = quant.quantize(weights, nothing)
    np.testing.assert_array_equal(data, quant.quantize_reference(weights, nothing))
    assert np.isfinite(quant.dequantize(data)).all()


@each(MADE)
def test_the_columns_that_count_come_out_better(quant: QuantType) -> None:
    weights = np.random.default_rng(1).standard_normal((64, 1024), np.float32)
    columns = np.ones(1024, np.float32)
    columns[::8] = 100
    plain = quant.quantize(weights)
    weighted = quant.quantize(weights, columns)
    if quant.name in INDIFFERENT:
        np.testing.assert_array_equal(plain, weighted)
        return
    before, after = (
        ((quant.dequantize(data) - weights)[:, ::8] ** 2).mean() for data in (plain, weighted)
    )
    assert after < 0.99 * before


@each(MADE)
def test_many_threads_at_once(quant: QuantType) -> None:
    weights, columns = plain_rows(64, 1024, seed=21), importance(1024)
    expected = quant.quantize(weights, columns)
    with ThreadPoolExecutor(8) as pool:
        rows = [weights[i : i + 1] for i in range(64)] * 4
        parts = list(pool.map(lambda row: quant.quantize(row, columns), rows))
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part[0], expected[i % 64])


def test_importance_of_a_wrong_kind() -> None:
    quant, weights = by_name("Q4_K"), plain_rows(2, 512)
    for wrong in (np.ones(256, np.float32), np.ones(512), np.ones((2, 512), np.float32)):
        for function in (quant.quantize, quant.quantize_reference):
            with pytest.raises(ValueError, match="the importance of rows of 512 weights"):
                function(weights, wrong)
