"""`gguf verify`: every kind of damage is found, and a good file is not called a broken one."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import FormatError, GGUFError
from gguf_tools.quants import QUANTS, by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.tools.digests import read_digests
from gguf_tools.tools.scales import count_not_finite
from gguf_tools.tools.verify import ERROR, WARNING, Report, verify
from gguf_tools.values import Array, MetadataValue, Value
from tests.gguf_bytes import F32, STR, U32, Parts, array_key, key, string, tensor, text_key, u32
from tests.kernels.blocks import random_rows
from tests.test_splitting import gguf, split_in
from tests.tiny import llama_file

VOCABULARY: dict[str, MetadataValue] = {
    "tokenizer.ggml.model": Value("str", "gpt2"),
    "tokenizer.ggml.tokens": Array("str", [f"t{i}" for i in range(70)]),
    "tokenizer.ggml.token_type": Array("i32", [1] * 70),
    "tokenizer.ggml.merges": Array("str", ["t 1"]),
    "tokenizer.ggml.eos_token_id": Value("u32", 69),
    "tokenizer.ggml.eot_token_ids": Array("i32", [3, 69]),
}
NO_IDS: dict[str, MetadataValue | None] = {"eos_token_id": None, "eot_token_ids": None}


def checked(path: Path) -> Report:
    with GGUFFile(path) as file:
        return verify(file)


def model(path: Path, **changes: MetadataValue | None) -> Path:
    """A good model, but for keys below tokenizer.ggml."""
    named = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    merged = {**VOCABULARY, **named}
    extra = {name: value for name, value in merged.items() if value is not None}
    return llama_file(path, quant="Q8_0", extra=extra)


def test_good_files(tmp_path: Path, stories260k_gguf: Path) -> None:
    path = model(tmp_path / "good.gguf")
    first, *_ = split_in(path, tmp_path / "part", max_tensors=6)
    for good in (path, first, stories260k_gguf):
        assert checked(good).findings == ()
    ended = gguf("verify", path, first)
    assert ended.returncode == 0 and ended.stderr == ""
    assert ended.stdout == f"{path}: good\n{first}: good\n"


@pytest.mark.parametrize(
    ("changes", "severity", "words"),
    [
        ({"eos_token_id": Value("u32", 70)}, ERROR, "0 to 69, found 70"),
        ({"bos_token_id": Value("i32", -1)}, ERROR, "0 to 69, found -1"),
        ({"bos_token_id": Value("str", "x")}, ERROR, "0 to 69, found x"),
        ({"eot_token_ids": Array("i32", [3, 99])}, ERROR, "found 99"),
        ({"token_type": Array("i32", [1] * 69)}, ERROR, "expected 70 numbers"),
        ({"scores": Array("f32", [1.0] * 71)}, ERROR, "expected 70 numbers"),
        ({"merges": None}, ERROR, "merges is missing"),
        ({"model": None}, ERROR, "model is missing"),
        ({"tokens": None}, ERROR, "tokens is missing"),
        ({"tokens": Array("str", ["x"] * 71), "token_type": None}, ERROR, "70 rows for 71 tokens"),
        ({"tokens": Array("str", ["x"] * 69), "token_type": None, **NO_IDS}, WARNING, "only 69"),
    ],
)
def test_tokenizers(
    changes: dict[str, MetadataValue | None], severity: str, words: str, tmp_path: Path
) -> None:
    report = checked(model(tmp_path / "m.gguf", **changes))
    assert any(f.severity == severity and words in f.what for f in report.findings), report
    assert report.good == (severity == WARNING)


def test_metadata(tmp_path: Path) -> None:
    for extra, words in (
        ({"llama.block_count": Value("u32", 4)}, "no tensors of layer 2, 3 of 4"),
        ({"llama.block_count": Value("u32", 10**9)}, "1,000,000,000 layers, but"),
        ({"llama.block_count": Value("u32", 0)}, "block_count: expected a number of at least 1"),
        ({"llama.context_length": Value("str", "x")}, "context_length: expected a number"),
        ({"llama.embedding_length": Value("u32", 32)}, "rows of 64"),
        ({"llama.rope.freq_base": Value("f32", float("nan"))}, "freq_base: found what is no"),
        ({"llama.a": Array("f32", [1.0, float("inf")])}, "llama.a: found what is no finite number"),
        ({"general.architecture": Value("str", "qwen2")}, "qwen2.block_count: expected"),
        ({"general.architecture": Value("u32", 1)}, "general.architecture is missing"),
    ):
        path = tmp_path / "m.gguf"
        path.unlink(missing_ok=True)
        report = checked(llama_file(path, extra={**VOCABULARY, **extra}))
        assert not report.good
        assert any(words in finding.what for finding in report.findings), (words, report)
    path.unlink()
    report = checked(llama_file(path, extra=VOCABULARY, drop=("token_embd.weight",)))
    assert any("token_embd.weight is missing" in finding.what for finding in report.findings)
    path.unlink()
    report = checked(llama_file(path, extra={"general.type": Value("str", "adapter")}))
    assert report.good


def layout(tmp_path: Path, parts: Parts) -> list[tuple[str, str]]:
    path = tmp_path / "odd.gguf"
    path.write_bytes(parts.build())
    found = [(finding.severity, finding.what) for finding in checked(path).findings]
    return [finding for finding in found if "tokenizer" not in finding[1]]


def test_layout(tmp_path: Path) -> None:
    plain = Parts(keys=[text_key("general.architecture", "clip")], data=bytes(640))
    assert layout(tmp_path, plain) == []
    assert layout(tmp_path, replace(plain, data=bytes(614))) == []  # the last padding is missing
    gap = replace(plain, data=plain.data + bytes(128))
    gap.tensors = [*plain.tensors[:2], tensor("output.weight", (32, 3), 8, 512 + 64)]
    (finding, *_) = layout(tmp_path, gap)
    assert finding[0] == ERROR and "output.weight" in finding[1] and "llama.cpp" in finding[1]
    later = replace(plain, data=bytes(32) + plain.data)
    later.tensors = [
        tensor("token_embd.weight", (32, 3), 0, 32),
        tensor("output_norm.weight", (32,), 0, 416),
        tensor("output.weight", (32, 3), 8, 544),
    ]
    assert layout(tmp_path, later)[0][0] == ERROR
    dirty = replace(plain, data=plain.data[:-1] + b"\1")
    assert layout(tmp_path, dirty) == [
        (WARNING, "tensor output.weight: the padding behind it is not zero")
    ]
    trailing = replace(plain, data=plain.data + b"zip file")
    assert layout(tmp_path, trailing) == [
        (WARNING, "8 bytes follow the last tensor, which belong to nothing")
    ]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.name)
def test_scales_of_every_format(quant) -> None:
    """Each byte pattern is judged as dequantising judges it, and bands of good blocks are good."""
    sizes = 1 << 10
    rng = np.random.default_rng(6)
    blocks = rng.integers(0, 256, (sizes, quant.block_bytes), dtype=np.uint8)
    weights = quant.dequantize(blocks.reshape(-1)).reshape(sizes, -1)
    wanted = int(np.count_nonzero(~np.isfinite(weights).all(axis=1)))
    found = count_not_finite(quant, blocks.reshape(-1))
    if quant.name in ("I8", "I16", "I32", "I64"):
        assert found == 0
    elif quant.name in ("Q8_1", "MXFP4"):  # a sum that no weight depends on; ggml's NaN
        assert found >= wanted
    else:
        assert found == wanted


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_K", "Q6_K", "Q8_0", "MXFP4"])
def test_one_bad_scale_in_a_file(kind: str, tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf", quant=kind, dim=256, ffn_dim=256, extra=VOCABULARY)
    assert checked(path).good
    name = "blk.1.ffn_up.weight"
    quant = by_name(kind)
    with GGUFFile(path) as file:
        at = file.tensors[name].offset + 9 * quant.block_bytes
    place, bad = {
        "F32": (0, struct.pack("<f", np.nan)),
        "F16": (0, b"\0\x7c"),
        "BF16": (0, b"\x80\xff"),
        "Q4_K": (2, b"\0\xfc"),
        "Q6_K": (208, b"\1\x7e"),
        "Q8_0": (0, b"\0\x7c"),
        "MXFP4": (0, b"\xff"),
    }[kind]
    data = bytearray(path.read_bytes())
    data[at + place : at + place + len(bad)] = bad
    path.write_bytes(data)
    (finding,) = checked(path).findings
    assert finding.severity == ERROR
    assert name in finding.what and "1 of " in finding.what and "NaN or infinite" in finding.what


def test_digests(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    ended = gguf("verify", "--write", path)
    assert ended.returncode == 0
    digests = tmp_path / "m.gguf.sha256"
    lines = digests.read_text().splitlines()
    with GGUFFile(path) as file:
        everything = b"".join(file.raw(name).tobytes() for name in file.tensors)
        wanted = [
            f"sha256    {hashlib.sha256(file.raw(name).tobytes()).hexdigest()}  m.gguf:{name}"
            for name in file.tensors
        ]
    assert lines == [*wanted, f"sha256    {hashlib.sha256(everything).hexdigest()}  m.gguf"]
    ended = gguf("verify", path)
    assert ended.returncode == 0 and f"(digests compared with {digests})" in ended.stdout
    # Metadata is no part of it, and neither is how the model is split.
    assert gguf("set", path, "general.name", "x" * 99, "--type", "str").returncode == 0
    assert gguf("verify", path).returncode == 0
    first, *_ = split_in(path, tmp_path / "part", max_tensors=6)
    assert gguf("verify", first, "--digests", digests).returncode == 0
    data = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        offset = file.tensors["blk.1.ffn_up.weight"].offset
    data[offset + 5] ^= 1
    path.write_bytes(data)
    ended = gguf("verify", path, "--json")
    assert ended.returncode == 1
    (facts,) = json.loads(ended.stdout)["files"]
    assert not facts["good"] and facts["digests_checked"] == str(digests)
    assert [finding["what"] for finding in facts["findings"]] == [
        "tensor blk.1.ffn_up.weight: its bytes are not those of the digest"
    ]
    assert len(facts["sha256"]) == len(wanted) and len(facts["sha256_all"]) == 64


def test_digests_of_other_tensors(tmp_path: Path) -> None:
    path = model(tmp_path / "m.gguf")
    gguf("verify", "--write", path)
    digests = tmp_path / "m.gguf.sha256"
    lines = digests.read_text().splitlines(keepends=True)
    digests.write_text(lines[0].replace("token_embd", "other") + "".join(lines[1:]))
    what = [finding.what for finding in checked(path).findings]
    assert what == [
        "tensor token_embd.weight: there is no digest of it",
        "tensor other.weight: there is a digest and no such tensor",
    ]
    digests.write_text(lines[-1])  # of all tensors alone
    assert checked(path).good
    digests.write_text(f"sha256    {'0' * 64}  m.gguf\n")
    assert not checked(path).good


@pytest.mark.parametrize("text", ["", "no digest", "sha1  00  m.gguf\n", "\x1b[2J"])
def test_files_that_are_no_digests(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.sha256").write_text(text)
    with pytest.raises(FormatError) as caught:
        read_digests(tmp_path / "x.sha256")
    assert "\x1b" not in str(caught.value)
    with pytest.raises(GGUFError, match="no such file"):
        read_digests(tmp_path / "absent")


def test_several_files_and_broken_ones(tmp_path: Path) -> None:
    good = model(tmp_path / "good.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(good.read_bytes()[:-500])
    ended = gguf("verify", broken)
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith(f"error: {broken}: ") and ended.stderr.count("\n") == 1
    ended = gguf("verify", broken, good, tmp_path / "absent.gguf", "--json")
    assert ended.returncode == 1
    files = json.loads(ended.stdout)["files"]
    assert [facts["good"] for facts in files] == [False, True, False]
    assert "cut off" in files[0]["findings"][0]["what"]
    assert gguf("verify", "--write", good, "--digests", good).returncode == 2


def test_nothing_from_the_file_is_an_escape(tmp_path: Path) -> None:
    nasty = "\x1b[2J\u202e"
    parts = Parts()
    parts.keys = [
        text_key("general.architecture", nasty),
        key(f"tokenizer.ggml.{nasty}_token_id", U32, u32(9)),
        text_key("tokenizer.ggml.model", nasty),
        array_key("tokenizer.ggml.tokens", STR, 1, string(nasty)),
        key("x", F32, b"\0\0\0\0"),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(parts.build())
    ended = gguf("verify", path)
    assert ended.returncode == 1 and "\x1b" not in ended.stdout and "\\x1b[2J" in ended.stdout


def test_random_rows_are_good() -> None:
    rows = random_rows("Q4_K", 4, 512, np.random.default_rng(0), spread=0.1)
    assert count_not_finite(by_name("Q4_K"), rows.reshape(-1)) == 0
