"""A Hugging Face folder: config.json, and tensors in one or many safetensors files.

What is missing, doubled or contradicts the index is found before any weight is read, and told at
once.
"""

import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gguf_tools import packed
from gguf_tools.errors import CheckpointError, printable
from gguf_tools.json_files import open_regular, read_json, shown
from gguf_tools.safetensors_file import MAX_HEADER, LazyTensor, open_tensors

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")

MAX_SHARDS = 10_000
MAX_NAMED = 20  # how many names an error lists before it counts the rest


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files were found complete."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]  # by the name that the checkpoint gives them
    files: tuple[Path, ...]  # the safetensors files, in order
    scheme: str = ""  # what the weights, floats here, are stored as: "FP8"


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the configuration and the headers of all shards; no weight is touched."""
    path = Path(folder)
    _check_folder(path)
    config = _read_config(path)
    packed.check(path, config)
    files, index = _find_files(path)
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, Path] = {}
    problems: list[str] = []
    for file in files:
        for name, tensor in open_tensors(file).items():
            if name in homes:
                problems.append(f"{printable(name)} is in {homes[name].name} and in {file.name}")
                continue
            homes[name], tensors[name] = file, tensor
    for name, shard in index.items():
        if name not in homes:
            problems.append(f"{printable(name)} is not in {printable(shard)}")
        elif homes[name].name != shard:
            found = homes[name].name
            problems.append(f"{printable(name)} is in {found}, not in {printable(shard)}")
    if problems:
        raise CheckpointError(f"{shown(path)}: tensors and index disagree: {listing(problems)}")
    if not tensors:
        raise CheckpointError(f"{shown(path)}: its safetensors files hold no tensor")
    tensors, scheme = packed.unpack(path, config, tensors)
    return Checkpoint(path, config, tensors, tuple(files), scheme)


def listing(names: Iterable[str], limit: int = MAX_NAMED) -> str:
    """The names, separated by commas; of very many, the first and a count."""
    all_names = list(names)
    first = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{first} and {rest:,} more" if rest > 0 else first


# --- the folder ---------------------------------------------------------------------------------


def _check_folder(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{shown(path)}: there is no such folder") from None
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{shown(path)}: cannot be opened: {reason}") from None
    if stat.S_ISDIR(mode):
        return
    wanted = "convert takes the folder of a Hugging Face checkpoint"
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{shown(path)} is not a folder; {wanted}")
    with open_regular(path) as file:
        magic = file.read(4)
    if magic == b"GGUF":
        raise CheckpointError(f"{shown(path)} is a GGUF file already; {wanted}")
    if (path.parent / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{shown(path)} is a file; {wanted}: try {shown(path.absolute().parent)}"
        )
    raise CheckpointError(f"{shown(path)} is a file; {wanted} (config.json and safetensors)")


def _read_config(path: Path) -> dict[str, Any]:
    if os.path.lexists(path / CONFIG_NAME):
        return read_json(path / CONFIG_NAME)
    names = _names_in(path)
    what = "has no config.json: it is not a Hugging Face checkpoint"
    if not names:
        what = "is empty: expected config.json, tokenizer files and safetensors"
    elif "adapter_config.json" in names:
        what = "is a LoRA adapter, not a model: convert its base with --lora, or use --lora-only"
    elif any(name.endswith(".gguf") for name in names):
        what = "has no config.json but GGUF files, which need no conversion"
    elif "params.json" in names:
        what = (
            "has no config.json but params.json, the layout of the model's authors: "
            "get the Hugging Face form of the model"
        )
    elif any(name.endswith(SUFFIX) for name in names):
        what = "has weights but no config.json: download the checkpoint again, whole"
    raise CheckpointError(f"{shown(path)} {what}")


def _find_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of the folder, and what the index says is in them (if there is one)."""
    names = _names_in(path)
    if INDEX_NAME in names:
        return _find_indexed(path, names)
    if SINGLE_NAME in names:
        return [path / SINGLE_NAME], {}
    files = [name for name in names if name.startswith("model") and name.endswith(SUFFIX)]
    if not files:
        _explain_no_files(path, names)
    _check_numbering(path, files)
    return [path / name for name in files], {}


def _find_indexed(path: Path, names: list[str]) -> tuple[list[Path], dict[str, str]]:
    where = path / INDEX_NAME
    index = read_json(where, limit=MAX_HEADER).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{shown(where)}: weight_map: expected an object from tensor names to file names, "
            f"found {printable(index)}"
        )
    for name, shard in index.items():
        if not _is_plain_name(shard):
            raise CheckpointError(
                f"{shown(where)}: {printable(name)}: expected the name of a safetensors file in "
                f"the folder, found {printable(repr(shard))}"
            )
    shards = sorted(set(index.values()))
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(
            f"{shown(where)}: expected at most {MAX_SHARDS:,} files, found {len(shards):,}"
        )
    present = set(names)
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise CheckpointError(
            f"{shown(path)}: {len(missing)} of {len(shards)} files named by {INDEX_NAME} are "
            f"missing: {listing(map(printable, missing))}; download them"
        )
    return [path / shard for shard in shards], index


def _is_plain_name(shard: object) -> bool:
    """A file of the folder itself: no separator, no parent, nothing absolute."""
    return (
        isinstance(shard, str)
        and shard.endswith(SUFFIX)
        and len(shard) > len(SUFFIX)
        and not re.search(r"[/\\:\0]", shard)
        and shard.isprintable()
    )


def _check_numbering(path: Path, files: list[str]) -> None:
    """Without an index the names themselves say whether all are there."""
    numbered = [re.fullmatch(r"(.*-)(\d{1,6})-of-(\d{1,6})\.safetensors", name) for name in files]
    totals = {int(match[3]) for match in numbered if match}
    if not totals:
        return
    found = {int(match[2]) for match in numbered if match}
    if len(totals) > 1 or not all(numbered) or max(totals) > MAX_SHARDS:
        raise CheckpointError(
            f"{shown(path)}: cannot tell which safetensors files belong together without "
            f"{INDEX_NAME}: {listing(map(printable, files))}"
        )
    total = max(totals)
    missing = [str(number) for number in range(1, total + 1) if number not in found]
    if missing or len(found) != total:
        raise CheckpointError(
            f"{shown(path)}: expected {total} safetensors files, found {len(files)}; missing: "
            f"number {listing(missing) or 'unknown'}; download the checkpoint again, whole"
        )


def _explain_no_files(path: Path, names: list[str]) -> NoReturn:
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{shown(path)} has its weights as pickles ({printable(pickles[0])}), which can run "
            "code when they are read: use the model's safetensors files (on the hub: the branch "
            "refs/pr/N of the automatic conversion, or the Space safetensors/convert), or load it "
            "once with transformers and call save_pretrained(folder)"
        )
    others = [name for name in names if name.endswith(SUFFIX)]
    found = f"; found {listing(map(printable, others), 5)}" if others else ""
    raise CheckpointError(
        f"{shown(path)} has no weights: expected {SINGLE_NAME} or {INDEX_NAME}{found}"
    )


def _names_in(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{shown(path)}: cannot be read: {error.strerror}") from error
