"""Each format's kernels against float64 products of the weights the gguf package decodes."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.jit import Kernel
from gguf_tools.kernel_files import CACHE_FOLDER
from runtime.kernels.formats import FormatKernels
from runtime.kernels.matmul import MOST_COLUMNS
from runtime.kernels.table import FORMATS
from tests.kernels.blocks import block_size, dequantise, random_rows
from tests.test_simd import usable_dots

LENGTHS = {
    1: (1, 15, 33, 172, 576, 2304, 4096),
    32: (32, 64, 96, 160, 224, 576, 2304, 4096),
    64: (64, 192, 576, 2304, 4096),
    128: (128, 384, 2304, 4096),
    256: (256, 768, 2304, 4096),
}
CASES = [(name, k) for name in FORMATS for k in LENGTHS[block_size(name)]]


def matvec(kernels: FormatKernels, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    n_rows, k = len(rows), len(x)
    y = np.full(n_rows, np.nan, np.float32)
    source = x
    if kernels.activation.quantise is not None:
        source = np.zeros(kernels.activation.size(k), np.uint8)
        kernels.activation.quantise(x.ctypes.data, source.ctypes.data, k)
    half = n_rows // 2
    for first, last in ((0, half), (half, n_rows)):  # as two threads would
        kernels.matvec(
            rows.ctypes.data, rows.shape[1], first, last, source.ctypes.data, y.ctypes.data, k
        )
    return y


@pytest.mark.parametrize(("name", "k"), CASES)
def test_matvec(name: str, k: int) -> None:
    rng = np.random.default_rng(k)
    rows = random_rows(name, 11, k, rng)
    x = rng.normal(size=k).astype(np.float32)
    weights = dequantise(name, rows)
    y = matvec(FORMATS[name], rows, x)
    if FORMATS[name].activation.quantise is None:
        scale = np.abs(weights) @ np.abs(x.astype(np.float64))
        assert np.all(np.abs(y - weights @ x) <= 1e-6 * scale + 1e-12)
        return
    # The activations are rounded: by half a step of max|x| / 127 in each 32.
    step = np.abs(x.reshape(-1, 32)).max(axis=1) / 127
    q = np.rint(x.reshape(-1, 32) / step[:, None]) * step[:, None]
    expected = weights @ q.reshape(-1).astype(np.float64)
    scale = np.abs(weights) @ np.abs(q.reshape(-1))
    # One value in many may round the other way where x / step is almost a half.
    assert np.all(np.abs(y - expected) <= 1e-4 * scale)
    assert np.all(np.abs(y - weights @ x) <= 0.02 * scale)


def check_columns(name: str, n: int, lengths: tuple[int, ...]) -> None:
    """A matvec for n columns gives what that for one gives for each, to the bit."""
    kernels, n_rows = FORMATS[name], 5
    for k in lengths:
        rng = np.random.default_rng(k)
        rows = random_rows(name, n_rows, k, rng)
        x = rng.normal(size=(n, k)).astype(np.float32)
        expected = np.stack([matvec(kernels, rows, each) for each in x])
        source = x
        if kernels.activation.quantise is not None:
            source = np.zeros((n, kernels.activation.size(k) + 64), np.uint8)
            for each, place in zip(x, source, strict=True):
                kernels.activation.quantise(each.ctypes.data, place.ctypes.data, k)
        y = np.full((n, n_rows + 3), np.nan, np.float32)
        columns = (source.ctypes.data, source.strides[0], y.ctypes.data, y.strides[0])
        kernels.matvec.for_columns(n)(rows.ctypes.data, rows.shape[1], 1, n_rows, *columns, k)
        assert np.array_equal(y[:, 1:n_rows], expected[:, 1:])
        assert np.isnan(y[:, [0, *range(n_rows, n_rows + 3)]]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_matvec_for_columns(name: str) -> None:
    check_columns(name, 3, LENGTHS[block_size(name)])


@pytest.mark.parametrize("n", [n for n in range(2, MOST_COLUMNS + 1) if n != 3])
@pytest.mark.parametrize("name", ["F16", "Q4_0", "Q4_K"])
def test_matvec_for_other_numbers_of_columns(name: str, n: int) -> None:
    check_columns(name, n, LENGTHS[block_size(name)])


@pytest.mark.parametrize(("name", "k"), CASES)
def test_rows(name: str, k: int) -> None:
    """The row decoder gives the weights exactly (up to the rounding of float32)."""
    rng = np.random.default_rng(k)
    rows = random_rows(name, 1, k, rng)
    kernels, weights = FORMATS[name], dequantise(name, rows)[0]
    if kernels.group == 0:
        values = np.zeros(k + 16, np.float32)
        kernels.rows(rows.ctypes.data, values.ctypes.data, 0, 0, k)
        assert np.array_equal(values[:k], weights)
        return
    q = np.zeros(k + 64, np.uint8)
    scales, offsets = np.zeros((2, k // kernels.group + 64), np.float32)
    kernels.rows(rows.ctypes.data, q.ctypes.data, scales.ctypes.data, offsets.ctypes.data, k)
    values = q[:k].reshape(-1, kernels.group).astype(np.float64) - kernels.bias
    values *= scales[: len(values), None]
    if kernels.has_offset:
        values += offsets[: len(values), None]
    assert np.allclose(values.reshape(-1), weights, rtol=2e-6, atol=1e-7 * np.abs(weights).max())


@pytest.mark.parametrize("name", [name for name in FORMATS if block_size(name) > 1])
@pytest.mark.parametrize("value", [0.0, 1e-38, 3e4])
def test_extreme_activations(name: str, value: float) -> None:
    """Zeros, denormal-sized and large activations give finite, right results."""
    k = 512
    rows = random_rows(name, 4, k, np.random.default_rng(1))
    x = np.full(k, value, np.float32)
    y = matvec(FORMATS[name], rows, x)
    expected = dequantise(name, rows) @ x.astype(np.float64)
    assert np.all(np.isfinite(y))
    assert np.allclose(y, expected, rtol=2e-5, atol=max(1e-4 * value * k, 1e-30))


def check_edges() -> None:
    """Kernels read nothing outside their rows: the pages around them cannot be read."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    area = mmap.mmap(-1, 34 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for guard in (base, base + 33 * page):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0, ctypes.get_errno()
    for name, k in CASES:
        kernels, rows = FORMATS[name], random_rows(name, 2, k, np.random.default_rng(0))
        x, y = np.ones(k, np.float32), np.zeros(2, np.float32)
        source, outputs = x, np.zeros((3, 4 * k + 4096), np.uint8)
        if kernels.activation.quantise is not None:
            source = np.zeros(kernels.activation.size(k), np.uint8)
            kernels.activation.quantise(x.ctypes.data, source.ctypes.data, k)
        for start in (base + page, base + 33 * page - rows.nbytes):
            ctypes.memmove(start, rows.ctypes.data, rows.nbytes)
            width = rows.shape[1]
            kernels.matvec(start, width, 0, 2, source.ctypes.data, y.ctypes.data, k)
            for row in (start, start + width):
                kernels.rows(row, *(array.ctypes.data for array in outputs), k)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as on Linux")
def test_nothing_is_read_outside_the_rows() -> None:
    code = "from tests.kernels.test_formats import check_edges; check_edges()"
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# Their products are those of IQ3_S, IQ1_S and Q1_0: the loops of runtime/kernels/decoded.py.
SAME_PRODUCTS = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "TQ2_0", "TQ1_0", "Q2_0")


def check_products() -> None:
    """Both paths of every format, for a process that was told which byte product to use."""
    for name in FORMATS.keys() - set(SAME_PRODUCTS):
        test_matvec(name, 768)
        test_rows(name, 768)
    for name in ("Q4_0", "Q6_K"):
        check_columns(name, 2, (768,))


@pytest.mark.skipif(CACHE_FOLDER is None, reason="kernels are kept in memory only")
@pytest.mark.parametrize("name", FORMATS)
def test_kernels_are_kept_on_disk(name: str) -> None:
    """Those are not that need a function which other processes may not have."""
    for each in (FORMATS[name].matvec, FORMATS[name].rows, FORMATS[name].matvec.for_columns(3)):
        assert each.address
        assert Kernel(each.function, each.letters, each.n_columns).is_ready


@pytest.mark.parametrize("dot", ["avx2", "neon", "armv8", "portable"])
def test_other_byte_products(dot: str) -> None:
    if dot not in usable_dots():
        pytest.skip(f"no {dot} here")
    environment = {**os.environ, "GGUF_TOOLS_DOT": dot}
    code = "from tests.kernels.test_formats import check_products; check_products()"
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=root)
