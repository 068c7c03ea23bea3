"""Weights trained for a type: whole multiples of one number in each block, kept as they are."""

import numpy as np
import pytest

from gguf_tools.quants import QUANTS, QuantType, by_name
from gguf_tools.quants.multiples import keep_multiples
from tests.quants.samples import bell, hard_matrix, plain_rows

HOLDING = [quant for quant in QUANTS if quant.multiples is not None]
Q4_0 = by_name("Q4_0")


def each(quants):
    return pytest.mark.parametrize("quant", quants, ids=lambda quant: quant.name)


def bf16(x: np.ndarray) -> np.ndarray:
    quant = by_name("BF16")
    return quant.dequantize(quant.quantize(x))


def f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


ROUNDINGS = {"F32": np.asarray, "F16": f16, "BF16": bf16}


def multiples(low: int, high: int, *, n_rows: int = 40, seed: int = 5) -> np.ndarray:
    """(n_rows, 8, 32) whole numbers, few of them large."""
    numbers = np.rint(bell(n_rows * 256, seed=seed) * (high - low) / 6)
    return np.clip(numbers, low, high).reshape(n_rows, 8, 32)


def scales(n_rows: int = 40, seed: int = 9) -> np.ndarray:
    """(n_rows, 8, 1) of 16 bits, some of them negative."""
    sizes = np.abs(bell(n_rows * 8, seed=seed)) * 0.01 + 0.001
    sizes[::3] *= -1
    return f16(sizes.astype(np.float32)).reshape(n_rows, 8, 1)


def kept(quant: QuantType, rows: np.ndarray) -> np.ndarray:
    """What is stored of them, as weights."""
    assert quant.quantize is not None
    return quant.dequantize(keep_multiples(quant, rows, quant.quantize(rows)))


RANGES = [("Q4_0", -8, 7), ("Q4_0", -7, 7), ("Q4_0", -1, 1), ("Q5_0", -15, 15), ("Q5_0", -16, 15),
          ("Q8_0", -15, 15), ("Q8_0", -127, 127), ("Q8_0", -128, 127)]  # fmt: skip


@pytest.mark.parametrize(("name", "low", "high"), RANGES)
def test_weights_on_the_levels_come_out_exactly(name: str, low: int, high: int) -> None:
    quant = by_name(name)
    rows = (scales() * multiples(low, high)).astype(np.float32).reshape(40, -1)
    np.testing.assert_array_equal(kept(quant, rows), rows)
    assert quant.quantize is not None
    data = quant.quantize(rows)
    assert (quant.dequantize(data) != rows).any(
        axis=1
    ).mean() > 0.3  # ggml's quantiser alone would not do


@pytest.mark.parametrize("stored", ["F16", "BF16"])
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 7), (-4, 3)])
def test_rounded_weights_round_to_what_was_stored(stored: str, low: int, high: int) -> None:
    """As of Gemma's checkpoints, which are BF16: the multiples are those of the training."""
    k, d = multiples(low, high), scales()
    rows = ROUNDINGS[stored]((d * k).astype(np.float32).reshape(40, -1))
    weights = kept(Q4_0, rows)
    np.testing.assert_array_equal(ROUNDINGS[stored](weights), rows)
    found = np.rint(weights.reshape(k.shape) / d)
    np.testing.assert_array_equal(found, k)
    error = np.abs(weights.reshape(k.shape) - d * k) / np.maximum(np.abs(d * k), 1e-9)
    assert error.max() <= (2.0**-8 if stored == "BF16" else 2.0**-10)  # of the scale that was found


@each(HOLDING)
def test_a_scale_of_more_digits_becomes_the_nearest(quant: QuantType) -> None:
    d = np.abs(bell(320, seed=4)).reshape(40, 8, 1) * 0.01 + 0.001
    rows = (d * multiples(-7, 7)).astype(np.float32).reshape(40, -1)
    error = np.abs(kept(quant, rows) - rows)
    assert (error <= np.abs(rows) * (2.0**-11 + 2.0**-20)).all()
    assert error.any()


@each(HOLDING)
def test_other_weights_stay_as_ggml_makes_them(quant: QuantType) -> None:
    assert quant.quantize is not None
    for rows in (plain_rows(96, 256), hard_matrix(), bf16(plain_rows(96, 256)), np.ones((3, 64))):
        rows = rows.astype(np.float32)
        data = quant.quantize(rows)
        finite = np.isfinite(rows).all()
        assert finite
        result = keep_multiples(quant, rows, data)
        if rows.shape != (3, 64):
            assert result is data


def test_what_is_not_nearly_all_is_not_taken_for_trained() -> None:
    rows = (scales() * multiples(-7, 7)).astype(np.float32).reshape(320, 32)
    rows[::4] = plain_rows(80, 32)  # a quarter of the blocks
    data = Q4_0.quantize(rows)  # type: ignore[misc]
    assert keep_multiples(Q4_0, rows, data) is data
    rows = (scales() * multiples(-7, 7)).astype(np.float32).reshape(320, 32)
    rows[5] = rows[-1] = plain_rows(1, 32)  # two of 320, one of which is looked at
    rows[7] = 0
    data = Q4_0.quantize(rows)  # type: ignore[misc]
    result = keep_multiples(Q4_0, rows, data)
    np.testing.assert_array_equal(result[[5, 7, -1]], data[[5, 7, -1]])
    trained = np.delete(np.arange(320), [5, 7, 319])
    np.testing.assert_array_equal(Q4_0.dequantize(result)[trained], rows[trained])


def test_what_is_to_the_bit_already_stays_as_ggml_makes_it() -> None:
    """BF16 weights whose largest is the last level: ggml's scale differs from theirs a little."""
    k = multiples(-8, 7)
    k[:, :, 0] = -8
    rows = bf16((scales() * k).astype(np.float32)).reshape(40, -1)
    data = Q4_0.quantize(rows)  # type: ignore[misc]
    made = Q4_0.dequantize(data)
    same = (bf16(made) == rows).reshape(-1, 32).all(axis=1)
    assert 0.3 < same.mean() < 0.8 and (made != rows).any()
    result = keep_multiples(Q4_0, rows, data).reshape(-1, 18)
    changed = (result != data.reshape(-1, 18)).any(axis=1)
    np.testing.assert_array_equal(changed, ~same)


@pytest.mark.parametrize("size", [2.0**-24, 3 * 2.0**-20, 65504.0 / 8, 0.0, 1e9, 1e-9])
def test_scales_at_the_ends_of_16_bits(size: float) -> None:
    rows = (np.float32(size) * multiples(-7, 7)).astype(np.float32).reshape(40, -1)
    weights = kept(Q4_0, rows)
    if size < 65504 and f16(np.float32(size)) == np.float32(size):
        np.testing.assert_array_equal(weights, rows)


def test_multiples_with_a_common_factor() -> None:
    """Of 5 d the scale 5 d may need more than 16 bits: d is the one."""
    d = np.float32((1 + 2.0**-10) / 128)
    rows = np.where(bell(64 * 32, seed=3) > 0.8, 5 * d, 0).reshape(64, 32).astype(np.float32)
    assert np.float16(5 * d) != 5 * d
    np.testing.assert_array_equal(kept(Q4_0, rows), rows)


def test_any_number_of_blocks() -> None:
    for n_rows in (0, 1, 2, 31, 33, 65):
        rows = (scales(n_rows) * multiples(-7, 7, n_rows=n_rows)).astype(np.float32)
        rows = rows.reshape(n_rows, 256)
        data = Q4_0.quantize(rows)  # type: ignore[misc]
        result = keep_multiples(Q4_0, rows, data)
        assert result.shape == data.shape
        np.testing.assert_array_equal(Q4_0.dequantize(result), rows)
