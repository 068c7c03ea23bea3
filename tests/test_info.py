"""`gguf info`: what it prints, for people and as JSON, and how it ends."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gguf_tools.describe import describe, short_count, short_size, show_value
from gguf_tools.reader import GGUFFile
from tests.gguf_bytes import F32, STR, U32, Parts, array_key, key, string, tensor, text_key, u32


def run_info(
    *arguments: str | Path, stdout: int = subprocess.PIPE, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gguf_tools", "info", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding=encoding,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        cwd=Path(__file__).parents[1],
        timeout=60,
        check=False,
    )


def write_parts(folder: Path, parts: Parts) -> Path:
    path = folder / "made.gguf"
    path.write_bytes(parts.build())
    return path


def test_json(tmp_path: Path) -> None:
    path = write_parts(tmp_path, Parts())
    ended = run_info(path, "--json")
    assert ended.returncode == 0 and ended.stderr == ""
    facts = json.loads(ended.stdout)
    data_offset = len(Parts().build()) - len(Parts().data)
    assert facts == {
        "architecture": "llama",
        "parameters": 96 + 32 + 96,
        "file_size": len(Parts().build()),
        "bits_per_weight": 8 * (384 + 128 + 102) / 224,
        "types": {"F32": 2, "Q8_0": 1},
        "tensors": [
            {
                "name": name,
                "type": kind,
                "shape": shape,
                "bytes": size,
                "offset": data_offset + offset,
            }
            for name, kind, shape, size, offset in (
                ("token_embd.weight", "F32", [32, 3], 384, 0),
                ("output_norm.weight", "F32", [32], 128, 384),
                ("output.weight", "Q8_0", [32, 3], 102, 512),
            )
        ],
        "metadata": {
            "general.architecture": "llama",
            "llama.context_length": 2048,
            "llama.rope.freq_base": 10000.0,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.tokens": ["a", "bc", ""],
            "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
        },
    }


def test_json_of_odd_values(tmp_path: Path) -> None:
    """JSON has neither NaN nor broken text; what it prints is JSON all the same."""
    parts = Parts(tensors=[], data=b"")
    parts.keys = [
        key("a.nan", F32, struct.pack("<f", float("nan"))),
        array_key("a.inf", F32, 2, struct.pack("<2f", float("inf"), float("-inf"))),
        array_key("a.bytes", STR, 1, string(b"\xff")),
        text_key("\x1b[31m", "\x1b[2J"),
    ]
    ended = run_info(write_parts(tmp_path, parts), "--json", encoding="ascii")
    assert ended.returncode == 0
    assert "\x1b" not in ended.stdout
    facts = json.loads(ended.stdout)
    assert facts["architecture"] is None
    assert facts["parameters"] == 0 and facts["bits_per_weight"] is None
    assert facts["types"] == {} and facts["tensors"] == []
    assert facts["metadata"] == {
        "a.nan": "NaN",
        "a.inf": ["Infinity", "-Infinity"],
        "a.bytes": ["\udcff"],
        "\x1b[31m": "\x1b[2J",
    }


def test_json_is_complete_and_terminal_is_short(smollm2_gguf: Path) -> None:
    facts = describe(GGUFFile(smollm2_gguf))
    assert len(facts["metadata"]["tokenizer.ggml.tokens"]) == 49152
    assert facts["types"] == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert facts["parameters"] == 134_515_008
    json.dumps(facts, allow_nan=False)
    ended = run_info(smollm2_gguf, "--metadata", "--tensors")
    assert ended.returncode == 0
    assert len(ended.stdout) < 100_000
    for text in (
        "134,515,008 (134.5M)",
        "5.7437",
        "Q4_1: 210 tensors",
        "8,192",
        "gpt2, pre smollm, 49,152 tokens",
        "bos 1 '<|im_start|>'",
        "yes (368 characters)",
        "(49,152 values)",
        "blk.29.ffn_down.weight",
        "576 x 49152",
    ):
        assert text in ended.stdout


def test_vocabulary_only(tmp_path: Path) -> None:
    ended = run_info(write_parts(tmp_path, Parts(tensors=[])), "--tensors", "--metadata")
    assert ended.returncode == 0
    assert "no tensors in this file" in ended.stdout


def test_lists_only_on_demand(tmp_path: Path) -> None:
    path = write_parts(tmp_path, Parts())
    assert "token_embd.weight" not in run_info(path).stdout
    assert "token_embd.weight" in run_info(path, "--tensors").stdout
    assert "llama.rope.freq_base" not in run_info(path).stdout
    assert "llama.rope.freq_base" in run_info(path, "--metadata").stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_nothing_from_the_file_is_markup_or_escape(tmp_path: Path, encoding: str) -> None:
    nasty = "[red]\x1b[2J\u202e[/red][/] :smile: \u4e16"
    parts = Parts(tensors=[tensor(nasty, (4,), 0, 0)])
    parts.keys = [
        text_key("general.architecture", nasty),
        text_key("general.name", nasty),
        text_key("tokenizer.ggml.model", nasty),
        array_key("tokenizer.ggml.tokens", STR, 1, string(nasty)),
        key("tokenizer.ggml.bos_token_id", U32, u32(0)),
        key("tokenizer.ggml.eos_token_id", U32, u32(77)),
        text_key("tokenizer.chat_template", nasty),
        text_key(f"tokenizer.chat_template.{nasty}", nasty),
        key(f"general.sampling.{nasty}", U32, u32(1)),
        text_key(nasty, nasty),
    ]
    path = write_parts(tmp_path, parts)
    ended = run_info(path, "--metadata", "--tensors", encoding=encoding)
    assert ended.returncode == 0 and ended.stderr == ""
    assert "\x1b" not in ended.stdout and "\u202e" not in ended.stdout
    assert ended.stdout.count("[red]\\x1b[2J\\u202e[/red][/] :smile:") >= 10


def test_keys_of_unexpected_types(tmp_path: Path) -> None:
    """The facts are shown as they are, whatever they are."""
    parts = Parts()
    parts.keys = [
        key("general.architecture", U32, u32(3)),
        text_key("tokenizer.ggml.tokens", "abc"),
        key("tokenizer.ggml.model", U32, u32(3)),
        text_key("tokenizer.ggml.bos_token_id", "one"),
        key("tokenizer.chat_template", U32, u32(3)),
        array_key("general.name", U32, 2, u32(1) + u32(2)),
    ]
    path = write_parts(tmp_path, parts)
    assert run_info(path, "--metadata").returncode == 0
    assert json.loads(run_info(path, "--json").stdout)["architecture"] is None


def test_errors_are_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Parts().build()[:-50])
    for path in (broken, tmp_path / "absent.gguf", tmp_path):
        for option in ([], ["--json"]):
            ended = run_info(path, *option)
            assert ended.returncode == 1
            assert ended.stdout == ""
            assert ended.stderr.startswith(f"error: {path}")
            assert ended.stderr.count("\n") == 1
    ended = run_info(broken, "--no-such-option")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    path = write_parts(tmp_path, Parts())
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = run_info(path, "--json", stdout=writing)
    finally:
        os.close(writing)
    assert ended.stderr == ""


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    path = write_parts(tmp_path, Parts())
    with open("/dev/full", "w") as full:
        ended = run_info(path, stdout=full.fileno())
    assert ended.returncode == 1
    assert ended.stderr == "error: No space left on device\n"


def test_help_answers_at_once() -> None:
    """Nothing heavy is imported; the clock has slack for a busy machine."""
    code = "import sys, gguf_tools.cli; print(*sys.modules)"
    loading = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=True,
    )
    loaded = set(loading.stdout.split())
    assert not loaded & {"numpy", "numba", "llvmlite", "gguf", "tokenizers", "sentencepiece"}
    start = time.perf_counter()
    ended = run_info("--help")
    assert ended.returncode == 0
    assert "fastest dimension" in " ".join(ended.stdout.split())
    assert time.perf_counter() - start < 3


def test_numbers_as_people_say_them() -> None:
    assert [short_count(n) for n in (0, 999, 134_515_008, 8_030_261_248)] == [
        "0",
        "999",
        "134.5M",
        "8.03B",
    ]
    assert [short_size(n) for n in (5, 98_362_432, 5 << 30)] == ["5 bytes", "93.81 MiB", "5.00 GiB"]
    assert show_value(1e-5) == "1e-05"
    assert show_value(True) == "true"
    assert show_value("x" * 500).endswith("(500 characters)")
