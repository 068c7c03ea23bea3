"""The tokenizer of a finished file against the checkpoint's own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gguf_tools.errors import OutputError
from gguf_tools.quants import by_name
from gguf_tools.values import Value
from gguf_tools.vocab import Vocab
from gguf_tools.vocab.agreement import ask_for_encodings, compare, read_encodings
from gguf_tools.vocab.corpus import COMPARED_TEXTS
from gguf_tools.writer import GGUFWriter, TensorSpec
from tests.checkpoints import make_llama
from tests.tokenizer_files import (
    byte_fallback,
    byte_level,
    n_tokens,
    sentencepiece_model,
    vocab_of,
    write_folder,
)

ROOT = Path(__file__).resolve().parent.parent


def write_vocabulary(path: Path, vocab: Vocab, **changes: Value) -> Path:
    metadata = {"general.architecture": Value("str", "llama"), **vocab.metadata}
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    with GGUFWriter(path, metadata=metadata, tensors=[]):
        pass
    return path


@pytest.mark.parametrize("data", [byte_level("llama3"), byte_fallback()], ids=["bytes", "pieces"])
def test_the_same_tokenizer(data: dict[str, Any], tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "x.gguf", vocab_of(data, tmp_path / "folder"))
    agreement = compare(tmp_path / "folder", path)
    assert agreement.complete and agreement.lines() == []
    assert (
        agreement.describe()
        == f"{len(COMPARED_TEXTS)} of {len(COMPARED_TEXTS)} test texts are "
        + ("encoded as by tokenizer.json")
    )


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    from gguf_tools.vocab import read_vocab

    model = sentencepiece_model(user_defined_symbols=["<b>"], control_symbols=["</body>"])
    folder = write_folder(tmp_path / "folder", tokenizer__model=model)
    path = write_vocabulary(tmp_path / "x.gguf", read_vocab(folder, {}, n_vocab=600))
    agreement = compare(folder, path)
    assert agreement.complete and agreement.source == "tokenizer.model"
    # A tokenizer.json that its library cannot read makes no difference.
    write_folder(folder, tokenizer__json={"model": "none"})
    assert compare(folder, path) == agreement


def test_slow_files(tmp_path: Path) -> None:
    from gguf_tools.vocab import read_vocab

    data = byte_level()
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in data["model"]["merges"])
    files = {"vocab__json": data["model"]["vocab"], "merges__txt": merges.encode()}
    folder = write_folder(tmp_path / "folder", **files)
    vocab = read_vocab(folder, {"eos_token_id": 0}, n_vocab=420)
    agreement = compare(folder, write_vocabulary(tmp_path / "x.gguf", vocab))
    assert agreement.complete and agreement.source == "vocab.json and merges.txt"


def test_differences_are_named_with_their_text(tmp_path: Path) -> None:
    data = byte_level("llama3")
    vocab = vocab_of(data, tmp_path / "folder")
    path = write_vocabulary(tmp_path / "x.gguf", vocab, pre=Value("str", "smollm"))
    agreement = compare(tmp_path / "folder", path)
    assert not agreement.complete and agreement.differences
    texts = [difference.text for difference in agreement.differences]
    assert set(texts) < set(COMPARED_TEXTS) and any("333" in text for text in texts)
    assert f"{len(COMPARED_TEXTS) - len(texts)} of {len(COMPARED_TEXTS)} " in agreement.describe()
    line = next(line for line in agreement.lines() if "3.14159" in line)
    assert line.startswith("tokenizer: '3.14159, 1,000,000.00;") and "tokenizer.json" in line


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "x.gguf", vocab_of(byte_level(), tmp_path / "folder"))
    empty = compare(write_folder(tmp_path / "empty"), path)
    assert not empty.complete and "neither tokenizer.json nor" in empty.describe()
    broken = compare(write_folder(tmp_path / "broken", tokenizer__json={"model": 1}), path)
    assert not broken.complete and "cannot load it" in broken.describe()
    hurt = write_vocabulary(
        tmp_path / "y.gguf", vocab_of(byte_level(), tmp_path / "b"), pre=Value("str", "made-up")
    )
    assert "'made-up'" in compare(tmp_path / "folder", hurt).describe()


def test_the_metadata_are_enough(tmp_path: Path) -> None:
    """The comparison begins while the tensors are still being made."""
    vocab = vocab_of(byte_level(), tmp_path / "folder")
    metadata = {"general.architecture": Value("str", "llama"), **vocab.metadata}
    weight = TensorSpec("output.weight", by_name("F32"), (4096, 4096))
    with (
        pytest.raises(OutputError, match="got 0"),
        GGUFWriter(tmp_path / "x.gguf", metadata=metadata, tensors=[weight]) as writer,
    ):
        assert compare(tmp_path / "folder", writer.part).complete


def test_what_the_trial_encoded_is_kept(tmp_path: Path) -> None:
    """A tokenizer.json that was run to find its pre-tokenizer is not run again."""
    vocab = vocab_of(byte_level(), tmp_path / "folder")
    with ask_for_encodings(tmp_path / "folder") as question:
        assert vocab.encodings == read_encodings(question)
    assert vocab_of(byte_fallback(), tmp_path / "other").encodings is None


# In `convert`.


def convert(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gguf_tools", "convert", "-o", str(folder / "x.gguf")]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.fixture(scope="module")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer replaces capitals, which GGUF has no place for."""
    folder = tmp_path_factory.mktemp("odd") / "Odd"
    data = byte_level(normalizer={"type": "Lowercase"})
    make_llama(folder, vocab_size=n_tokens(data), bos_token_id=None, eos_token_id=0)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


def test_a_difference_is_told(odd_checkpoint: Path, tmp_path: Path) -> None:
    done = convert(tmp_path, odd_checkpoint)
    assert done.returncode == 0 and (tmp_path / "x.gguf").is_file()
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("self-check "))
    assert f"of {len(COMPARED_TEXTS)} test texts are encoded as by tokenizer.json" in row
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: tokenizer: '")]
    assert any("Hello world" in note for note in notes)


def test_strict_leaves_no_file(odd_checkpoint: Path, tmp_path: Path) -> None:
    done = convert(tmp_path, odd_checkpoint, "--strict", "--no-quality")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert "--strict" in done.stderr and "Hello world" in done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.gguf").write_text("mine")
    assert convert(tmp_path, odd_checkpoint, "--strict", "--force").returncode == 1
    assert (tmp_path / "x.gguf").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_strict_is_content_with_the_same(stories260k: Path, tmp_path: Path) -> None:
    done = convert(tmp_path, stories260k, "--type", "F16", "--strict")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "x.gguf").is_file()
