"""Checkpoints whose weights are quantised already: their weights as floats, read by bands.

config.json names the scheme. Each scheme has a file, which takes the stored parts of a weight
(codes, scales, zero points) and gives a LazyTensor of floats instead; everything that follows sees
an ordinary checkpoint. Weights that the scheme left as floats stay as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf_tools.archs.config import HFConfig
from gguf_tools.errors import CheckpointError, printable
from gguf_tools.json_files import shown
from gguf_tools.packed import awq, bitsandbytes, compressed_tensors, fp8, gptq, marlin
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import LazyTensor

KEYS = ("quantization_config", "compression_config")
KEPT = ("mxfp4",)  # its blocks are written as they are: see views.mxfp4
TRANSPOSED = ("gpt2",)  # models whose matrices are stored inputs first


@dataclass(frozen=True)
class Scheme:
    """A way to quantise a checkpoint."""

    methods: tuple[str, ...]  # quant_method in config.json
    unpack: Callable[[Parts, HFConfig], None]
    describe: Callable[[HFConfig], str]  # for the user: "GPTQ, 4 bits"


SCHEMES = (
    Scheme(("fp8", "fbgemm_fp8"), fp8.unpack, fp8.describe),
    Scheme(("compressed-tensors",), compressed_tensors.unpack, compressed_tensors.describe),
    Scheme(("gptq",), gptq.unpack, gptq.describe),
    Scheme(("marlin",), marlin.unpack, marlin.describe),
    Scheme(("awq",), awq.unpack, awq.describe),
    Scheme(("bitsandbytes",), bitsandbytes.unpack, bitsandbytes.describe),
)


def unpack(
    folder: Path, config: dict[str, Any], tensors: dict[str, LazyTensor]
) -> tuple[dict[str, LazyTensor], str]:
    """The tensors as floats, and the scheme they were quantised with ("" if they were not)."""
    for key in KEYS:
        found = config.get(key)
        if not found:
            continue
        where = f"{shown(folder)}: config.json: {key}"
        scheme = _find(folder, key, found)
        if scheme is None:
            return tensors, ""
        if config.get("model_type") in TRANSPOSED:
            raise CheckpointError(
                f"{shown(folder)}: a quantised {config['model_type']} cannot be converted, as "
                "schemes differ in which way round they store its matrices; get the checkpoint in "
                "BF16, F16 or F32"
            )
        settings = HFConfig(found, where)
        parts = Parts(tensors, shown(folder))
        scheme.unpack(parts, settings)
        described = scheme.describe(settings)
        return parts.result(described), described
    return tensors, ""


def check(folder: Path, config: dict[str, Any]) -> None:
    """An error if config.json names a scheme that is not known; for before any file is opened."""
    for key in KEYS:
        if config.get(key):
            _find(folder, key, config[key])


def _find(folder: Path, key: str, found: object) -> Scheme | None:
    """The scheme of a quantization_config; None if its blocks are kept."""
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method in KEPT:
        return None
    if isinstance(found, dict) and method is None and _is_bitsandbytes(found):
        method = "bitsandbytes"  # as transformers wrote it before it wrote methods
    for scheme in SCHEMES:
        if method in scheme.methods:
            return scheme
    known = sorted((*KEPT, *(name for scheme in SCHEMES for name in scheme.methods)))
    named = printable(method) if method is not None else f"{printable(found)} without quant_method"
    raise CheckpointError(
        f"{shown(folder)}: config.json: {key}: these weights are quantised already with a scheme "
        f"that is not known ({named}); known are {', '.join(known)}; get the checkpoint in one of "
        "these, or in BF16, F16 or F32"
    )


def _is_bitsandbytes(found: dict[str, Any]) -> bool:
    return found.get("load_in_8bit") is True or found.get("load_in_4bit") is True
