"""`tokenizer.model`: SentencePiece's own file, a protobuf message.

It is read here, not by the sentencepiece package: a damaged or hostile file then costs an error,
never the process. Only the fields a tokenizer is made of are looked at:

    ModelProto      1 pieces: 1 piece, 2 score, 3 type
                    2 trainer_spec: 3 model_type, 24 treat_whitespace_as_suffix
                    3 normalizer_spec: 2 precompiled_charsmap, 3 add_dummy_prefix,
                                       4 remove_extra_whitespaces
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from gguf_tools.errors import CheckpointError, printable
from gguf_tools.token_types import NORMAL

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
MAX_PIECES = 1 << 24

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    kind: int  # SentencePiece's numbers are GGUF's: 1 normal, 2 unknown, ... 6 byte


@dataclass(frozen=True)
class SentencePieceModel:
    pieces: tuple[Piece, ...]
    model_type: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    whitespace_suffix: bool


def parse_model(data: bytes, name: str) -> SentencePieceModel:
    """The model in `data`; `name` is the file, for messages."""
    if not data:
        raise CheckpointError(f"{name}: expected a SentencePiece model, found an empty file")
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data, name):
        if number == 1 and isinstance(value, bytes):
            if len(pieces) >= MAX_PIECES:
                raise CheckpointError(f"{name}: more than {MAX_PIECES:,} pieces")
            pieces.append(_piece(value, len(pieces), name))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value, name))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value, name))
    if not pieces:
        raise CheckpointError(f"{name}: not a SentencePiece model: it has no pieces")
    model_type = MODEL_TYPES.get(_number(trainer.get(3, 1)))
    if model_type is None:
        raise CheckpointError(f"{name}: unknown SentencePiece model type {trainer.get(3)!r}")
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type,
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        add_dummy_prefix=_number(normalizer.get(3, 1)) != 0,
        remove_extra_whitespaces=_number(normalizer.get(4, 1)) != 0,
        whitespace_suffix=_number(trainer.get(24, 0)) != 0,
    )


def _piece(message: bytes, index: int, name: str) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message, name):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{name}: piece {index:,} is not UTF-8 text") from error
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not text:
        raise CheckpointError(f"{name}: piece {index:,} has no text")
    if not 1 <= kind <= 6:
        raise CheckpointError(f"{name}: piece {index:,} has the unknown type {kind}")
    if not math.isfinite(score):
        raise CheckpointError(f"{name}: piece {index:,} ('{printable(text, 40)}') scores {score}")
    return Piece(text, score, kind)


def _fields(data: bytes, name: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: numbers for varints, bytes for everything else."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at, name)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, name)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at, name)
        elif wire == _FIXED32:
            size = 4
        elif wire == _FIXED64:
            size = 8
        else:
            raise CheckpointError(f"{name}: not a SentencePiece model (byte {at:,})")
        if size > end - at:
            raise CheckpointError(f"{name}: cut short or damaged (byte {at:,})")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int, name: str) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise CheckpointError(f"{name}: cut short or damaged (byte {at:,})")


def _number(value: int | bytes) -> int:
    return value if isinstance(value, int) else 0
