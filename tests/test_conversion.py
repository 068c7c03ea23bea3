"""Whole conversions: the file read back is the checkpoint, permuted, in the types planned."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_tools import conversion
from gguf_tools.checkpoint import open_checkpoint
from gguf_tools.conversion import convert, plan_conversion, quantise_band, rows_per_band
from gguf_tools.errors import CheckpointError, GGUFError, UnsupportedQuantError
from gguf_tools.plan import Plan
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import available, find_file_type
from tests.checkpoints import STORIES, llama_config, llama_tensors, make_llama

FILE_TYPES = [file_type.name for file_type in available()]


def convert_to(
    folder: Path, output: Path, file_type: str = "F32", threads: int = 2, **options: Any
) -> Plan:
    plan = plan_conversion(folder, find_file_type(file_type))
    for _ in convert(plan, output, threads=threads, **options):
        pass
    return plan


def interleaved(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Written out row by row: new row 2j + s of a head is old row s * half + j."""
    head_dim = values.shape[0] // n_heads
    half = head_dim // 2
    order = [
        head * head_dim + s * half + j
        for head in range(n_heads)
        for j in range(half)
        for s in (0, 1)
    ]
    return values[order]


def expected_tensors(
    tensors: dict[str, np.ndarray], n_heads: int, n_kv_heads: int
) -> dict[str, np.ndarray]:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
    }  # fmt: skip
    found = {}
    for name, values in tensors.items():
        if ".q_proj." in name:
            values = interleaved(values, n_heads)
        if ".k_proj." in name:
            values = interleaved(values, n_kv_heads)
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = values
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 24, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1},
    ],
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_f32_is_the_checkpoint_reordered(
    tmp_path: Path, changes: dict[str, Any], dtype: str
) -> None:
    written = make_llama(tmp_path / "model", dtype=dtype, n_shards=2, **changes)
    if dtype == "BF16":
        written = {
            name: (values.view("<u4") & 0xFFFF0000).view("<f4") for name, values in written.items()
        }
    config = llama_config(**changes)
    convert_to(tmp_path / "model", tmp_path / "out.gguf")
    expected = expected_tensors(
        written, config["num_attention_heads"], config["num_key_value_heads"]
    )
    with GGUFFile(tmp_path / "out.gguf") as file:
        assert set(file.tensors) == set(expected)
        for name, values in expected.items():
            assert file.tensors[name].shape == values.shape
            np.testing.assert_array_equal(file.load(name), values, err_msg=name)


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_every_type_of_the_embedded_model(tmp_path: Path, file_type: str) -> None:
    """Types, sizes and bytes: against gguf's reader, and each tensor quantised in one piece."""
    output = tmp_path / "out.gguf"
    plan = convert_to(STORIES, output, file_type)
    assert output.stat().st_size == plan.total_size
    read = gguf.GGUFReader(output)
    assert [tensor.name for tensor in read.tensors] == [tensor.name for tensor in plan.tensors]
    for tensor, planned in zip(read.tensors, plan.tensors, strict=True):
        assert tensor.tensor_type.name == planned.quant.name
        assert tuple(reversed(tensor.shape.tolist())) == planned.shape
        whole = quantise_band(planned, 0, planned.source.n_rows).blocks
        assert tensor.data.tobytes() == whole.tobytes(), tensor.name
    fields = {name: field.contents() for name, field in read.fields.items()}
    assert fields["general.file_type"] == find_file_type(file_type).file_type_id
    assert fields["general.quantization_version"] == 2
    assert len(fields["tokenizer.ggml.tokens"]) == 512


@pytest.mark.parametrize("file_type", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("threads", [1, 3])
def test_bands_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_type: str, threads: int
) -> None:
    convert_to(STORIES, tmp_path / "whole.gguf", file_type)
    monkeypatch.setattr(conversion, "BAND", 64 * 10)
    plan = convert_to(STORIES, tmp_path / "bands.gguf", file_type, threads=threads)
    steps = {tensor.name: rows_per_band(tensor) for tensor in plan.tensors}
    assert steps["token_embd.weight"] == 10
    assert steps["blk.0.attn_q.weight"] == 8  # whole heads
    assert steps["blk.0.ffn_down.weight"] == 3
    assert (tmp_path / "bands.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_progress_counts_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "BAND", 64 * 16)
    plan = plan_conversion(STORIES, find_file_type("Q8_0"))
    steps = list(convert(plan, tmp_path / "out.gguf", threads=2))
    assert sum(step.n_bytes for step in steps) == sum(tensor.nbytes for tensor in plan.tensors)
    assert [step.tensor.name for step in steps if step.finished] == [
        tensor.name for tensor in plan.tensors
    ]


def test_only_a_few_bands_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the writing is, reading does not run ahead of it."""
    monkeypatch.setattr(conversion, "BAND", 64)
    started = 0
    lock = threading.Lock()

    def counted(*arguments: Any) -> Any:
        nonlocal started
        with lock:
            started += 1
        return quantise_band(*arguments)

    monkeypatch.setattr(conversion, "quantise_band", counted)
    plan = plan_conversion(STORIES, find_file_type("F32"))
    for i, _ in enumerate(convert(plan, tmp_path / "out.gguf", threads=2)):
        assert started <= i + 1 + 2 + 2
        if i > 200:
            break


def with_value(
    tensors: dict[str, np.ndarray], name: str, index: tuple[int, ...], value: float
) -> None:
    tensors[name][index] = value


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (37, 5)),
        ("model.embed_tokens.weight", (511, 63)),
        ("model.norm.weight", (17,)),
        ("model.layers.0.self_attn.k_proj.bias", (9,)),
    ],
)
@pytest.mark.parametrize("file_type", ["F32", "Q8_0"])
def test_what_is_no_number_is_named_with_its_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    name: str,
    index: tuple[int, ...],
    file_type: str,
) -> None:
    monkeypatch.setattr(conversion, "BAND", 64 * 20)
    tensors = llama_tensors(llama_config(attention_bias=True))
    tensors[name][index] = value
    make_llama(tmp_path / "model", tensors=tensors, attention_bias=True)
    place = f"tensor {name}[{', '.join(map(str, index))}] is {value:g}"
    with pytest.raises(CheckpointError) as caught:
        convert_to(tmp_path / "model", tmp_path / "out.gguf", file_type)
    assert place in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("file_type", "value", "held"),
    [
        ("F16", 70000.0, False),
        ("F16", 65504.0, True),
        ("F16", -1e9, False),
        ("BF16", 70000.0, True),
        ("BF16", 3.4e38, False),
        ("F32", 3.4e38, True),
        ("Q8_0", 8e6, True),
        ("Q8_0", 9e6, False),
        ("Q4_K_M", 1e30, False),
    ],
)
def test_what_a_type_cannot_hold_is_named(
    tmp_path: Path, file_type: str, value: float, held: bool
) -> None:
    config = {"hidden_size": 256, "intermediate_size": 256}
    tensors = llama_tensors(llama_config(**config))
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 9] = value
    make_llama(tmp_path / "model", tensors=tensors, **config)
    output = tmp_path / "out.gguf"
    if held:
        convert_to(tmp_path / "model", output, file_type)
        return
    with pytest.raises(UnsupportedQuantError, match=r"q_proj.weight\[3, 9\] is .* can hold"):
        convert_to(tmp_path / "model", output, file_type)
    assert not output.exists()


def test_a_double_beyond_float32_is_named(tmp_path: Path) -> None:
    tensors = {name: values.astype("<f8") for name, values in llama_tensors(llama_config()).items()}
    tensors["model.norm.weight"][3] = 1e200
    make_llama(tmp_path / "model", tensors=tensors, dtype="F64")
    with pytest.raises(CheckpointError, match=r"model.norm.weight\[3\] is inf"):
        convert_to(tmp_path / "model", tmp_path / "out.gguf")


def break_shard(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def remove_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [break_shard, remove_shard])
def test_a_checkpoint_that_changes_meanwhile_leaves_no_file(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    make_llama(tmp_path / "model")
    plan = plan_conversion(tmp_path / "model", find_file_type("F32"))
    damage(tmp_path / "model")
    with pytest.raises(GGUFError):
        list(convert(plan, tmp_path / "out.gguf", threads=2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_stopping_in_the_middle_leaves_no_file(tmp_path: Path) -> None:
    plan = plan_conversion(STORIES, find_file_type("F32"))
    steps = convert(plan, tmp_path / "out.gguf", threads=2)
    next(steps)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf.part"]
    steps.close()
    assert list(tmp_path.iterdir()) == []


def test_the_oracle_of_these_tests_is_gguf_pys_permutation() -> None:
    """`interleaved`, written out above, is what llama.cpp's converter does with reshapes."""
    values = np.arange(4 * 16 * 3, dtype=np.float32).reshape(64, 3)
    theirs = values.reshape(4, 2, 8, 3).swapaxes(1, 2).reshape(64, 3)
    np.testing.assert_array_equal(interleaved(values, 4), theirs)


def test_smollm2_tensors(smollm2_checkpoint: Path) -> None:
    """A real BF16 checkpoint: a few tensors in BF16, bit for bit."""
    plan = plan_conversion(smollm2_checkpoint, find_file_type("BF16"))
    planned = {tensor.name: tensor for tensor in plan.tensors}
    stored = open_checkpoint(smollm2_checkpoint).tensors
    for name, source, n_heads in (
        ("blk.29.attn_q.weight", "model.layers.29.self_attn.q_proj.weight", 9),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", 3),
    ):
        tensor = stored[source]
        expected = interleaved(tensor.load(0, tensor.n_rows), n_heads)
        blocks = quantise_band(planned[name], 0, tensor.n_rows).blocks
        np.testing.assert_array_equal(planned[name].quant.dequantize(blocks), expected)


def test_threads_that_start_with_different_formats() -> None:
    """Importing kernels and compiling them take locks in different orders; once they met."""
    program = """
import threading
import numpy as np
from gguf_tools.quants import by_name
weights = np.ones((4, 256), np.float32)
names = ("Q4_0", "Q5_1", "Q8_0", "Q6_K", "F16", "IQ4_NL")
threads = [threading.Thread(target=by_name(name).quantize, args=(weights,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    for _ in range(3):
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
