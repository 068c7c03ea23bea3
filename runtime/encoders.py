"""Text to ids, by the libraries that define the two kinds of tokenizer.

- `PieceEncoder`: SentencePiece, which joins pieces by their scores. Its own library runs it, on a
  model message put together from the file's tokens and scores.
- `MergeEncoder`: BPE by a list of merges, over GPT-2's byte alphabet or over plain text.
- `Matcher`: finds added tokens in a text before either of them sees it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gguf_tools.errors import FormatError, printable
from runtime.vocabulary import (
    BYTE,
    NORMAL,
    PIECE_MODELS,
    USER_DEFINED,
    Vocabulary,
    byte_value,
)

SPACE = "\u2581"  # how a space is written in tokens

ADDED_SCORE = -1000.0
"""Of tokens added to a SentencePiece model. They are found before it sees the text, which then goes
on like a new one; user-defined pieces of its own, with other scores, are found by it."""


def is_added(vocabulary: Vocabulary, token_id: int) -> bool:
    """Whether a user-defined token is one that `Matcher` has to find."""
    scores = vocabulary.scores
    if vocabulary.model not in PIECE_MODELS or scores is None:
        return True
    return bool(scores[token_id] == ADDED_SCORE)


class Encoder(Protocol):
    """Encodes a text, or a stretch of it between added tokens; `first` when no token is before."""

    def encode(self, text: str, *, first: bool) -> list[int]: ...


def make_encoder(vocabulary: Vocabulary) -> Encoder:
    """The encoder that the vocabulary's kind asks for."""
    if vocabulary.model in PIECE_MODELS:
        return PieceEncoder(vocabulary)
    return MergeEncoder(vocabulary)


class Matcher:
    """Finds the leftmost, longest occurrences of a set of tokens."""

    def __init__(self, texts: Sequence[str], ids: Sequence[int]) -> None:
        from tokenizers import AddedToken, Tokenizer
        from tokenizers.models import BPE

        self._matcher: Any = None
        known = {text: i for text, i in zip(texts, ids, strict=True) if text and _is_utf8(text)}
        if known:
            # A tokenizer with no vocabulary but the added tokens: what they don't match, it drops.
            self._matcher = Tokenizer(BPE({}, []))
            self._matcher.add_tokens([AddedToken(text, normalized=False) for text in known])
            self._ids = {self._matcher.token_to_id(text): i for text, i in known.items()}

    def split(self, text: str) -> Iterator[str | int]:
        """Stretches of text, and the ids of the tokens between them."""
        start = 0
        if self._matcher is not None:
            found = self._matcher.encode(text, add_special_tokens=False)
            for token_id, (begin, end) in zip(found.ids, found.offsets, strict=True):
                if begin > start:
                    yield text[start:begin]
                yield self._ids[token_id]
                start = end
        if start < len(text):
            yield text[start:]


class MergeEncoder:
    """BPE by merges."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

        pre = vocabulary.pre
        usable = (NORMAL, USER_DEFINED, BYTE)
        tokens: dict[str, int] = {}
        for i, (text, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.types.tolist(), strict=True)
        ):
            if kind in usable and text not in tokens and _is_utf8(text):
                tokens[text] = i
        options = {"ignore_merges": pre.ignore_merges, "byte_fallback": pre.raw_bytes}
        self._tokenizer: Any = Tokenizer(_bpe(tokens, vocabulary.merges, options))
        cuts: list[Any] = [
            pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        if pre.raw_bytes:
            self._tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        else:
            cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
            if pre.nfc:
                self._tokenizer.normalizer = normalizers.NFC()
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)

    def encode(self, text: str, *, first: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def _bpe(tokens: dict[str, int], merges: Sequence[str], options: dict[str, bool]) -> Any:
    from tokenizers.models import BPE

    pairs = []
    for rank, merge in enumerate(merges):
        # The first space is part of the first token when the merge begins with it.
        at = merge.find(" ", 1)
        if at < 0:
            raise FormatError(
                f"tokenizer.ggml.merges: entry {rank:,} is not two tokens but "
                f"'{printable(merge, 40)}'"
            )
        pairs.append((merge[:at], merge[at + 1 :]))
    try:
        return BPE(tokens, pairs, **options)
    except Exception:
        # Some merge is of tokens that are not in the vocabulary: it could never be used.
        pairs = [(a, b) for a, b in pairs if a in tokens and b in tokens and a + b in tokens]
        return BPE(tokens, pairs, **options)


class PieceEncoder:
    """SentencePiece: BPE or unigram, by scores."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from sentencepiece import set_min_log_level

        tokens, types = vocabulary.tokens, vocabulary.types.tolist()
        self._byte_ids: list[int | None] = [None] * 256
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
            if kind == BYTE and (byte := byte_value(text)) is not None:
                self._byte_ids[byte] = i
        self._unknown = vocabulary.ids.get("unknown")
        self._own_unknown = len(tokens)
        self._all_bytes = None not in self._byte_ids
        set_min_log_level(_ERRORS)
        self._prefixing: Any = self._load(vocabulary, prefix=vocabulary.add_space_prefix)
        self._plain = self._prefixing
        self._first_only = vocabulary.prefix_first_only
        self._unless_space = vocabulary.prefix_unless_space
        if vocabulary.add_space_prefix and (self._first_only or self._unless_space):
            self._plain = self._load(vocabulary, prefix=False)

    def _load(self, vocabulary: Vocabulary, *, prefix: bool) -> Any:
        from sentencepiece import SentencePieceProcessor

        message = _model_message(vocabulary, byte_fallback=self._all_bytes, prefix=prefix)
        processor: Any = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(message)
        except RuntimeError as error:
            raise FormatError(
                f"the file's tokenizer makes no SentencePiece model ({printable(error)})"
            ) from error
        return processor

    def encode(self, text: str, *, first: bool) -> list[int]:
        spared = (self._first_only and not first) or (
            self._unless_space and text.startswith((" ", SPACE))
        )
        processor = self._plain if spared else self._prefixing
        ids: list[int] = processor.EncodeAsIds(text)
        if self._own_unknown not in ids:
            return ids
        return self._without_unknown(ids, processor.EncodeAsPieces(text))

    def _without_unknown(self, ids: list[int], pieces: list[str]) -> list[int]:
        """Characters that are in no piece: their bytes, or else the unknown token."""
        result: list[int] = []
        # The piece of an unknown stretch is its text.
        for token_id, piece in zip(ids, pieces, strict=True):
            if token_id != self._own_unknown:
                result.append(token_id)
                continue
            by_bytes = [self._byte_ids[byte] for byte in piece.encode()]
            known = [i for i in by_bytes if i is not None]
            if len(known) == len(by_bytes):
                result += known
            elif self._unknown is not None:
                result.append(self._unknown)
        return result


def _model_message(vocabulary: Vocabulary, *, byte_fallback: bool, prefix: bool) -> bytes:
    """A serialized SentencePiece ModelProto with the vocabulary's tokens at their ids.

    Tokens that text must not become (control, unused, unknown) are control pieces there, and so are
    added tokens, which a `Matcher` finds. The one unknown piece that the library asks for stands
    behind them all.
    """
    from struct import pack

    assert vocabulary.scores is not None
    parts = []
    taken: set[str] = set()
    scores, types = vocabulary.scores.tolist(), vocabulary.types.tolist()
    entries = zip(vocabulary.tokens, scores, types, strict=True)
    for i, (text, score, kind) in enumerate(entries):
        code = kind if kind == NORMAL else _CONTROL_PIECE
        if kind == BYTE and byte_fallback and byte_value(text) is not None:
            code, text = BYTE, f"<0x{byte_value(text):02X}>"
        elif kind == USER_DEFINED and score != ADDED_SCORE:
            code, text = USER_DEFINED, text.replace(" ", SPACE)
        if not text or text in taken or "\0" in text or not _is_utf8(text):
            code, text = _CONTROL_PIECE, f"\ufdd1{i}"
        taken.add(text)
        data = text.encode()
        piece = b"\n" + _varint(len(data)) + data + b"\x15" + pack("<f", score) + _KINDS[code]
        parts.append(b"\n" + _varint(len(piece)) + piece)
    data = "\ufdd1unknown".encode()
    piece = b"\n" + _varint(len(data)) + data + b"\x15" + pack("<f", 0.0) + _KINDS[_UNKNOWN_PIECE]
    parts.append(b"\n" + _varint(len(piece)) + piece)
    model_type = 2 if vocabulary.model == "llama" else 1  # BPE or unigram
    trainer = _number(3, model_type) + _number(35, int(byte_fallback)) + _number(40, len(parts) - 1)
    trainer += b"".join(_number(field, (1 << 64) - 1) for field in (41, 42, 43))  # no bos, eos, pad
    spaces = int(vocabulary.remove_extra_whitespaces)
    charsmap = vocabulary.charsmap
    normalizer = b"\x12" + _varint(len(charsmap)) + charsmap
    normalizer += _number(3, int(prefix)) + _number(4, spaces) + _number(5, 1)
    for key, message in ((b"\x12", trainer), (b"\x1a", normalizer)):
        parts.append(key + _varint(len(message)) + message)
    return b"".join(parts)


_UNKNOWN_PIECE, _CONTROL_PIECE = 2, 3
_ERRORS = 2  # a level of the library's log


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


_KINDS = {kind: _number(3, kind) for kind in range(1, 7)}


def _is_utf8(text: str) -> bool:
    """Whether `text` can be written as UTF-8; bytes of a file that could not, can't again."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
