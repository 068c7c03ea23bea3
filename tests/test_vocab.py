import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.errors import CheckpointError, UnsupportedModelError
from gguf_tools.pretokenizers import GPT2, PRETOKENIZERS, SPLITS
from gguf_tools.values import Array, Value
from gguf_tools.vocab import Vocab, begin_trial, read_vocab
from gguf_tools.vocab.presplit import known_split
from gguf_tools.vocab.sentencepiece_model import parse_model
from tests.tokenizer_files import (
    add_token,
    as_read,
    byte_fallback,
    byte_level,
    n_tokens,
    sentencepiece_model,
    vocab_of,
    write_folder,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
GGML = "tokenizer.ggml."


def value(vocab: Vocab, key: str) -> Any:
    entry = vocab.metadata[GGML + key]
    return entry.value if isinstance(entry, Value) else list(entry.values)


def kind_of(vocab: Vocab, text: str) -> int:
    return value(vocab, "token_type")[value(vocab, "tokens").index(text)]


# The three kinds.


def test_sentencepiece_model(stories260k: Path) -> None:
    config = json.loads((stories260k / "config.json").read_text())
    vocab = read_vocab(stories260k, config, n_vocab=512)
    assert vocab.warnings == ()
    assert value(vocab, "model") == "llama" and value(vocab, "pre") == "default"
    assert value(vocab, "tokens")[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert value(vocab, "token_type")[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    assert value(vocab, "token_type").count(BYTE) == 256
    assert len(value(vocab, "scores")) == 512
    assert (value(vocab, "bos_token_id"), value(vocab, "eos_token_id")) == (1, 2)
    assert value(vocab, "unknown_token_id") == 0
    assert value(vocab, "add_bos_token") is True and value(vocab, "add_eos_token") is False
    assert value(vocab, "add_space_prefix") is True


def test_types_are_those_llama_cpp_reads(stories260k: Path) -> None:
    metadata = read_vocab(stories260k, {}, n_vocab=512).metadata
    types = {key.removeprefix(GGML): entry.type for key, entry in metadata.items()}
    assert types["model"] == types["pre"] == "str"
    assert isinstance(metadata[GGML + "tokens"], Array) and types["tokens"] == "str"
    assert types["scores"] == "f32" and types["token_type"] == "i32"
    assert types["bos_token_id"] == types["eos_token_id"] == types["unknown_token_id"] == "u32"
    assert types["add_bos_token"] == types["add_space_prefix"] == "bool"


def test_byte_level_json(tmp_path: Path) -> None:
    data = byte_level("smollm")
    vocab = vocab_of(data, tmp_path)
    assert vocab.warnings == ()
    assert value(vocab, "model") == "gpt2"
    assert PRETOKENIZERS[value(vocab, "pre")].split == "smollm"
    assert value(vocab, "merges") == [" ".join(pair) for pair in data["model"]["merges"]]
    assert GGML + "scores" not in vocab.metadata
    tokens = value(vocab, "tokens")
    assert {text: i for i, text in enumerate(tokens)} == data["model"]["vocab"]
    assert value(vocab, "token_type")[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert value(vocab, "eos_token_id") == 0


def test_byte_fallback_json(tmp_path: Path) -> None:
    data = byte_fallback()
    vocab = vocab_of(data, tmp_path)
    assert value(vocab, "model") == "llama" and value(vocab, "pre") == "default"
    assert kind_of(vocab, "<unk>") == UNKNOWN
    assert kind_of(vocab, "<s>") == kind_of(vocab, "</s>") == CONTROL
    assert kind_of(vocab, "<0x0A>") == BYTE and value(vocab, "token_type").count(BYTE) == 256
    assert value(vocab, "add_space_prefix") is True
    ranks = {a + b: -rank for rank, (a, b) in enumerate(data["model"]["merges"])}
    scores = dict(zip(value(vocab, "tokens"), value(vocab, "scores"), strict=True))
    assert all(scores[text] == rank for text, rank in ranks.items())
    assert min(scores.values()) == -max(len(ranks), 1000)


def test_metaspace_instead_of_a_normalizer(tmp_path: Path) -> None:
    step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}
    data = {**byte_fallback(), "normalizer": None, "pre_tokenizer": step}
    assert value(vocab_of(data, tmp_path), "add_space_prefix") is False


def test_spaces_in_merges_are_escaped(tmp_path: Path) -> None:
    data = byte_level()
    tokens = data["model"]["vocab"]
    for text in (" ", " t"):
        tokens[text] = max(n_tokens(data) - 1, *tokens.values()) + 1
    data["model"]["merges"].append([" ", "t"])
    assert value(vocab_of(data, tmp_path), "merges")[-1] == "\u0120 t"


def test_old_spelling_of_merges(tmp_path: Path) -> None:
    data = byte_level()
    old = json.loads(json.dumps(data))
    old["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    new, same = vocab_of(data, tmp_path / "new"), vocab_of(old, tmp_path / "old")
    assert value(new, "merges") == value(same, "merges")


def test_slow_files(tmp_path: Path) -> None:
    data = byte_level()
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in data["model"]["merges"])
    files = {"vocab__json": data["model"]["vocab"], "merges__txt": merges.encode()}
    write_folder(tmp_path, **files, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"})
    vocab = read_vocab(tmp_path, {"eos_token_id": 0}, n_vocab=420)
    assert value(vocab, "pre") == "gpt-2" and vocab.warnings == ()
    assert value(vocab, "merges") == [" ".join(pair) for pair in data["model"]["merges"]]
    write_folder(tmp_path, tokenizer_config__json={"tokenizer_class": "OddTokenizer"})
    with pytest.raises(UnsupportedModelError, match="OddTokenizer"):
        read_vocab(tmp_path, {}, n_vocab=420)


def test_model_file_comes_first(tmp_path: Path, stories260k: Path) -> None:
    model = (stories260k / "tokenizer.model").read_bytes()
    folder = write_folder(tmp_path, tokenizer__model=model, tokenizer__json=byte_level())
    assert value(read_vocab(folder, {}, n_vocab=512), "model") == "llama"


def test_tiktoken_file_named_tokenizer_model(tmp_path: Path) -> None:
    data = byte_level()
    folder = write_folder(tmp_path, tokenizer__model=b"IQ== 0\nIg== 1\n", tokenizer__json=data)
    assert value(read_vocab(folder, {}, n_vocab=n_tokens(data)), "model") == "gpt2"


def test_unigram_model_is_written_as_t5(tmp_path: Path) -> None:
    model = sentencepiece_model(model_type="unigram", normalization_rule_name="nmt_nfkc")
    n_pieces = len(parse_model(model, "it").pieces)
    vocab = read_vocab(write_folder(tmp_path, tokenizer__model=model), {}, n_vocab=n_pieces)
    assert value(vocab, "model") == "t5"
    assert vocab.metadata[GGML + "precompiled_charsmap"].type == "u8"


def test_tinystories(tinystories: Path) -> None:
    vocab = read_vocab(tinystories, {}, n_vocab=2048)
    assert value(vocab, "model") == "llama" and vocab.warnings == ()
    assert value(vocab, "token_type")[:4] == [UNKNOWN, CONTROL, CONTROL, NORMAL]


# Added tokens, padding.


def test_added_tokens(tmp_path: Path) -> None:
    data = byte_level()
    add_token(data, "<tool>", special=False)
    add_token(data, "<|fim_prefix|>", special=False)
    add_token(data, "[SPECIAL]", special=True)
    vocab = vocab_of(data, tmp_path)
    assert kind_of(vocab, "<tool>") == USER_DEFINED
    assert kind_of(vocab, "<|fim_prefix|>") == CONTROL  # by its looks
    assert kind_of(vocab, "[SPECIAL]") == CONTROL
    assert value(vocab, "fim_pre_token_id") == value(vocab, "tokens").index("<|fim_prefix|>")


def test_added_tokens_of_a_model_file(tmp_path: Path, stories260k: Path) -> None:
    folder = write_folder(
        tmp_path,
        tokenizer__model=(stories260k / "tokenizer.model").read_bytes(),
        added_tokens__json={"<slow>": 512},
        tokenizer_config__json={
            "added_tokens_decoder": {
                "513": {"content": "<|im_end|>", "special": True},
                "514": {"content": "a\u2581b", "special": False},
            }
        },
    )
    vocab = read_vocab(folder, {}, n_vocab=520)
    assert value(vocab, "tokens")[512:] == [
        "<slow>", "<|im_end|>", "a b", *(f"[PAD{i}]" for i in range(515, 520)),
    ]  # fmt: skip
    assert value(vocab, "token_type")[512:516] == [USER_DEFINED, CONTROL, USER_DEFINED, UNUSED]
    assert value(vocab, "scores")[512:516] == [-1000.0, -1000.0, -1000.0, -10000.0]


def test_config_has_the_last_word_on_special(tmp_path: Path) -> None:
    data = byte_level()
    token_id = add_token(data, "<tool>", special=False)
    config = {"added_tokens_decoder": {str(token_id): {"content": "<tool>", "special": True}}}
    assert kind_of(vocab_of(data, tmp_path, tokenizer_config__json=config), "<tool>") == CONTROL


def test_named_special_tokens_are_control(tmp_path: Path) -> None:
    data = byte_level()
    data["model"]["vocab"]["<pad_me>"] = n_tokens(data)
    config = {"pad_token": {"content": "<pad_me>"}}
    vocab = vocab_of(data, tmp_path, tokenizer_config__json=config)
    assert kind_of(vocab, "<pad_me>") == CONTROL
    assert value(vocab, "padding_token_id") == value(vocab, "tokens").index("<pad_me>")


def test_padding_never_repeats_a_token(tmp_path: Path) -> None:
    data = byte_level()
    n = n_tokens(data)
    add_token(data, f"[PAD{n + 2}]", special=False)
    write_folder(tmp_path, tokenizer__json=data)
    vocab = read_vocab(tmp_path, {}, n_vocab=n + 4)
    tokens = value(vocab, "tokens")
    assert tokens[n:] == [f"[PAD{n + 2}]", f"[PAD{n + 1}]", f"[PAD[PAD{n + 2}]]", f"[PAD{n + 3}]"]
    assert len(set(tokens)) == n + 4


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    data = byte_level()
    n = n_tokens(data)
    add_token(data, "<extra>", special=True)
    write_folder(tmp_path, tokenizer__json=data)
    vocab = read_vocab(tmp_path, {}, n_vocab=n)
    assert "<extra>" not in value(vocab, "tokens") and "left out" in vocab.warnings[0]
    fewer = read_vocab(tmp_path, {}, n_vocab=n - 5)
    left = set(value(fewer, "tokens"))
    assert len(left) == n - 5
    assert all(set(merge.split(" ")) <= left for merge in value(fewer, "merges"))
    with pytest.raises(CheckpointError, match="cannot belong together"):
        read_vocab(tmp_path, {}, n_vocab=n // 2)


def test_huge_vocab_size_is_not_padded(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer__json=byte_level())
    with pytest.raises(CheckpointError, match="cannot belong together"):
        read_vocab(tmp_path, {}, n_vocab=10**9)


# The pre-tokenizer.


@pytest.mark.parametrize("split", [s for s in SPLITS if s not in ("newlines", "words")])
def test_every_split_is_known_by_its_structure(split: str, tmp_path: Path) -> None:
    data = byte_level(split)
    add_token(data, "<anything that changes the hash>", special=True)
    name = value(vocab_of(data, tmp_path), "pre")
    assert SPLITS[PRETOKENIZERS[name].split] == SPLITS[split]


def test_ignore_merges_chooses_the_name(tmp_path: Path) -> None:
    data = byte_level("llama3")
    assert value(vocab_of(data, tmp_path / "a"), "pre") == "dbrx"
    data["model"]["ignore_merges"] = True
    assert value(vocab_of(data, tmp_path / "b"), "pre") == "llama-bpe"


def step(kind: str, **options: Any) -> dict[str, Any]:
    return {"type": kind, **options}


BYTES = step("ByteLevel", use_regex=False, add_prefix_space=False, trim_offsets=True)


@pytest.mark.parametrize(
    ("steps", "split"),
    [
        ([step("ByteLevel", add_prefix_space=False)], "gpt-2"),
        ([step("ByteLevel", add_prefix_space=True)], None),
        ([step("Digits", individual_digits=True), step("ByteLevel")], "smollm"),
        ([step("Split", pattern={"Regex": GPT2}, behavior="Removed", invert=True), BYTES], "gpt-2"),
        ([step("Split", pattern={"Regex": GPT2}, behavior="Isolated"), BYTES], "gpt-2"),
        ([step("Split", pattern={"Regex": GPT2}, behavior="MergedWithNext"), BYTES], None),
        ([step("Split", pattern={"String": " "}, behavior="Isolated"), BYTES], None),
        ([step("Whitespace"), BYTES], None),
        (
            [
                step("Punctuation", behavior="Contiguous"),
                step("ByteLevel"),
                step("Digits", individual_digits=False),
                step("Split", pattern={"Regex": "[0-9][0-9][0-9]"}, behavior="Isolated"),
            ],
            "falcon",
        ),
    ],
)
def test_spellings_of_structures(steps: list[dict[str, Any]], split: str | None) -> None:
    assert known_split(steps) == split


def test_unknown_structure_takes_the_nearest(tmp_path: Path) -> None:
    data = byte_level("smollm")
    odd = {"Regex": r"\p{N}|\p{Sc}"}  # like smollm, but currency signs stand alone too
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = odd
    vocab = vocab_of(data, tmp_path)
    assert PRETOKENIZERS[value(vocab, "pre")].split == "smollm"
    assert "of 49 test texts encode identically" in vocab.warnings[0]


def test_nothing_near_is_refused(tmp_path: Path) -> None:
    letters = step("Split", pattern={"Regex": "."}, behavior="Isolated", invert=False)
    data = byte_level(pre_tokenizer=step("Sequence", pretokenizers=[letters, BYTES]))
    with pytest.raises(UnsupportedModelError, match=r"known are .*gpt-2.*qwen2"):
        vocab_of(data, tmp_path)


def test_normalizer_that_has_no_form(tmp_path: Path) -> None:
    data = byte_level(normalizer=step("Lowercase"))
    (warning,) = vocab_of(data, tmp_path).warnings
    assert "test texts encode identically" in warning


def test_endless_pattern_is_refused(tmp_path: Path) -> None:
    endless = {"Regex": r"(?:\w|\w\w|\w\w\w|\s)*[^\w\s\S]"}
    bomb = step("Split", pattern=endless, behavior="Isolated", invert=False)
    data = byte_level(pre_tokenizer=step("Sequence", pretokenizers=[bomb, BYTES]))
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        vocab_of(data, tmp_path)


def test_trial_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_tools.vocab.trial.TIME_LIMIT", 0.001)
    vocab = vocab_of(byte_level("qwen2"), tmp_path)
    assert PRETOKENIZERS[value(vocab, "pre")].split == "qwen2"
    assert "took too long" in vocab.warnings[0]
    data = byte_level(pre_tokenizer=step("Sequence", pretokenizers=[step("Whitespace"), BYTES]))
    with pytest.raises(UnsupportedModelError, match="cannot be run"):
        vocab_of(data, tmp_path)


def test_a_trial_that_has_begun_is_used(tmp_path: Path) -> None:
    data = byte_level("qwen2")
    vocab = vocab_of(data, tmp_path)
    with begin_trial(tmp_path) as trial:
        assert trial is not None
        again = read_vocab(tmp_path, {}, n_vocab=n_tokens(data), trial=trial)
        assert again == vocab
        with pytest.raises(CheckpointError, match="cannot load"):  # its process has ended
            trial.result()


def test_nothing_is_tried_out_in_vain(tmp_path: Path) -> None:
    fallback, model, none = (tmp_path / name for name in ("fallback", "model", "none"))
    write_folder(fallback, tokenizer__json=byte_fallback())
    write_folder(model, tokenizer__json=byte_level(), tokenizer__model=sentencepiece_model())
    for folder in (fallback, model, none):
        with begin_trial(folder) as trial:
            assert trial is None


# Special ids from all the places.


def special_ids(folder: Path, config: dict[str, Any], **files: Any) -> dict[str, int]:
    data = byte_level()
    for text in ("<|eot_id|>", "<|eom_id|>", "<pad>"):
        add_token(data, text, special=True)
    write_folder(folder, tokenizer__json=data, **files)
    vocab = read_vocab(folder, config, n_vocab=n_tokens(data))
    tokens = value(vocab, "tokens")
    return {
        key.removeprefix(GGML).removesuffix("_token_id"): tokens[entry.value]
        for key, entry in vocab.metadata.items()
        if key.endswith("_token_id")
    }


N = 420  # the first added id


def test_ids_by_text_come_first(tmp_path: Path) -> None:
    ids = special_ids(
        tmp_path,
        {"eos_token_id": 0, "bos_token_id": 0},
        tokenizer_config__json={"eos_token": "<|im_end|>"},
        special_tokens_map__json={"bos_token": {"content": "<|im_start|>"}, "eos_token": "<pad>"},
    )
    assert (ids["bos"], ids["eos"]) == ("<|im_start|>", "<|im_end|>")
    # What other files call the end ends an answer too.
    assert ids["eot"] == "<|im_end|>" or {"<pad>", "<|endoftext|>"} & {ids["eot"], ids["eom"]}


def test_lists_of_ends(tmp_path: Path) -> None:
    ids = special_ids(
        tmp_path,
        {"eos_token_id": [0, N + 1]},
        generation_config__json={"eos_token_id": [0, N + 1, N], "pad_token_id": N + 2},
    )
    assert ids["eos"] == "<|endoftext|>"
    assert (ids["eot"], ids["eom"], ids["padding"]) == ("<|eot_id|>", "<|eom_id|>", "<pad>")


def test_turn_end_as_eos_is_eot_as_well(tmp_path: Path) -> None:
    ids = special_ids(
        tmp_path,
        {"eos_token_id": [0, N + 1, N]},
        tokenizer_config__json={"eos_token": "<|eot_id|>"},
    )
    assert (ids["eos"], ids["eot"], ids["eom"]) == ("<|eot_id|>", "<|eot_id|>", "<|eom_id|>")


def test_ids_in_a_text_config(tmp_path: Path) -> None:
    assert special_ids(tmp_path, {"text_config": {"eos_token_id": N}})["eos"] == "<|eot_id|>"


def test_bos_is_always_written(tmp_path: Path) -> None:
    # llama.cpp would take the id 11 for it.
    assert special_ids(tmp_path, {"eos_token_id": N})["bos"] == "<|eot_id|>"


@pytest.mark.parametrize("bad", [-5, 10**12, "2", 2.0, True, {"id": 2}, [10**6]])
def test_impossible_ids_are_ignored_in_words(bad: object, tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer__json=byte_level())
    vocab = read_vocab(tmp_path, {"eos_token_id": bad}, n_vocab=420)
    assert value(vocab, "eos_token_id") == 0
    assert "config.json: eos_token_id" in vocab.warnings[0]


def test_no_pad_is_no_news(tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer__json=byte_level())
    assert read_vocab(tmp_path, {"pad_token_id": -1}, n_vocab=420).warnings == ()


# Whether bos and eos are added.


def template(*items: str) -> dict[str, Any]:
    def parts(*names: str) -> list[dict[str, Any]]:
        kinds = ("Sequence" if name in "AB" else "SpecialToken" for name in names)
        return [{kind: {"id": n, "type_id": 0}} for kind, n in zip(kinds, names, strict=True)]

    tokens = {name: {"id": name, "ids": [0], "tokens": [name]} for name in items if name != "A"}
    return step(
        "TemplateProcessing",
        single=parts(*items),
        pair=parts(*items, "B"),
        special_tokens=tokens,
    )


@pytest.mark.parametrize(
    ("processor", "config", "bos", "eos", "n_warnings"),
    [
        (None, {}, False, False, 0),
        (None, {"add_bos_token": True}, True, False, 0),
        (step("ByteLevel"), {}, False, False, 0),
        (template("<|im_start|>", "A"), {}, True, False, 0),
        (template("A", "<|endoftext|>"), {}, False, True, 0),
        (template("<|im_start|>", "A", "<|endoftext|>"), {"add_bos_token": True}, True, True, 0),
        (step("Sequence", processors=[step("ByteLevel"), template("<|im_start|>", "A")]), {},
         True, False, 0),
        (template("<|im_start|>", "A"), {"add_bos_token": False}, True, False, 1),
        (template("<|im_start|>", "A"),
         {"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, False, False, 1),
    ],
)  # fmt: skip
def test_added_ends(
    processor: dict[str, Any] | None,
    config: dict[str, Any],
    bos: bool,
    eos: bool,
    n_warnings: int,
    tmp_path: Path,
) -> None:
    config = {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>", **config}
    data = byte_level(post_processor=processor)
    for part in (data["post_processor"] or {}).get("processors", [data["post_processor"] or {}]):
        if part.get("type") == "ByteLevel":
            part.update(add_prefix_space=False, trim_offsets=False, use_regex=True)
    vocab = vocab_of(data, tmp_path, tokenizer_config__json=config)
    assert (value(vocab, "add_bos_token"), value(vocab, "add_eos_token")) == (bos, eos)
    assert len(vocab.warnings) == n_warnings


# Templates and sampling.


def templates(vocab: Vocab) -> dict[str, Any]:
    entries = {k: v for k, v in vocab.metadata.items() if k.startswith("tokenizer.chat")}
    return {k: v.value if isinstance(v, Value) else list(v.values) for k, v in entries.items()}


def test_template_precedence(tmp_path: Path) -> None:
    data = byte_level()
    folder = tmp_path / "a"
    vocab = vocab_of(data, folder, tokenizer_config__json={"chat_template": "config"})
    assert templates(vocab) == {"tokenizer.chat_template": "config"}
    (folder / "chat_template.jinja").write_text("file")
    vocab = vocab_of(data, folder, tokenizer_config__json={"chat_template": "config"})
    assert templates(vocab) == {"tokenizer.chat_template": "config"}
    assert "different chat templates" in vocab.warnings[0]
    vocab = vocab_of(data, folder, tokenizer_config__json={})
    assert templates(vocab) == {"tokenizer.chat_template": "file"}
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert templates(vocab_of(data, folder)) == {"tokenizer.chat_template": "json"}


def test_named_templates(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "d"},
        {"name": "tool use", "template": "t"},
        {"name": "rag", "template": "r"},
    ]
    expected = {
        "tokenizer.chat_template": "d",
        "tokenizer.chat_template.rag": "r",
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": ["rag", "tool_use"],
    }
    data = byte_level()
    vocab = vocab_of(data, tmp_path / "a", tokenizer_config__json={"chat_template": named})
    assert templates(vocab) == expected
    extra = tmp_path / "b" / "additional_chat_templates"
    extra.mkdir(parents=True)
    (tmp_path / "b" / "chat_template.jinja").write_text("d")
    (extra / "rag.jinja").write_text("r")
    (extra / "tool use.jinja").write_text("t")
    assert templates(vocab_of(data, tmp_path / "b")) == expected


def test_sampling_defaults(tmp_path: Path) -> None:
    generation = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0,
                  "repetition_penalty": 1.05, "do_sample": True}  # fmt: skip
    vocab = vocab_of(byte_level(), tmp_path, generation_config__json=generation)
    assert vocab.sampling == {
        "general.sampling.temp": Value("f32", 0.6),
        "general.sampling.top_k": Value("i32", 20),
        "general.sampling.top_p": Value("f32", 0.95),
        "general.sampling.min_p": Value("f32", 0.0),
        "general.sampling.penalty_repeat": Value("f32", 1.05),
    }


@pytest.mark.parametrize("bad", [-1, "warm", 1e99, True, [1], float("nan"), float("inf")])
def test_odd_sampling_is_ignored_in_words(bad: object, tmp_path: Path) -> None:
    vocab = vocab_of(byte_level(), tmp_path, generation_config__json={"temperature": bad})
    assert vocab.sampling == {} and "temperature" in vocab.warnings[0]


# Files that are broken, or want to break something.


def changed(data: dict[str, Any], path: str, new: object) -> dict[str, Any]:
    *parents, last = path.split(".")
    part = data
    for name in parents:
        part = part[name]
    part[last] = new
    return data


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("model", None),
        ("model", []),
        ("model.type", "WordPiece"),
        ("model.type", 7),
        ("model.vocab", {}),
        ("model.vocab", ["a"]),
        ("model.vocab.the", -1),
        ("model.vocab.the", 10**12),
        ("model.vocab.the", "5"),
        ("model.vocab.the", 5.0),
        ("model.vocab.the", None),
        ("model.vocab.the", 5),
        ("model.vocab.\ud800", 420),
        ("model.merges", {"a": 1}),
        ("model.merges", [["a"]]),
        ("model.merges", ["a b c"]),
        ("model.merges", [["a", "nowhere"]]),
        ("model.merges", [7]),
        ("model.continuing_subword_prefix", "##"),
        ("model.end_of_word_suffix", "</w>"),
        ("added_tokens", "all"),
        ("added_tokens", [{"id": 1}]),
        ("added_tokens", [{"id": -1, "content": "x"}]),
        ("added_tokens", [{"id": "7", "content": "x"}]),
        ("added_tokens", [{"id": 7, "content": "<new>"}]),
        ("added_tokens", [7]),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{}] * 100}),
        ("pre_tokenizer", {"type": "Sequence"}),
        ("pre_tokenizer", 7),
        ("pre_tokenizer.pretokenizers", [{"type": "Split"}]),
        ("normalizer", {"type": 7}),
    ],
)
def test_broken_json(path: str, new: object, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        write_folder(tmp_path, tokenizer__json=changed(byte_level(), path, new))
        read_vocab(tmp_path, {}, n_vocab=420)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200


@pytest.mark.parametrize(
    "content",
    [
        b"", b"   ", b"{", b"[]", b"7", b"null", b'"text"', b"\xff\xfe{\x00}\x00", b"{}" * 2,
        b"[" * 100_000, b'{"a":' * 100_000, b'{"model": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "added_tokens.json",
    ],
)
def test_files_that_are_no_json_object(name: str, content: bytes, tmp_path: Path) -> None:
    write_folder(tmp_path, tokenizer__json=byte_level())
    (tmp_path / name).write_bytes(content)
    if name == "added_tokens.json" and content == b"{}":
        return
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_vocab(tmp_path, {}, n_vocab=420)


def test_cut_anywhere(tmp_path: Path, stories260k: Path) -> None:
    model = (stories260k / "tokenizer.model").read_bytes()
    for size in range(0, len(model), len(model) // 37):
        folder = write_folder(tmp_path, tokenizer__model=model[:size])
        try:
            vocab = read_vocab(folder, {}, n_vocab=512)
        except CheckpointError:
            continue
        assert len(value(vocab, "tokens")) == 512  # it was cut between two pieces


@pytest.mark.parametrize(
    "data",
    [
        b"\x00", b"hello world, this is no protobuf", b"\xff" * 64, b"\x0a\xff\xff\xff\xff\x0f",
        b"\x0a\x7f", b"\x0a\x03\x0a\x01\xff", b"\x0a\x02\x0a\x00", b"\x0b\x0c",
        b"\x0a\x09\x0a\x01a\x15\x00\x00\xc0\x7fx\x00", b"\x0a\x05\x0a\x01a\x18\x63",
        b"\x08" + b"\x80" * 20, b"\x12\x04\x18\x07\x20\x01",
    ],
)  # fmt: skip
def test_garbage_model_file(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_vocab(write_folder(tmp_path, tokenizer__model=data), {}, n_vocab=512)


def test_two_pieces_of_one_text(tmp_path: Path) -> None:
    piece = b"\x0a\x03\x0a\x01a"
    with pytest.raises(CheckpointError, match="same text"):
        read_vocab(write_folder(tmp_path, tokenizer__model=piece * 2), {}, n_vocab=2)


def test_word_models_are_refused(tmp_path: Path) -> None:
    model = sentencepiece_model(model_type="char", byte_fallback=False)
    with pytest.raises(UnsupportedModelError, match="'bpe' and 'unigram'"):
        read_vocab(write_folder(tmp_path, tokenizer__model=model), {}, n_vocab=600)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.model or tokenizer\.json"):
        read_vocab(tmp_path, {}, n_vocab=512)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are a POSIX thing")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="a pipe"):
        read_vocab(tmp_path, {}, n_vocab=512)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("tokenizer.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_vocab(tmp_path, {}, n_vocab=512)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="a device"):
        read_vocab(tmp_path, {}, n_vocab=512)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match="a folder"):
        read_vocab(tmp_path, {}, n_vocab=512)


def test_links_to_files_are_fine(tmp_path: Path) -> None:
    data = byte_level()
    write_folder(tmp_path / "blobs", tokenizer__json=data)
    folder = write_folder(tmp_path / "snapshot")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blobs" / "tokenizer.json")
    assert len(value(read_vocab(folder, {}, n_vocab=n_tokens(data)), "tokens")) == n_tokens(data)


def test_real_checkpoint(smollm2_checkpoint: Path, smollm2_gguf: Path) -> None:
    from gguf_tools.reader import GGUFFile

    config = json.loads((smollm2_checkpoint / "config.json").read_text())
    vocab = read_vocab(smollm2_checkpoint, config, n_vocab=config["vocab_size"])
    assert vocab.warnings == ()
    ours = as_read(vocab)
    with GGUFFile(smollm2_gguf) as file:
        for key, theirs in file.metadata.items():
            if key.startswith("tokenizer."):
                kind = file.metadata_types[key].removeprefix("arr[").removesuffix("]")
                assert kind == vocab.metadata[key].type
                assert np.array_equal(ours[key], theirs), key
