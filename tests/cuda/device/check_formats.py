"""Products of every format: decoding, tiles for prompts, and experts."""

import numpy as np
import pytest

from gguf_tools.quants import by_name
from runtime.backends import cuda_memory
from runtime.backends.cuda import CUDABackend
from runtime.backends.cuda_formats import NATIVE, weight_bytes
from runtime.backends.cuda_memory import DeviceMemory, spread_out
from runtime.backends.cuda_room import HEAD_ROWS
from runtime.kernels.cuda.products import BLOCKS
from runtime.program import MatMul, Matrix, Program
from runtime.stages import whole
from tests.cuda.device.agreement import FLOAT, INT8, logits, worst
from tests.programs import mixture, random_matrix

OTHERS = ("IQ2_XXS", "NVFP4", "Q8_1")  # kept as F16, BF16, F32
FLOATS = ("F32", "F16", "BF16")


def product(name: str, n_rows: int, k: int, rng: np.random.Generator) -> Program:
    """logits = matrix times an input."""
    inputs = rng.normal(size=(16, k)).astype(np.float32)
    return Program(
        buffers={"x": k, "logits": n_rows},
        embedding=Matrix("inputs", by_name("F32"), 16, k, inputs.view(np.uint8)),
        layers=(),
        head=(MatMul("x", "logits", random_matrix(rng, n_rows, k, name)),),
        caches=(),
    )


@pytest.mark.parametrize("name", [*NATIVE, *OTHERS])
def test_a_product(name: str, rng: np.random.Generator) -> None:
    """Of one token, and of enough for tiles: with two of rows, and a short last step of columns.

    Without tensor cores, which check_tensor_cores.py holds against this.
    """
    k = 256 if by_name(name).block_size == 256 else 192
    program = product(name, 66 if name in ("F16", "Q8_0") else 6, k, rng)
    backend = CUDABackend(whole(program), n_ctx=16, n_batch=9, capability=(6, 1))
    tiled = logits(backend, program, (9,))
    backend = CUDABackend(whole(program), n_ctx=16, n_batch=9)
    one_by_one = logits(backend, program, (1, 1))
    assert np.abs(tiled[:2] - one_by_one).max() <= 1e-5 * np.abs(tiled).max()
    expected = program.embed(np.arange(9), 0) @ program.head[0].matrix.rows(slice(None)).T
    worst_of_all = np.abs(tiled - expected).max() / np.abs(expected).max()
    assert worst_of_all <= (FLOAT if name in FLOATS + OTHERS else INT8)


@pytest.mark.parametrize("name", [name for name, form in BLOCKS.items() if len(form.planes) > 1])
def test_fields_lie_apart(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NumPy puts them, for two matrices in turn, with three rows at a time on their way."""
    k = by_name(name).block_size * 3
    matrices = [random_matrix(rng, 7, k, name) for _ in range(2)]
    monkeypatch.setattr(cuda_memory, "STAGED", 3 * by_name(name).row_bytes(k))
    memory = DeviceMemory()
    held = memory.weights(matrices).copy_to_host().reshape(2, -1)
    for matrix, found in zip(matrices, held, strict=True):
        expected = spread_out(matrix)
        assert len(expected) == weight_bytes(matrix)
        form, n = BLOCKS[name], 21
        for _, width, at in form.places(32):
            here = slice(at, at + n * width)
            assert np.array_equal(found[here], expected[here])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("k", [7, 12])
def test_rows_that_begin_anywhere(name: str, k: int, rng: np.random.Generator) -> None:
    assert worst(product(name, 3, k, rng), (9, 1)) <= FLOAT


@pytest.mark.parametrize("name", ["F16", "Q4_1"])
def test_experts(name: str, rng: np.random.Generator) -> None:
    program = mixture(rng, dim=32, ffn_dim=64, n_experts=3, n_used=2, quant=name)
    assert worst(program, (9, 1)) <= (FLOAT if name == "F16" else INT8)


def test_formats_that_grow_are_named(rng: np.random.Generator) -> None:
    program = product("IQ2_XXS", 3, 256, rng)
    backend = CUDABackend(whole(program), n_ctx=16, n_batch=1)
    assert backend.notes == (
        "the GPU keeps some formats as larger ones, which have kernels there: IQ2_XXS as F16",
    )
    assert weight_bytes(program.head[0].matrix) == 3 * 256 * 2
    assert CUDABackend(whole(product("Q4_K", 3, 256, rng)), n_ctx=16, n_batch=1).notes == ()


def test_more_logits_than_there_is_room_for_at_once(rng: np.random.Generator) -> None:
    assert worst(product("F32", 3, 8, rng), (HEAD_ROWS + 6,)) <= FLOAT
