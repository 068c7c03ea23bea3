"""The arithmetic of a lane, compiled for the CPU: the very functions that kernels are made of."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from tests.kernels.blocks import dequantise, random_rows

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install '.[dev]'", allow_module_level=True)


import tests.cuda.cpu_bodies  # noqa: F401 - CPU bodies of the primitives
from runtime.backends.cuda_formats import blocks_held
from runtime.backends.cuda_memory import spread_out
from runtime.kernels.cuda.products import BLOCKS, PRODUCTS
from runtime.program import Matrix


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel `quantise` makes of one row."""
    groups = x.reshape(-1, 32)
    scales = np.abs(groups).max(1) / np.float32(127)
    q = np.rint(groups / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    sums = (q.reshape(-1, 2, 16).sum(2) * scales[:, None]).astype(np.float32)
    return q.reshape(-1), scales, sums.reshape(-1)


def on_gpu(name: str, rows: np.ndarray, n_columns: int) -> tuple[np.ndarray, int]:
    """The rows as a GPU has them, and the blocks that there is room for."""
    matrix = Matrix("w", by_name(name), len(rows), n_columns, rows)
    return spread_out(matrix) if name in BLOCKS else rows.reshape(-1), blocks_held(matrix)


def product(name: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """rows times x, as 32 lanes compute two of them."""
    k, last = len(x), len(rows) - 1
    activations = quantised(x) if name in BLOCKS else (x, x[:1], x[:1])
    dots, (w, n) = PRODUCTS[name].dots, on_gpu(name, rows, k)
    sums = [
        [dots(w, 0, n, r, min(r + 1, last), *activations, 0, k, lane) for lane in range(32)]
        for r in range(0, len(rows), 2)
    ]
    return np.array(sums, np.float32).sum(1).reshape(-1)[: len(rows)]


def exact(name: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The same in float64, of the activations that the lanes see."""
    if name in BLOCKS:
        q, scales, _ = quantised(x)
        x = (q.reshape(-1, 32) * scales[:, None]).reshape(-1)
    return dequantise(name, rows) @ x.astype(np.float64)


def real_blocks(path: Path, name: str, tensor: str, n_rows: int) -> np.ndarray:
    """The first rows of a model's tensor, in a format that may not be the file's."""
    quant = by_name(name)
    with GGUFFile(path) as file:
        stored = file.tensors[tensor].quant
        blocks = file.rows(tensor, 0, n_rows)
    if stored.name == name:
        return blocks
    assert quant.quantize_reference is not None
    return np.asarray(quant.quantize_reference(stored.dequantize(blocks)), np.uint8)


MADE = [name for name in sorted(PRODUCTS) if by_name(name).quantize_reference is not None]
REAL = [
    *((name, "blk.4.ffn_down.weight", 1536) for name in MADE),
    *((name, "blk.20.attn_q.weight", 576) for name in MADE if by_name(name).block_size <= 32),
]


@pytest.mark.parametrize(("name", "tensor", "n_columns"), REAL)
def test_rows_of_a_real_model(name: str, tensor: str, n_columns: int, smollm2_gguf: Path) -> None:
    """Q4_1 as they are in the file, the other formats made of them."""
    rows = real_blocks(smollm2_gguf, name, tensor, 8)
    x = np.random.default_rng(6).normal(size=n_columns).astype(np.float32)
    size = np.abs(dequantise(name, rows)) @ np.abs(x)
    assert np.abs(product(name, rows, x) - exact(name, rows, x)).max() <= 2e-6 * size.max()


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_a_row_of_random_blocks(name: str) -> None:
    rng = np.random.default_rng(5)
    quant = by_name(name)
    k = max(quant.block_size, 32) * 5
    rows = random_rows(name, 5, k, rng)
    x = rng.normal(size=k).astype(np.float32)
    expected = exact(name, rows, x)
    size = np.abs(dequantise(name, rows)) @ np.abs(x)
    assert np.abs(product(name, rows, x) - expected).max() <= 2e-6 * size.max()
