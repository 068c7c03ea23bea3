"""The `tokenizer.*` metadata of a GGUF file, checked: tokens, their types, and the special ids.

Files come from anywhere. A number that would be used as an index is checked here; what a file
leaves out takes llama.cpp's default.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_tools.errors import FormatError, UnsupportedModelError, printable
from gguf_tools.pretokenizers import PRETOKENIZERS, PreTokenizer
from gguf_tools.token_types import (
    ADDED_SCORE,
    BYTE,
    CONTROL,
    FILL_IN_MIDDLE,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
)

KNOWN_MODELS = ("llama", "t5", "gpt2", "gemma4", "bert")
PIECE_MODELS = ("llama", "t5")  # SentencePiece's BPE and unigram models
MERGE_MODELS = ("gpt2", "gemma4")
NO_MODELS = ("none", "no_vocab")  # a file that says that it has no tokenizer

# What llama.cpp takes a special token to be where the file says nothing.
DEFAULT_IDS = {
    "llama": {"bos": 1, "eos": 2, "unknown": 0},
    "t5": {"eos": 1, "unknown": 2},
    "gpt2": {"bos": 11, "eos": 11},
    "gemma4": {},
    "bert": {"bos": 101, "eos": 102, "unknown": 100},
}
PREFIX = "tokenizer.ggml."
TEMPLATE_KEY = "tokenizer.chat_template"

# Tokens that end a turn or a text, whatever the metadata says of them.
END_TEXTS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_utterance>",
    "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "_<EOT>", "[e~[",
})  # fmt: skip
# The same, but only where they are control tokens: they may be text as well (HTML's </s>).
END_CONTROL_TEXTS = frozenset({"</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]"})
# Tokens of fill-in-the-middle are control tokens, whatever a converter took them for.
FILL_TEXTS = frozenset(text for texts in FILL_IN_MIDDLE.values() for text in texts)
# Fill-in-the-middle tokens that end the part between (padding, next file, next repository).
FILL_ENDS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
# Special tokens of Phi-3 that leave the white space behind them.
PHI3_KEEPS = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_SURROGATES = re.compile("[\ud800-\udfff]")

# With both of a pair in the vocabulary, <|end|> ends a message of several in one answer.
END_IS_NO_END = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"), ("<|call|>", "<|flush|>"))


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens."""

    model: str
    pre: PreTokenizer
    tokens: Sequence[str]
    types: NDArray[np.int32]  # (n_tokens,)
    scores: NDArray[np.float32] | None  # (n_tokens,)
    merges: Sequence[str]
    ids: Mapping[str, int]  # "bos", "eos", "unknown", ... -> id
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    prefix_first_only: bool  # not after added tokens
    prefix_unless_space: bool  # not before a text that begins with a space
    remove_extra_whitespaces: bool
    charsmap: bytes  # SentencePiece's table of replacements, or nothing
    nfc: bool  # text is brought to Unicode's composed form first
    lowercase: bool  # of the bert kind: text is brought to small letters first
    strip_accents: bool  # of the bert kind
    lstrip_ids: frozenset[int]  # special tokens that take the white space before them with them
    rstrip_ids: frozenset[int]  # or behind them
    chat_template: str | None
    notes: tuple[str, ...]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary that these `tokenizer.*` entries describe."""
    model = _text(metadata, "model")
    if model is None:
        raise FormatError(f"the file has no tokenizer: {PREFIX}model is missing")
    if model in NO_MODELS:
        raise FormatError(f"the file has no tokenizer: {PREFIX}model is '{model}'")
    if model not in KNOWN_MODELS:
        raise UnsupportedModelError(
            f"the file's tokenizer is of the kind '{printable(model, 40)}'; known are "
            f"{', '.join(KNOWN_MODELS)}"
        )
    notes: list[str] = []
    pre = _pre_tokenizer(metadata, model, notes)
    tokens = _strings(metadata, "tokens")
    if tokens is None or not tokens:
        raise FormatError(
            f"the file's tokenizer is empty: {PREFIX}tokens is missing or has no token"
        )
    types = _types(metadata, model, tokens)
    scores = _numbers(metadata, "scores", len(tokens), np.float32)
    merges = _strings(metadata, "merges")
    if model in PIECE_MODELS and scores is None:
        raise FormatError(f"the file's tokenizer is incomplete: {PREFIX}scores is missing")
    if model in MERGE_MODELS and merges is None:
        raise FormatError(f"the file's tokenizer is incomplete: {PREFIX}merges is missing")
    if scores is not None and not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise FormatError(f"{PREFIX}scores: the score of token {bad:,} is {scores[bad]}")
    ids = _special_ids(metadata, model, tokens, types, notes)
    types[[i for i, text in enumerate(tokens) if text in FILL_TEXTS]] = CONTROL
    eog_ids = _end_ids(tokens, types, ids)
    types[[i for i in eog_ids if types[i] in (NORMAL, USER_DEFINED)]] = CONTROL
    template = metadata.get(TEMPLATE_KEY)
    lowercase = _flag(metadata, "normalizer.lowercase", True)
    lstrip_ids, rstrip_ids = _stripping(metadata, tokens, types, pre)
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges or (),
        ids=ids,
        eog_ids=eog_ids,
        add_bos=_adds_bos(metadata, model, pre) and "bos" in ids,
        add_eos=_flag(metadata, "add_eos_token", model in ("t5", "bert")) and "eos" in ids,
        add_space_prefix=model == "bert"
        or (model in PIECE_MODELS and _flag(metadata, "add_space_prefix", model == "llama")),
        prefix_first_only=_flag(metadata, "space_prefix_first_only", False),
        prefix_unless_space=_flag(metadata, "space_prefix_unless_space", False),
        charsmap=_charsmap(metadata),
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", False),
        nfc=_flag(metadata, "normalizer.nfc", pre.nfc),
        lowercase=lowercase,
        strip_accents=_flag(metadata, "normalizer.strip_accents", lowercase),
        lstrip_ids=lstrip_ids,
        rstrip_ids=rstrip_ids,
        chat_template=template if isinstance(template, str) else None,
        notes=tuple(notes),
    )


def is_added(vocabulary: Vocabulary, token_id: int) -> bool:
    """Whether a user-defined token is found before the encoder sees the text, not by it."""
    scores = vocabulary.scores
    if vocabulary.model not in PIECE_MODELS or scores is None:
        return True
    return bool(scores[token_id] == ADDED_SCORE)


def byte_value(text: str) -> int | None:
    """The byte that a token such as `<0x0A>` stands for."""
    if len(text) != 6 or not text.startswith("<0x") or text[5] != ">":
        return None
    digits = text[3:5]
    return int(digits, 16) if all(c in "0123456789abcdefABCDEF" for c in digits) else None


def is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8; bytes of a file that could not, can't again."""
    return text.isascii() or _SURROGATES.search(text) is None


def _pre_tokenizer(metadata: Mapping[str, Any], model: str, notes: list[str]) -> PreTokenizer:
    name = _text(metadata, "pre")
    if model == "gemma4":
        name = "gemma4"
    if model not in MERGE_MODELS or name == "default":
        return PRETOKENIZERS["default"]
    if not name:
        notes.append(
            "WARNING: the file does not name its pre-tokenizer (tokenizer.ggml.pre; it was made by "
            "an old converter): the default one is used, and text may be tokenized otherwise than "
            "in training; answers may be poor, convert the model anew"
        )
        return PRETOKENIZERS["default"]
    pre = PRETOKENIZERS.get(name)
    if pre is None:
        raise UnsupportedModelError(
            f"the file's pre-tokenizer is '{printable(name, 40)}'; known are "
            f"{', '.join(sorted(PRETOKENIZERS))}"
        )
    return pre


def _types(metadata: Mapping[str, Any], model: str, tokens: Sequence[str]) -> NDArray[np.int32]:
    types = _numbers(metadata, "token_type", len(tokens), np.int32)
    if types is not None:
        types = types.copy()
        types[(types < NORMAL) | (types > BYTE)] = NORMAL
        return types
    types = np.full(len(tokens), NORMAL, np.int32)
    if model in PIECE_MODELS:  # files of the first converters had none
        types[[i for i, t in enumerate(tokens) if byte_value(t) is not None]] = BYTE
        types[[i for i, t in enumerate(tokens) if t in ("<s>", "</s>")]] = CONTROL
        types[[i for i, t in enumerate(tokens) if t == "<unk>"]] = UNKNOWN
    return types


def _special_ids(
    metadata: Mapping[str, Any],
    model: str,
    tokens: Sequence[str],
    types: NDArray[np.int32],
    notes: list[str],
) -> dict[str, int]:
    ids: dict[str, int] = {}
    n_tokens = len(tokens)
    for key, value in metadata.items():
        if not key.startswith(PREFIX) or not key.endswith("_token_id"):
            continue
        role = key[len(PREFIX) : -len("_token_id")]
        number = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if number and 0 <= value < n_tokens:
            ids[role] = int(value)
        elif not (number and value in (-1, 2**32 - 1)):  # "none", as some converters write it
            notes.append(
                f"{printable(key)} is {printable(value, 40)}, which is no token of "
                f"{n_tokens:,}, and was ignored"
            )
    if model == "bert":  # its names for what stands before and behind a text
        for role, own in (("bos", "cls"), ("eos", "seperator")):
            if own in ids:
                ids.setdefault(role, ids[own])
    for role, token_id in DEFAULT_IDS[model].items():
        key = f"{PREFIX}{role}_token_id"
        if key not in metadata and token_id < n_tokens and types[token_id] in (CONTROL, UNKNOWN):
            ids.setdefault(role, token_id)
    return ids


def _end_ids(
    tokens: Sequence[str], types: NDArray[np.int32], ids: Mapping[str, int]
) -> frozenset[int]:
    """The ids that end an answer: those the metadata names, and those known by their text."""
    ends = {ids[role] for role in ("eos", "eot", "eom") if role in ids}
    by_text = {text: i for i, text in enumerate(tokens) if text in END_TEXTS}
    ends.update(by_text.values())
    candidates = np.flatnonzero((types != NORMAL) & (types != USER_DEFINED)).tolist()
    control = {tokens[i]: i for i in candidates}
    ends.update(control[text] for text in END_CONTROL_TEXTS if text in control)
    for key, texts in FILL_ENDS.items():
        role = key[: -len("_token_id")]
        known = [ids[role]] if role in ids else [control[text] for text in texts if text in control]
        ends.update(known[:1])
    if any(a in by_text and b in by_text for a, b in END_IS_NO_END):
        ends.discard(by_text.get("<|end|>", -1))
    return frozenset(ends)


def _adds_bos(metadata: Mapping[str, Any], model: str, pre: PreTokenizer) -> bool:
    """Whether bos is put before a text."""
    if pre.raw_bytes and pre.add_bos:
        return True  # of Gemma 4, whatever the file says: its first converters wrote false
    return _flag(metadata, "add_bos_token", model in ("llama", "bert") or pre.add_bos)


def _stripping(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: NDArray[np.int32], pre: PreTokenizer
) -> tuple[frozenset[int], frozenset[int]]:
    """The special tokens that take the white space before, and behind, them with them.

    Files of `convert` list them. Others do not, and llama.cpp goes by the names of a few models.
    """
    listed = [metadata.get(f"{PREFIX}{side}_token_ids") for side in ("lstrip", "rstrip")]
    if any(ids is not None for ids in listed):
        return _token_ids(listed[0], "lstrip", tokens), _token_ids(listed[1], "rstrip", tokens)
    name = str(metadata.get("general.name", "")).lower()
    arch = str(metadata.get("general.architecture", ""))
    before: tuple[str, ...] = ()
    behind: frozenset[int] = frozenset()
    if pre.name.startswith("jina-v2-") or arch in ("nomic-bert-moe", "jina-bert-v3"):
        before = ("<mask>",)
    elif "phi-3" in name or "phi3" in name:
        special = np.flatnonzero(np.isin(types, (CONTROL, UNKNOWN, USER_DEFINED))).tolist()
        behind = frozenset(i for i in special if tokens[i] not in PHI3_KEEPS)
    elif "modern-bert" in name:
        before = ("[MASK]",)
    return frozenset(i for i, text in enumerate(tokens) if text in before), behind


def _token_ids(values: object, side: str, tokens: Sequence[str]) -> frozenset[int]:
    """A list of ids, each of them a token."""
    ids = np.asarray([] if values is None else values)
    if ids.size == 0:
        return frozenset()
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise FormatError(f"{PREFIX}{side}_token_ids: expected a list of token ids")
    if int(ids.min()) < 0 or int(ids.max()) >= len(tokens):
        raise FormatError(
            f"{PREFIX}{side}_token_ids goes from {int(ids.min())} to {int(ids.max())}; the "
            f"vocabulary has {len(tokens):,} tokens"
        )
    return frozenset(ids.tolist())


def _charsmap(metadata: Mapping[str, Any]) -> bytes:
    """SentencePiece's normalizer table, its automaton checked: it runs without looking back.

    A u32 size, a double array of u32 units (offset, label and flags in each), and the replacements,
    each with a zero behind it. From a unit, a character leads to another unit; where a match ends,
    a unit holds the place of its replacement.
    """
    value = metadata.get(PREFIX + "precompiled_charsmap")
    if value is None:
        return b""
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.dtype.itemsize != 1 or array.ndim != 1:
        raise FormatError(f"{PREFIX}precompiled_charsmap: expected a list of bytes")
    data = array.tobytes()
    if not data:
        return b""
    n_trie = int.from_bytes(data[:4], "little")
    if len(data) < 8 or n_trie % 1024 or not 0 < n_trie < len(data) - 4 or data[-1]:
        raise FormatError(f"{PREFIX}precompiled_charsmap: not a table of characters")
    units = np.frombuffer(data, "<u4", n_trie // 4, 4).astype(np.int64)
    is_value = units >> 31 != 0
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    reached = (np.arange(units.size) ^ offsets) | 0xFF
    n_replacements = len(data) - 4 - n_trie
    if (reached[~is_value] >= units.size).any() or (
        (units & 0x7FFFFFFF)[is_value] >= n_replacements
    ).any():
        raise FormatError(f"{PREFIX}precompiled_charsmap: it leads out of itself")
    return data


def _text(metadata: Mapping[str, Any], name: str) -> str | None:
    value = metadata.get(PREFIX + name)
    if value is not None and not isinstance(value, str):
        raise FormatError(f"{PREFIX}{name}: expected a text, found {printable(value, 40)}")
    return value


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(PREFIX + name)
    if value is None:
        return default
    if not isinstance(value, bool | np.bool_):
        raise FormatError(f"{PREFIX}{name}: expected true or false, found {printable(value, 40)}")
    return bool(value)


def _strings(metadata: Mapping[str, Any], name: str) -> Sequence[str] | None:
    value = metadata.get(PREFIX + name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise FormatError(f"{PREFIX}{name}: expected a list of texts")
    return value


def _numbers(
    metadata: Mapping[str, Any], name: str, n_tokens: int, dtype: type[Any]
) -> NDArray[Any] | None:
    """An array with a number for each token; whole numbers are fine where floats are expected."""
    value = metadata.get(PREFIX + name)
    if value is None:
        return None
    array = np.asarray(value)
    kinds = "iuf" if dtype is np.float32 else "iu"
    if (
        array.ndim != 1
        or (array.size and array.dtype.kind not in kinds)
        or array.dtype.itemsize < 4
    ):
        raise FormatError(f"{PREFIX}{name}: expected a list of {np.dtype(dtype).name} numbers")
    if array.size != n_tokens:
        raise FormatError(
            f"{PREFIX}{name} has {array.size:,} entries for {n_tokens:,} tokens: the file is "
            "damaged"
        )
    return array.astype(dtype)
