"""Backends against each other on small random models, and the invariances of the CPU backend."""

from pathlib import Path

import numpy as np
import pytest

from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from runtime.kernels.table import FORMATS
from runtime.model import Model
from tests.tiny import llama_file

IDS = np.random.default_rng(3).integers(0, 70, 150).tolist()


def logits(
    path: Path, ids: list[int] = IDS, batches: tuple[int, ...] = (), **options
) -> np.ndarray:
    """Logits after every token; `batches` says how to cut the ids (the rest comes last)."""
    with GGUFFile(path) as file, Model.load(file, n_ctx=256, **options) as model:
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


@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_agrees_with_the_reference(shape: str, tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf", **SHAPES[shape])
    expected = logits(path, backend="reference")
    # f16 keys and values are what differs.
    assert close(logits(path, threads=2), expected, 4e-3)
    assert close(logits(path, threads=1, batches=(1,) * 149), expected, 4e-3)
    assert close(logits(path, threads=3, batches=(1, 2, 3, 5, 64, 1, 1)), expected, 4e-3)


@pytest.mark.parametrize("quant", [name for name in FORMATS if name != "F32"])
def test_formats_agree_with_the_reference(quant: str, tmp_path: Path) -> None:
    sizes = {"dim": 256, "ffn_dim": 512, "n_heads": 4, "n_kv_heads": 2, "n_layers": 1}
    path = llama_file(tmp_path / "m.gguf", quant=quant, **sizes)
    expected = logits(path, backend="reference")
    tolerance = 4e-3 if quant in ("F16", "BF16") else 0.06
    for batches in ((), (1,) * 149):
        got = logits(path, threads=2, batches=batches)
        assert close(got, expected, tolerance)


@pytest.mark.parametrize("quant", ["F32", "Q4_0", "Q6_K"])
def test_threads_do_not_change_a_bit(quant: str, tmp_path: Path) -> None:
    sizes = {"dim": 256, "ffn_dim": 768, "n_heads": 8, "n_kv_heads": 2}
    path = llama_file(tmp_path / "m.gguf", quant=quant, **sizes)
    for batches in ((), (1,) * 149, (40, 1, 1, 60)):
        one = logits(path, threads=1, batches=batches)
        for threads in (2, 3, 5):
            assert np.array_equal(logits(path, threads=threads, batches=batches), one)


def test_formats_without_kernels_run_through_numpy(tmp_path: Path) -> None:
    """IQ3_S has no kernel of its own: it runs, right, and a note says that it is slow."""
    assert "IQ3_S" not in FORMATS
    sizes = {"dim": 256, "ffn_dim": 256, "n_layers": 1}
    path = llama_file(tmp_path / "m.gguf", quant="IQ3_S", **sizes)
    with GGUFFile(path) as file, Model.load(file) as model:
        assert len(model.notes) == 1 and "IQ3_S" in model.notes[0]
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
