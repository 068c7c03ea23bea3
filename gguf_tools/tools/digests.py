"""SHA-256 digests of a model's tensors, in a text file beside it.

The lines are those of llama.cpp's gguf-hash (`--sha256`), which checks such a file with `--check`:

    sha256    64 hexadecimal digits  model.gguf:token_embd.weight      one for each tensor
    sha256    64 hexadecimal digits  model.gguf                        all tensors, in their order

Metadata is not part of it: changing a chat template leaves the digests valid.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gguf_tools.errors import FormatError, GGUFError, OutputError, printable
from gguf_tools.reader import GGUFFile

SUFFIX = ".sha256"
MAX_BYTES = 1 << 26
_LINE = re.compile(r"(\w+) +([0-9a-fA-F]+) +(.+)")


def digests_path(file: GGUFFile) -> Path:
    """Where the digests of a model are kept."""
    return file.path.with_name(file.path.name + SUFFIX)


def hash_tensors(file: GGUFFile) -> Iterator[tuple[str | None, str]]:
    """The name of each tensor and its digest; at last None and that of all tensors."""
    everything = hashlib.sha256()
    for name in file.tensors:
        digest = hashlib.sha256()
        for band in file.bands(name):
            digest.update(band.data)
            everything.update(band.data)
        yield name, digest.hexdigest()
    yield None, everything.hexdigest()


def write_digests(path: Path, model: str, digests: dict[str | None, str]) -> None:
    """Write the digests of the model in the file called `model`, all or nothing."""
    part = path.with_name(path.name + ".part")
    lines = [
        f"{'sha256':<8}  {digest}  {model if name is None else f'{model}:{name}'}\n"
        for name, digest in digests.items()
    ]
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            f"{printable(path, limit=1000)}: cannot be written: {error.strerror or error}"
        ) from error


def read_digests(path: Path) -> dict[str | None, str]:
    """The SHA-256 digests in a file, whatever its model is called there."""
    shown = printable(path, limit=1000)
    if not path.is_file():
        raise GGUFError(f"{shown}: no such file of digests; `gguf verify --write` makes one")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise FormatError(f"{shown}: expected at most {MAX_BYTES:,} bytes of digests")
    found: dict[str | None, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        parts = _LINE.fullmatch(line.strip())
        if parts is None:
            raise FormatError(
                f"{shown}: line {number:,}: expected a kind of digest, its digits and a name, "
                f"found '{printable(line)}'"
            )
        if parts[1] == "sha256":
            _, _, tensor = parts[3].partition(".gguf:")
            found[tensor or None] = parts[2].lower()
    if not found:
        raise FormatError(f"{shown}: there is no sha256 digest in it")
    return found
