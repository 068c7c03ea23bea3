"""What decides the bytes of a conversion, as three short digests.

Two runs with the same identity write the same file, so the second may go on where the first was
stopped. Contents of weights are sampled, not read: whoever replaces a file changes its size, its
time or one of the samples; and whoever writes into one and sets its time back still changes the
time of its last change of any kind, which nobody can set.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from gguf_tools.errors import CheckpointError
from gguf_tools.json_files import open_regular

WHOLE = 1 << 20  # bytes from the start of each file that are read, all of most
SAMPLES = 8  # pieces of what follows, evenly spread
SAMPLE = 4096  # bytes of each
PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*config*.json")
# A conversion's own output, should it lie in the folder, matches none of the patterns.


@dataclass(frozen=True)
class Identity:
    """Each a hexadecimal digest."""

    program: str  # the sources of this package, and NumPy
    inputs: str  # the files that weights and transforms come from
    settings: str  # the options, and the file's header: metadata, types, shapes

    def difference(self, other: "Identity") -> str:
        """What `other` differs in, in words; empty if in nothing."""
        words = {
            "program": "the program",
            "inputs": "the checkpoint",
            "settings": "the options or the tokenizer",
        }
        found = [
            words[field.name]
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
        return found[0] if found else ""


def digest_program() -> str:
    """The version of everything that computes: an edited source is another program."""
    seen = hashlib.sha256(np.__version__.encode())
    package = Path(__file__).resolve().parent
    for path in sorted(package.rglob("*.py")):
        seen.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()


def digest_inputs(inputs: Iterable[Path], *, any_change: bool) -> str:
    """Of each file, and of each folder's weights and configuration: name, size, time, samples.

    With `any_change` it also differs after what leaves the contents alone, such as another link to
    a file: right where a difference costs time only.
    """
    seen = hashlib.sha256()
    for path in inputs:
        for file in _files(path):
            seen.update(os.fsencode(file.name) + b"\0" + _digest_file(file, any_change))
    return seen.hexdigest()


def _digest_file(path: Path, any_change: bool) -> bytes:
    """What is sampled of a file; of one that cannot be read, which others report, nothing."""
    try:
        with open_regular(path) as opened:
            status = os.fstat(opened.fileno())
            seen = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}\0".encode())
            if any_change:
                seen.update(f"{status.st_ino} {status.st_ctime_ns}\0".encode())
            for position, size in _pieces(status.st_size):
                opened.seek(position)
                seen.update(opened.read(size))
            return seen.digest()
    except (CheckpointError, OSError):
        return b""


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted({file for pattern in PATTERNS for file in path.glob(pattern)})


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Position and length of what is read of a file."""
    yield 0, WHOLE
    for i in range(SAMPLES if size > WHOLE else 0):
        yield WHOLE + (size - WHOLE - SAMPLE) * i // (SAMPLES - 1), SAMPLE
