"""A Hugging Face folder: config.json and tensors in safetensors files, read by bands of rows.

A safetensors file is a u64 length, that many bytes of JSON (name -> dtype, shape, data_offsets,
offsets relative to the end of the JSON), and the tensors' bytes. Everything that the JSON says is
checked against the file before any of it is used. Weights are read with plain reads, never through
a memory map, so that what was read and converted does not stay in memory.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gguf_tools.errors import CheckpointError, printable

Floats: TypeAlias = npt.NDArray[np.float32]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle")

MAX_CONFIG = 16_000_000  # bytes
MAX_HEADER = 100_000_000  # bytes, as the safetensors library has it
MAX_JSON_ITEMS = 4_000_000  # of one file; a tensor is eight
MAX_DIMS = 8
MAX_DIM = 2**48
MAX_SHARDS = 10_000
MAX_NAMED = 20  # how many names an error lists before it counts the rest

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
READABLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for, a band of rows at a time.

    Its rows are those of the matrix (product of all dimensions but the last, last dimension); a
    vector is one row.
    """

    name: str
    shape: tuple[int, ...]  # NumPy order
    dtype: str  # as the file calls it
    load: Callable[[int, int], Floats]  # first row, row after the last -> (n, row_length)

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_length(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files were found complete."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]  # by the name that the checkpoint gives them
    files: tuple[Path, ...]  # the safetensors files, in order


@dataclass(frozen=True)
class _Entry:
    """Where the bytes of a tensor are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int  # position in the file
    end: int


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the configuration and the headers of all shards; no weight is touched."""
    path = Path(folder)
    _check_folder(path)
    config = _read_config(path)
    _refuse_quantised(path, config)
    files, index = _find_files(path)
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, Path] = {}
    problems: list[str] = []
    for file in files:
        for name, entry in read_header(file).items():
            if name in homes:
                problems.append(f"{printable(name)} is in {homes[name].name} and in {file.name}")
                continue
            homes[name] = file
            tensors[name] = _lazy(name, file, entry)
    for name, shard in index.items():
        if name not in homes:
            problems.append(f"{printable(name)} is not in {printable(shard)}")
        elif homes[name].name != shard:
            found = homes[name].name
            problems.append(f"{printable(name)} is in {found}, not in {printable(shard)}")
    if problems:
        raise CheckpointError(f"{_shown(path)}: tensors and index disagree: {listing(problems)}")
    if not tensors:
        raise CheckpointError(f"{_shown(path)}: its safetensors files hold no tensor")
    return Checkpoint(path, config, tensors, tuple(files))


def read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one safetensors file, every number checked against the file."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            raise CheckpointError(
                f"{_shown(path)}: header length: expected 2 to {max(size - 8, 2):,} bytes, found "
                f"{length if len(start) == 8 else 'the end of the file'}{_looks_like(start)}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(
                f"{_shown(path)}: header length: expected at most {MAX_HEADER:,} bytes, "
                f"found {length:,}"
            )
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{_shown(path)}: the file ended inside its header of {length:,}")
    if not text.startswith(b"{"):
        raise CheckpointError(
            f"{_shown(path)}: header: expected a JSON object, "
            f"found {printable(text[:8])}{_looks_like(start)}"
        )
    header = _parse_json(text, path, "header", unique=True)
    data_size = size - 8 - length
    entries = {
        name: _read_entry(path, name, value, data_size)
        for name, value in header.items()
        if name != "__metadata__"
    }
    _check_coverage(path, entries, data_size)
    offset = 8 + length
    return {
        name: _Entry(entry.dtype, entry.shape, entry.begin + offset, entry.end + offset)
        for name, entry in entries.items()
    }


def read_json(path: Path, limit: int = MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from a regular file of at most `limit` bytes."""
    with _open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{_shown(path)}: expected at most {limit:,} bytes, found {size:,}"
            )
        text = file.read(limit + 1)
    if not text.strip():
        raise CheckpointError(f"{_shown(path)}: expected a JSON object, found an empty file")
    return _parse_json(text, path, "", unique=False)


def listing(names: Iterable[str], limit: int = MAX_NAMED) -> str:
    """The names, separated by commas; of very many, the first and a count."""
    all_names = list(names)
    shown = ", ".join(all_names[:limit])
    rest = len(all_names) - limit
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def _shown(path: Path) -> str:
    return printable(path, limit=1000)


# --- the folder ---------------------------------------------------------------------------------


def _check_folder(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{_shown(path)}: there is no such folder") from None
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{_shown(path)}: cannot be opened: {reason}") from None
    if stat.S_ISDIR(mode):
        return
    wanted = "convert takes the folder of a Hugging Face checkpoint"
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{_shown(path)} is not a folder; {wanted}")
    with _open_regular(path) as file:
        magic = file.read(4)
    if magic == b"GGUF":
        raise CheckpointError(f"{_shown(path)} is a GGUF file already; {wanted}")
    if (path.parent / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{_shown(path)} is a file; {wanted}: try {_shown(path.absolute().parent)}"
        )
    raise CheckpointError(f"{_shown(path)} is a file; {wanted} (config.json and safetensors)")


def _read_config(path: Path) -> dict[str, Any]:
    if os.path.lexists(path / CONFIG_NAME):
        return read_json(path / CONFIG_NAME)
    names = _names_in(path)
    what = "has no config.json: it is not a Hugging Face checkpoint"
    if not names:
        what = "is empty: expected config.json, tokenizer files and safetensors"
    elif "adapter_config.json" in names:
        what = "is a LoRA adapter, not a model: merge it into its base model first"
    elif any(name.endswith(".gguf") for name in names):
        what = "has no config.json but GGUF files, which need no conversion"
    elif "params.json" in names:
        what = (
            "has no config.json but params.json, the layout of the model's authors: "
            "get the Hugging Face form of the model"
        )
    elif any(name.endswith(SUFFIX) for name in names):
        what = "has weights but no config.json: download the checkpoint again, whole"
    raise CheckpointError(f"{_shown(path)} {what}")


def _refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if not found:
            continue
        scheme = ""
        if isinstance(found, dict):
            parts = [str(found.get(part)) for part in ("quant_method", "format") if found.get(part)]
            if found.get("bits"):
                parts.append(f"{found['bits']} bits")
            scheme = f" ({printable(', '.join(parts))})" if parts else ""
        raise CheckpointError(
            f"{_shown(path)}: config.json has a {key}{scheme}: these weights are quantised "
            "already and cannot be converted; get the checkpoint in BF16, F16 or F32"
        )


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
            f"{_shown(where)}: weight_map: expected an object from tensor names to file names, "
            f"found {printable(index)}"
        )
    for name, shard in index.items():
        if not _is_plain_name(shard):
            raise CheckpointError(
                f"{_shown(where)}: {printable(name)}: expected the name of a safetensors file in "
                f"the folder, found {printable(repr(shard))}"
            )
    shards = sorted(set(index.values()))
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(
            f"{_shown(where)}: expected at most {MAX_SHARDS:,} files, found {len(shards):,}"
        )
    present = set(names)
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise CheckpointError(
            f"{_shown(path)}: {len(missing)} of {len(shards)} files named by {INDEX_NAME} are "
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
            f"{_shown(path)}: cannot tell which safetensors files belong together without "
            f"{INDEX_NAME}: {listing(map(printable, files))}"
        )
    total = max(totals)
    missing = [str(number) for number in range(1, total + 1) if number not in found]
    if missing or len(found) != total:
        raise CheckpointError(
            f"{_shown(path)}: expected {total} safetensors files, found {len(files)}; missing: "
            f"number {listing(missing) or 'unknown'}; download the checkpoint again, whole"
        )


def _explain_no_files(path: Path, names: list[str]) -> None:
    pickles = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{_shown(path)} has its weights as pickles ({printable(pickles[0])}), which can run "
            "code when they are read: use the model's safetensors files (on the hub: the branch "
            "refs/pr/N of the automatic conversion, or the Space safetensors/convert), or load it "
            "once with transformers and call save_pretrained(folder)"
        )
    others = [name for name in names if name.endswith(SUFFIX)]
    found = f"; found {listing(map(printable, others), 5)}" if others else ""
    raise CheckpointError(
        f"{_shown(path)} has no weights: expected {SINGLE_NAME} or {INDEX_NAME}{found}"
    )


def _names_in(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointError(f"{_shown(path)}: cannot be read: {error.strerror}") from error


# --- files --------------------------------------------------------------------------------------


def _open_regular(path: Path) -> Any:
    """The file, unbuffered; nothing but a regular file or a link to one (no pipe, no device)."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{_shown(path)}: expected a file, found a {_kind(path)}")
        fd = os.open(path, flags)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise CheckpointError(f"{_shown(path)}: expected a file")
        return os.fdopen(fd, "rb", buffering=0)
    except OSError as error:
        reason = error.strerror
        if error.errno == errno.ENOENT and os.path.islink(path):
            reason = "a link to nowhere"
        raise CheckpointError(f"{_shown(path)}: cannot be opened: {reason}") from error


def _kind(path: Path) -> str:
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        return "folder"
    return "pipe" if stat.S_ISFIFO(mode) else "device or socket"


def _parse_json(text: bytes, path: Path, part: str, *, unique: bool) -> dict[str, Any]:
    where = _shown(path) + (f": {part}" if part else "")
    n_items = text.count(b",") + text.count(b"[") + text.count(b"{")
    if n_items > MAX_JSON_ITEMS:
        raise CheckpointError(
            f"{where}: expected at most {MAX_JSON_ITEMS:,} JSON items, found {n_items:,}"
        )

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if unique and len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{where}: {printable(twice)} is there twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=collect)
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where}: expected UTF-8 text, found the byte 0x{text[error.start]:02x} at position "
            f"{error.start}"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{where}: expected JSON, found it nested too deep") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise CheckpointError(f"{where}: expected JSON: {printable(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def _looks_like(start: bytes) -> str:
    kinds = (
        (b"PK\x03\x04", "a zip archive, such as PyTorch's pickles are"),
        (b"\x80\x02", "a pickle"),
        (b"GGUF", "a GGUF file"),
        (b"version ", "a git-lfs pointer: fetch the file itself with `git lfs pull`"),
        (b"<!DOCTYP", "a web page"),
        (b"<html", "a web page"),
    )
    return next((f"; it looks like {kind}" for magic, kind in kinds if start.startswith(magic)), "")


# --- safetensors --------------------------------------------------------------------------------


def _read_entry(path: Path, name: str, value: Any, data_size: int) -> _Entry:
    """One tensor's entry; positions are relative to the end of the header."""

    def refuse(part: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{_shown(path)}: tensor {printable(name)}: {part}expected {expected}, "
            f"found {printable(found)}"
        )

    if not isinstance(value, dict):
        raise refuse("", "an object", type(value).__name__)
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse("dtype: ", f"one of {', '.join(DTYPE_BITS)}", repr(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_count, shape)):
        raise refuse("shape: ", f"at most {MAX_DIMS} sizes from 0", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise refuse("data_offsets: ", "two positions", offsets)
    begin, end = offsets
    if not begin <= end <= data_size:
        raise refuse("data_offsets: ", f"a range within 0 to {data_size:,}", offsets)
    n_bits = prod(shape) * DTYPE_BITS[dtype]
    if n_bits != 8 * (end - begin):
        raise refuse(
            "data_offsets: ",
            f"{n_bits / 8:,.0f} bytes for {dtype} {printable(shape)}",
            f"{end - begin:,}",
        )
    return _Entry(dtype, tuple(shape), begin, end)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIM


def _check_coverage(path: Path, entries: dict[str, _Entry], data_size: int) -> None:
    """Tensors lie one after the other, from the first byte of the data to the last."""
    position, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin < position:
            raise CheckpointError(
                f"{_shown(path)}: tensors {printable(before)} and {printable(name)} overlap"
            )
        if entry.begin > position:
            raise CheckpointError(
                f"{_shown(path)}: tensor {printable(name)}: expected to begin at {position:,}, "
                f"found {entry.begin:,}"
            )
        position, before = entry.end, name
    if position != data_size:
        raise CheckpointError(
            f"{_shown(path)}: expected {position:,} bytes of tensors, found {data_size:,}"
        )


def _lazy(name: str, path: Path, entry: _Entry) -> LazyTensor:
    row_length = entry.shape[-1] if entry.shape else 1
    row_bytes = row_length * DTYPE_BITS[entry.dtype] // 8

    def load(first: int, last: int) -> Floats:
        if entry.dtype not in READABLE:
            raise CheckpointError(unreadable(name, entry.dtype))
        data = _read_at(path, entry.begin + first * row_bytes, (last - first) * row_bytes)
        return _to_float32(data, entry.dtype).reshape(last - first, row_length)

    return LazyTensor(name, entry.shape, entry.dtype, load)


def unreadable(name: str, dtype: str) -> str:
    """The sentence that refuses a tensor for its dtype."""
    return (
        f"tensor {printable(name)} is {printable(dtype)}: expected one of {', '.join(READABLE)}; "
        "get the checkpoint in one of these"
    )


def _read_at(path: Path, position: int, size: int) -> npt.NDArray[np.uint8]:
    data = np.empty(size, np.uint8)
    view, done = memoryview(data), 0
    with _open_regular(path) as file:
        file.seek(position)
        while done < size:
            n = file.readinto(view[done:])
            if not n:
                raise CheckpointError(
                    f"{_shown(path)}: expected {size:,} bytes at {position:,}, found {done:,}: "
                    "the file has shrunk"
                )
            done += n
    return data


def _to_float32(data: npt.NDArray[np.uint8], dtype: str) -> Floats:
    if dtype == "BF16":
        wide = data.view("<u2").astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    if dtype == "F32":
        return data.view("<f4").astype(np.float32, copy=False)
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which conversion reports
        return data.view("<f8" if dtype == "F64" else "<f2").astype(np.float32)
