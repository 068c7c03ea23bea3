"""SentencePiece, which joins pieces by their scores: BPE or unigram.

Its own library runs it, on a model message put together from the file's tokens and scores.
"""

from struct import pack
from typing import Any

from gguf_tools.encoders.vocabulary import Vocabulary, byte_value, is_utf8
from gguf_tools.errors import FormatError, printable
from gguf_tools.token_types import ADDED_SCORE, BYTE, NORMAL, SPACE, USER_DEFINED

_UNKNOWN_PIECE, _CONTROL_PIECE = 2, 3
_ERRORS = 2  # a level of the library's log


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
        if not text or text in taken or "\0" in text or not is_utf8(text):
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
