"""What of a .part file can be trusted, so that a stopped conversion goes on instead of over.

NAME.part.journal is text: who writes, then a line for each band that was appended to the .part.

    gguf-tools journal 1 PROGRAM INPUTS SETTINGS    three digests of 64 digits, see identity.py
    END CHECKSUM CHECK                              one for each band

END is where the band ends in the .part, CHECKSUM the CRC-32 of the bytes from the line before to
there, CHECK the CRC-32 of the line so far. A line is appended after its band. Nothing is flushed
to the disk on the way: a process that is killed loses nothing that it wrote, and after a power
failure some of the lines and some of the bands are there. So none is believed: a run that goes on
reads the whole .part first, and keeps what agrees with the checksums, up to the first band that
does not. The header is written again: a run that was stopped at its very end may have put into it
what it had found out. Whatever is damaged, torn or mixed up costs time, never the file.
"""

import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from gguf_tools.errors import CheckpointError, OutputError, printable
from gguf_tools.identity import Identity, digest_inputs, digest_program

SUFFIX = ".journal"
MAX_JOURNAL = 1 << 28  # bytes; a line is about 30 and stands for about a million weights
CHUNK = 1 << 20

_TITLE = re.compile(rb"gguf-tools journal 1 ([0-9a-f]{64}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
_LINE = re.compile(rb"((\d{1,18}) ([0-9a-f]{8})) ([0-9a-f]{8})\n")


class Journal:
    """The journal of one .part file; only the holder of the .part's lock opens it.

    `remark` says after `open` what was found, `kept` after `close` what is left for the next run;
    both are sentences for the user, or empty.
    """

    def __init__(self, inputs: Sequence[Path], *, options: str = "", resume: bool = True) -> None:
        """`inputs` are the files and checkpoint folders that bytes come from, as they are now;
        `options` is whatever else decides bytes and is not in the header. Without `resume` nothing
        that an earlier run has left is looked at.
        """
        self._inputs = tuple(inputs)
        self._options = options
        self._inputs_digest = digest_inputs(self._inputs, any_change=True)
        self._contents_digest = digest_inputs(self._inputs, any_change=False)
        self._program_digest = digest_program()
        self.remark = ""
        self.kept = ""
        self._resume = resume
        self._fd = -1
        self._first = 0  # where the bands begin in the .part
        self._end = 0  # where the last recorded band ends
        self._total = 0

    def add_option(self, text: str) -> None:
        """What else decides bytes, where that is known only now: before `open`."""
        self._options += "\0" + text

    @property
    def has_bands(self) -> bool:
        """Whether there is anything to go on from."""
        return self._end > self._first

    def open(self, part: Path, fd: int, *, header: bytes, total: int) -> int:
        """How many bytes of `part`, open as `fd`, are right; 0 if it must be written anew.

        `header` is what it is to begin with, which is not looked at: bands count from there on, and
        the header decides what they are. `total` is its size when finished.
        """
        self._part, self._path = part, part.with_name(part.name + SUFFIX)
        settings = hashlib.sha256(self._options.encode("utf-8", "surrogateescape") + b"\0" + header)
        self._identity = Identity(self._program_digest, self._inputs_digest, settings.hexdigest())
        self._first = self._end = len(header)
        self._total = total
        length = self._find(fd) if self._resume and os.fstat(fd).st_size else 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        self._fd = os.open(self._path, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            raise OutputError(
                f"{printable(self._path, limit=1000)} is not a regular file; remove it"
            )
        os.ftruncate(self._fd, length)
        if not length:
            words = " ".join(astuple(self._identity))
            self._write(f"gguf-tools journal 1 {words}\n".encode("ascii"))
        return self._end if length else 0

    def confirm_inputs(self) -> None:
        """CheckpointError if an input is no longer what it was when the journal was made."""
        if digest_inputs(self._inputs, any_change=False) != self._contents_digest:
            names = ", ".join(printable(path, limit=1000) for path in self._inputs)
            raise CheckpointError(f"{names} changed while it was converted; convert it again")

    def append(self, n_bytes: int, checksum: int) -> None:
        """So many bytes with this CRC-32 have been appended to the .part."""
        self._end += n_bytes
        line = f"{self._end} {checksum:08x}".encode("ascii")
        self._write(line + b" %08x\n" % zlib.crc32(line))

    def close(self, *, keep: bool) -> None:
        """Leave the journal for the next run, or remove it."""
        if keep:
            self.kept = (
                f"{self._percent()} of the file is kept in {self._shown}; "
                "the same command goes on from there"
            )
        if self._fd < 0:
            return
        if not keep:
            with suppress(OSError):  # gone already, or a folder that has become read-only
                if os.path.samestat(os.fstat(self._fd), os.lstat(self._path)):
                    os.unlink(self._path)
        os.close(self._fd)
        self._fd = -1

    @property
    def _shown(self) -> str:
        return printable(self._part, limit=1000)

    def _percent(self) -> str:
        return f"{100 * self._end // self._total} %"

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _find(self, fd: int) -> int:
        """Set `_end` and `remark`; how much of the journal is good, 0 if nothing is."""
        text = self._read()
        title = _TITLE.match(text)
        if title is None:
            what = "its journal is damaged" if text else "it has no journal"
            self.remark = f"starting over: {self._shown} cannot be trusted, {what}"
            return 0
        changed = self._identity.difference(Identity(*(group.decode() for group in title.groups())))
        if changed:
            self.remark = f"starting over: {changed} changed since {self._shown} was begun"
            return 0
        self._end = max(
            self._first, os.fstat(fd).st_size
        )  # whoever stops the reading loses nothing
        length, end = title.end(), self._first
        damaged = False
        for after, checksum, line_end in _records(text, length):
            damaged = not end < after <= self._total or _checksum(fd, end, after) != checksum
            if damaged:
                break
            end, length = after, line_end
        self._end = end
        if not self.has_bands:
            what = "is damaged" if damaged else "holds no whole band"
            self.remark = f"starting over: {self._shown} {what}"
            return 0
        rest = "; what follows is damaged and made again" if damaged else ""
        self.remark = (
            f"going on from {self._shown}, which holds {self._percent()} of the file{rest}"
        )
        return length

    def _read(self) -> bytes:
        """What an earlier run has left; nothing if that is no file of ours."""
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with suppress(FileNotFoundError), os.fdopen(os.open(self._path, flags), "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(MAX_JOURNAL)
        return b""


def _records(text: bytes, position: int) -> Iterator[tuple[int, int, int]]:
    """End and checksum of each band, and where its line ends, up to the first damaged line."""
    while match := _LINE.match(text, position):
        if zlib.crc32(match[1]) != int(match[4], 16):
            return
        position = match.end()
        yield int(match[2]), int(match[3], 16), position


def _checksum(fd: int, begin: int, end: int) -> int:
    """The CRC-32 of the bytes from `begin` to `end`, or of those that there are."""
    checksum = 0
    while begin < end and (piece := os.pread(fd, min(CHUNK, end - begin), begin)):
        checksum = zlib.crc32(piece, checksum)
        begin += len(piece)
    return checksum if begin == end else -1
