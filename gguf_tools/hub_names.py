"""Models on the Hugging Face hub by name: hf:OWNER/REPO[:FILE], and which file that means."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from gguf_tools.errors import GGUFError, printable
from gguf_tools.parts import parse_part_name

PREFIX = "hf:"
SHOWN_FILES = 12  # in one error

_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
_CARD = "README.md"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class HubName:
    """`hf:OWNER/REPO:WANTED`; what is wanted is a file, a type such as Q4_K_M, or not said."""

    repo: str
    wanted: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}" + (f":{self.wanted}" if self.wanted else "")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    name: str  # with its folder, if any
    size: int | None = None
    sha256: str = ""  # of large files
    git_sha1: str = ""  # of small files: git's own digest


def parse_hub_name(text: str) -> HubName | None:
    """The name of a model on the hub; None when `text` is meant as a path."""
    if not text.lower().startswith(PREFIX):
        return None
    repo, _, wanted = text[len(PREFIX) :].partition(":")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise GGUFError(
            f"{printable(text)}: expected {PREFIX}OWNER/REPO or {PREFIX}OWNER/REPO:FILE, such as "
            f"{PREFIX}Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M"
        )
    return HubName(repo, wanted)


def choose_model(name: HubName, files: Iterable[HubFile]) -> list[HubFile]:
    """The GGUF file that `name` means, or all parts of a split one, the first part first."""
    ggufs = {file.name: file for file in files if _is_model(file.name)}
    if not ggufs:
        raise GGUFError(
            f"{name}: this repository holds no GGUF file; if it is a checkpoint, make one with "
            f"`convert {PREFIX}{name.repo}`"
        )
    if name.wanted in ggufs:
        firsts = [_first_part(name.wanted)]
    else:
        firsts = sorted({_first_part(file) for file in ggufs if _matches(file, name.wanted)})
    if len(firsts) == 1:
        return [_take(part, ggufs, name) for part in _parts_of(firsts[0])]
    candidates = firsts or sorted({_first_part(file) for file in ggufs})
    shown = ", ".join(printable(file) for file in candidates[:SHOWN_FILES])
    more = len(candidates) - SHOWN_FILES
    listed = f"{shown} and {more} more" if more > 0 else shown
    if firsts:
        said = f"{len(firsts)} files of that type" if name.wanted else f"{len(firsts)} GGUF files"
        raise GGUFError(
            f"{name}: the repository holds {said}; name one, or a type such as Q4_K_M, behind a "
            f"colon ({PREFIX}{name.repo}:FILE): {listed}"
        )
    raise GGUFError(f"{name}: the repository holds no such GGUF file or type; it holds {listed}")


def choose_checkpoint(name: HubName, files: Sequence[HubFile]) -> list[HubFile]:
    """The files of a checkpoint that the converter reads: weights, configuration, tokenizer."""
    if name.wanted:
        raise GGUFError(f"{name}: a checkpoint is converted whole; name no file of it")
    names = {file.name for file in files}
    chosen = [f for f in files if f.name == _CARD or _is_of_checkpoint(f.name)]
    if {"model.safetensors", "model.safetensors.index.json"} & names:
        # The same weights again, in the layout of the model's maker.
        chosen = [f for f in chosen if not f.name.startswith("consolidated")]
    if _ADAPTER_CONFIG in names and "config.json" not in names:
        raise GGUFError(
            f"{name}: this is a LoRA adapter: convert its base with --lora {name}, or this alone "
            "with --lora-only"
        )
    if not any(file.name.endswith(".safetensors") for file in chosen):
        found = "GGUF files, which `run` takes" if any(map(_is_model, names)) else "none"
        raise GGUFError(
            f"{name}: convert reads a checkpoint's safetensors files, and this repository holds "
            f"{found}"
        )
    if "config.json" not in names:
        raise GGUFError(f"{name}: the repository has no config.json: it is not a checkpoint")
    return chosen


def choose_adapter(name: HubName, files: Sequence[HubFile]) -> list[HubFile]:
    """The files of a LoRA adapter: its configuration, weights and card."""
    if name.wanted:
        raise GGUFError(f"{name}: an adapter is taken whole; name no file of it")
    names = {file.name for file in files}
    if _ADAPTER_CONFIG not in names:
        raise GGUFError(f"{name}: the repository has no {_ADAPTER_CONFIG}: it is no LoRA adapter")
    if _ADAPTER_WEIGHTS not in names:
        pickles = [file for file in names if file.endswith(".bin")]
        found = f"{printable(pickles[0])}, a pickle, which can run code" if pickles else "none"
        raise GGUFError(f"{name}: expected {_ADAPTER_WEIGHTS} in the repository, found {found}")
    return [file for file in files if file.name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS, _CARD)]


def choose_config(name: HubName, files: Sequence[HubFile]) -> list[HubFile]:
    """The configuration of a checkpoint alone."""
    if name.wanted:
        raise GGUFError(f"{name}: a model's configuration is meant; name no file of it")
    chosen = [file for file in files if file.name == "config.json"]
    if not chosen:
        raise GGUFError(f"{name}: the repository has no config.json: it is not a checkpoint")
    return chosen


def has_type(file: str, kind: str) -> bool:
    """Whether the name of a file says that it is of this type: Q4_K is not in x-Q4_K_M.gguf."""
    whole = re.compile(rf"(?<![a-z0-9]){re.escape(kind.lower())}(?![a-z0-9_])")
    return whole.search(PurePosixPath(file).name.lower()) is not None


def _is_model(name: str) -> bool:
    """Whether a file is a GGUF model; the projector of an image encoder is none."""
    path = PurePosixPath(name)
    return path.suffix.lower() == ".gguf" and "mmproj" not in path.name.lower()


def _is_of_checkpoint(name: str) -> bool:
    path = PurePosixPath(name)
    in_place = path.parent == PurePosixPath(".") or path.parent.name.endswith("chat_templates")
    return in_place and path.suffix in _MODEL_SUFFIXES


def _matches(file: str, wanted: str) -> bool:
    """Whether a file is what is wanted: named so without its folder, or of that type."""
    return not wanted or PurePosixPath(file).name == wanted or has_type(file, wanted)


def _first_part(file: str) -> str:
    path = PurePosixPath(file)
    part = parse_part_name(path.name)
    return str(path.with_name(str(part.sibling(1)))) if part else file


def _parts_of(first: str) -> list[str]:
    path = PurePosixPath(first)
    part = parse_part_name(path.name)
    if part is None:
        return [first]
    return [str(path.with_name(str(part.sibling(n + 1)))) for n in range(part.count)]


def _take(part: str, files: dict[str, HubFile], name: HubName) -> HubFile:
    if part not in files:
        raise GGUFError(
            f"{name}: the model is split, and its part {printable(part)} is not in the repository"
        )
    return files[part]
