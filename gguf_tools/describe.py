"""The facts of a GGUF file: what `gguf info` shows, as plain data and as lines of text."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gguf_tools.errors import printable
from gguf_tools.quality_sheet import describe_sheet, from_metadata, sheet_lines
from gguf_tools.reader import GGUFFile, TensorInfo

SHOWN_ITEMS = 6  # of a long array, on the terminal
SHOWN_PARTS = 20  # of a split model, on the terminal
SHOWN_CHARACTERS = 100  # of a long string, on the terminal

TOKENIZER = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
TARGET = "gguf_tools.target."  # keys of files whose types were chosen for a size
COMMAND_CHARACTERS = 16_000
SAMPLING = "general.sampling."
CALIBRATION = "gguf_tools.calibration."
SPECIAL_TOKENS = {  # the key's middle part, and how people call the token
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unknown": "unk",
    "padding": "pad",
    "seperator": "sep",
    "separator": "sep",
    "mask": "mask",
}


def describe(file: GGUFFile) -> dict[str, Any]:
    """Everything about `file` in the types of JSON: the object that `gguf info --json` prints."""
    parts = {} if len(file.paths) == 1 else {"parts": describe_parts(file)}
    sheet = from_metadata(file.metadata)
    return {
        "architecture": architecture(file),
        "parameters": count_parameters(file),
        "file_size": file.file_size,
        **parts,
        "bits_per_weight": bits_per_weight(file),
        "types": count_types(file),
        **({} if sheet is None else {"quality": describe_sheet(sheet)}),
        "tensors": [describe_tensor(file, tensor) for tensor in file.tensors.values()],
        "metadata": {key: to_json(value) for key, value in file.metadata.items()},
    }


def architecture(file: GGUFFile) -> str | None:
    """`general.architecture`, if the file has it."""
    value = file.metadata.get("general.architecture")
    return value if isinstance(value, str) else None


def count_parameters(file: GGUFFile) -> int:
    """The number of weights in all tensors."""
    return sum(tensor.n_elements for tensor in file.tensors.values())


def bits_per_weight(file: GGUFFile) -> float | None:
    """Bits of tensor data per weight; None for a file without tensors."""
    parameters = count_parameters(file)
    if parameters == 0:
        return None
    return 8 * sum(tensor.nbytes for tensor in file.tensors.values()) / parameters


def count_types(file: GGUFFile) -> dict[str, int]:
    """How many tensors there are of each type, the most frequent first."""
    counts = Counter(tensor.quant.name for tensor in file.tensors.values())
    return dict(counts.most_common())


def describe_tensor(file: GGUFFile, tensor: TensorInfo) -> dict[str, Any]:
    """A tensor as it is in the file: dimensions fastest first, offset from the file's start.

    Of a split model, `part` says in which file, from 1.
    """
    facts = {
        "name": tensor.name,
        "type": tensor.quant.name,
        "shape": list(reversed(tensor.shape)),
        "bytes": tensor.nbytes,
        "offset": tensor.offset,
    }
    return facts if len(file.paths) == 1 else {**facts, "part": tensor.part + 1}


def describe_parts(file: GGUFFile) -> list[dict[str, Any]]:
    """The files of a model: the name of each, its size, its tensors and their bytes."""
    tensors: list[list[TensorInfo]] = [[] for _ in file.paths]
    for tensor in file.tensors.values():
        tensors[tensor.part].append(tensor)
    return [
        {
            "file": path.name,
            "file_size": size,
            "tensors": len(held),
            "bytes": sum(tensor.nbytes for tensor in held),
        }
        for path, size, held in zip(file.paths, file.part_sizes, tensors, strict=True)
    ]


def to_json(value: Any) -> Any:
    """A metadata value as JSON can hold it; JSON has no NaN and no infinity, so these are text."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value


def summarise(file: GGUFFile) -> Iterator[tuple[str, str]]:
    """The facts that a person wants first, as pairs of a label and text fit for a terminal."""
    metadata = file.metadata
    arch = architecture(file)
    yield "file", printable(file.path, limit=1000)
    yield "format", f"GGUF version {file.version}"
    yield "architecture", printable(arch) if arch is not None else "not said"
    if "general.name" in metadata:
        yield "name", show_value(metadata["general.name"])
    parameters = count_parameters(file)
    if parameters:
        yield "parameters", f"{parameters:,} ({short_count(parameters)})"
    else:
        yield "parameters", "none (no tensors in this file)"
    where = f" in {len(file.paths)} files" if len(file.paths) > 1 else ""
    yield "file size", f"{file.file_size:,} bytes ({short_size(file.file_size)}){where}"
    yield from _summarise_parts(file)
    bits = bits_per_weight(file)
    if bits is not None:
        yield "bits per weight", f"{bits:.4f}"
    yield from _summarise_types(file)
    yield from _summarise_target(metadata)
    yield from _summarise_calibration(metadata)
    yield from _summarise_quality(metadata)
    yield from _summarise_sizes(metadata, arch)
    yield from _summarise_tokenizer(metadata)
    yield "chat template", _summarise_template(metadata)
    sampling = [
        f"{printable(key.removeprefix(SAMPLING))} {show_value(value)}"
        for key, value in metadata.items()
        if key.startswith(SAMPLING)
    ]
    yield "sampling", ", ".join(sampling) or "no defaults in the file"


def _summarise_target(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of a file whose types were chosen for a size: what was measured, and how to make it again."""
    known = {
        key.removeprefix(TARGET): value for key, value in metadata.items() if key.startswith(TARGET)
    }
    if "command" not in known:
        return
    size, bits = known.get("size"), known.get("bits_per_weight")
    wanted = f"{show_value(size)} bytes" if bits is None else f"{show_value(bits)} bits per weight"
    text = f"for {wanted}: mean KL {show_value(known.get('kl'))}"
    if "file_type_kl" in known:
        text += f" ({show_value(known.get('file_type'))}: {show_value(known['file_type_kl'])})"
    yield "types chosen", text
    yield "made again by", printable(str(known["command"]), limit=COMMAND_CHARACTERS)


def show_value(value: Any) -> str:
    """A metadata value on one line, long ones shortened."""
    if isinstance(value, str):
        if len(value) <= SHOWN_CHARACTERS:
            return printable(value, limit=4 * SHOWN_CHARACTERS)
        return f"{printable(value, limit=SHOWN_CHARACTERS)} ({len(value):,} characters)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.7g}"
    if isinstance(value, (list, np.ndarray)):
        few = value[:SHOWN_ITEMS]
        if isinstance(few, np.ndarray):
            few = few.tolist()
        items = ", ".join(_show_item(item) for item in few)
        if len(value) <= SHOWN_ITEMS:
            return f"[{items}]"
        return f"[{items}, ...] ({len(value):,} values)"
    return str(value)


def short_count(number: int) -> str:
    """A count of weights as people say it: 134.5M, 8.03B."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def short_size(size: int) -> str:
    """A size in bytes in binary units: 93.8 MiB."""
    for unit, name in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def _show_item(item: Any) -> str:
    if isinstance(item, str):
        return f"'{printable(item, limit=40)}'"
    if isinstance(item, (list, np.ndarray)):
        return f"[{len(item):,} values]"
    return show_value(item)


def _summarise_parts(file: GGUFFile) -> Iterator[tuple[str, str]]:
    parts = describe_parts(file) if len(file.paths) > 1 else []
    for number, part in enumerate(parts[:SHOWN_PARTS], 1):
        plural = "tensor" if part["tensors"] == 1 else "tensors"
        yield (
            f"part {number}",
            f"{printable(part['file'], limit=1000)}: {short_size(part['file_size'])}, "
            f"{part['tensors']:,} {plural}",
        )
    if len(parts) > SHOWN_PARTS:
        yield "", f"... and {len(parts) - SHOWN_PARTS:,} more"


def _summarise_types(file: GGUFFile) -> Iterator[tuple[str, str]]:
    label = "types"
    for name, count in count_types(file).items():
        tensors = [tensor for tensor in file.tensors.values() if tensor.quant.name == name]
        weights = short_count(sum(tensor.n_elements for tensor in tensors))
        size = short_size(sum(tensor.nbytes for tensor in tensors))
        plural = "tensor" if count == 1 else "tensors"
        yield label, f"{name}: {count:,} {plural}, {weights} weights, {size}"
        label = ""


def _summarise_calibration(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How `convert --calibrate` rounded the weights."""
    method = metadata.get(CALIBRATION + "method")
    if method is not None:
        text, tokens = (show_value(metadata.get(CALIBRATION + key)) for key in ("text", "tokens"))
        yield "calibrated", f"{show_value(method)} on {text}, {tokens} tokens"


def _summarise_quality(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What quantising cost, where the file says so."""
    sheet = from_metadata(metadata)
    for number, line in enumerate(sheet_lines(sheet) if sheet is not None else ()):
        yield "" if number else "quality", line


def _summarise_sizes(metadata: dict[str, Any], arch: str | None) -> Iterator[tuple[str, str]]:
    """The numbers under the architecture's own prefix."""
    for label, key in (
        ("context length", "context_length"),
        ("layers", "block_count"),
        ("width", "embedding_length"),
        ("feed-forward width", "feed_forward_length"),
        ("heads", "attention.head_count"),
        ("key/value heads", "attention.head_count_kv"),
        ("experts", "expert_count"),
    ):
        value = metadata.get(f"{arch}.{key}")
        if value is not None:
            yield label, f"{value:,}" if type(value) is int else show_value(value)


def _summarise_tokenizer(metadata: dict[str, Any]) -> Iterator[tuple[str, str]]:
    model = metadata.get(TOKENIZER + "model")
    if model is None:
        yield "tokenizer", "none in this file"
        return
    parts = [show_value(model)]
    if TOKENIZER + "pre" in metadata:
        parts.append(f"pre {show_value(metadata[TOKENIZER + 'pre'])}")
    tokens = metadata.get(TOKENIZER + "tokens")
    if isinstance(tokens, list):
        parts.append(f"{len(tokens):,} tokens")
    yield "tokenizer", ", ".join(parts)
    special = []
    for middle, short in SPECIAL_TOKENS.items():
        token_id = metadata.get(f"{TOKENIZER}{middle}_token_id")
        if token_id is None:
            continue
        text = show_value(token_id)
        if isinstance(tokens, list) and isinstance(token_id, int) and 0 <= token_id < len(tokens):
            text += f" {_show_item(tokens[token_id])}"
        special.append(f"{short} {text}")
    if special:
        yield "special tokens", ", ".join(special)
    added = [
        what
        for what in ("bos", "eos", "sep", "space_prefix")
        if metadata.get(f"{TOKENIZER}add_{what}" + ("" if "_" in what else "_token")) is True
    ]
    if added:
        yield "added by itself", ", ".join(what.replace("_", " ") for what in added)


def _summarise_template(metadata: dict[str, Any]) -> str:
    template = metadata.get(TEMPLATE)
    if template is None:
        return "no"
    text = f"yes ({len(template):,} characters)" if isinstance(template, str) else "not text"
    others = [
        printable(key[len(TEMPLATE) + 1 :]) for key in metadata if key.startswith(TEMPLATE + ".")
    ]
    return text + (f"; also {', '.join(others)}" if others else "")
