"""Look at a whole GGUF file and say what is wrong with it.

Opening a file checks every number of its header against its size already; what is found then is an
error of its own. Here come the things that a reader can live without: the layout that llama.cpp
insists on, padding, the metadata that a model needs, the tokenizer's tables against each other,
scales that are no numbers, and digests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gguf_tools.describe import architecture
from gguf_tools.errors import printable
from gguf_tools.reader import GGUFFile, TensorInfo
from gguf_tools.tools.digests import digests_path, hash_tensors, read_digests
from gguf_tools.tools.edit_values import not_finite
from gguf_tools.tools.scales import count_not_finite

TOKENIZER = "tokenizer.ggml."
NEEDED = ("context_length", "embedding_length", "block_count")  # below the architecture's name
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """Something about a file that is not as it should be."""

    severity: str  # ERROR: the file is broken; WARNING: it works and is odd
    what: str


@dataclass(frozen=True)
class Report:
    """What has been looked at, and what was found."""

    path: Path
    findings: tuple[Finding, ...]
    digests: Mapping[str | None, str] | None  # None if they were not made
    checked_digests: Path | None  # what they were compared with

    @property
    def good(self) -> bool:
        return not any(finding.severity == ERROR for finding in self.findings)


def verify(file: GGUFFile, *, digests: Path | None = None, make_digests: bool = False) -> Report:
    """Look at everything. `digests` is a file to compare with, by default FILE.sha256 if it is
    there; `make_digests` makes digests to be written, and compares with none."""
    findings = [*_check_layout(file), *_check_metadata(file), *_check_tokenizer(file)]
    findings += _check_scales(file)
    if digests is None and digests_path(file).is_file():
        digests = digests_path(file)
    if make_digests or digests is None:
        made = dict(hash_tensors(file)) if make_digests else None
        return Report(file.path, tuple(findings), made, None)
    expected = read_digests(digests)
    made = dict(hash_tensors(file))
    findings += _compare_digests(made, expected)
    return Report(file.path, tuple(findings), made, digests)


def broken_report(path: Path, what: str) -> Report:
    """The report on a file that does not open."""
    return Report(path, (Finding(ERROR, what),), None, None)


def describe_report(report: Report) -> dict[str, Any]:
    """What `gguf verify --json` prints for a file."""
    digests = report.digests or {}
    return {
        "file": str(report.path),
        "good": report.good,
        "findings": [{"severity": f.severity, "what": f.what} for f in report.findings],
        "digests_checked": str(report.checked_digests) if report.checked_digests else None,
        "sha256": {name: digest for name, digest in digests.items() if name is not None},
        "sha256_all": digests.get(None),
    }


def report_lines(report: Report) -> Iterator[str]:
    """What `gguf verify` prints for a file."""
    shown = printable(report.path, limit=1000)
    for finding in report.findings:
        yield f"{shown}: {finding.severity}: {finding.what}"
    digests = ""
    if report.checked_digests:
        digests = f" (digests compared with {printable(report.checked_digests, limit=1000)})"
    yield f"{shown}: {'good' if report.good else 'broken'}{digests}"


# --- the file


def _check_layout(file: GGUFFile) -> Iterator[Finding]:
    """llama.cpp takes tensors one after another, in the order in which they are announced."""
    for part, (path, size) in enumerate(zip(file.paths, file.part_sizes, strict=True)):
        tensors = [tensor for tensor in file.tensors.values() if tensor.part == part]
        where = f"{printable(path.name, limit=1000)}: " if len(file.paths) > 1 else ""
        alignment = file.alignment
        end = file.data_offsets[part]
        for tensor in tensors:
            if tensor.offset != end:
                yield Finding(
                    ERROR,
                    f"{where}tensor {printable(tensor.name)}: expected at byte {end:,}, where the "
                    f"one before it ends, found at {tensor.offset:,}; llama.cpp does not open "
                    "such a file",
                )
            end = tensor.offset + tensor.nbytes
            padding = -tensor.nbytes % alignment
            if file.has_bytes(part, end, min(padding, size - end)):
                yield Finding(
                    WARNING,
                    f"{where}tensor {printable(tensor.name)}: the padding behind it is not zero",
                )
            end += padding
        if size > end:
            yield Finding(
                WARNING,
                f"{where}{size - end:,} bytes follow the last tensor, which belong to nothing",
            )


def _check_metadata(file: GGUFFile) -> Iterator[Finding]:
    arch = architecture(file)
    if arch is None:
        yield Finding(ERROR, "general.architecture is missing, or no text")
        return
    kind = file.metadata.get("general.type", "model")
    if kind != "model" or arch == "clip" or not file.tensors:
        return  # adapters, importance matrices, vision parts and vocabularies have other keys
    for key, value in file.metadata.items():
        if key.startswith(f"{arch}.") and any(map(not_finite, _items(value))):
            yield Finding(ERROR, f"metadata {printable(key)}: found what is no finite number")
    for name in NEEDED:
        value = file.metadata.get(f"{arch}.{name}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "it is missing" if value is None else f"found {printable(value)}"
            yield Finding(
                ERROR, f"{printable(arch)}.{name}: expected a number of at least 1, {found}"
            )
    yield from _check_layers(file, file.metadata.get(f"{arch}.block_count"))
    embedding = file.tensors.get("token_embd.weight")
    width = file.metadata.get(f"{arch}.embedding_length")
    if embedding is None:
        yield Finding(ERROR, "tensor token_embd.weight is missing")
    elif isinstance(width, int) and embedding.row_length != width:
        yield Finding(
            ERROR,
            f"tensor token_embd.weight: rows of {embedding.row_length:,}, but "
            f"{printable(arch)}.embedding_length is {width:,}",
        )


def _items(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return value if isinstance(value, list) else [value]


def _check_layers(file: GGUFFile, n_layers: Any) -> Iterator[Finding]:
    if not isinstance(n_layers, int) or n_layers > len(file.tensors):
        if isinstance(n_layers, int):
            yield Finding(ERROR, f"{n_layers:,} layers, but {len(file.tensors):,} tensors in all")
        return
    found = {
        int(number)
        for name in file.tensors
        if name.startswith("blk.") and (number := name.split(".")[1]).isdecimal()
    }
    missing = [str(layer) for layer in range(n_layers) if layer not in found]
    if missing:
        yield Finding(ERROR, f"no tensors of layer {', '.join(missing[:8])} of {n_layers:,}")
    extra = [str(layer) for layer in sorted(found) if layer >= n_layers]
    if extra:
        yield Finding(WARNING, f"tensors of layer {', '.join(extra[:8])}, but {n_layers:,} layers")


# --- the tokenizer


def _check_tokenizer(file: GGUFFile) -> Iterator[Finding]:
    tokens = file.metadata.get(TOKENIZER + "tokens")
    model = file.metadata.get(TOKENIZER + "model")
    if model is None and tokens is None:
        if "token_embd.weight" in file.tensors:
            yield Finding(WARNING, "there is no tokenizer in this file")
        return
    if not isinstance(model, str):
        yield Finding(ERROR, f"{TOKENIZER}model is missing, or no text")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        if model not in ("none", "no_vocab"):
            yield Finding(ERROR, f"{TOKENIZER}tokens is missing, or no list of texts")
        return
    for name in ("scores", "token_type"):
        values = file.metadata.get(TOKENIZER + name)
        if values is not None and not _has_length(values, len(tokens)):
            yield Finding(
                ERROR, f"{TOKENIZER}{name}: expected {len(tokens):,} numbers, one a token"
            )
    if model == "gpt2" and not file.metadata.get(TOKENIZER + "merges"):
        yield Finding(ERROR, f"{TOKENIZER}merges is missing, which a gpt2 tokenizer needs")
    yield from _check_ids(file, len(tokens))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        yield from _check_rows(embedding, len(tokens))


def _check_ids(file: GGUFFile, n_tokens: int) -> Iterator[Finding]:
    for key, value in file.metadata.items():
        if not key.startswith(TOKENIZER):
            continue
        if key.endswith("_token_id"):
            ids = [value]
        elif key.endswith("_token_ids") and isinstance(value, np.ndarray):
            ids = value.tolist()
        else:
            continue
        wrong = [i for i in ids if type(i) is not int or not 0 <= i < n_tokens]
        if wrong:
            yield Finding(
                ERROR,
                f"{printable(key)}: expected the id of a token, 0 to {n_tokens - 1:,}, found "
                f"{printable(wrong[0])}",
            )


def _check_rows(embedding: TensorInfo, n_tokens: int) -> Iterator[Finding]:
    if embedding.n_rows < n_tokens:
        yield Finding(
            ERROR,
            f"tensor token_embd.weight: {embedding.n_rows:,} rows for {n_tokens:,} tokens",
        )
    elif embedding.n_rows > n_tokens:
        yield Finding(
            WARNING,
            f"tensor token_embd.weight: {embedding.n_rows:,} rows and only {n_tokens:,} tokens",
        )


def _has_length(values: Any, length: int) -> bool:
    return isinstance(values, np.ndarray) and len(values) == length


# --- the weights


def _check_scales(file: GGUFFile) -> Iterator[Finding]:
    for tensor in file.tensors.values():
        bad = sum(count_not_finite(tensor.quant, band) for band in file.bands(tensor.name))
        if bad:
            blocks = tensor.n_elements // tensor.quant.block_size
            what = "weights" if tensor.quant.block_size == 1 else "blocks have a scale that"
            are = "are" if tensor.quant.block_size == 1 else "is"
            yield Finding(
                ERROR,
                f"tensor {printable(tensor.name)} ({tensor.quant.name}): {bad:,} of {blocks:,} "
                f"{what} {are} NaN or infinite",
            )


def _compare_digests(
    made: Mapping[str | None, str], expected: Mapping[str | None, str]
) -> Iterator[Finding]:
    wrong = [name for name in made if name in expected and made[name] != expected[name]]
    for name in wrong:
        if name is not None:
            yield Finding(ERROR, f"tensor {printable(name)}: its bytes are not those of the digest")
    if wrong == [None]:
        yield Finding(ERROR, "the tensors together are not those of the digest")
    if len(expected) > 1 or None not in expected:
        for name in made:
            if name is not None and name not in expected:
                yield Finding(ERROR, f"tensor {printable(name)}: there is no digest of it")
    for name in expected:
        if name is not None and name not in made:
            yield Finding(ERROR, f"tensor {printable(name)}: there is a digest and no such tensor")
