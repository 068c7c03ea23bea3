"""The texts that models are calibrated on: a file of the user's, or the one that ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf_tools.errors import GGUFError, printable

DEFAULT = "default"  # the name that means the text that ships
SHIPPED = Path(__file__).resolve().parent / "calibration.txt"  # its origin: calibration.md


@dataclass(frozen=True)
class Text:
    """What a model is to read."""

    name: str  # as importance matrices record it
    content: str


def read_text(path: Path | None) -> Text:
    """The text of a file; of None, or of a path `default`, the one that ships.

    GGUFError where it is not UTF-8; OSError as the system has it.
    """
    if path is None or path.as_posix() == DEFAULT:
        return Text("gguf-tools calibration.txt", SHIPPED.read_text(encoding="utf-8"))
    data = path.read_bytes()
    try:
        return Text(str(path), data.decode())
    except UnicodeDecodeError as error:
        raise GGUFError(
            f"{printable(path, 1000)}: expected UTF-8 text, found the byte "
            f"0x{data[error.start]:02x} at position {error.start:,}"
        ) from None
