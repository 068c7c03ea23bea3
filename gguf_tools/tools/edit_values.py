"""What a metadata value may be set to: its type, and the values that would break the file."""

import json
import math
import re
import struct
from collections.abc import Callable
from typing import Any

from gguf_tools.errors import FormatError, GGUFError, printable
from gguf_tools.reader import GGUFFile
from gguf_tools.values import (
    ALIGNMENT_KEY,
    RESERVE_KEY,
    SCALAR_BY_NAME,
    SCALARS,
    Array,
    MetadataValue,
    ScalarType,
    Value,
)
from gguf_tools.writer import encode_value

TYPES = ("str", *(scalar.name for scalar in SCALARS))
TOKENIZER = "tokenizer."
GUARDED = ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens")
MAX_TEXT = 1 << 24  # of a string; longer ones are not read either
_KEY = re.compile(r"[^\s\x00-\x1f\x7f]+")


def parse_value(
    file: GGUFFile, key: str, text: str, type_name: str | None
) -> tuple[str, Any, MetadataValue]:
    """The type, the value and what is written, of `text` for `key`; an existing key keeps its type.

    An array is written as JSON.
    """
    kind = file.metadata_types.get(key)
    if kind is not None and type_name not in (None, kind):
        raise GGUFError(
            f"{printable(key)} is of type {kind} in this file and not {printable(type_name)}; "
            "a key keeps its type: leave --type out, or remove the key first"
        )
    if kind is None:
        kind = _new_type(key, type_name)
    if kind.startswith("arr["):
        value: Any = _parse_array(key, kind[4:-1], text)
        entry: MetadataValue = Array(kind[4:-1], value)
    else:
        value = text if kind == "str" else _parse_scalar(SCALAR_BY_NAME[kind], key, text)
        entry = Value(kind, value)
    if kind == "str" and len(text.encode("utf-8", "surrogateescape")) > MAX_TEXT:
        raise GGUFError(f"{printable(key)}: expected at most {MAX_TEXT:,} bytes of text")
    try:
        encode_value(entry)
    except (struct.error, OverflowError, UnicodeEncodeError) as error:
        raise GGUFError(
            f"{printable(key)}: expected a value of type {kind}, found '{printable(text)}'"
        ) from error
    return kind, value, entry


def check_change(file: GGUFFile, key: str, value: Any | None, *, force: bool) -> None:
    """Refuse what would break the file; None as value removes the key."""
    shown = printable(key)
    if value is None and key not in file.metadata:
        raise GGUFError(f"{printable(file.path, limit=1000)}: there is no key {shown} to remove")
    if key == RESERVE_KEY and value is not None:
        raise GGUFError(f"{shown} is room for later changes; make some with --reserve BYTES")
    if key == ALIGNMENT_KEY or key.startswith("split."):
        why = "where the tensors lie" if key == ALIGNMENT_KEY else "how the parts belong together"
        raise GGUFError(f"{shown} says {why}; changing it would break the file")
    if key in GUARDED and not force:
        raise GGUFError(
            f"{shown} decides how every other key is read; with --force it is changed nevertheless"
        )
    if value is None:
        return
    odd = [item for item in (value if isinstance(value, list) else [value]) if not_finite(item)]
    if odd and not force:
        raise GGUFError(
            f"{shown}: expected a finite number, found {odd[0]}; with --force it is changed "
            "nevertheless"
        )
    tokens: Any = file.metadata.get("tokenizer.ggml.tokens")
    is_id = key.startswith(TOKENIZER) and key.endswith("_token_id") and isinstance(tokens, list)
    if is_id and not (isinstance(value, int) and 0 <= value < len(tokens)):
        raise GGUFError(
            f"{shown}: expected the id of a token, 0 to {len(tokens) - 1:,}, found {value}"
        )
    if key.startswith(TOKENIZER) and file.metadata_types.get(key, "").startswith("arr["):
        old: Any = file.metadata[key]
        if len(old) != len(value) and not force:
            raise GGUFError(
                f"{shown} has {len(old):,} values, which belong to the tokens one by one; found "
                f"{len(value):,}; with --force it is changed nevertheless"
            )


def not_finite(value: object) -> bool:
    """Whether it is a float that is infinite or no number."""
    return isinstance(value, float) and not math.isfinite(value)


def _new_type(key: str, type_name: str | None) -> str:
    if not _KEY.fullmatch(key) or len(key.encode("utf-8", "surrogateescape")) > 65535:
        raise GGUFError(f"'{printable(key)}' is no key: expected a name without spaces")
    known = f"{', '.join(TYPES)}, or arr[TYPE] of one of them"
    if type_name is None:
        raise GGUFError(
            f"{printable(key)} is not in this file; to add it say --type with one of {known}"
        )
    element = type_name[4:-1] if re.fullmatch(r"arr\[.*\]", type_name) else type_name
    if element not in TYPES:
        raise GGUFError(f"type {printable(type_name)} is not known; known are {known}")
    return type_name


def _parse_scalar(scalar: ScalarType, key: str, text: str) -> int | float | bool:
    parse: Callable[[str], Any] = _parse_int
    if scalar.name == "bool":
        parse = _parse_bool
    elif scalar.name in ("f32", "f64"):
        parse = float
    try:
        value: int | float | bool = parse(text.strip())
    except ValueError:
        raise GGUFError(
            f"{printable(key)}: expected a value of type {scalar.name}, found '{printable(text)}'"
        ) from None
    return value


def _parse_int(text: str) -> int:
    if len(text) > 30:  # no type has so many digits
        raise ValueError
    return int(text, 0)


def _parse_bool(text: str) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    if found is None:
        raise ValueError
    return found


def _parse_array(key: str, element: str, text: str) -> list[Any]:
    if element == "arr":
        raise FormatError(f"{printable(key)} is an array of arrays, which is not changed here")
    wrong = f"{printable(key)}: expected a JSON array of {element}"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GGUFError(f"{wrong}: {error}") from None
    if not isinstance(values, list):
        raise GGUFError(f"{wrong}, found '{printable(text)}'")
    allowed: tuple[type, ...] = (int,)
    if element in ("str", "bool"):
        allowed = (str,) if element == "str" else (bool,)
    elif element in ("f32", "f64"):
        allowed = (int, float)
    for index, value in enumerate(values):
        if not isinstance(value, allowed) or (element != "bool" and isinstance(value, bool)):
            raise GGUFError(f"{wrong}, found {printable(json.dumps(value))} at place {index:,}")
    return values
