"""The list of tokens as GGUF stores it: a text, a score and a type for each id."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf_tools.errors import CheckpointError, printable
from gguf_tools.token_types import UNUSED

PAD_SCORE = -10000.0  # of ids that have no token
MAX_PADDING = 1 << 20  # rows of the embedding beyond the tokenizer's last token

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LOOKS_SPECIAL = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})
_SPECIAL_BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True)
class AddedToken:
    """A token that a configuration file adds to the vocabulary, or marks in it."""

    id: int
    text: str
    special: bool
    source: str  # the file, for messages
    lstrip: bool = False  # it takes the white space before it with it
    rstrip: bool = False  # or behind it


@dataclass
class TokenTable:
    """Tokens by id; ids without a token are absent until `filled`."""

    texts: dict[int, str] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    types: dict[int, int] = field(default_factory=dict)
    added: set[int] = field(default_factory=set)
    lstrip: set[int] = field(default_factory=set)  # of the added ones
    rstrip: set[int] = field(default_factory=set)

    def put(self, token_id: int, text: str, score: float, kind: int) -> None:
        self.texts[token_id] = text
        self.scores[token_id] = score
        self.types[token_id] = kind

    def put_all(self, texts: Mapping[int, str], score: float, kind: int) -> None:
        """The same for many tokens."""
        self.texts.update(texts)
        self.scores.update(dict.fromkeys(texts, score))
        self.types.update(dict.fromkeys(texts, kind))

    def filled(self, n_vocab: int) -> tuple[list[str], list[float], list[int]]:
        """Texts, scores and types for ids 0 .. n_vocab-1; holes become `[PAD{i}]`, unused."""
        check_text("".join(self.texts.values()), "the tokenizer")
        last = max(self.texts, default=-1)
        if n_vocab - last > MAX_PADDING:
            raise CheckpointError(
                f"the embedding has {n_vocab:,} rows but the tokenizer's last token is {last:,}: "
                "they cannot belong together"
            )
        ids = range(n_vocab)
        if all(map(self.texts.__contains__, ids)):  # no holes
            return (
                list(map(self.texts.__getitem__, ids)),
                list(map(self.scores.__getitem__, ids)),
                list(map(self.types.__getitem__, ids)),
            )
        taken = set(self.texts.values())
        texts, scores, types = [], [], []
        for i in ids:
            text = self.texts.get(i)
            if text is None:
                text = f"[PAD{i}]"
                while text in taken:
                    text = f"[PAD{text}]"
                taken.add(text)
                scores.append(PAD_SCORE)
                types.append(UNUSED)
            else:
                scores.append(self.scores[i])
                types.append(self.types[i])
            texts.append(text)
        return texts, scores, types


def is_byte_token(text: str) -> bool:
    """Whether `text` is a byte of SentencePiece's byte fallback, such as `<0x0A>`."""
    return _BYTE_TOKEN.fullmatch(text) is not None


def looks_special(text: str) -> bool:
    """Whether an added token is a control token although nothing marks it special."""
    return text in _LOOKS_SPECIAL or any(
        text.startswith(start) and text.endswith(end) for start, end in _SPECIAL_BRACKETS
    )


def read_added_tokens(entries: object, source: str) -> list[AddedToken]:
    """The `added_tokens` list of tokenizer.json, or `added_tokens_decoder` of its config."""
    if entries is None:
        return []
    pairs: list[tuple[Any, Any]]
    if isinstance(entries, Mapping):
        pairs = [(_decimal(key, source), value) for key, value in entries.items()]
    elif isinstance(entries, list):
        pairs = [(e.get("id") if isinstance(e, Mapping) else None, e) for e in entries]
    else:
        raise CheckpointError(f"{source}: the added tokens are not a list")
    tokens = []
    for token_id, entry in pairs:
        text = entry.get("content") if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or not text:
            raise CheckpointError(f"{source}: an added token has no text ({printable(entry)})")
        check_id(token_id, text, source)
        flags = {name: entry.get(name) is True for name in ("special", "lstrip", "rstrip")}
        tokens.append(AddedToken(token_id, text, source=source, **flags))
    return tokens


def are_ids(values: Collection[Any]) -> bool:
    """Whether all are plausible numbers, at least one."""
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 1 << 31


def check_id(token_id: Any, text: str, source: str) -> None:
    """Refuse an id that is not a plausible number."""
    if not are_ids([token_id]):
        raise CheckpointError(
            f"{source}: token '{printable(text, 40)}' has the id {printable(token_id, 40)}, "
            "which is not a number from 0 up"
        )


def check_text(text: str, source: str) -> None:
    """Refuse text that UTF-8 cannot hold: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{source}: the character U+{ord(text[error.start]):04X} is half of a surrogate pair, "
            "not text"
        ) from error


def check_unique(table: TokenTable, source: str) -> None:
    """Refuse two ids with one text: neither this runtime nor llama.cpp could tell them apart."""
    if len(set(table.texts.values())) == len(table.texts):
        return
    seen: dict[str, int] = {}
    for token_id, text in table.texts.items():
        if text in seen:
            raise CheckpointError(
                f"{source}: token '{printable(text, 40)}' has two ids, {seen[text]:,} and "
                f"{token_id:,}"
            )
        seen[text] = token_id


def _decimal(key: str, source: str) -> int:
    if not key.isascii() or not key.isdigit() or len(key) > 12:
        raise CheckpointError(f"{source}: '{printable(key, 40)}' is not a token id")
    return int(key)
