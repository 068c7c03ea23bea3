"""Backends against each other on small random models, and the invariances of the CPU backend."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from runtime.backends.cpu import CPUBackend, few_tokens
from runtime.backends.memory import Arena, make_caches
from runtime.backends.needs import few_kernels
from runtime.backends.reference import WEIGHTS_AT_ONCE, matmul
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.kernels.experts import FEW as EXPERTS_AT_ONCE
from runtime.kernels.kv_cache import KV_TYPES
from runtime.kernels.matmul import FEW_TOKENS
from runtime.kernels.table import FORMATS
from runtime.model import Model
from runtime.program import KVShape, Matrix, Program, Scale
from runtime.stages import whole
from runtime.streamed_rows import StreamedRows
from tests.programs import compile_all, mixture, program_of
from tests.tiny import llama_file

IDS = np.random.default_rng(3).integers(0, 70, 150).tolist()


def logits(
    path: Path, ids: list[int] = IDS, batches: tuple[int, ...] = (), **options
) -> np.ndarray:
    """Logits after every token; `batches` says how to cut the ids (the rest comes last)."""
    options.setdefault("n_ctx", 256)
    with GGUFFile(path) as file, Model.load(file, **options) as model:
        if any(1 < size <= FEW_TOKENS for size in batches):
            compile_all(few_kernels(build_program(file, read_config(file))))
        parts, first = [], 0
        for size in (*batches, len(ids) - sum(batches)):
            parts.append(model.forward(ids[first : first + size], all_logits=True))
            first += size
        assert model.tokens == ids
        return np.concatenate(parts)


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


SHAPES = {
    "grouped": {},
    "odd sizes": {"dim": 40, "ffn_dim": 52, "n_heads": 5, "n_kv_heads": 1, "n_vocab": 71},
    "head of 8": {"dim": 64, "n_heads": 8, "n_kv_heads": 4},
    "head of 24": {"dim": 48, "n_heads": 2, "n_kv_heads": 2},
    "head of 80": {"dim": 80, "n_heads": 2, "n_kv_heads": 1, "key_dim": 80},
    "head of 256": {"dim": 64, "n_heads": 2, "n_kv_heads": 1, "key_dim": 256},
    "many heads on one": {"dim": 128, "n_heads": 16, "n_kv_heads": 1, "key_dim": 16},
    "biases": {"biases": True},
    "separate head": {"tied": False},
    "window": {"extra": {"llama.attention.sliding_window": Value("u32", 20)}},
    "linear rope": {
        "extra": {
            "llama.rope.scaling.type": Value("str", "linear"),
            "llama.rope.scaling.factor": Value("f32", 4.0),
        }
    },
    "yarn rope": {
        "extra": {
            "llama.rope.scaling.type": Value("str", "yarn"),
            "llama.rope.scaling.factor": Value("f32", 4.0),
            "llama.rope.scaling.original_context_length": Value("u32", 64),
        }
    },
    "llama3 rope": {"rope_factors": True},
    "partial rope": {"extra": {"llama.rope.dimension_count": Value("u32", 8)}},
}


KV_TOLERANCE = {"f16": 4e-3, "q8_0": 3e-2}  # of the largest logit: what rounding costs


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_a_few_tokens_are_single_steps(quant: str, kv_type: str, tmp_path: Path) -> None:
    """To the bit, whatever their number, at the edges of blocks and of a window, too."""
    extra = {"llama.attention.sliding_window": Value("u32", 70)}
    path = llama_file(tmp_path / "m.gguf", quant=quant, extra=extra, biases=True)
    sizes = tuple(range(2, FEW_TOKENS + 1))
    batches = (*sizes, *sizes, *sizes)
    ids = IDS[: sum(batches) + 1]
    single = logits(path, ids, batches=(1,) * (len(ids) - 1), kv_type=kv_type)
    for threads in (1, 2, 3):
        got = logits(path, ids, batches=batches, threads=threads, kv_type=kv_type)
        assert np.array_equal(got, single)
    with GGUFFile(path) as file, Model.load(file, kv_type=kv_type) as model:
        for size in sizes:
            model.truncate(0)
            assert np.array_equal(model.forward(ids[:size]), single[size - 1])


def test_a_few_tokens_share_a_step() -> None:
    """The tables for a few tokens are used, for as many as are computed as single ones."""
    gated = program_of([Scale("x", 0.5)], 40)
    experts = mixture(np.random.default_rng(2), quant="Q8_0")
    for program, most in ((gated, FEW_TOKENS), (experts, EXPERTS_AT_ONCE)):
        compile_all(few_kernels(program))
        stage = whole(program)
        backend = CPUBackend(stage, n_ctx=64, n_threads=2, n_batch=16)
        assert few_tokens(stage) == most
        read(backend, program, 0, most + 1)
        assert backend._few_tables is None
        together = read(backend, program, 0, most)
        assert backend._few_tables is not None
        single = [read(backend, program, i, i + 1) for i in range(most)]
        assert np.array_equal(together, np.concatenate(single))
        backend.close()


def read(backend: CPUBackend, program: Program, first: int, end: int) -> np.ndarray:
    """The logits after each of some positions, whose tokens have the same numbers."""
    values = {"x": program.embed(np.arange(first, end), first)}
    return backend.run(0, values, first, end - first)["logits"]


WITHOUT_FOLDER = """
import numpy as np
from runtime.backends.cpu import CPUBackend
from runtime.program import Scale
from runtime.stages import whole
from tests.programs import program_of
from tests.test_backends import read
program = program_of([Scale("x", 0.5)], 40)
backend = CPUBackend(whole(program), n_ctx=64, n_threads=1, n_batch=16)
together = read(backend, program, 0, 5)
assert backend._few_tables is None
single = [read(backend, program, i, i + 1) for i in range(5)]
assert np.array_equal(together, np.concatenate(single))
backend.close()
"""


def test_a_few_tokens_before_their_kernels_are_compiled() -> None:
    """Where nothing can be compiled in the background they go one after the other."""
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "GGUF_TOOLS_CACHE": "off"}
    command = [sys.executable, "-c", WITHOUT_FOLDER]
    subprocess.run(command, check=True, cwd=root, env=environment)


@pytest.mark.parametrize("kv_type", KV_TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_agrees_with_the_reference(shape: str, kv_type: str, tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf", **SHAPES[shape])
    expected = logits(path, backend="reference")
    # How keys and values are rounded is what differs.
    for threads, batches in ((2, ()), (1, (1,) * 149), (3, (1, 2, 3, 5, 64, 1, 1))):
        got = logits(path, threads=threads, batches=batches, kv_type=kv_type)
        assert close(got, expected, KV_TOLERANCE[kv_type])


@pytest.mark.parametrize("window", [100, 1024])
@pytest.mark.parametrize("kv_type", KV_TOLERANCE)
def test_many_positions(kv_type: str, window: int, tmp_path: Path) -> None:
    """Chunks of several blocks in one layer's attention; windows that begin within a block."""
    extra = {
        "llama.context_length": Value("u32", 2048),
        "llama.attention.sliding_window": Value("u32", window),
    }
    path = llama_file(tmp_path / "m.gguf", extra=extra, n_layers=1)
    ids = np.random.default_rng(5).integers(0, 70, 1310).tolist()
    batches = (1100, *(1,) * 60)
    options = {"n_ctx": 2048, "batches": batches}
    expected = logits(path, ids, backend="reference", **options)
    got = logits(path, ids, threads=2, kv_type=kv_type, **options)
    assert close(got, expected, KV_TOLERANCE[kv_type])


def test_a_quantised_cache_is_half_as_large() -> None:
    sizes = []
    for kv in (KV_TYPES["f16"], KV_TYPES["q8_0"]):
        arena = Arena()
        make_caches(arena, [KVShape(9, 3, 64, 64)] * 2, kv, 1024)
        sizes.append(arena.size)
    assert sizes[0] == 2 * 2 * 3 * 1024 * 64 * 2  # layers, keys and values, heads, f16
    assert sizes[1] == sizes[0] * 34 // 64  # 32 bytes and a half instead of 32 halves


def test_kv_types_that_are_not_known(tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf")
    with GGUFFile(path) as file, pytest.raises(ValueError, match=r"f16.*q8_0.*not 'q4_0'"):
        Model.load(file, kv_type="q4_0")


@pytest.mark.parametrize("kv_type", KV_TOLERANCE)
def test_positions_forgotten_leave_nothing_behind(kv_type: str, tmp_path: Path) -> None:
    """Keys and values that are not numbers, forgotten, do not reach what is read after."""
    path = llama_file(tmp_path / "m.gguf", tied=False)
    with GGUFFile(path) as file:
        embedding = file.tensors["token_embd.weight"]
    with open(path, "r+b") as file:
        file.seek(embedding.offset + 69 * embedding.row_bytes)
        file.write(np.full(64, np.inf, np.float32).tobytes())
    with GGUFFile(path) as file, Model.load(file, threads=2, kv_type=kv_type) as model:
        fresh = model.forward(IDS[:20])
        model.truncate(10)
        model.forward([69] * 60)
        model.truncate(10)
        assert np.allclose(model.forward(IDS[10:20]), fresh, atol=1e-2)
        model.truncate(10)
        for i in IDS[10:20]:
            last = model.forward([i])
        assert np.allclose(last, fresh, atol=1e-2)


@pytest.mark.parametrize("quant", [name for name in FORMATS if name != "F32"])
def test_formats_agree_with_the_reference(quant: str, tmp_path: Path) -> None:
    sizes = {"dim": 256, "ffn_dim": 512, "n_heads": 4, "n_kv_heads": 2, "n_layers": 1}
    path = llama_file(tmp_path / "m.gguf", quant=quant, **sizes)
    expected = logits(path, backend="reference")
    tolerance = 4e-3 if quant in ("F16", "BF16") else 0.06
    for batches in ((), (1,) * 149):
        got = logits(path, threads=2, batches=batches)
        assert close(got, expected, tolerance)


@pytest.mark.parametrize(
    ("quant", "kv_type"), [("F32", "f16"), ("Q4_0", "f16"), ("Q6_K", "f16"), ("F32", "q8_0")]
)
def test_threads_do_not_change_a_bit(quant: str, kv_type: str, tmp_path: Path) -> None:
    sizes = {"dim": 256, "ffn_dim": 768, "n_heads": 8, "n_kv_heads": 2}
    path = llama_file(tmp_path / "m.gguf", quant=quant, **sizes)
    for batches in ((), (1,) * 149, (40, 1, 1, 60)):
        one = logits(path, threads=1, batches=batches, kv_type=kv_type)
        for threads in (2, 3, 5):
            got = logits(path, threads=threads, batches=batches, kv_type=kv_type)
            assert np.array_equal(got, one)


def test_numpy_reads_a_few_rows_at_a_time() -> None:
    """A model's self-check runs through it: memory must not grow with the model."""
    quant, n_rows, n_columns = by_name("Q8_0"), 600, 1 << 14
    blocks = np.zeros((n_rows, quant.row_bytes(n_columns)), np.uint8)
    blocks[:, 2:] = np.arange(n_rows)[:, None] % 7
    blocks[:, 1::34] = 0x3C  # scales of 1
    blocks[:, 0::34] = 0
    read = []

    def rows(first: int, last: int) -> np.ndarray:
        read.append(last - first)
        return blocks[first:last]

    data = StreamedRows(rows, 0, n_rows, blocks.shape[1])
    matrix = Matrix("blk.0.ffn_down.weight", quant, n_rows, n_columns, data)
    x = np.random.default_rng(0).normal(size=(3, n_columns)).astype(np.float32)
    expected = x @ quant.dequantize(blocks).T
    np.testing.assert_allclose(matmul(x, matrix), expected, rtol=1e-3, atol=1e-2)
    assert sum(read) == n_rows and max(read) * n_columns <= WEIGHTS_AT_ONCE


def test_formats_without_kernels_run_through_numpy(tmp_path: Path) -> None:
    """Q8_1 has no kernel of its own: it runs, right, and a note says that it is slow."""
    assert "Q8_1" not in FORMATS
    sizes = {"dim": 256, "ffn_dim": 256, "n_layers": 1}
    path = llama_file(tmp_path / "m.gguf", quant="Q8_1", **sizes)
    with GGUFFile(path) as file, Model.load(file) as model:
        assert len(model.notes) == 1 and "Q8_1" in model.notes[0]
    ids = IDS[:20]
    expected = logits(path, ids, backend="reference")
    assert close(logits(path, ids, threads=2), expected, 4e-3)
    assert close(logits(path, ids, threads=2, batches=(1,) * 19), expected, 4e-3)


def test_values_that_are_not_numbers_do_not_hang(tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf")
    with GGUFFile(path) as file:
        offset = file.tensors["blk.0.attn_norm.weight"].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.array([np.nan, np.inf], np.float32).tobytes())
    got = logits(path, IDS[:10], threads=2)
    assert got.shape == (10, 70) and np.isnan(got).all()
