"""What `convert --target-size` and `--target-bpw` ask for."""

import re
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.errors import GGUFError, printable

DEFAULT_TEXT = "default"  # stands for the text that ships
UNITS = {"": 1, "b": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("kmgt", 1)
    for end, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]{0,3})")


@dataclass(frozen=True)
class Target:
    """How large a file may become: in bytes, or in bits for each weight."""

    n_bytes: int | None = None
    bits_per_weight: float | None = None
    text: Path | None = None  # to measure on; None: the one that ships
    given: str = ""  # the option's value

    @property
    def name(self) -> str:
        """For the end of a file's name."""
        return self.given.replace(" ", "") + ("bpw" if self.n_bytes is None else "")

    @property
    def option(self) -> str:
        if self.n_bytes is not None:
            return f"--target-size {printable(self.given)}"
        return f"--target-bpw {self.given}"


def read_target(size: str | None, bits: float | None, text: str | None) -> Target | None:
    """What the options ask for; None where they do not."""
    if size is None and bits is None:
        if text is not None:
            raise GGUFError("--target-text says what to measure on: give --target-size, too")
        return None
    if size is not None and bits is not None:
        raise GGUFError("--target-size and --target-bpw exclude each other")
    path = None if text in (None, DEFAULT_TEXT) else Path(str(text))
    if path is not None and not path.is_file():
        raise GGUFError(
            f"--target-text {printable(path, limit=1000)}: expected a file of text, or `default`, "
            "found none of that name"
        )
    if size is not None:
        return Target(parse_size(size), None, path, size)
    if bits is not None and not 0 < bits <= 32:
        raise GGUFError(f"--target-bpw {bits:g}: expected bits for each weight, such as 4.5")
    return Target(None, bits, path, f"{bits:g}")


def parse_size(text: str) -> int:
    """The bytes of `4.2GiB` (powers of 1024), `4.2GB` (powers of 1000) or `4200000000`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in UNITS:
        raise GGUFError(
            f"--target-size {printable(text)}: expected a size, such as 4.2GiB, 700MB or 105453984"
        )
    return int(float(match[1]) * UNITS[match[2].lower()])
