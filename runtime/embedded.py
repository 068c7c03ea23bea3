"""The model that comes along: a checkpoint of a megabyte, converted once and kept."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf_tools
from gguf_tools.cache_folder import cache_root
from gguf_tools.errors import GGUFError, OutputError

NAME = "stories260k"
FILE_TYPE = "Q8_0"


def embedded_checkpoint() -> Path:
    """The folder of the embedded checkpoint, in the source tree or in the installed package."""
    package = Path(gguf_tools.__file__).resolve().parent
    for folder in (package.parent / "models" / NAME, package / "embedded" / NAME):
        if (folder / "config.json").is_file():
            return folder
    raise GGUFError("this installation holds no embedded model; name a GGUF file: `run MODEL.gguf`")


@contextmanager
def embedded_model() -> Iterator[Path]:
    """The embedded model as a GGUF file: from the cache, or made now.

    It is kept in the user's cache folder; where that can't be written, it lasts for this once.
    """
    checkpoint = embedded_checkpoint()
    name = f"{NAME}-{FILE_TYPE}-{_digest(checkpoint)}.gguf"
    root = cache_root()
    if root is not None:
        kept = root / "models" / name
        if kept.is_file() or _keep(checkpoint, kept):
            yield kept
            return
    with tempfile.TemporaryDirectory(prefix="gguf-tools-", ignore_cleanup_errors=True) as folder:
        yield _convert(checkpoint, Path(folder) / name)


def _keep(checkpoint: Path, path: Path) -> bool:
    """Make `path`; whether that was possible. Another process may be making it, too."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
            os.replace(_convert(checkpoint, Path(folder) / path.name), path)
    except (OSError, OutputError):
        return path.is_file()
    return True


def _convert(checkpoint: Path, path: Path) -> Path:
    from gguf_tools.conversion import convert, plan_conversion
    from gguf_tools.recipes import find_file_type

    plan = plan_conversion(checkpoint, find_file_type(FILE_TYPE))
    for _ in convert(plan, path, threads=1):
        pass
    return path


def _digest(checkpoint: Path) -> str:
    """Names what the file depends on: the checkpoint and the converter."""
    seen = hashlib.sha256()
    sources = Path(gguf_tools.__file__).resolve().parent.rglob("*.py")
    files = (path for path in checkpoint.iterdir() if path.is_file())
    for path in (*sorted(files), *sorted(sources)):
        seen.update(path.name.encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:20]
