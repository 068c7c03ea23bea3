"""Change one metadata value of a GGUF file.

The tensors' bytes begin at a multiple of the alignment after the header, so a header that stays
within its padding is changed in place: nothing else in the file moves. One that does not is a
rewrite of the file. A rewrite can reserve room, a key of zeros that later edits shrink and grow.

A change in place is safe against being killed: the old bytes are first written to FILE.undo and
flushed. While that file is there, the model does not open; `recover` puts the old bytes back.
Programs that have the file mapped see nothing of it: they read the header when they open a file,
and the tensors stay where and what they are. A rewrite gives them the old file until they let go.
"""

import hashlib
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.errors import FormatError, OutputError, printable
from gguf_tools.reader import UNDO_MAGIC, GGUFFile, undo_path
from gguf_tools.tools.edit_values import check_change, parse_value
from gguf_tools.tools.splitting import copy_tensors
from gguf_tools.values import ALIGNMENT_KEY, MAGIC, RESERVE_KEY, Array, MetadataValue, Value
from gguf_tools.writer import GGUFWriter, TensorSpec, encode_string, encode_value, open_locked

UNDO = struct.Struct("<8sQQ32s")  # magic, offset, length, SHA-256 of the bytes that follow
MAX_UNDO = 1 << 28


@dataclass(frozen=True)
class Change:
    """A change of one key, worked out and not yet made."""

    file: Path
    key: str
    type: str
    before: Any | None  # None: the key is new
    after: Any | None  # None: the key is removed
    offset: int  # of the first byte that differs
    header: bytes | None  # from there to the tensors; None: the file has to be written anew
    rewrite: dict[str, MetadataValue]
    header_size: int  # of the file as it was looked at
    digest: bytes  # SHA-256 of that header

    @property
    def in_place(self) -> bool:
        return self.header is not None

    @property
    def nothing_to_do(self) -> bool:
        return self.header == b""


def plan_change(
    file: GGUFFile,
    key: str,
    text: str | None,
    *,
    type_name: str | None = None,
    force: bool = False,
    reserve: int = 0,
) -> Change:
    """What setting `key` to `text` comes to; None as text removes it. Refuses what would break
    the file. `reserve` bytes of room are made if the file has to be rewritten."""
    entries: dict[str, MetadataValue] = {name: file.encoded(name) for name in file.metadata}
    before = file.metadata.get(key)
    after = None
    if text is None:
        kind = file.metadata_types.get(key, "")
        check_change(file, key, None, force=force)
        del entries[key]
    else:
        kind, after, entries[key] = parse_value(file, key, text, type_name)
        check_change(file, key, after, force=force)
    with open(file.paths[0], "rb") as source:
        old = source.read(file.data_offset)
        n_names = os.fstat(source.fileno()).st_nlink
    offset, header = _fit(file, old, entries)
    if n_names > 1 and header:  # only the name that was given is to mean the changed file
        header = None
    if header is None:
        if ALIGNMENT_KEY in entries:
            entries[ALIGNMENT_KEY] = Value("u32", file.alignment)
        if reserve:
            entries.pop(RESERVE_KEY, None)
            entries[RESERVE_KEY] = Array("u8", np.zeros(reserve, np.uint8))
    digest = hashlib.sha256(old).digest()
    return Change(
        file.paths[0], key, kind, before, after, offset, header, entries, len(old), digest
    )


def apply_in_place(change: Change) -> None:
    """Write the new header over the old one. Either the whole change is made or none of it."""
    assert change.header is not None
    with _alone(change) as lock, open(change.file, "r+b", buffering=0) as file:
        file.seek(change.offset)
        old = file.read(len(change.header))
        _write_undo(lock, undo_path(change.file), change.offset, old)
        try:
            _overwrite(file.fileno(), change.offset, change.header)
        except BaseException:
            _overwrite(file.fileno(), change.offset, old)
            os.ftruncate(lock, 0)
            raise
        os.ftruncate(lock, 0)  # from here on there is nothing to put back


def apply_rewrite(change: Change, file: GGUFFile) -> Iterator[tuple[str, int]]:
    """Write the file anew, beside the old one, which is replaced when the new one is complete.

    The name of each tensor and the bytes of it that have been written.
    """
    specs = [
        TensorSpec(tensor.name, tensor.quant, tensor.shape)
        for tensor in file.tensors.values()
        if tensor.part == 0
    ]
    with (
        _alone(change),
        GGUFWriter(
            change.file,
            metadata=change.rewrite,
            tensors=specs,
            force=True,
            alignment=file.alignment,
        ) as writer,
    ):
        yield from copy_tensors(file, writer, specs)
        with suppress(OSError):  # some file systems have no permissions
            os.chmod(writer.part, os.stat(change.file).st_mode & 0o7777)


def recover(path: Path) -> bool:
    """Put back what an interrupted change had begun to overwrite; whether there was anything."""
    undo = undo_path(path)
    found = _read_undo(undo)
    if found is None:
        return False
    lock = open_locked(undo)
    try:
        if _read_undo(undo) not in (found, None):
            raise OutputError(f"{printable(undo, limit=1000)} has just changed; try again")
        offset, old = found
        if old:
            with open(path, "r+b", buffering=0) as file:
                if file.read(4) != MAGIC or os.fstat(file.fileno()).st_size < offset + len(old):
                    raise FormatError(
                        f"{printable(undo, limit=1000)} does not belong to "
                        f"{printable(path, limit=1000)}; remove it if the model is another one now"
                    )
                _write_undo(lock, undo, offset, old)  # where locking has emptied it
                _overwrite(file.fileno(), offset, old)
    except OSError as error:
        os.close(lock)
        raise _cannot_change(path, error) from error
    except BaseException:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    _close_undo(lock, undo)
    return bool(old)


def check_target(path: Path) -> None:
    """Refuse a link: what it leads to belongs to others, a download cache perhaps."""
    if path.is_symlink():
        raise OutputError(
            f"{printable(path, limit=1000)} is a link to "
            f"{printable(os.path.realpath(path), limit=1000)}, which others may use; copy the "
            "file, or name that one"
        )


def _fit(
    file: GGUFFile, old: bytes, entries: Mapping[str, MetadataValue]
) -> tuple[int, bytes | None]:
    """Where the new header first differs, and its bytes to where it last does; None if it does
    not fit before the tensors."""
    first, last = file.infos_span
    infos = old[first:last]
    counts = old[: len(MAGIC) + 12] + struct.pack("<Q", len(entries))
    body = [encode_string(key) + encode_value(entry) for key, entry in entries.items()]
    room = file.data_offset - len(counts) - sum(map(len, body)) - len(infos)
    names = list(entries)
    if RESERVE_KEY in entries and file.metadata_types.get(RESERVE_KEY) == "arr[u8]":
        index = names.index(RESERVE_KEY)
        room += len(body[index])
        empty = encode_string(RESERVE_KEY) + encode_value(Array("u8", b""))
        if room >= len(empty):
            zeros = np.zeros(room - len(empty), np.uint8)
            body[index] = encode_string(RESERVE_KEY) + encode_value(Array("u8", zeros))
            room = 0
    if len(old) != file.data_offset or not 0 <= room < file.alignment:
        return 0, None
    new = counts + b"".join(body) + infos + bytes(room)
    if new == old:
        return 0, b""
    start = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    end = len(new) - next(
        i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=True)) if a != b
    )
    return start, new[start:end]


# --- the file that says what was there before


@contextmanager
def _alone(change: Change) -> Iterator[int]:
    """The locked, empty undo file: no other change happens now, nor has since this was planned."""
    undo = undo_path(change.file)
    try:
        lock = open_locked(undo)
        try:
            with open(change.file, "rb") as file:
                header = file.read(change.header_size)
            if hashlib.sha256(header).digest() != change.digest:
                raise OutputError(
                    f"{printable(change.file, limit=1000)} has been changed by another process "
                    "just now; try again"
                )
            yield lock
        finally:
            _close_undo(lock, undo)
    except OSError as error:
        raise _cannot_change(change.file, error) from error


def _cannot_change(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{printable(path, limit=1000)}: cannot be changed: {error.strerror or error}"
    )


def _write_undo(lock: int, undo: Path, offset: int, old: bytes) -> None:
    head = UNDO.pack(UNDO_MAGIC, offset, len(old), hashlib.sha256(old).digest())
    os.ftruncate(lock, 0)
    os.lseek(lock, 0, os.SEEK_SET)
    _write_all(lock, head + old)
    os.fsync(lock)
    with suppress(OSError):  # some systems cannot flush a folder
        folder = os.open(undo.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_undo(undo: Path) -> tuple[int, bytes] | None:
    """The offset and the bytes, none if they were not complete; None if it is no such file."""
    if not undo.is_file():
        return None
    with open(undo, "rb") as file:
        data = file.read(MAX_UNDO)
    if not data.startswith(UNDO_MAGIC):
        return None
    if len(data) < UNDO.size:
        return 0, b""
    _, offset, length, digest = UNDO.unpack_from(data)
    old = data[UNDO.size :]
    whole = length == len(old) and digest == hashlib.sha256(old).digest()
    return (offset, old) if whole else (0, b"")


def _close_undo(lock: int, undo: Path) -> None:
    """Remove the file, unless it has something to put back."""
    done = os.fstat(lock).st_size == 0
    with suppress(OSError):
        if done and sys.platform != "win32":
            undo.unlink()  # while the lock is held
    os.close(lock)
    with suppress(OSError):
        if done and sys.platform == "win32":  # an open file cannot be removed there
            undo.unlink()


def _overwrite(fd: int, offset: int, data: bytes) -> None:
    os.lseek(fd, offset, os.SEEK_SET)
    _write_all(fd, data)
    os.fsync(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]
