"""The arithmetic of a lane, compiled for the CPU: the very functions that kernels are made of."""

import importlib.util

import numpy as np
import pytest

from gguf_tools.quants import by_name
from tests.kernels.blocks import dequantise, random_rows

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install '.[dev]'", allow_module_level=True)


import tests.cuda.cpu_bodies  # noqa: F401 - CPU bodies of the primitives
from runtime.kernels.cuda.products import BLOCKS, PRODUCTS

PADDING = 16  # bytes behind the weights, which loads of whole words may touch


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel `quantise` makes of one row."""
    groups = x.reshape(-1, 32)
    scales = np.abs(groups).max(1) / np.float32(127)
    q = np.rint(groups / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
    sums = (q.reshape(-1, 2, 16).sum(2) * scales[:, None]).astype(np.float32)
    return q.reshape(-1), scales, sums.reshape(-1)


def padded(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows.reshape(-1), np.zeros(PADDING, np.uint8)])


def product(name: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """rows times x, as 32 lanes compute it."""
    k, row_bytes = len(x), rows.shape[1]
    activations = quantised(x) if name in BLOCKS else (x, x[:1], x[:1])
    dot, w = PRODUCTS[name].dot, padded(rows)
    sums = [
        [dot(w, r * row_bytes, *activations, 0, k, lane) for lane in range(32)]
        for r in range(len(rows))
    ]
    return np.array(sums, np.float32).sum(1)


def exact(name: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The same in float64, of the activations that the lanes see."""
    if name in BLOCKS:
        q, scales, _ = quantised(x)
        x = (q.reshape(-1, 32) * scales[:, None]).reshape(-1)
    return dequantise(name, rows) @ x.astype(np.float64)


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_a_row_of_random_blocks(name: str) -> None:
    rng = np.random.default_rng(5)
    quant = by_name(name)
    k = max(quant.block_size, 32) * 5
    rows = random_rows(name, 6, k, rng)
    x = rng.normal(size=k).astype(np.float32)
    expected = exact(name, rows, x)
    size = np.abs(dequantise(name, rows)) @ np.abs(x)
    assert np.abs(product(name, rows, x) - expected).max() <= 2e-6 * size.max()
