"""`gguf set`: what is changed where, what is refused, and what a killed change leaves behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.errors import FormatError, GGUFError, OutputError
from gguf_tools.reader import GGUFFile, undo_path
from gguf_tools.tools.edit import (
    UNDO,
    Change,
    apply_in_place,
    apply_rewrite,
    check_target,
    plan_change,
    recover,
)
from gguf_tools.values import RESERVE_KEY, Array, Value
from tests.gguf_bytes import ARR, STR, U32, Parts, array_key, key, string, text_key, u32, u64
from tests.test_splitting import gguf, split_in
from tests.tiny import llama_file

TOKENS = {
    "tokenizer.ggml.model": Value("str", "gpt2"),
    "tokenizer.ggml.tokens": Array("str", [f"t{i}" for i in range(70)]),
    "tokenizer.ggml.scores": Array("f32", [0.0] * 70),
    "tokenizer.ggml.eos_token_id": Value("u32", 2),
    "tokenizer.ggml.add_bos_token": Value("bool", True),
    "tokenizer.chat_template": Value("str", "{{ messages }}"),
    "general.tags": Array("str", ["a", "b"]),
    "a.u64": Value("u64", 2**64 - 1),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama_file(tmp_path / "model.gguf", quant="Q8_0", extra=TOKENS)


def change(path: Path, name: str, text: str | None, **options: Any) -> Change:
    """Make a change; the rest of the file must stay what it was."""
    with GGUFFile(path) as file:
        before = {tensor: file.raw(tensor).tobytes() for tensor in file.tensors}
        others = {k: file.encoded(k) for k in file.metadata if k not in (name, RESERVE_KEY)}
        size = file.data_offset
        made = plan_change(file, name, text, **options)
        if made.in_place:
            apply_in_place(made)
        else:
            assert list(apply_rewrite(made, file))
    with GGUFFile(path) as file:
        assert {tensor: file.raw(tensor).tobytes() for tensor in file.tensors} == before
        assert others == {k: file.encoded(k) for k in file.metadata if k not in (name, RESERVE_KEY)}
        assert not made.in_place or file.data_offset == size
    assert {p.name for p in path.parent.iterdir() if p.name.startswith("model.gguf")} == {
        "model.gguf"
    }
    return made


def value(path: Path, name: str) -> Any:
    with GGUFFile(path) as file:
        found = file.metadata.get(name)
        return found.tolist() if isinstance(found, np.ndarray) else found


def test_numbers_are_changed_in_place_and_nothing_else(model: Path) -> None:
    before = model.read_bytes()
    inode = model.stat().st_ino
    assert change(model, "tokenizer.ggml.eos_token_id", "7").in_place
    after = model.read_bytes()
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [
        before.index(b"eos_token_id") + len("eos_token_id") + 4
    ]
    assert model.stat().st_ino == inode
    assert change(model, "tokenizer.ggml.add_bos_token", "false").in_place
    assert value(model, "tokenizer.ggml.add_bos_token") is False
    assert change(model, "llama.context_length", "0x800").in_place
    assert value(model, "llama.context_length") == 2048
    assert change(model, "llama.attention.layer_norm_rms_epsilon", "1e-6").in_place
    assert value(model, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert change(model, "a.u64", str(2**63 + 1)).in_place and value(model, "a.u64") == 2**63 + 1
    again = change(model, "a.u64", str(2**63 + 1))
    assert again.nothing_to_do


def test_every_length_of_text(model: Path) -> None:
    """In place exactly where the padding has room; llama.cpp's rule gives the new offset."""
    places = set()
    for length in range(80):
        with GGUFFile(model) as file:
            end = file.infos_span[1] + length - len(file.metadata["tokenizer.chat_template"])
            fits = end + -end % 32 == file.data_offset
        made = change(model, "tokenizer.chat_template", "x" * length)
        assert made.in_place == fits
        assert value(model, "tokenizer.chat_template") == "x" * length
        places.add(made.in_place)
    assert places == {True, False}


def test_reserved_room_takes_later_changes(model: Path) -> None:
    assert not change(model, "tokenizer.chat_template", "x" * 100, reserve=500).in_place
    size = model.stat().st_size
    for text in ("y" * 300, "", "z" * 590, "{{ short }}"):
        assert change(model, "tokenizer.chat_template", text).in_place
    assert change(model, "general.author", "a person", type_name="str").in_place
    assert change(model, "general.tags", '["a", "longer", "list"]').in_place
    assert change(model, "general.author", None).in_place
    assert model.stat().st_size == size
    assert not change(model, "tokenizer.chat_template", "x" * 3000).in_place


def test_what_is_no_utf8_survives_a_rewrite(tmp_path: Path) -> None:
    parts = Parts(alignment=64)
    parts.keys = [
        *parts.keys,
        key("general.alignment", U32, u32(64)),
        array_key("a.nested", ARR, 1, u32(U32) + u64(2) + u32(7) + u32(8)),
        array_key("a.texts", STR, 1, string(b"\xff\xfe")),
        text_key("a.bytes", b"\xff\xfe"),
    ]
    parts.data += bytes(-len(parts.data) % 64)
    path = tmp_path / "model.gguf"
    path.write_bytes(parts.build())
    assert not change(path, "general.architecture", "x" * 200, force=True).in_place
    with GGUFFile(path) as file:
        assert file.alignment == 64
        with pytest.raises(GGUFError, match="array of arrays"):
            plan_change(file, "a.nested", "[]")


def test_new_and_removed_keys(model: Path) -> None:
    change(model, "general.license", "mit", type_name="str")
    change(model, "a.numbers", "[1, 2.5]", type_name="arr[f32]")
    change(model, "a.flags", "[true, false]", type_name="arr[bool]")
    assert value(model, "a.numbers") == [1.0, 2.5] and value(model, "a.flags") == [True, False]
    assert value(model, "general.license") == "mit"
    change(model, "general.license", None)
    assert value(model, "general.license") is None


@pytest.mark.parametrize(
    ("name", "text", "options", "words"),
    [
        ("general.alignment", "64", {"type_name": "u32", "force": True}, "would break the file"),
        ("split.count", "2", {"type_name": "u16", "force": True}, "would break the file"),
        ("general.architecture", "qwen2", {}, "--force"),
        ("general.architecture", None, {}, "--force"),
        ("tokenizer.ggml.tokens", None, {}, "--force"),
        ("tokenizer.ggml.scores", "[1, 2]", {}, "70 values"),
        ("tokenizer.ggml.eos_token_id", "70", {}, "0 to 69"),
        ("tokenizer.ggml.eos_token_id", "-1", {}, "of type u32, found '-1'"),
        ("tokenizer.ggml.eos_token_id", "two", {}, "type u32"),
        ("tokenizer.ggml.eos_token_id", "9" * 5000, {}, "type u32"),
        ("tokenizer.ggml.bos_token_id", "70", {"type_name": "u32"}, "0 to 69"),
        ("tokenizer.ggml.add_bos_token", "yes", {}, "type bool"),
        ("llama.context_length", "4294967296", {}, "of type u32, found '4294967296'"),
        ("llama.context_length", "5", {"type_name": "u64"}, "keeps its type"),
        ("llama.rope.freq_base", "x", {"type_name": "f32"}, "type f32"),
        ("llama.rope.freq_base", "1e39", {"type_name": "f32"}, "of type f32, found '1e39'"),
        ("llama.rope.freq_base", "nan", {"type_name": "f32"}, "finite number, found nan"),
        ("a.floats", "[1, -Infinity]", {"type_name": "arr[f32]"}, "finite number, found -inf"),
        ("general.license", "mit", {}, "--type"),
        ("general.license", "mit", {"type_name": "string"}, "known are str"),
        ("general.license", "[]", {"type_name": "arr[arr]"}, "known are str"),
        ("a key", "mit", {"type_name": "str"}, "is no key"),
        ("general.absent", None, {}, "no key"),
        ("general.tags", "a", {}, "JSON array of str"),
        ("general.tags", '["a", 1]', {}, "found 1 at place 1"),
        ("general.tags", "[" * 100_000, {}, "JSON array"),
        ("tokenizer.ggml.scores", "[true]", {}, "found true at place 0"),
        (RESERVE_KEY, "[0]", {"type_name": "arr[u8]"}, "--reserve"),
    ],
)
def test_refused(
    name: str, text: str | None, options: dict[str, Any], words: str, model: Path
) -> None:
    with GGUFFile(model) as file, pytest.raises(GGUFError, match=words) as caught:
        plan_change(file, name, text, **options)
    assert len(str(caught.value)) < 500


def test_forced(model: Path) -> None:
    change(model, "general.architecture", "qwen2", force=True)
    assert value(model, "general.architecture") == "qwen2"
    change(model, "general.sampling.temp", "inf", type_name="f32", force=True)
    assert value(model, "general.sampling.temp") == float("inf")


def test_a_split_model(model: Path, tmp_path: Path) -> None:
    first, *others = split_in(model, tmp_path / "part", max_tensors=8)
    before = [path.read_bytes() for path in others]
    for text in ("3", "4"):
        ended = gguf("set", first, "tokenizer.ggml.eos_token_id", text, "--json")
        assert json.loads(ended.stdout)["how"] == "in place"
    assert json.loads(gguf("set", first, "tokenizer.chat_template", "x" * 99, "--json").stdout) == {
        "file": str(first),
        "key": "tokenizer.chat_template",
        "type": "str",
        "before": "{{ messages }}",
        "after": "x" * 99,
        "how": "rewritten",
        "written": True,
    }
    assert value(first, "tokenizer.chat_template") == "x" * 99
    assert [path.read_bytes() for path in others] == before


def test_links_and_several_names(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    with pytest.raises(OutputError, match="is a link to"):
        check_target(link)
    other = tmp_path / "other.gguf"
    os.link(model, other)
    before = other.read_bytes()
    assert not change(model, "tokenizer.ggml.eos_token_id", "9").in_place
    assert other.read_bytes() == before and value(model, "tokenizer.ggml.eos_token_id") == 9


def test_permissions_stay(model: Path) -> None:
    model.chmod(0o640)
    assert not change(model, "tokenizer.chat_template", "x" * 200).in_place
    assert model.stat().st_mode & 0o777 == 0o640


def test_a_mapped_file_keeps_its_tensors(model: Path) -> None:
    """A program that has the file open goes on with the bytes that it had."""
    with GGUFFile(model) as file:
        raw = file.raw("token_embd.weight")
        before = raw.tobytes()
        change(model, "tokenizer.ggml.eos_token_id", "9")
        change(model, "tokenizer.chat_template", "x" * 500)
        assert raw.tobytes() == before
        assert file.load("token_embd.weight").shape == (70, 64)


def test_changed_in_between(model: Path) -> None:
    with GGUFFile(model) as file:
        late = plan_change(file, "tokenizer.ggml.eos_token_id", "9")
        later = plan_change(file, "tokenizer.chat_template", "x" * 300)
        change(model, "a.u64", "1")
        before = model.read_bytes()
        with pytest.raises(OutputError, match="changed by another process"):
            apply_in_place(late)
        with pytest.raises(OutputError, match="changed by another process"):
            list(apply_rewrite(later, file))
    assert model.read_bytes() == before and not undo_path(model).exists()


def leave_undo(path: Path, offset: int, old: bytes, *, cut: int = 0) -> None:
    head = UNDO.pack(b"GGUFUNDO", offset, len(old), hashlib.sha256(old).digest())
    data = head + old
    undo_path(path).write_bytes(data[: len(data) - cut])


def test_an_interrupted_change_is_put_back(model: Path) -> None:
    before = model.read_bytes()
    leave_undo(model, 40, before[40:400])
    model.write_bytes(before[:40] + bytes(200) + before[240:])
    with pytest.raises(FormatError, match="--recover"):
        GGUFFile(model)
    ended = gguf("info", model)
    assert ended.returncode == 1 and "gguf set FILE --recover" in ended.stderr
    assert gguf("set", model, "a.u64", "1").returncode == 1
    ended = gguf("set", model, "--recover")
    assert ended.returncode == 0 and "the old metadata is back" in ended.stdout
    assert model.read_bytes() == before and not undo_path(model).exists()
    assert json.loads(gguf("set", model, "--recover", "--json").stdout)["recovered"] is False


def test_undo_files_that_are_not_whole(model: Path) -> None:
    """Killed before all was in it: the model had not been touched."""
    before = model.read_bytes()
    for cut in (1, 359, 370, 396):
        leave_undo(model, 40, bytes(360), cut=cut)
        assert not recover(model)
        assert model.read_bytes() == before and not undo_path(model).exists()
    undo_path(model).write_bytes(b"something else")
    assert not recover(model) and undo_path(model).exists()
    GGUFFile(model).close()
    leave_undo(model, len(before), b"x")
    with pytest.raises(FormatError, match="does not belong to"):
        recover(model)
    assert model.read_bytes() == before


LOOP = """
import sys
from gguf_tools.reader import GGUFFile
from gguf_tools.tools.edit import apply_in_place, plan_change
print("ready", flush=True)
while True:
    for text in ("x" * 100, "y" * 60_000):
        with GGUFFile(sys.argv[1]) as file:
            change = plan_change(file, "tokenizer.chat_template", text)
        assert change.in_place
        apply_in_place(change)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_at_random_times(tmp_path: Path) -> None:
    """The file is one or the other, at once or after --recover."""
    rng = np.random.default_rng(1)
    long = {**TOKENS, "z.words": Array("str", ["a word or two"] * 20_000)}
    path = llama_file(tmp_path / "model.gguf", quant="Q8_0", extra=long)
    change(path, "tokenizer.chat_template", "y" * 60_000, reserve=100_000)
    change(path, "tokenizer.chat_template", "x" * 100)
    states = {path.read_bytes()}
    change(path, "tokenizer.chat_template", "y" * 60_000)
    states.add(path.read_bytes())

    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(float(rng.uniform(0.01, 0.2)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        recover(path)
        assert path.read_bytes() in states
        undo_path(path).unlink(missing_ok=True)  # an empty one says nothing
        GGUFFile(path).close()


def test_the_command(model: Path) -> None:
    ended = gguf("set", model, "general.name", "A name", "--type", "str", "--dry-run")
    assert "not written" in ended.stdout and value(model, "general.name") is None
    ended = gguf("set", model, "general.name", "A \x1b[2Jname", "--type", "str")
    assert ended.returncode == 0 and "not there -> A \\x1b[2Jname" in ended.stdout
    assert value(model, "general.name") == "A \x1b[2Jname"
    ended = gguf("set", model, "general.name", "--remove")
    assert "-> not there" in ended.stdout
    ended = gguf("set", model, "a.u64", "--", "-1")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: a.u64: ") and ended.stderr.count("\n") == 1
    for arguments in (("general.name",), ("general.name", "x", "--remove"), ("--remove",)):
        assert gguf("set", model, *arguments).returncode == 2
    assert gguf("set", model.parent / "no.gguf", "a", "b").returncode == 1
    model.chmod(0o400)
    if os.geteuid() != 0:
        assert "cannot be changed" in gguf("set", model, "a.u64", "1").stderr
