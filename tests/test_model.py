"""The model: context, truncation, refusals; and real files against an independent forward pass."""

import re
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import (
    ContextFullError,
    FormatError,
    MissingTensorError,
    UnsupportedModelError,
)
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from runtime.model import Model
from tests.oracle import agreement, logits
from tests.tiny import llama_file

PROSE = Path(__file__).parent / "data" / "prose.txt"


def test_truncated_and_read_again(tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf")
    with GGUFFile(path) as file, Model.load(file, threads=2) as model:
        model.forward([1, 2, 3, 4, 5])
        model.truncate(2)
        again = model.forward([7, 8])
        assert model.tokens == [1, 2, 7, 8]
        model.truncate(0)
        assert np.allclose(model.forward([1, 2, 7, 8]), again, atol=1e-5)


def test_context_that_is_full(tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf")
    with GGUFFile(path) as file, Model.load(file, n_ctx=8) as model:
        model.forward([1] * 6)
        with pytest.raises(ContextFullError, match="8 tokens: 6 are used and 3 more"):
            model.forward([1] * 3)
        assert len(model.tokens) == 6
        model.forward([1] * 2)


@pytest.mark.parametrize("ids", [[], [-1], [70], [2**40]])
def test_wrong_ids(ids: list[int], tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf")
    with GGUFFile(path) as file, Model.load(file) as model, pytest.raises(ValueError):
        model.forward(ids)


REFUSED = {
    "no layers": ("llama.block_count", Value("u32", 0), "block_count"),
    "a billion layers": ("llama.block_count", Value("u32", 10**9), "block_count"),
    "layers as text": ("llama.block_count", Value("str", "2"), "block_count"),
    "heads not shared evenly": ("llama.attention.head_count_kv", Value("u32", 3), "head_count_kv"),
    "more kv heads": ("llama.attention.head_count_kv", Value("u32", 8), "head_count_kv"),
    "odd rope": ("llama.rope.dimension_count", Value("u32", 7), "dimension_count"),
    "long rope": ("llama.rope.dimension_count", Value("u32", 64), "dimension_count"),
    "no epsilon": ("llama.attention.layer_norm_rms_epsilon", Value("f32", np.nan), "epsilon"),
    "rope unheard of": ("llama.rope.scaling.type", Value("str", "spiral"), "spiral"),
    "no context": ("llama.context_length", Value("u32", 0), "context_length"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_numbers_that_contradict(case: str, tmp_path: Path) -> None:
    key, value, named = REFUSED[case]
    path = llama_file(tmp_path / "m.gguf", extra={key: value})
    with GGUFFile(path) as file, pytest.raises(FormatError, match=named) as raised:
        Model.load(file)
    assert "\n" not in str(raised.value)


def test_a_huge_trained_context_is_not_allocated(tmp_path: Path) -> None:
    extra = {"llama.context_length": Value("u32", 2**30)}
    path = llama_file(tmp_path / "m.gguf", extra=extra)
    with GGUFFile(path) as file, Model.load(file) as model:
        assert model.n_ctx == 8192


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    """Every one is named: missing, misshapen, and not expected."""
    drop = ("blk.0.attn_q.weight", "blk.1.ffn_norm.weight")
    extra = {"llama.feed_forward_length": Value("u32", 128)}
    path = llama_file(tmp_path / "m.gguf", drop=drop, extra=extra, n_layers=3)
    with GGUFFile(path) as file, pytest.raises(MissingTensorError) as raised:
        Model.load(file)
    text = str(raised.value)
    assert "blk.0.attn_q.weight is missing" in text
    assert "blk.1.ffn_norm.weight is missing" in text
    assert "blk.0.ffn_gate.weight is 96 x 64, expected 128 x 64" in text
    path = llama_file(tmp_path / "b.gguf", extra={"llama.block_count": Value("u32", 1)})
    with GGUFFile(path) as file, pytest.raises(MissingTensorError, match="not expected"):
        Model.load(file)


def test_unknown_architecture(tmp_path: Path) -> None:
    extra = {"general.architecture": Value("str", "lla\x1bma")}
    keys = ("context_length", "embedding_length", "block_count", "feed_forward_length")
    more = {f"lla\x1bma.{key}": Value("u32", 64) for key in keys}
    more["lla\x1bma.attention.head_count"] = Value("u32", 4)
    more["lla\x1bma.attention.layer_norm_rms_epsilon"] = Value("f32", 1e-5)
    path = llama_file(tmp_path / "m.gguf", extra={**extra, **more})
    with GGUFFile(path) as file, pytest.raises(UnsupportedModelError) as raised:
        Model.load(file)
    assert re.search(r"lla\\x1bma cannot be run yet; known: .*\bllama\b", str(raised.value))


def test_an_unknown_architecture_is_named_before_its_keys(tmp_path: Path) -> None:
    """Others keep arrays, or nothing, under the keys that are known here."""
    path = llama_file(tmp_path / "m.gguf", extra={"general.architecture": Value("str", "rwkv9")})
    with GGUFFile(path) as file, pytest.raises(UnsupportedModelError, match="rwkv9 cannot be run"):
        Model.load(file)


def test_more_heads_than_dimensions(tmp_path: Path) -> None:
    """The largest Gemma scales queries by their quotient."""
    own = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 46,
        "feed_forward_length": 96,
        "attention.head_count": 128,
        "attention.key_length": 16,
        "attention.value_length": 16,
    }
    extra = {f"gemma2.{key}": Value("u32", value) for key, value in own.items()}
    extra["gemma2.attention.layer_norm_rms_epsilon"] = Value("f32", 1e-6)
    extra["general.architecture"] = Value("str", "gemma2")
    path = llama_file(tmp_path / "m.gguf", extra=extra)
    with GGUFFile(path) as file, pytest.raises(MissingTensorError, match="attn_q"):
        Model.load(file)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("quant", ["Q4_0", "F64"])  # with kernels and without
def test_damaged_weights_run_without_warnings(quant: str, backend: str, tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf", quant=quant)
    data = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        for name in ("blk.0.attn_k.weight", "blk.1.ffn_up.weight"):
            tensor = file.tensors[name]
            data[tensor.offset : tensor.offset + tensor.nbytes] = b"\xff\x7b" * (tensor.nbytes // 2)
    path.write_bytes(data)
    with GGUFFile(path) as file, Model.load(file, backend=backend) as model:
        assert model.forward([1] * 9).shape == (70,)
        assert model.forward([2]).shape == (70,)


@pytest.mark.parametrize("batched", [True, False])
def test_real_file_against_an_independent_pass(smollm2_gguf: Path, batched: bool) -> None:
    from runtime.tokenizer import Tokenizer

    with GGUFFile(smollm2_gguf) as file:
        ids = Tokenizer(file.metadata).encode(PROSE.read_text())[:256]
        with Model.load(file, threads=2) as model:
            if batched:
                got = model.forward(ids, all_logits=True)
            else:
                got = np.array([model.forward([i]) for i in ids])
    cosine, same = agreement(got, logits(smollm2_gguf, ids))
    assert cosine > 0.999
    assert same > 0.94


def test_real_file_knows_capitals(smollm2_gguf: Path) -> None:
    from runtime.tokenizer import Tokenizer

    with GGUFFile(smollm2_gguf) as file, Model.load(file) as model:
        tokenizer = Tokenizer(file.metadata)
        for country, capital in (("France", " Paris"), ("Italy", " Rome"), ("Spain", " Madrid")):
            model.truncate(0)
            following = model.forward(tokenizer.encode(f"The capital of {country} is"))
            assert tokenizer.decode([int(following.argmax())]) == capital
