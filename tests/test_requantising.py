"""A GGUF file as the source of another: metadata as it was, weights as from the checkpoint."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import GGUFError, UnsupportedQuantError
from gguf_tools.imatrix import read_importance_matrix
from gguf_tools.overrides import parse_overrides
from gguf_tools.plan import refuse_fallbacks
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.requantising import is_gguf, plan_requantisation, source_name
from gguf_tools.values import Value
from gguf_tools.writer import GGUFWriter
from tests.checkpoints import STORIES
from tests.split import split_file
from tests.test_conversion import convert_to
from tests.test_convert_options import make_matrix
from tests.test_imatrix import new_file
from tests.test_lora import FOLDER
from tests.tiny import llama_file


def requantise(
    source: Path, output: Path, file_type: str, *, allow: bool = False, **options: Any
) -> str:
    with GGUFFile(source) as file:
        plan = plan_requantisation(
            file, find_file_type(file_type), allow_requantize=allow, **options
        )
        for _ in convert(plan, output, threads=2):
            pass
    return " ".join(plan.notes)


def types_in(path: Path) -> dict[str, str]:
    with GGUFFile(path) as file:
        return {name: tensor.quant.name for name, tensor in file.tensors.items()}


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("floats") / "stories-F32.gguf"
    convert_to(STORIES, path, "F32")
    return path


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_0", "F16", "F32"])
def test_the_file_is_what_the_checkpoint_gives(
    tmp_path: Path, floats: Path, file_type: str
) -> None:
    """To the byte: metadata, order, types and blocks."""
    requantise(floats, tmp_path / "again.gguf", file_type)
    convert_to(STORIES, tmp_path / "direct.gguf", file_type)
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()


def test_quantised_weights_are_not_quantised_again_unasked(tmp_path: Path, floats: Path) -> None:
    requantise(floats, tmp_path / "q8.gguf", "Q8_0")
    with pytest.raises(UnsupportedQuantError, match="--allow-requantize"):
        requantise(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0")
    assert not (tmp_path / "q4.gguf").exists()
    note = requantise(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", allow=True)
    assert "quantised already (Q8_0)" in note
    name = "blk.0.ffn_up.weight"
    with GGUFFile(tmp_path / "q8.gguf") as before, GGUFFile(tmp_path / "q4.gguf") as after:
        quant = after.tensors[name].quant
        assert quant.name == "Q4_0"
        assert quant.quantize is not None
        blocks = quant.quantize(before.load(name))
        np.testing.assert_array_equal(after.raw(name), blocks.reshape(after.raw(name).shape))


def test_tensors_that_have_the_type_are_copied(tmp_path: Path, floats: Path) -> None:
    requantise(floats, tmp_path / "one.gguf", "Q8_0")
    assert requantise(tmp_path / "one.gguf", tmp_path / "two.gguf", "Q8_0") == ""
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


@pytest.mark.parametrize(
    ("file_type", "options"),
    [
        ("Q4_K_M", {"tensor_types": ["ffn_(up|gate)=Q5_1", "attn=Q4_0"]}),
        ("Q4_0", {"embedding": "F16", "output": "Q8_0", "keep": ["blk.[01].attn_v.weight"]}),
        ("Q5_0", {"pure": True}),
    ],
)
def test_options_do_what_they_do_with_the_checkpoint(
    tmp_path: Path, floats: Path, file_type: str, options: dict[str, Any]
) -> None:
    overrides = parse_overrides(**options)
    requantise(floats, tmp_path / "again.gguf", file_type, overrides=overrides)
    plan = plan_conversion(STORIES, find_file_type(file_type), overrides=overrides)
    for _ in convert(plan, tmp_path / "direct.gguf", threads=2):
        pass
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()


def test_an_importance_matrix(tmp_path: Path, floats: Path) -> None:
    """Also of a split file, and of one that tells of another matrix already."""
    plain = plan_conversion(STORIES, find_file_type("Q4_0"))
    matrix = read_importance_matrix(make_matrix(tmp_path / "matrix", plain))
    plan = plan_conversion(STORIES, find_file_type("Q4_0"), matrix=matrix)
    for _ in convert(plan, tmp_path / "direct.gguf", threads=2):
        pass
    expected = (tmp_path / "direct.gguf").read_bytes()
    requantise(floats, tmp_path / "again.gguf", "Q4_0", matrix=matrix)
    assert (tmp_path / "again.gguf").read_bytes() == expected
    parts = split_file(floats, tmp_path / "part", 3)
    requantise(parts[0], tmp_path / "joined.gguf", "Q4_0", matrix=matrix)
    assert (tmp_path / "joined.gguf").read_bytes() == expected
    requantise(tmp_path / "again.gguf", tmp_path / "q5.gguf", "Q5_0", allow=True, matrix=matrix)
    with GGUFFile(tmp_path / "q5.gguf") as file:
        keys = [key for key in file.metadata if "imatrix" in key or "file_type" in key]
        assert keys == ["general.file_type", *(f"quantize.imatrix.{key}" for key in IMATRIX_KEYS)]


IMATRIX_KEYS = ("file", "dataset", "entries_count", "chunks_count")


def test_what_is_copied_needs_no_importance(tmp_path: Path, floats: Path) -> None:
    requantise(floats, tmp_path / "q4.gguf", "Q4_0")
    plain = plan_conversion(STORIES, find_file_type("Q4_0"))
    matrix = read_importance_matrix(make_matrix(tmp_path / "matrix", plain))
    with GGUFFile(tmp_path / "q4.gguf") as file:
        plan = plan_requantisation(file, find_file_type("Q4_0"), matrix=matrix)
        assert not any(tensor.importance for tensor in plan.tensors)
        assert plan.weighable == []


def test_what_is_kept_is_copied(tmp_path: Path, floats: Path) -> None:
    requantise(floats, tmp_path / "q8.gguf", "Q8_0")
    keep = parse_overrides(keep=["*.attn_?.weight", "token_embd.weight"])
    requantise(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", allow=True, overrides=keep)
    types = types_in(tmp_path / "q4.gguf")
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    with GGUFFile(tmp_path / "q8.gguf") as before, GGUFFile(tmp_path / "q4.gguf") as after:
        name = "blk.0.attn_q.weight"
        np.testing.assert_array_equal(before.raw(name), after.raw(name))


def test_options_that_fit_nothing_are_refused(tmp_path: Path, floats: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"overrides": parse_overrides(tensor_types=["nothing=Q4_0"])}, "no tensor of this model"),
        ({"overrides": parse_overrides(embedding="Q6_K")}, "rows of 64 are not whole blocks"),
        ({"matrix": read_importance_matrix(other_matrix(tmp_path))}, "found none of them"),
    ]
    for options, words in cases:
        with pytest.raises(GGUFError, match=words):
            requantise(floats, tmp_path / "out.gguf", "Q4_0", **options)
    with GGUFFile(floats) as file:
        plan = plan_requantisation(file, find_file_type("Q4_K_M"))
        with pytest.raises(UnsupportedQuantError, match="--strict: token_embd"):
            refuse_fallbacks(plan)


def other_matrix(folder: Path) -> Path:
    path = folder / "other"
    path.write_bytes(new_file({"x.in_sum2": np.ones((1, 4)), "x.counts": np.ones((1, 1))}))
    return path


def test_floats_of_quantised_weights_are_no_second_quantisation(
    tmp_path: Path, floats: Path
) -> None:
    requantise(floats, tmp_path / "q8.gguf", "Q8_0")
    assert requantise(tmp_path / "q8.gguf", tmp_path / "f32.gguf", "F32", allow=True) == ""


def test_keys_that_we_do_not_know_are_carried_over(tmp_path: Path) -> None:
    extra = {
        "general.alignment": Value("u32", 32),
        "split.count": Value("u16", 0),
        "somebody.key": Value("f64", 0.1),
        "general.file_type": Value("u32", 0),
        "zebra": Value("str", "last"),
    }
    source = llama_file(tmp_path / "in.gguf", extra=extra)
    requantise(source, tmp_path / "out.gguf", "Q8_0")
    with GGUFFile(source) as before, GGUFFile(tmp_path / "out.gguf") as after:
        own = ["general.quantization_version", "general.file_type"]
        gone = {"general.alignment", "split.count", *own}
        assert list(after.metadata) == [key for key in before.metadata if key not in gone] + own
        assert after.metadata["somebody.key"] == 0.1
        assert after.metadata_types["somebody.key"] == "f64"
        assert after.metadata["general.file_type"] == 7


def test_a_file_without_layers_is_refused(tmp_path: Path) -> None:
    extra = {"llama.block_count": Value("str", "two")}
    source = llama_file(tmp_path / "in.gguf", extra=extra)
    with pytest.raises(GGUFError, match=r"llama\.block_count: expected a count, found 'two'"):
        requantise(source, tmp_path / "out.gguf", "Q8_0")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("qwen-F16.gguf", "qwen"),
        ("a/qwen.Q4_K_M.gguf", "a/qwen"),
        ("qwen2.5-bf16-00001-of-00003.gguf", "qwen2.5"),
        ("qwen2.5.gguf", "qwen2.5"),
        ("F16.gguf", "F16"),
    ],
)
def test_the_output_is_named_after_the_model(name: str, model: str) -> None:
    assert source_name(Path(name)) == Path(model)


def test_what_is_taken_for_a_gguf_file(tmp_path: Path, floats: Path) -> None:
    copied = tmp_path / "model"
    copied.write_bytes(floats.read_bytes()[:100])
    assert is_gguf(floats)
    assert is_gguf(copied)
    assert is_gguf(tmp_path / "absent.gguf")
    assert not is_gguf(STORIES)
    assert not is_gguf(STORIES / "config.json")
    assert not is_gguf(tmp_path / "absent")


def test_a_vocabulary_alone(tmp_path: Path, floats: Path) -> None:
    """As llama.cpp's test vocabularies are: no tensor, and no division by how many there are."""
    source, output = tmp_path / "vocab.gguf", tmp_path / "out.gguf"
    with GGUFFile(floats) as file:
        metadata = {key: file.encoded(key) for key in file.metadata}
        with GGUFWriter(source, metadata=metadata, tensors=[]):
            pass
    done = run(source, "--type", "F16", "-o", output)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a vocabulary alone" in done.stdout
    assert types_in(output) == {}
    assert run(source, "--type", "Q4_0", "--dry-run").returncode == 0


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gguf_tools", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_from_the_command_line(tmp_path: Path, floats: Path) -> None:
    output = tmp_path / "out.gguf"
    done = run(floats, "--type", "Q8_0", "-o", output)
    assert done.returncode == 0, done.stderr
    again = run(output, "--type", "Q4_0", "-o", tmp_path / "q4.gguf")
    assert again.returncode == 1
    assert "say --allow-requantize" in again.stderr
    options = ("--tensor-type", "ffn=Q5_1", "--pure", "--allow-requantize")
    named = run(output, "--type", "Q4_0", *options, "-o", tmp_path / "q4.gguf")
    assert named.returncode == 0, named.stderr
    assert "second quantisation (Q8_0): it cost a relative RMS error of" in named.stderr
    assert types_in(tmp_path / "q4.gguf")["blk.0.ffn_up.weight"] == "Q5_1"
    merged = run(output, "--type", "Q8_0", "--lora", FOLDER / "patterns", "-o", tmp_path / "x")
    assert merged.returncode == 2
    assert "takes no --lora" in merged.stderr
    over = run(output, "--type", "Q8_0", "-o", output, "--force")
    assert over.returncode == 1
    assert "is the file that is being read" in over.stderr
    for end in (".part", ".part.journal"):  # what is written first
        source = tmp_path / f"x.gguf{end}"
        shutil.copy(output, source)
        over = run(source, "--type", "Q8_0", "-o", tmp_path / "x.gguf", "--force")
        assert over.returncode == 1
        assert f"x.gguf{end}, as which x.gguf begins, is the file that is" in over.stderr
        assert source.read_bytes() == output.read_bytes()
