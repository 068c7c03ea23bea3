"""Reading the small files of a checkpoint folder, none of which is trusted."""

import errno
import json
import stat
from pathlib import Path
from typing import Any

from gguf_tools.errors import CheckpointError, printable

MAX_FILE_BYTES = 256 << 20  # the largest tokenizer.json in use is about 35 MB


def read_bytes(folder: Path, name: str) -> bytes | None:
    """The whole of a regular file (or of a link to one), or None when there is none."""
    path = folder / name
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(
                f"{printable(path)}: expected a regular file, found {_kind(info)}"
            )
        if info.st_size > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{printable(path)}: {info.st_size:,} bytes is more than the "
                f"{MAX_FILE_BYTES:,} a tokenizer file may have"
            )
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise CheckpointError(f"{printable(path)}: cannot be read ({error.strerror})") from error


def read_text(folder: Path, name: str) -> str | None:
    """A UTF-8 text file, or None when there is none."""
    data = read_bytes(folder, name)
    if data is None:
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{printable(folder / name)}: not UTF-8 text (byte {error.start:,} is "
            f"0x{data[error.start]:02x})"
        ) from error


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file that holds an object, or None when there is none."""
    text = read_text(folder, name)
    if text is None:
        return None
    if not text.strip():
        raise CheckpointError(f"{printable(folder / name)}: expected JSON, found an empty file")
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{printable(folder / name)}: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(
            f"{printable(folder / name)}: not valid JSON ({printable(error)}); "
            "download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{printable(folder / name)}: expected a JSON object, found {_json_kind(value)}"
        )
    return value


def _kind(info: Any) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(info.st_mode):
            return name
    return "something else"


def _json_kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
