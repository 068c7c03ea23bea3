"""llama.cpp's own vocabularies: the ids it recorded for their texts, and how they decode."""

import json
from functools import cache
from pathlib import Path

import pytest

from gguf_tools.reader import GGUFFile
from runtime.tokenizer import Tokenizer

VECTORS = (
    "bert-bge", "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gemma-4", "gpt-2",
    "llama-bpe", "llama-spm", "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
WITHOUT_VECTORS = ("aquila", "baichuan", "gpt-neox", "nomic-bert-moe")
RECORDED = Path(__file__).parent / "data" / "tokenizers" / "hugging_face.json"
SEPARATOR = "\n__ggml_vocab_test__\n"


def path_of(models: Path, name: str) -> Path:
    return models / f"ggml-vocab-{name}.gguf"


@cache
def load(path: Path) -> Tokenizer:
    with GGUFFile(path) as file:
        return Tokenizer(file.metadata)


def test_no_vector_is_left_out(llama_cpp_models: Path) -> None:
    found = {p.name.removesuffix(".gguf") for p in llama_cpp_models.glob("ggml-vocab-*.gguf")}
    assert found == {f"ggml-vocab-{name}" for name in VECTORS + WITHOUT_VECTORS}
    with_vectors = {p.name for p in llama_cpp_models.glob("*.gguf.inp")}
    assert with_vectors == {f"ggml-vocab-{name}.gguf.inp" for name in VECTORS}


@pytest.mark.parametrize("name", VECTORS)
def test_recorded_ids(llama_cpp_models: Path, name: str) -> None:
    path = path_of(llama_cpp_models, name)
    tokenizer = load(path)
    with Path(f"{path}.inp").open(encoding="utf-8", newline="") as stream:
        texts = stream.read().split(SEPARATOR)
    lines = Path(f"{path}.out").read_text().split("\n")  # with or without a newline at the end
    assert len(texts) >= 46 and len(lines) - len(texts) in (0, 1)
    for text, line in zip(texts, lines, strict=False):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == [int(number) for number in line.split()], text
        if name != "bert-bge":
            assert tokenizer.decode(ids) == text


def test_what_bert_keeps_of_a_text(llama_cpp_models: Path) -> None:
    """Its tokens know no capitals, accents or runs of spaces."""
    tokenizer = load(path_of(llama_cpp_models, "bert-bge"))
    ids = tokenizer.encode("  Unaffable\u00e9\n\nTOKENS ")
    assert tokenizer.decode(ids) == "unaffablee tokens"
    assert tokenizer.decode(ids, special=True) == "[CLS] unaffablee tokens[SEP]"
    assert ids[0] == tokenizer.bos_id == 101 and ids[-1] == tokenizer.eos_id == 102


def test_ids_recorded_from_hugging_face(llama_cpp_models: Path) -> None:
    """Random mixed scripts, encoded by the makers' tokenizer.json of the same vocabularies."""
    for record in json.loads(RECORDED.read_text()):
        tokenizer = load(path_of(llama_cpp_models, record["vocabulary"]))
        assert len(record["texts"]) == 40
        for entry in record["texts"]:
            ids = tokenizer.encode(entry["text"], add_special=False)
            assert ids == entry["ids"], (record["source"], entry["text"])


def test_phi3_takes_the_space_behind_a_special_token(llama_cpp_models: Path) -> None:
    tokenizer = load(path_of(llama_cpp_models, "phi-3"))
    prompt = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    ids = tokenizer.encode(prompt, add_special=False, parse_special=True)
    said = [tokenizer.token_text(i) for i in ids]
    assert said == ["<|user|>", "\u2581Hi", "<|end|>", "<|assistant|>"]
    typed = tokenizer.encode(tokenizer.guarded(prompt), add_special=False, parse_special=True)
    assert tokenizer.decode(typed) == prompt


def test_fill_in_the_middle_is_never_found_in_plain_text(llama_cpp_models: Path) -> None:
    """This file calls the tokens user-defined."""
    tokenizer = load(path_of(llama_cpp_models, "deepseek-coder"))
    text = "<\uff5cfim\u2581begin\uff5c>x<\uff5cfim\u2581hole\uff5c>"
    assert len(tokenizer.encode(text, add_special=False, parse_special=True)) == 3
    plain = tokenizer.encode(text, add_special=False)
    assert len(plain) > 8 and tokenizer.decode(plain) == text


@pytest.mark.parametrize("name", WITHOUT_VECTORS)
def test_vocabularies_without_vectors(llama_cpp_models: Path, name: str) -> None:
    """Two of them do not name their pre-tokenizer, which is told loudly."""
    tokenizer = load(path_of(llama_cpp_models, name))
    text = "Hello  World, 1234 \u4e16\u754c!"
    decoded = tokenizer.decode(tokenizer.encode(text, add_special=False))
    assert decoded == ("Hello World, 1234 \u4e16\u754c!" if name == "nomic-bert-moe" else text)
    told = any("WARNING" in note and "tokenizer.ggml.pre" in note for note in tokenizer.notes)
    assert told == (name in ("aquila", "gpt-neox"))
