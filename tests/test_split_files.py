"""Models in several files: opened by the first part, and every lie of a part refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import FormatError, GGUFError
from gguf_tools.parts import PartName, parse_part_name
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from runtime.model import Model
from tests.split import split_file
from tests.tiny import llama_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_file(tmp_path_factory.mktemp("whole") / "whole.gguf", quant="Q8_0")


def test_parts_are_the_whole(whole: Path, tmp_path: Path) -> None:
    first, *others = split_file(whole, tmp_path / "model", 3)
    expected = GGUFFile(whole)
    with GGUFFile(first) as file:
        assert list(file.tensors) == list(expected.tensors)
        assert {tensor.part for tensor in file.tensors.values()} == {1, 2}
        assert file.file_size == sum(path.stat().st_size for path in (first, *others))
        for name in file.tensors:
            assert np.array_equal(file.raw(name), expected.raw(name))
        for key, value in expected.metadata.items():
            assert file.metadata[key] == value
        assert file.paths == (first, *others)
    with pytest.raises(ValueError, match="closed"):
        file.raw("token_embd.weight")


def test_a_split_model_runs_like_the_whole(whole: Path, tmp_path: Path) -> None:
    first, *_ = split_file(whole, tmp_path / "model", 4)
    outputs = []
    for path in (whole, first):
        with GGUFFile(path) as file, Model.load(file, n_ctx=64, threads=1) as model:
            outputs.append(model.forward(np.arange(12)))
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("name", ["x-00001-of-00003.gguf", "a-00002-of-00009-00007-of-00008.gguf"])
def test_names_of_parts(name: str) -> None:
    part = parse_part_name(name)
    assert part is not None and str(part) == name


def test_names_that_are_none() -> None:
    for name in ("x.gguf", "x-1-of-3.gguf", "x-00004-of-00003.gguf", "x-00000-of-00003.gguf", ""):
        assert parse_part_name(name) is None
    assert parse_part_name("x-00001-of-00003.gguf") == PartName("x", 1, 3)


def refused(path: Path, error: type[GGUFError], *words: str) -> None:
    with pytest.raises(error) as caught:
        GGUFFile(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_another_part_names_the_first(whole: Path, tmp_path: Path) -> None:
    _, second, third = split_file(whole, tmp_path / "model", 3)
    refused(second, FormatError, "part 2 of 3", "open model-00001-of-00003.gguf")
    named = third.rename(tmp_path / "other.gguf")
    refused(named, FormatError, "part 3 of 3", "open its first part")


def test_a_missing_part_is_named(whole: Path, tmp_path: Path) -> None:
    first, _, third = split_file(whole, tmp_path / "model", 3)
    third.unlink()
    refused(first, GGUFError, "part 3", "model-00003-of-00003.gguf", "download")


def test_a_renamed_first_part(whole: Path, tmp_path: Path) -> None:
    first, *_ = split_file(whole, tmp_path / "model", 3)
    named = shutil.copy(first, tmp_path / "model.gguf")
    refused(Path(named), FormatError, "part 1 of 3", "-00001-of-00003.gguf")
    named = shutil.copy(first, tmp_path / "model-00001-of-00002.gguf")
    refused(Path(named), FormatError, "part 1 of 3", "-00001-of-00003.gguf")


def test_a_part_that_is_not_the_one_named(whole: Path, tmp_path: Path) -> None:
    first, *_ = split_file(whole, tmp_path / "a", 3, number={2: 1})
    refused(first, FormatError, "a-00003-of-00003.gguf", "expected part 3 of 3", "part 2 of 3")
    first, *_ = split_file(whole, tmp_path / "b", 3, count={1: 4})
    refused(first, FormatError, "b-00002-of-00003.gguf", "expected part 2 of 3", "part 2 of 4")
    first, second, _ = split_file(whole, tmp_path / "c", 3)
    shutil.copy(whole, second)
    refused(first, FormatError, "c-00002-of-00003.gguf", "found a whole model")


def test_parts_of_other_models(whole: Path, tmp_path: Path) -> None:
    other = {1: {"general.architecture": Value("str", "qwen2")}}
    first, *_ = split_file(whole, tmp_path / "a", 3, extra=other)
    refused(first, FormatError, "a-00002-of-00003.gguf", "qwen2 instead of llama")
    first, *_ = split_file(whole, tmp_path / "b", 3, repeat="token_embd.weight")
    refused(first, FormatError, "b-00003-of-00003.gguf", "token_embd.weight", "b-00002-of-00003")
    first, *_ = split_file(whole, tmp_path / "c", 3, n_tensors=99)
    refused(first, FormatError, "split.tensors.count", "99")


def test_a_damaged_part(whole: Path, tmp_path: Path) -> None:
    first, _, third = split_file(whole, tmp_path / "model", 3)
    third.write_bytes(third.read_bytes()[:-40])
    refused(first, FormatError, "model-00003-of-00003.gguf", "cut off")
    third.unlink()
    third.mkdir()
    refused(first, GGUFError, "model-00003-of-00003.gguf", "folder")
    third.rmdir()
    third.symlink_to(third)
    refused(first, GGUFError, "model-00003-of-00003.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("split.no", Value("str", "0")),
        ("split.no", Value("bool", False)),
        ("split.no", Value("u16", 3)),
        ("split.no", Value("i32", -1)),
        ("split.count", Value("f32", 3.0)),
        ("split.tensors.count", Value("str", "x")),
    ],
)
def test_keys_of_wrong_types(key: str, value: Value, whole: Path, tmp_path: Path) -> None:
    first, *_ = split_file(whole, tmp_path / "model", 3, extra={0: {key: value}})
    refused(first, FormatError, key, "expected a")


def command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=300,
        check=False,
    )


def test_the_commands_take_split_models(stories260k_gguf: Path, tmp_path: Path) -> None:
    first, second, _ = split_file(stories260k_gguf, tmp_path / "stories", 3)
    shown = command("gguf_tools", "info", first, "--tensors")
    assert shown.returncode == 0 and "in 3 files" in shown.stdout and "part" in shown.stdout
    facts = json.loads(command("gguf_tools", "info", first, "--json").stdout)
    assert {tensor["part"] for tensor in facts["tensors"]} == {2, 3}
    answers = [
        command("runtime", "run", path, "-p", "Once upon a time", "--temp", "0", "-n", "12")
        for path in (stories260k_gguf, first)
    ]
    assert answers[0].returncode == answers[1].returncode == 0
    assert answers[0].stdout == answers[1].stdout and "girl" in answers[1].stdout
    measured = command("runtime", "bench", first, "--prompt", "8", "--gen", "2", "--repeat", "1")
    assert measured.returncode == 0, measured.stderr
    for module, *name in (("gguf_tools", "info"), ("runtime", "bench"), ("runtime", "-p", "x")):
        wrong = command(module, *name, second)
        assert wrong.returncode == 1
        assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
        assert "open stories-00001-of-00003.gguf" in wrong.stderr
