"""Names: of the model from its folder, of its parts by the GGUF convention, of the output file.

The convention is BaseName-SizeLabel-FineTune-Version-Encoding.gguf. A folder that is called
SmolLM2-135M-Instruct says the first three already, so a file is called like its folder, with the
encoding behind it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UNITS = (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3))

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_ENCODING = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(
    r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE
)
_FINE_TUNE = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_UNFIT = re.compile(r"[^\w.+@=,()\[\]-]+")  # for a file name; spaces and slashes first of all


@dataclass(frozen=True)
class NameParts:
    """A model's name taken apart; empty where the name does not say."""

    base: str = ""
    size: str = ""
    fine_tune: str = ""
    version: str = ""


def model_id(folder: Path) -> str:
    """The name of a checkpoint: of its folder, or of its repository in the hub's cache."""
    path = folder.absolute()
    path = path.resolve() if path.name in ("", ".", "..") else path
    cache = path.parent.parent.name
    if path.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.rpartition("--")[2]
    return path.name or "model"


def output_name(folder: Path, file_type: str, *, adapters: Sequence[Path] = ()) -> str:
    """The default name of the output file: the model's, with those of adapters merged into it."""
    names = "-".join(map(model_id, (folder, *adapters)))
    stem = _UNFIT.sub("-", names).strip("-.") or "model"
    return f"{stem[:180]}-{file_type}.gguf"


def title(name: str) -> str:
    """`smollm2-135m` as a title, the way llama.cpp's converter writes general.name."""
    words = name.strip().replace("-", " ").split()
    return " ".join(
        word.title() if word.islower() and not re.match(r"(v\d+(?:\.\d+)*|\d.*)$", word) else word
        for word in words
    )


def size_label(n_parameters: int) -> str:
    """`135M`: at least two significant digits, powers of a thousand."""
    unit, scale = next(((u, s) for u, s in UNITS[:-1] if n_parameters > s), UNITS[-1])
    scaled = n_parameters * (1 / scale)
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{unit}"


def name_parts(name: str, n_parameters: int) -> NameParts:
    """Base name, size, fine-tune and version out of `SmolLM2-135M-Instruct-v0.2`.

    The rules are those of llama.cpp's converter (gguf-py, Metadata.get_model_id_components); a
    name that says neither size nor fine-tune nor version is left whole.
    """
    if " " in name:
        return NameParts()
    parts = [part for part in name.split("-") if part]
    kinds: list[set[str]] = [set() for _ in parts]
    for i, part in enumerate(parts):
        if _VERSION.fullmatch(part):
            kinds[i].add("version")
        elif _ENCODING.fullmatch(part):
            kinds[i].add("encoding")
            parts[i] = part.upper()
        elif i and _SIZE.fullmatch(part):
            parts[i], kind = _read_size(part, n_parameters)
            kinds[i].add(kind)
        elif i and _FINE_TUNE.fullmatch(part):
            kinds[i].add("fine_tune")
    sizes = [part for part, kind in zip(parts, kinds, strict=True) if "size" in kind]
    if any(character.isdecimal() for size in sizes for character in size):
        for part, found in zip(parts, kinds, strict=True):
            if part.isalpha():
                found.discard("size")
    _find_base(parts, kinds)

    def joined(kind: str, without: str = "") -> str:
        chosen = [p for p, k in zip(parts, kinds, strict=True) if kind in k and without not in k]
        return "-".join(dict.fromkeys(chosen) if kind == "size" else chosen)

    named = NameParts(
        joined("base"), joined("size"), joined("fine_tune"), joined("version", without="base")
    )
    return named if named.size or named.fine_tune or named.version else NameParts()


def _read_size(part: str, n_parameters: int) -> tuple[str, str]:
    """A size label in its usual spelling; one that is far from the model's size is no size."""
    part = part.replace("_", ".")
    if part[-1].isdecimal() and len(part) > 1 and part[-2].isalpha():  # 7b1 is 7.1b
        part = f"{part[:-2]}.{part[-1]}{part[-2]}"
    if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
        part = part[:-1] + part[-1].upper()
    scale = dict(UNITS).get(part[-1], 0)
    try:
        label = float(part[:-1]) * scale
    except ValueError:  # a word, or 8x7B
        return part, "size"
    if n_parameters and abs(label - n_parameters) > 7 * n_parameters // 8:
        return part[:-1] + part[-1].lower(), "fine_tune"  # a length of context, for example
    return part, "size"


def _find_base(parts: list[str], kinds: list[set[str]]) -> None:
    """The base name is how the name begins, up to the first part of another kind."""
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("base")
        else:
            at_start = False
            if not kind:
                kind.add("fine_tune")
    for found in reversed(kinds):
        if "base" not in found or len(found) == 1:
            break
        found.discard("base")
