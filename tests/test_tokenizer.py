import codecs
import json
import random
import unicodedata
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as SourceTokenizer

from gguf_tools.errors import FormatError, UnsupportedModelError
from gguf_tools.pretokenizers import PRETOKENIZERS
from gguf_tools.reader import GGUFFile
from gguf_tools.vocab import read_vocab
from gguf_tools.vocab.corpus import TEST_TEXTS
from gguf_tools.vocab.sentencepiece_model import parse_model
from runtime.tokenizer import StreamDecoder, Tokenizer, encode_chat
from tests.tokenizer_files import (
    add_token,
    as_read,
    byte_fallback,
    byte_level,
    sentencepiece_model,
    vocab_of,
    write_folder,
)

RECORDED = Path(__file__).parent / "data" / "tokenizers" / "smollm2.json"
GGML = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

BLOCKS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F),
    (0xE00, 0xE7F), (0x1780, 0x17FF), (0x2000, 0x206F), (0x20A0, 0x257F), (0x3000, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFF00, 0xFFEF), (0x1F300, 0x1FAFF), (0x1D400, 0x1D7FF),
)  # fmt: skip
SNIPPETS = (" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", " \n", "'s", "'LL", "'re", "hello",
            "The", "foo_bar", "x = 1;", "(a)", "Lily", " was a ", "1234567", " 12 ")  # fmt: skip


def random_texts(n: int, seed: int = 1) -> list[str]:
    """Mixed scripts, spaces, digits and words."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randrange(1, 20)):
            if rng.random() < 0.5:
                parts.append(rng.choice(SNIPPETS))
            else:
                low, high = rng.choice(BLOCKS)
                parts += [chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 5))]
        text = "".join(parts)
        texts.append("".join(c for c in text if unicodedata.category(c) != "Cn"))
    return texts


def tokenizer_of(data: dict[str, Any], folder: Path, **files: Any) -> Tokenizer:
    return Tokenizer(as_read(vocab_of(data, folder, **files)))


# The same ids as everyone else.


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama3", "tekken", "gpt-4o", "deepseek-v3"])
def test_byte_level_like_the_source(split: str, tmp_path: Path) -> None:
    data = byte_level(split)
    tokenizer = tokenizer_of(data, tmp_path)
    source = SourceTokenizer.from_str(json.dumps(data))
    for text in (*TEST_TEXTS, *random_texts(200)):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == source.encode(text).ids, text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}], ids=["as-is", "composed"])
@pytest.mark.parametrize("split", ["qwen35", "qwen2"])
def test_composed_or_not_like_the_source(
    split: str, normalizer: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Whatever the name of the pre-tokenizer stands for: Qwen 3.5 composes, its name does not."""
    data = byte_level(split, normalizer=normalizer)
    vocab = vocab_of(data, tmp_path)
    assert vocab.warnings == ()
    tokenizer = Tokenizer(as_read(vocab))
    source = SourceTokenizer.from_str(json.dumps(data))
    for text in ("e\u0301te\u0301", *TEST_TEXTS, *random_texts(50)):
        assert tokenizer.encode(text, add_special=False) == source.encode(text).ids, text


def test_byte_fallback_like_the_source(tmp_path: Path) -> None:
    data = byte_fallback()
    tokenizer = tokenizer_of(data, tmp_path)
    source = SourceTokenizer.from_str(json.dumps(data))
    for text in (*TEST_TEXTS, *random_texts(200)):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == source.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text


def test_prefix_before_a_text_or_after_every_token(tmp_path: Path) -> None:
    data = byte_fallback()
    add_token(data, "[INST]", special=True)
    for scheme in ("always", "first", "never"):
        step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme}
        changed = {**data, "normalizer": None, "pre_tokenizer": {**step, "split": False}}
        tokenizer = tokenizer_of(changed, tmp_path / scheme)
        source = SourceTokenizer.from_str(json.dumps(changed))
        for text in ("a time", "[INST]a time[INST] a[INST]", " a[INST]  time"):
            ids = tokenizer.encode(text, add_special=False, parse_special=True)
            assert ids == source.encode(text).ids, (scheme, text)


@pytest.mark.parametrize("data", [byte_level(), byte_fallback()], ids=["bytes", "pieces"])
def test_tokens_that_take_the_space_beside_them(data: dict[str, Any], tmp_path: Path) -> None:
    add_token(data, "<|user|>", special=True, rstrip=True)
    add_token(data, "<mask>", special=True, lstrip=True)
    add_token(data, "<both>", special=False, lstrip=True, rstrip=True)
    tokenizer = tokenizer_of(data, tmp_path)
    source = SourceTokenizer.from_str(json.dumps(data))
    for text in (
        "<|user|>\nOnce <mask> upon",
        "Once \u3000<mask>\n<|user|> <|user|>\n\na",
        " <both>  <mask> <both> a",
        "<|user|>",
        "<mask> ",
    ):
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        assert ids == source.encode(text, add_special_tokens=False).ids, text
        typed = tokenizer.encode(tokenizer.guarded(text), add_special=False, parse_special=True)
        assert typed == tokenizer.encode(text, add_special=False)
    assert "\n" in tokenizer.decode(tokenizer.encode("<|user|>\nOnce", add_special=False))


def test_both_kinds_of_space_in_added_pieces(tmp_path: Path) -> None:
    """Gemma's tokenizer.json adds runs of U+2581, which a user may type as such."""
    data = byte_fallback()
    for n in (2, 3):
        add_token(data, "\u2581" * n, special=False)
    tokenizer = tokenizer_of(data, tmp_path)
    source = SourceTokenizer.from_str(json.dumps(data))
    for text in ("a\u2581\u2581b", "\u2581\u2581\u2581\u2581\u2581", "a b"):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == source.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_pieces_like_the_source(lowercase: bool) -> None:
    from tokenizers import BertWordPieceTokenizer

    source = BertWordPieceTokenizer(lowercase=lowercase, strip_accents=lowercase)
    lines = [line for text in (*TEST_TEXTS, *random_texts(300, seed=7)) for line in [text] * 2]
    source.train_from_iterator(lines, vocab_size=700, show_progress=False, min_frequency=2)
    names = sorted(source.get_vocab(), key=source.token_to_id)
    special = {"[PAD]": "padding", "[UNK]": "unknown", "[CLS]": "cls", "[SEP]": "seperator"}
    texts = [n if n in special else n[2:] if n[:2] == "##" else "\u2581" + n for n in names]
    types = np.array([CONTROL if name in special else NORMAL for name in names], np.int32)
    roles = {f"{role}_token_id": names.index(name) for name, role in special.items()}
    flags = {} if lowercase else {"normalizer.lowercase": False}
    tokenizer = Tokenizer(
        minimal(model="bert", pre=None, merges=None, tokens=texts, token_type=types,
                eos_token_id=None, **roles, **flags)
    )  # fmt: skip
    assert tokenizer.notes == ()
    for text in (*TEST_TEXTS, *random_texts(200), "[CLS] a[SEP]", "x" * 101 + " y"):
        ids = tokenizer.encode(text, add_special=False)
        assert ids == source.encode(text, add_special_tokens=False).ids or "[" in text, text
        assert tokenizer.encode(text) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    typed = tokenizer.encode("[CLS]", add_special=False)
    assert tokenizer.bos_id not in typed
    assert tokenizer.encode("[CLS]", add_special=False, parse_special=True) == [tokenizer.bos_id]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": False},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"user_defined_symbols": ["<sep>", "\u2581\u2581", "play"], "control_symbols": ["<c>"]},
        {"model_type": "unigram"},
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "byte_fallback": False},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_pieces_like_sentencepiece(options: dict[str, Any], tmp_path: Path) -> None:
    model = sentencepiece_model(**options)
    n_pieces = len(parse_model(model, "it").pieces)
    vocab = read_vocab(write_folder(tmp_path, tokenizer__model=model), {}, n_vocab=n_pieces)
    tokenizer = Tokenizer(as_read(vocab))
    source = sentencepiece.SentencePieceProcessor(model_proto=model)
    more = ("", " ", "   ", "a<sep>b <sep> c", "  play  with   it  ", "<c></s><s>", "x\0y")
    for text in (*TEST_TEXTS, *random_texts(200), *more):
        assert tokenizer.encode(text, add_special=False) == source.encode(text), text


def test_embedded_model(stories260k: Path) -> None:
    tokenizer = Tokenizer(as_read(read_vocab(stories260k, {}, n_vocab=512)))
    source = sentencepiece.SentencePieceProcessor(str(stories260k / "tokenizer.model"))
    for text in (*TEST_TEXTS, *random_texts(200)):
        assert tokenizer.encode(text) == [1, *source.encode(text)]
    text = "Once upon a time, \u00e9\U0001f680"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tinystories_like_the_source(tinystories: Path) -> None:
    tokenizer = Tokenizer(as_read(read_vocab(tinystories, {}, n_vocab=2048)))
    source = SourceTokenizer.from_file(str(tinystories / "tokenizer.json"))
    for text in (*TEST_TEXTS, *random_texts(200)):
        assert tokenizer.encode(text) == source.encode(text).ids, text


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    with GGUFFile(smollm2_gguf) as file:
        return Tokenizer(file.metadata)


def test_ids_recorded_from_llama_cpp(smollm2: Tokenizer) -> None:
    for entry in json.loads(RECORDED.read_text()):
        assert smollm2.encode(entry["text"]) == entry["ids"]
        assert smollm2.encode(entry["text"], parse_special=True) == entry["special_ids"]


def test_foreign_file_like_the_source(smollm2: Tokenizer, smollm2_checkpoint: Path) -> None:
    source = SourceTokenizer.from_file(str(smollm2_checkpoint / "tokenizer.json"))
    for text in random_texts(1000, seed=2):
        ids = smollm2.encode(text)
        assert ids == source.encode(text).ids, text
        assert smollm2.decode(ids) == text


def test_a_large_vocabulary_is_ready_at_once(smollm2_gguf: Path) -> None:
    with GGUFFile(smollm2_gguf) as file:
        start = perf_counter()
        Tokenizer(file.metadata).encode("Hello")
        assert perf_counter() - start < 2  # 0.1 s on a quiet machine


# Special tokens.


def specials(folder: Path) -> Tokenizer:
    data = byte_level()
    add_token(data, "<tool>", special=False)
    add_token(data, "<|x|>", special=True)
    add_token(data, "<|x|>y", special=True)
    return tokenizer_of(
        data,
        folder,
        tokenizer_config__json={
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
        },
    )


def texts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


def test_control_tokens_only_where_asked_for(tmp_path: Path) -> None:
    tokenizer = specials(tmp_path)
    text = "a<|im_end|>b"
    plain = tokenizer.encode(text, add_special=False)
    assert tokenizer.eos_id not in plain and tokenizer.decode(plain) == text
    parsed = tokenizer.encode(text, add_special=False, parse_special=True)
    assert texts_of(tokenizer, parsed) == ["a", "<|im_end|>", "b"]
    assert tokenizer.decode(parsed) == "ab"
    assert tokenizer.decode(parsed, special=True) == text


def test_no_text_becomes_a_control_token(tmp_path: Path) -> None:
    data = byte_level()
    for left, right in (("<", "|"), ("<|", "x"), ("<|x", "|"), ("<|x|", ">")):
        data["model"]["vocab"].setdefault(left + right, len(data["model"]["vocab"]))
        data["model"]["merges"].append([left, right])
    data["pre_tokenizer"]["pretokenizers"].pop(0)
    add_token(data, "<|x|>", special=True)
    # The merges lead to it, and still the text stays text.
    vocab = as_read(vocab_of(byte_level(), tmp_path))
    control = data["model"]["vocab"]["<|x|>"]
    tokens = [text for text, _ in sorted(data["model"]["vocab"].items(), key=lambda e: e[1])]
    vocab[GGML + "tokens"] = tokens
    vocab[GGML + "token_type"] = np.array(
        [CONTROL if i in (0, 1, 2, control) else NORMAL for i in range(len(tokens))], np.int32
    )
    vocab[GGML + "merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    tokenizer = Tokenizer(vocab)
    assert control not in tokenizer.encode("<|x|>")
    assert tokenizer.encode("<|x|>", parse_special=True) == [control]


def test_user_defined_tokens_are_always_found(tmp_path: Path) -> None:
    tokenizer = specials(tmp_path)
    ids = tokenizer.encode("a<tool>b", add_special=False)
    assert texts_of(tokenizer, ids) == ["a", "<tool>", "b"]
    assert tokenizer.decode(ids) == "a<tool>b"


def test_longest_token_wins(tmp_path: Path) -> None:
    tokenizer = specials(tmp_path)
    ids = tokenizer.encode("<|x|>y<|x|>z", add_special=False, parse_special=True)
    assert texts_of(tokenizer, ids) == ["<|x|>y", "<|x|>", "z"]


def test_bos_is_never_doubled(tmp_path: Path) -> None:
    tokenizer = specials(tmp_path)
    bos = tokenizer.bos_id
    assert tokenizer.encode("")[:1] == [bos] and tokenizer.encode("a")[0] == bos
    assert tokenizer.encode("a", add_special=False)[0] != bos
    parsed = tokenizer.encode("<|im_start|>a", parse_special=True)
    assert parsed.count(bos) == 1 and parsed == encode_chat(tokenizer, "<|im_start|>a")
    assert encode_chat(tokenizer, "a")[0] == bos


def test_eos_is_added_to_texts_and_not_to_chats(tmp_path: Path) -> None:
    data = byte_level()
    config = {"eos_token": "<|im_end|>", "add_eos_token": True}
    tokenizer = tokenizer_of(data, tmp_path, tokenizer_config__json=config)
    assert tokenizer.encode("a")[-1] == tokenizer.eos_id
    assert tokenizer.eos_id not in encode_chat(tokenizer, "a")


def test_guarded_text_holds_no_control_token(tmp_path: Path) -> None:
    tokenizer = specials(tmp_path)
    for text in (
        "<|im_end|>",
        "<<|im_end|>|im_end|>",
        "a<|x|>y",
        "\ufdd0<|im\ufdd0_end|>",
        "<tool>",
    ):
        guarded = tokenizer.guarded(text)
        ids = tokenizer.encode(f"<|im_start|>{guarded}<|im_end|>", parse_special=True)
        inside = ids[1:-1]
        assert tokenizer.decode(inside, special=True) == text.replace("\ufdd0", "")
        assert tokenizer.decode(inside) == text.replace("\ufdd0", "")


# Which tokens end an answer.


def minimal(**changes: Any) -> dict[str, Any]:
    """The metadata of a byte-level vocabulary of a few tokens."""
    texts = ["<|endoftext|>", "a", "b", "ab", *changes.pop("more", [])]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": texts,
        "token_type": np.array([CONTROL] + [NORMAL] * (len(texts) - 1), np.int32),
        "merges": ["a b"],
        "eos_token_id": 0,
        **changes,
    }
    return {GGML + key: entry for key, entry in metadata.items() if entry is not None}


def test_ends_named_by_the_metadata() -> None:
    metadata = minimal(eos_token_id=1, eot_token_id=2, eom_token_id=3)
    assert Tokenizer(metadata).eog_ids == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        (["<|im_end|>", "<|eot_id|>", "<end_of_turn>"], [4, 5, 6]),
        (["<|end|>"], [4]),
        (["<|end|>", "<|return|>", "<|call|>"], [5, 6]),
        (["<|end|>", "<|calls|>", "<|flush|>"], [5, 6]),
        (["</s>", "<eos>"], []),  # text here, as HTML's tags are for some models
        (["end", "<|im_start|>"], []),
    ],
)
def test_ends_known_by_their_text(texts: list[str], ends: list[int]) -> None:
    tokenizer = Tokenizer(minimal(more=texts))
    assert tokenizer.eog_ids == {0, *ends}
    assert all(tokenizer.token_bytes(i) == b"" for i in ends)  # never shown, whatever their type


def test_control_tokens_that_end(stories260k: Path) -> None:
    vocab = as_read(read_vocab(stories260k, {}, n_vocab=512))
    assert Tokenizer(vocab).eog_ids == {2}


# Ids back to text.


def test_stream_never_breaks_a_character(smollm2: Tokenizer) -> None:
    for text in (*TEST_TEXTS, *random_texts(100, seed=3)):
        decoder = StreamDecoder(smollm2)
        shown = [decoder.feed(i) for i in smollm2.encode(text)]
        assert "".join(shown) + decoder.finish() == text
        assert "\ufffd" not in "".join(shown) or "\ufffd" in text


def test_stream_of_broken_bytes(stories260k: Path) -> None:
    tokenizer = Tokenizer(as_read(read_vocab(stories260k, {}, n_vocab=512)))
    byte = {tokenizer.token_bytes(i): i for i in range(3, 259)}
    for data in (b"\xf0\x9f\x9a\x80", b"\xf0\x9f", b"\xffa\xe4\xbda\x80", b"a\xc3", b"\xc3\xa9"):
        decoder = StreamDecoder(tokenizer)
        shown = "".join(decoder.feed(byte[bytes([b])]) for b in data) + decoder.finish()
        assert shown == data.decode("utf-8", "replace")
    incremental = codecs.getincrementaldecoder("utf-8")("replace")
    rng = random.Random(4)
    decoder = StreamDecoder(tokenizer)
    for _ in range(2000):
        data = bytes([rng.randrange(256)])
        assert decoder.feed(byte[data]) == incremental.decode(data)


def test_control_tokens_are_not_shown(stories260k: Path) -> None:
    tokenizer = Tokenizer(as_read(read_vocab(stories260k, {}, n_vocab=512)))
    assert tokenizer.decode([1, 2, 0]) == "" and tokenizer.token_bytes(1) == b""
    assert tokenizer.decode([1], special=True) == "<s>" and tokenizer.token_text(1) == "<s>"
    decoder = StreamDecoder(tokenizer, special=True)
    assert decoder.feed(1) == "<s>"


@pytest.mark.parametrize("token_id", [-1, 512, 10**9])
def test_ids_that_are_no_tokens(token_id: int, stories260k: Path) -> None:
    tokenizer = Tokenizer(as_read(read_vocab(stories260k, {}, n_vocab=512)))
    with pytest.raises(ValueError, match="no token"):
        tokenizer.token_bytes(token_id)


def test_text_that_is_not_utf8(stories260k: Path) -> None:
    tokenizer = Tokenizer(as_read(read_vocab(stories260k, {}, n_vocab=512)))
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udcff")) == "a\ufffdb\ufffd"
    assert tokenizer.encode("\ud83d\ude80") == tokenizer.encode("\U0001f680")


# Metadata from anywhere.


@pytest.mark.parametrize("name", sorted(PRETOKENIZERS))
def test_every_named_pre_tokenizer_loads(name: str) -> None:
    text = "Hello  12345 \u4e16\u754c \u00e9\n\n'll"
    alphabet = [*"Helo123456789", "\u0120", "\u010a", "'", "\u2581", "\n"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)] if PRETOKENIZERS[name].raw_bytes else []
    tokenizer = Tokenizer(minimal(pre=name, more=[*alphabet, *raw]))
    assert tokenizer.encode(text)


def test_missing_pre_tokenizer_is_told() -> None:
    tokenizer = Tokenizer(minimal(pre=None))
    assert "old converter" in tokenizer.notes[0]
    assert tokenizer.encode("ab", add_special=False) == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no tokenizer"),
        ({"model": 7}, "expected a text"),
        ({"tokens": None}, "empty"),
        ({"tokens": []}, "empty"),
        ({"tokens": "abc"}, "list of texts"),
        ({"tokens": ["a", 7]}, "list of texts"),
        ({"token_type": np.zeros(3, np.int32)}, "3 entries for 4 tokens"),
        ({"token_type": np.zeros(4, np.float32)}, "int32"),
        ({"token_type": np.zeros(4, np.int8)}, "int32"),
        ({"token_type": "abcd"}, "int32"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["ab"]}, "not two tokens"),
        ({"merges": np.zeros(2)}, "list of texts"),
        ({"model": "llama", "scores": None}, "scores is missing"),
        ({"model": "llama", "scores": np.zeros(3, np.float32)}, "3 entries for 4 tokens"),
        ({"model": "llama", "scores": np.full(4, np.nan, np.float32)}, "score of token 0"),
        ({"model": "llama", "scores": np.zeros(4, np.int8)}, "float32"),
        ({"add_bos_token": "yes"}, "true or false"),
        ({"model": "none"}, "no tokenizer.*'none'"),
        ({"model": "bert"}, "unknown_token_id is missing"),
        ({"normalizer.lowercase": 1}, "true or false"),
        ({"rstrip_token_ids": np.array([4], np.int32)}, "from 4 to 4.*has 4 tokens"),
        ({"lstrip_token_ids": np.array([0, -1], np.int32)}, "from -1 to 0"),
        ({"lstrip_token_ids": np.array([2**63], np.uint64)}, "has 4 tokens"),
        ({"lstrip_token_ids": np.zeros(2, np.float32)}, "list of token ids"),
        ({"lstrip_token_ids": "ab"}, "list of token ids"),
        ({"precompiled_charsmap": np.arange(9, dtype=np.uint8)}, "not a table"),
        ({"precompiled_charsmap": np.zeros(2, np.float32)}, "list of bytes"),
    ],
)
def test_broken_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer(minimal(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, r"'rwkv'; known are llama, t5, gpt2, gemma4, bert"),
        ({"model": "plamo2"}, r"'plamo2'; known are llama"),
        ({"model": "\x1b[31m"}, r"\\x1b\[31m"),
        ({"pre": "made-up"}, r"'made-up'; known are .*gpt-2.*qwen2"),
    ],
)
def test_unknown_kinds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        Tokenizer(minimal(**changes))


@pytest.mark.parametrize("bad", [4, 2**31, 2**40, -7, "1", 1.0, np.uint64(2**63), True])
def test_ids_out_of_range_are_ignored_in_words(bad: object) -> None:
    tokenizer = Tokenizer(minimal(bos_token_id=bad, eos_token_id=bad, add_bos_token=True))
    assert tokenizer.bos_id is None and tokenizer.eos_id is None and not tokenizer.add_bos
    assert len(tokenizer.notes) == 2 and "is no token of 4" in tokenizer.notes[0]
    assert tokenizer.eog_ids == {0}


@pytest.mark.parametrize("none", [-1, np.uint32(2**32 - 1)])
def test_no_token_is_a_choice(none: object) -> None:
    assert Tokenizer(minimal(bos_token_id=none)).notes == ()


def test_fill_in_the_middle_tokens_are_control() -> None:
    """Whatever the file calls them: what a user types never becomes one."""
    tokenizer = Tokenizer(minimal(more=["<|fim_prefix|>", "<|fim_pad|>"]))
    assert 4 not in tokenizer.encode("<|fim_prefix|>")
    assert tokenizer.encode("<|fim_prefix|>", parse_special=True) == [4]
    assert tokenizer.eog_ids == {0, 5}


def test_gemma4_always_has_bos() -> None:
    """The first files said that it has none."""
    metadata = minimal(model="gemma4", pre=None, bos_token_id=0, add_bos_token=False)
    assert Tokenizer(metadata).encode("ab") == [0, 3]
    assert Tokenizer(minimal(bos_token_id=0, add_bos_token=False)).encode("ab") == [3]


def test_default_ids() -> None:
    scores = np.zeros(3, np.float32)
    metadata = minimal(model="llama", tokens=["<unk>", "<s>", "</s>"], scores=scores,
                       token_type=None, eos_token_id=None)  # fmt: skip
    tokenizer = Tokenizer(metadata)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    assert Tokenizer(minimal(eos_token_id=None)).eos_id is None  # llama.cpp would say 11


def test_odd_vocabularies() -> None:
    """Empty, repeated and impossible tokens: nothing is indexed that is not there."""
    scores = np.array([0, -1, -2, -3, -4, -5, 1e30, -1e30], np.float32)
    texts = ["", "a", "a", "<0x-1>", "<0xZZ>", "<0x41>", "\udc80", "b\0"]
    types = np.array([UNKNOWN, NORMAL, NORMAL, BYTE, BYTE, BYTE, NORMAL, NORMAL], np.int32)
    metadata = minimal(model="llama", tokens=texts, scores=scores, token_type=types)
    tokenizer = Tokenizer(metadata)
    assert tokenizer.encode("aA", add_special=False) == [0, 1, 5]
    assert tokenizer.token_bytes(6) == b"\x80"
    assert [tokenizer.token_bytes(i) for i in (3, 4, 5)] == [b"<0x-1>", b"<0xZZ>", b"A"]
    metadata = minimal(
        tokens=texts, token_type=types, merges=["a a", "x y", "\udc80 a", " a b", "<0x41> <0x41>"]
    )
    assert Tokenizer(metadata).encode("aab") == [1, 1]


def test_a_vocabulary_of_one() -> None:
    for model in ("gpt2", "llama", "t5", "gemma4", "bert"):
        metadata = minimal(model=model, tokens=["a"], token_type=None, merges=[],
                           scores=np.zeros(1, np.float32), eos_token_id=None,
                           unknown_token_id=0 if model == "bert" else None)  # fmt: skip
        tokenizer = Tokenizer(metadata)
        assert tokenizer.encode("ba")[-1:] in ([0], [])


def test_long_texts_are_quick(smollm2: Tokenizer) -> None:
    start = perf_counter()
    for text in (
        "a" * 100_000,
        " " * 100_000,
        "\n" * 100_000,
        "ab 12 " * 20_000,
        "\u4e16" * 50_000,
    ):
        assert smollm2.decode(smollm2.encode(text)) == text
    assert perf_counter() - start < 20
