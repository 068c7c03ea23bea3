"""Whether a GPU computes what it should, and which kernels read prompts there.

The first time that a format is met on a device, a small product of the model's own weights is made
by the kernels for a token and for prompts, and by NumPy: a device that is wrong is not used. Then
by the kernels for tensor cores: where they differ, or cannot be loaded, the plain ones are used,
and it is said.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import cuda

from gguf_tools.errors import DeviceError
from runtime.backends.cuda_formats import blocks_held, kept_as, way_of_tiles
from runtime.backends.cuda_memory import DeviceMemory
from runtime.backends.cuda_room import is_quantised
from runtime.kernels.cuda.products import PRODUCTS, ROWS, WARPS, Products, quantise
from runtime.kernels.cuda.tensor_tiles import TENSOR_TILES
from runtime.kernels.cuda.tiles import THREADS, TILES, Tiles
from runtime.program import Floats, Matrix, Stage, matrices

SWITCH = "GGUF_TOOLS_TENSOR_CORES"  # environment variable
N_ROWS = N_TOKENS = 59  # of the product: nearly a block, so that an edge is seen
MOST_COLUMNS = 512
TOLERANCE = 1e-2  # of the largest result: activations may be rounded to 16 bits
LEAST = 1e-30  # weights that are all zeros make results that are
WRONG = 5e-2  # of the largest result; activations of 8 bits make about 1e-2

_checked: set[tuple[int, str]] = set()  # devices and formats whose products are right
_verdicts: dict[tuple[int, str, str], str] = {}  # device, way, format -> why not, or nothing


def choose_tiles(
    stage: Stage, device: int, capability: tuple[int, int]
) -> tuple[dict[str, Tiles], tuple[str, ...]]:
    """The kernels for prompts of each format on the current device, and notes for the user.

    GGUF_TOOLS_TENSOR_CORES=off leaves it at the plain ones.
    """
    chosen, refused = dict(TILES), dict[str, str]()
    if os.environ.get(SWITCH, "").lower() == "off":
        return chosen, ()
    for matrix in matrices(stage):
        name = kept_as(matrix.quant)
        way = way_of_tiles(capability, name, matrix.n_columns)
        if way == "plain" or name in refused or chosen[name] is not TILES[name]:
            continue
        reason = _verdict(matrix, device, name, way)
        if reason:
            refused[name] = reason
        else:
            chosen[name] = TENSOR_TILES[way][name]
    return chosen, tuple(
        f"prompts are read without tensor cores where weights are {name}: {reason}"
        for name, reason in sorted(refused.items())
    )


def check_products(stage: Stage, device: int) -> None:
    """DeviceError when the current device multiplies wrongly with a format of the stage."""
    for matrix in matrices(stage):
        name = kept_as(matrix.quant)
        if (device, name) in _checked:
            continue
        part = _corner(matrix)
        exact = _activations(part.n_columns) @ part.rows(slice(None)).T
        for found in (_product(TILES[name], part), _rows(PRODUCTS[name], part)):
            wrong = np.abs(found - exact[: len(found)]).max() / max(np.abs(exact).max(), LEAST)
            if not wrong <= WRONG and np.isfinite(exact).all():
                raise DeviceError(
                    f"GPU {device} multiplies wrongly with weights of {name} (by {wrong:.2g} of "
                    "the largest result): --gpu-layers 0 uses the processor alone"
                )
        _checked.add((device, name))


def _verdict(matrix: Matrix, device: int, name: str, way: str) -> str:
    key = device, way, name
    if key not in _verdicts:
        _verdicts[key] = why_wrong(TENSOR_TILES[way][name], TILES[name], matrix)
    return _verdicts[key]


def why_wrong(fast: Tiles, plain: Tiles, matrix: Matrix) -> str:
    """What is wrong with a kernel here, or nothing: held against the plain one."""
    expected = _product(plain, matrix)
    try:
        found = _product(fast, matrix)
    except Exception as error:  # whatever compilers and drivers raise: the plain one works
        return f"their kernel cannot be used ({type(error).__name__}: {error})"
    largest = float(np.abs(expected).max())
    if np.allclose(found, expected, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
        return ""
    return f"their results differ by {np.abs(found - expected).max() / largest:.2g} of the largest"


def _product(tiles: Tiles, matrix: Matrix) -> Floats:
    """The first rows and columns of a matrix times some tokens, (tokens, rows)."""
    part = _corner(matrix)
    n_rows, k, made = part.n_rows, part.n_columns, _empty(N_TOKENS * part.n_rows)
    arguments = (DeviceMemory().weights((part,)), *_prepared(part), k, made, n_rows)
    shape = (n_rows, k, blocks_held(part), N_TOKENS)
    tiles.matmul[(1, 1, 1), (THREADS, 1)](*arguments, *shape)
    return np.asarray(made.copy_to_host(), np.float32).reshape(N_TOKENS, n_rows)


def _rows(products: Products, matrix: Matrix) -> Floats:
    """The same of the first token, (1, rows)."""
    part = _corner(matrix)
    n_rows, k, made, nothing = part.n_rows, part.n_columns, _empty(part.n_rows), _empty(1)
    held = (DeviceMemory().weights((part,)), blocks_held(part))
    arguments = (*_prepared(part), k, k, *held, made, n_rows, n_rows)
    unused = (nothing, False, nothing, 0, False)
    products.matvec[(-(-n_rows // ROWS), 1, 1), (32, WARPS)](*arguments, *unused)
    return np.asarray(made.copy_to_host(), np.float32)[None]


def _activations(k: int) -> Floats:
    """Of all tokens, (tokens, k)."""
    return np.random.default_rng(0).normal(size=(N_TOKENS, k)).astype(np.float32)


def _prepared(matrix: Matrix) -> tuple[Any, Any, Any]:
    """The activations on the device, as the products of the matrix's format read them."""
    k, x = matrix.n_columns, cuda.to_device(_activations(matrix.n_columns).reshape(-1))
    if not is_quantised(matrix):
        return x, _empty(1), _empty(1)
    size = N_TOKENS * k
    made = (_empty(size, np.int8), _empty(size // 32), _empty(size // 16))
    quantise[(-(-k // (32 * WARPS)), N_TOKENS, 1), (32, WARPS)](x, k, *made, k)
    return made


def _corner(matrix: Matrix) -> Matrix:
    """Its first rows and columns."""
    n_rows, k = min(matrix.n_rows, N_ROWS), min(matrix.n_columns, MOST_COLUMNS)
    blocks = np.ascontiguousarray(matrix.data[:n_rows])[:, : matrix.quant.row_bytes(k)]
    return Matrix(matrix.name, matrix.quant, n_rows, k, blocks)


def _empty(size: int, dtype: npt.DTypeLike = np.float32) -> Any:
    return cuda.device_array(size, dtype)
