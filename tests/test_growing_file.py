"""A file is looked at while it is written."""

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.child import ROOT, python_command
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import FormatError
from gguf_tools.reader import GGUFFile, TensorInfo, UnfinishedFile
from gguf_tools.recipes import find_file_type
from gguf_tools.self_check import SheetRequest
from runtime.file_check import Answer, Texts, check, open_source
from runtime.growing_file import GrowingFile
from runtime.quality.file_run import FileRun
from runtime.quality.sheet import measure
from runtime.quality.source_run import SourceRun
from tests.checkpoints import STORIES


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "x.gguf"
    for _ in convert(plan_conversion(STORIES, find_file_type("Q8_0")), path, threads=2):
        pass
    return path


def tensors_of(path: Path) -> list[TensorInfo]:
    """In the order of the file."""
    with GGUFFile(path) as file:
        return sorted(file.tensors.values(), key=lambda tensor: tensor.offset)


def grown(part: Path, data: bytes, ends: list[int]) -> Callable[[float], bool]:
    """An `is_finished` that lets the file grow to each of its ends, and then be whole.

    It grows when it is waited for.
    """

    def steps() -> Iterator[bool]:
        for end in ends:
            part.write_bytes(data[:end])
            yield False
        part.write_bytes(data)
        yield True

    left = steps()
    part.write_bytes(data[: ends[0]])
    return lambda seconds: seconds > 0 and next(left)


def checked(part: Path, is_finished: Callable[[float], bool], **more: Any) -> Answer:
    request = {"file": part, "source": STORIES, "is_checkpoint": True, "adapters": [], "threads": 1}
    return check({**request, **more}, wait=lambda: None, is_finished=is_finished)


# --- reading ------------------------------------------------------------------------------------


def test_what_is_there_is_what_the_finished_file_has(whole: Path, tmp_path: Path) -> None:
    part, data = tmp_path / "x.part", whole.read_bytes()
    tensors = tensors_of(whole)
    half = tensors[len(tensors) // 2]
    part.write_bytes(data[: tensors[0].offset])
    with GrowingFile(UnfinishedFile(part)) as file, GGUFFile(whole) as finished:
        assert file.tensors == finished.tensors and file.there() == set()
        part.write_bytes(data[: half.offset + half.nbytes - 1])
        assert file.there() == {tensor.name for tensor in tensors if tensor.offset < half.offset}
        for name in file.there():
            assert (file.raw(name) == finished.raw(name)).all()
            assert (file.load(name) == finished.load(name)).all()
        with pytest.raises(ValueError, match="not there yet"):
            file.raw(half.name)
        assert np.isnan(file.load(half.name)).all()
        part.write_bytes(data)
        assert file.there() == set(file.tensors)
        last = tensors[-1].name
        assert (file.rows(last, 0, 1) == finished.rows(last, 0, 1)).all()


def test_a_file_that_becomes_shorter(whole: Path, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(whole.read_bytes())
    with GrowingFile(UnfinishedFile(part)) as file:
        name = max(file.there(), key=lambda name: file.tensors[name].offset)
        with open(part, "r+b") as stream:
            stream.truncate(file.tensors[name].offset)
        with pytest.raises(FormatError, match="the file has become shorter"):
            file.raw(name)


# --- checking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_weights", [1 << 30, 1000])
def test_the_same_is_found_in_pieces(
    whole_weights: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.logits_check.WHOLE_WEIGHTS", whole_weights)
    tensors = tensors_of(whole)
    ends = [tensors[0].offset, *(tensor.offset + tensor.nbytes for tensor in tensors[:-1:3])]
    in_pieces = grown(tmp_path / "x.part", whole.read_bytes(), ends)
    sheet = asdict(SheetRequest(8, compiles=False))
    found = checked(tmp_path / "x.part", in_pieces, sheet=sheet)
    at_once = checked(whole, lambda seconds: True, sheet=sheet)
    assert found == at_once and len(found.findings[-1].details) >= 7
    assert found.sheet is not None and found.sheet.costs


@pytest.mark.parametrize(("layer", "whole_weights"), [(0, 1 << 30), (0, 1000), (2, 1000)])
def test_a_wrong_layer_is_found_before_the_end(
    layer: int, whole_weights: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is right in the finished file: who looks only at that finds nothing."""
    monkeypatch.setattr("runtime.logits_check.WHOLE_WEIGHTS", whole_weights)
    data = whole.read_bytes()
    tensors = {tensor.name: tensor for tensor in tensors_of(whole)}
    wrong = tensors[f"blk.{layer}.ffn_down.weight"]
    damaged = bytearray(data)
    rows = np.frombuffer(data, np.uint8, wrong.nbytes, wrong.offset).reshape(wrong.n_rows, -1)
    damaged[wrong.offset : wrong.offset + wrong.nbytes] = np.roll(rows, 1, axis=0).tobytes()
    part = tmp_path / "x.part"
    part.write_bytes(damaged[: tensors["blk.3.ffn_up.weight"].offset])
    looks = []

    def is_finished(seconds: float) -> bool:
        if seconds == 0:
            return False
        looks.append(0)
        if len(looks) == 2:
            part.write_bytes(data)
        return len(looks) == 2

    (problem,) = checked(part, is_finished).findings[-1].problems
    assert problem.startswith(f"the {'blk.2.' if layer == 2 else 'layer 0'}")


def test_a_file_that_is_never_finished(whole: Path, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(whole.read_bytes()[: tensors_of(whole)[0].offset])
    left = iter([False, False, True])
    answer = checked(
        part,
        lambda seconds: seconds > 0 and next(left),
        sheet=asdict(SheetRequest(8, compiles=False)),
    )
    assert answer.findings[-1].text == "not readable" and answer.sheet is None
    (problem,) = answer.findings[-1].problems
    assert problem == f"the file cannot be read: {answer.no_sheet}"
    assert answer.no_sheet.startswith(f"{part}: tensor token_embd.weight: shape")


@pytest.mark.parametrize("n_lines", [0, 1, 2])
def test_without_its_parent_it_ends(n_lines: int, whole: Path, tmp_path: Path) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(whole.read_bytes()[: tensors_of(whole)[5].offset])
    source = {"source": str(STORIES), "is_checkpoint": True, "adapters": []}
    requests = [source, {**source, "file": str(part), "threads": 1}]
    line = b"".join(json.dumps(each).encode() + b"\n" for each in requests[:n_lines])
    done = subprocess.run(
        python_command("runtime.file_check"), input=line, capture_output=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_the_text_is_run_as_far_as_the_file_goes(whole: Path, tmp_path: Path) -> None:
    data, tensors = whole.read_bytes(), tensors_of(whole)
    part = tmp_path / "x.part"
    part.write_bytes(data[: next(t.offset for t in tensors if t.name.startswith("blk.4."))])
    source = open_source({"source": STORIES, "is_checkpoint": True, "adapters": []})
    begun = UnfinishedFile(part)
    texts = Texts(begun.metadata, None)
    with SourceRun(source, texts.long, bos=texts.bos, threads=lambda: 1, compiles=False) as run:
        early, late = FileRun(run), FileRun(run)
        with GrowingFile(begun) as file:
            while early.look(file, file.there()):
                pass
        assert early.n_layers == 4 and len(early.hidden) == len(run.windows)
        assert {name for name in early.estimates if "blk.3" in name} and not late.estimates
        part.write_bytes(data)
        with GGUFFile(part) as finished:
            sheets = [measure(each, finished, bits=8, threads=1) for each in (early, late)]
        assert sheets[0] == sheets[1] and early.estimates == late.estimates
