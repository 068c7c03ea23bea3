"""Every block format, against ggml's recorded answers, the gguf package, and itself."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_tools.errors import UnsupportedQuantError
from gguf_tools.jit import kernel
from gguf_tools.quants import QUANTS, QuantType, arithmetic, by_id, by_name
from gguf_tools.quants.kernels import lanes
from gguf_tools.simd import ld_f32x16, st
from tests.quants.samples import hard_matrix, hard_rows, plain_rows

ROOT = Path(__file__).resolve().parent.parent.parent
ANSWERS = ROOT / "tests" / "data" / "quants" / "ggml.npz"
MADE = [quant for quant in QUANTS if quant.quantize is not None]
RECORDED = [quant for quant in MADE if quant.name != "F32"]
SIZE_OF_OLD = {"Q8_1": 36}
"""Where the gguf package is behind: ggml's block_q8_1 has two halves, not two floats."""


def each(quants):
    return pytest.mark.parametrize("quant", quants, ids=lambda quant: quant.name)


def known_to_gguf(quant: QuantType) -> bool:
    return quant.type_id in set(map(int, gguf.GGMLQuantizationType))


def decoded_by_gguf(quant: QuantType) -> bool:
    if not known_to_gguf(quant) or quant.name in ("I8", "I16", "I32", "I64", "F64"):
        return False
    try:
        rows = np.zeros((1, quant.block_bytes), np.uint8)
        if quant.name in ("F32", "F16"):
            rows = rows.view(np.float32 if quant.name == "F32" else np.float16)
        gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(quant.type_id))
    except (NotImplementedError, ValueError):
        return False
    return True


def random_rows(quant: QuantType, *, wild: bool) -> np.ndarray:
    """Rows of random bytes; unless wild, 16-bit patterns of infinite or NaN halves are rare."""
    rng = np.random.default_rng(quant.type_id)
    data = rng.integers(0, 256, (5, 6, quant.block_bytes), np.uint8)
    if not wild and quant.name not in ("F32", "F16", "BF16"):
        data &= rng.choice(np.array([0xFF, 0xBB], np.uint8), (5, 6, 1))
    return data.reshape(5, -1)


# --- the list ---------------------------------------------------------------------------------


def test_the_list_is_whole() -> None:
    ids = [quant.type_id for quant in QUANTS]
    assert len(set(ids)) == len(ids)
    assert set(ids) == {0, 1, 2, 3, *range(6, 31), 34, 35, 39, 40, 41, 42}
    for quant in QUANTS:
        assert by_id(quant.type_id) is by_name(quant.name) is quant


@each([quant for quant in QUANTS if known_to_gguf(quant)])
def test_sizes(quant: QuantType) -> None:
    kind = gguf.GGMLQuantizationType(quant.type_id)
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    assert quant.name == kind.name
    assert quant.block_size == block_size
    assert quant.block_bytes == SIZE_OF_OLD.get(quant.name, block_bytes)


@pytest.mark.parametrize("type_id", [-1, 4, 5, 31, 33, 36, 43, 255, 2**32 - 1])
def test_unknown_number(type_id: int) -> None:
    with pytest.raises(UnsupportedQuantError, match=rf"type {type_id} is not known.* 12 Q4_K"):
        by_id(type_id)


def test_unknown_name() -> None:
    with pytest.raises(UnsupportedQuantError, match=r"type Q9\\x1b is not known; .*Q4_K"):
        by_name("Q9\x1b")


def test_importing_is_cheap() -> None:
    code = "import gguf_tools.quants, sys; print({'numba', 'gguf', 'llvmlite'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# --- from bytes to weights --------------------------------------------------------------------


@pytest.mark.parametrize("wild", [False, True], ids=["usual", "wild"])
@each([quant for quant in QUANTS if decoded_by_gguf(quant)])
def test_dequantize_equals_gguf(quant: QuantType, wild: bool) -> None:
    rows = random_rows(quant, wild=wild)
    source = rows
    if quant.name in ("F32", "F16"):
        source = rows.view(np.float32 if quant.name == "F32" else np.float16)
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType(quant.type_id)
        expected = gguf.quants.dequantize(source, kind).astype(np.float32)
    weights = quant.dequantize(rows)
    assert weights.dtype == np.float32
    assert weights.shape == (5, 6 * quant.block_size)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(weights), ~number)
    np.testing.assert_array_equal(weights[number].view(np.uint32), expected[number].view(np.uint32))


@pytest.mark.parametrize(
    ("name", "number"),
    [("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8"), ("F64", "<f8")],
)
def test_plain_numbers(name: str, number: str) -> None:
    numbers = np.array([[0, 1, -1], [100, -128, 7]], number)
    weights = by_name(name).dequantize(numbers.view(np.uint8))
    np.testing.assert_array_equal(weights, numbers.astype(np.float32))


def test_q1_0() -> None:
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([1.5], "<f2").view(np.uint8)
    block[0, 2:4] = 0b00000001, 0b10000000
    weights = by_name("Q1_0").dequantize(block)[0]
    assert np.flatnonzero(weights == 1.5).tolist() == [0, 15]
    assert np.flatnonzero(weights == -1.5).size == 126


def test_q2_0() -> None:
    block = np.zeros((1, 18), np.uint8)
    block[0, :2] = np.array([0.5], "<f2").view(np.uint8)
    block[0, 2] = 0b11100100
    weights = by_name("Q2_0").dequantize(block)[0]
    assert weights[:6].tolist() == [-0.5, 0, 0.5, 1, -0.5, -0.5]


def test_activations_of_ggml() -> None:
    q8_1 = np.zeros((1, 36), np.uint8)
    q8_1[0, :2] = np.array([0.5], "<f2").view(np.uint8)
    q8_1[0, 4:6] = 3, 0xFF
    assert by_name("Q8_1").dequantize(q8_1)[0, :3].tolist() == [1.5, -0.5, 0]
    q8_k = np.zeros((1, 292), np.uint8)
    q8_k[0, :4] = np.array([0.25], "<f4").view(np.uint8)
    q8_k[0, 4:6] = 8, 0x80
    assert by_name("Q8_K").dequantize(q8_k)[0, :3].tolist() == [2, -32, 0]


@each(QUANTS)
def test_dequantize_shapes(quant: QuantType) -> None:
    k, n_bytes = 2 * quant.block_size, 2 * quant.block_bytes
    rows = np.zeros((3, 4, n_bytes), np.uint8)
    rows.flags.writeable = False
    assert quant.dequantize(rows).shape == (3, 4, k)
    assert quant.dequantize(rows[:, ::2]).shape == (3, 2, k)  # not contiguous
    assert quant.dequantize(rows[0, 0]).shape == (k,)
    assert quant.dequantize(rows[:0, 0]).shape == (0, k)
    assert quant.dequantize(rows[0, :, :0]).shape == (4, 0)
    unaligned = np.zeros(n_bytes + 1, np.uint8)[1:].reshape(1, n_bytes)
    assert quant.dequantize(unaligned).shape == (1, k)


@each([quant for quant in QUANTS if quant.block_bytes > 1])
def test_bytes_that_are_no_blocks(quant: QuantType) -> None:
    with pytest.raises(UnsupportedQuantError, match=f"multiple of {quant.block_bytes}"):
        quant.dequantize(np.zeros((2, quant.block_bytes + 1), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        quant.dequantize(np.zeros((2, quant.block_bytes), np.int8))


# --- from weights to bytes --------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    with np.load(ANSWERS) as stored:
        return dict(stored)


def check_hard_rows(data: np.ndarray, expected: np.ndarray) -> None:
    different = (data != expected).any(axis=1)
    assert [name for name, bad in zip(hard_rows(), different, strict=True) if bad] == []


@each(RECORDED)
def test_reference_equals_ggml(quant: QuantType, answers: dict[str, np.ndarray]) -> None:
    check_hard_rows(quant.quantize_reference(hard_matrix()), answers[f"{quant.name} hard"])
    few = quant.quantize_reference(plain_rows(12, 512))
    np.testing.assert_array_equal(few, answers[f"{quant.name} few"])


@each(RECORDED)
def test_fast_equals_ggml(quant: QuantType, answers: dict[str, np.ndarray]) -> None:
    check_hard_rows(quant.quantize(hard_matrix()), answers[f"{quant.name} hard"])
    many = quant.quantize(plain_rows(700, 1024, seed=3))
    digest = hashlib.sha256(many.tobytes()).digest()
    assert digest == answers[f"{quant.name} many"].tobytes()


@each(MADE)
def test_fast_equals_reference(quant: QuantType) -> None:
    k = 5 * quant.block_size
    for n_rows in (0, 1, 3, 7, 16, 33):
        weights = plain_rows(n_rows, k, seed=11 + n_rows)
        data = quant.quantize(weights)
        assert data.dtype == np.uint8
        assert data.shape == (n_rows, quant.row_bytes(k))
        np.testing.assert_array_equal(data, quant.quantize_reference(weights))


@each(MADE)
def test_shapes_of_weights(quant: QuantType) -> None:
    weights = plain_rows(6, 2 * quant.block_size, seed=5)
    data = quant.quantize(weights)
    for quantize in (quant.quantize, quant.quantize_reference):
        weights.flags.writeable = False
        np.testing.assert_array_equal(quantize(weights[::2]), data[::2])
        np.testing.assert_array_equal(quantize(np.asfortranarray(weights)), data)
        np.testing.assert_array_equal(quantize(weights[3]), data[3])
        cube = weights.reshape(2, 3, -1)
        np.testing.assert_array_equal(quantize(cube), data.reshape(2, 3, -1))
        assert quantize(weights[:, :0]).shape == (6, 0)


@each([quant for quant in MADE if quant.block_size > 1])
def test_rows_that_are_no_blocks(quant: QuantType) -> None:
    weights = np.zeros((2, quant.block_size + 1), np.float32)
    message = f"{quant.block_size + 1} weights .* {quant.name}: .* multiple of {quant.block_size}"
    for function in (quant.quantize, quant.quantize_reference):
        with pytest.raises(UnsupportedQuantError, match=message):
            function(weights)
    with pytest.raises(UnsupportedQuantError, match=message):
        quant.row_bytes(quant.block_size + 1)


@each(MADE)
def test_weights_are_float32(quant: QuantType) -> None:
    for function in (quant.quantize, quant.quantize_reference):
        with pytest.raises(ValueError, match="float32"):
            function(np.zeros((2, 256)))


@each(MADE)
def test_many_threads_at_once(quant: QuantType) -> None:
    weights = plain_rows(64, 1024, seed=21)
    expected = quant.quantize(weights)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(quant.quantize, [weights[i : i + 1] for i in range(64)] * 4))
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part[0], expected[i % 64])


@kernel("ii")
def settle(x, y):
    st(y, lanes.settle_nan(ld_f32x16(x)))


def test_undefined_numbers_get_one_sign() -> None:
    """inf / inf is a negative NaN on x86 and a positive one on ARM."""
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0x7F800001], np.uint32)
    others = np.array([0, -0.0, 1, -1, np.inf, -np.inf, 3e38, 1e-45, -2], np.float32)
    x = np.concatenate([bits.view(np.float32), others, np.zeros(3, np.float32)])
    y = np.zeros(16, np.float32)
    settle(x.ctypes.data, y.ctypes.data)
    for settled in (y, arithmetic.settle_nan(x)):
        assert np.isnan(settled[:4]).all() and np.signbit(settled[:4]).all()
        assert np.array_equal(settled[4:].view(np.uint32), x[4:].view(np.uint32))


def test_undefined_scales_are_the_same_on_every_processor() -> None:
    """IQ4_NL's sums of squares overflow."""
    weights = np.full((17, 32), 3e38, np.float32)
    for data in (
        by_name("IQ4_NL").quantize(weights),
        by_name("IQ4_NL").quantize_reference(weights),
    ):
        assert (np.ascontiguousarray(data[:, :2]).view("<u2") == 0xFE00).all()


@each(MADE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number(quant: QuantType, value: float) -> None:
    """Without effect on other blocks. What becomes of its own block is open, but no crash."""
    weights = plain_rows(40, 512, seed=31)
    expected = quant.quantize(weights)
    damaged = weights.copy()
    damaged[7, 300], damaged[19] = value, value
    sane = np.delete(np.arange(40), [7, 19])
    for function in (quant.quantize, quant.quantize_reference):
        data = function(damaged)
        np.testing.assert_array_equal(data[sane], expected[sane])
        quant.dequantize(data)


@each([by_name(name) for name in ("F32", "F16", "BF16")])
def test_floats_keep_what_is_no_number(quant: QuantType) -> None:
    weights = np.array([[np.nan, np.inf, -np.inf, -0.0] * 64], np.float32)
    weights.view(np.uint32)[0, 0] = 0xFFC12345  # a NaN with sign and payload
    for function in (quant.quantize, quant.quantize_reference):
        back = quant.dequantize(function(weights))
        np.testing.assert_array_equal(back, weights)
        assert np.signbit(back[0, 0])
        assert np.signbit(back[0, 3])
    np.testing.assert_array_equal(quant.quantize(weights), quant.quantize_reference(weights))


ERRORS = {"F32": 0, "F16": 0.0003, "BF16": 0.0025, "Q8_0": 0.006, "Q6_K": 0.02, "Q5_K": 0.04}
ERRORS |= {"Q5_1": 0.045, "Q5_0": 0.05, "Q4_K": 0.08, "Q4_1": 0.09, "Q4_0": 0.1}
ERRORS |= {"IQ4_NL": 0.08, "IQ4_XS": 0.08, "Q3_K": 0.2, "Q2_K": 0.4}


@each(MADE)
def test_error_is_what_the_bits_allow(quant: QuantType) -> None:
    """Root mean square of the error, over that of the weights."""
    weights = np.random.default_rng(1).standard_normal((64, 1024), np.float32)
    error = quant.dequantize(quant.quantize(weights)) - weights
    relative = np.sqrt((error**2).mean() / (weights**2).mean())
    assert relative <= ERRORS[quant.name]
