"""JSON objects from files that nobody vouches for.

Only regular files are opened, and links to them. What is too large, too deep, of too many parts or
not JSON at all is refused in words, before it can cost memory.
"""

import errno
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from gguf_tools.errors import CheckpointError, printable

MAX_CONFIG = 16_000_000  # bytes
MAX_JSON_ITEMS = 4_000_000  # of one file; a tensor is eight


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from a regular file of at most `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{shown(path)}: expected at most {limit:,} bytes, found {size:,}"
            )
        text = file.read(limit + 1)
    if not text.strip():
        raise CheckpointError(f"{shown(path)}: expected a JSON object, found an empty file")
    return parse_json(text, path, "", unique=False)


def shown(path: Path) -> str:
    """A path in a message."""
    return printable(path, limit=1000)


def open_regular(path: Path) -> Any:
    """The file, unbuffered; nothing but a regular file or a link to one (no pipe, no device)."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{shown(path)}: expected a file, found a {_kind(path)}")
        fd = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CheckpointError(f"{shown(path)}: expected a file")
        return os.fdopen(fd, "rb", buffering=0)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOENT and os.path.islink(path):
            reason = "a link to nowhere"
        raise CheckpointError(f"{shown(path)}: cannot be opened: {reason}") from error


def _kind(path: Path) -> str:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return "folder"
    return "pipe" if stat.S_ISFIFO(mode) else "device or socket"


def parse_json(text: bytes, path: Path, part: str, *, unique: bool) -> dict[str, Any]:
    where = shown(path) + (f": {part}" if part else "")
    n_items = text.count(b",") + text.count(b"[") + text.count(b"{")
    if n_items > MAX_JSON_ITEMS:
        raise CheckpointError(
            f"{where}: expected at most {MAX_JSON_ITEMS:,} JSON items, found {n_items:,}"
        )

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if unique and len(found) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise CheckpointError(f"{where}: {printable(twice)} is there twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=collect)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where}: expected UTF-8 text, found the byte 0x{text[error.start]:02x} at position "
            f"{error.start}"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{where}: expected JSON, found it nested too deep") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise CheckpointError(f"{where}: expected JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value
