"""compressed-tensors, as vLLM's llm-compressor writes it.

float-, int- and naive-quantized
    X.weight             F8 or I8  (out, in)
pack-quantized
    X.weight_packed      I32  (out, in * bits / 32)   code + 2^(bits - 1), low bits first
    X.weight_shape       out, in
nvfp4- and mxfp4-pack-quantized
    X.weight_packed      U8   (out, in / 2)           4-bit floats (E2M1), low half first
    X.weight_global_scale     scales are divided by it (nvfp4)

X.weight_scale           one for the tensor, each row, group of a row, or block
X.weight_zero_point      of asymmetric integers; packed ones (out * bits / 32, groups)
X.weight_g_idx           I32  (in)  the group of each input, where they were reordered

weight = (code - zero) * scale
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gguf_tools.archs.config import HFConfig
from gguf_tools.packed import fp8
from gguf_tools.packed.grid import Rectangle, grid_shape, scaled
from gguf_tools.packed.numbers import (
    E2M1,
    FLOATS,
    INTEGERS,
    as_floats,
    read_integers,
    unpack_integers,
)
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import Floats, LazyTensor

PLAIN = ("float-quantized", "int-quantized", "naive-quantized")
PACKED = "pack-quantized"
FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
FORMATS = ("dense", *PLAIN, PACKED, *FP4, "mixed-precision")
CODES = (*fp8.CODES, "I8")
SCALES = (*fp8.SCALES, "F8_E4M3", "U8")
ZEROS = ("I8", "I16", "I32", "U8", *FLOATS)
WORD = 32
OTHERS = (
    "_global_scale", "_zero_point", ".input_scale", ".output_scale", ".k_scale", ".v_scale",
    ".weight_shape",
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """How the weights of some modules are quantised: `weights` of a config group."""

    bits: int
    block: Rectangle | None  # of strategy "block"
    group_size: int | None
    format: str


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights; which group a module belongs to is told by its shapes."""
    groups = _read_groups(config)
    for module in parts.modules(".weight_packed"):
        packed = parts.take(f"{module}.weight_packed", ("I32", "U8"))
        if packed.dtype == "U8":
            parts.add(_small_floats(parts, packed, module))
        else:
            parts.add(_packed_integers(parts, packed, module, groups))
    for name in parts.of_dtype(CODES):
        if name.endswith(".weight"):
            parts.add(_plain(parts, name, groups))
    parts.drop(OTHERS)


def describe(config: HFConfig) -> str:
    return f"compressed-tensors, {config.text('format', default='dense')}"


def _read_groups(config: HFConfig) -> list[_Group]:
    default = config.text("format", default="dense")
    groups = config.values.get("config_groups")
    if default not in FORMATS:
        raise config.refuse("format", f"one of {', '.join(FORMATS)}", default)
    if default == "dense" and not groups:
        return []
    if not isinstance(groups, dict):
        raise config.refuse("config_groups", "an object", groups)
    found = []
    for name, group in groups.items():
        where = f"{config.where}: config_groups: {name}"
        if not isinstance(group, dict):
            raise config.refuse(f"config_groups: {name}", "an object", group)
        weights = HFConfig(group, where).nested("weights")
        if weights is None:
            continue
        format_ = HFConfig(group, where).text("format", default=default)
        if format_ not in FORMATS:
            raise HFConfig(group, where).refuse("format", f"one of {', '.join(FORMATS)}", format_)
        bits = weights.integer("num_bits", low=1, high=8)
        size = weights.values.get("group_size")
        group_size = weights.integer("group_size") if size not in (None, -1) else None
        found.append(_Group(bits, _read_block(weights), group_size, format_))
    return found


def _read_block(weights: HFConfig) -> Rectangle | None:
    found: Any = weights.values.get("block_structure")
    if found is None:
        return None
    if isinstance(found, str):  # "128x128" of earlier versions
        sides = found.split("x")
        found = [int(side) for side in sides if side.isdecimal() and len(side) < 6]
    sizes = isinstance(found, list) and len(found) == 2
    if not sizes or not all(type(side) is int and 1 <= side <= fp8.MAX_BLOCK for side in found):
        raise weights.refuse("block_structure", "two sizes, of rows and of columns", found)
    return found[0], found[1]


def _plain(parts: Parts, name: str, groups: list[_Group]) -> LazyTensor:
    codes = parts.take(name, CODES, n_dims=(2, 3))
    scales = parts.take(f"{name}_scale", fp8.SCALES, n_dims=range(4))
    rectangle = _rectangle(parts, codes, scales, groups)
    zeros = None
    if parts.has(f"{name}_zero_point"):
        zeros = parts.take(f"{name}_zero_point", ZEROS, n_dims=range(4))
        parts.expect(zeros, scales.shape)
    columns = _columns(parts, name, codes, scales)
    return scaled(
        as_floats(codes),
        as_floats(scales),
        rectangle,
        zeros=as_floats(zeros) if zeros else None,
        columns=columns,
    )


def _packed_integers(
    parts: Parts, packed: LazyTensor, module: str, groups: list[_Group]
) -> LazyTensor:
    name = f"{module}.weight"
    stored = parts.take(f"{name}_shape", ("I64", "I32"), n_dims=(1,))
    parts.expect(stored, (2,))
    height, width = (int(size) for size in read_integers(stored, 0, 1)[0])
    fitting = {g.bits for g in groups if packed.shape == (height, _n_words(width, g.bits))}
    if len(fitting) != 1:
        sizes = " or ".join(str(g.bits) for g in groups)
        raise parts.refuse(
            packed, f"{height} rows of {width} integers of {sizes} bits", packed.shape
        )
    (bits,) = fitting
    scales = parts.take(f"{name}_scale", fp8.SCALES, n_dims=(1, 2))
    offset = np.float32(1 << (bits - 1))

    def load(first: int, last: int) -> Floats:
        assert packed.raw is not None
        codes = unpack_integers(packed.raw(first, last), bits, width)
        return codes.astype(np.float32) - offset

    codes = LazyTensor(name, (height, width), "F32", load)
    rectangle = _rectangle(parts, codes, scales, groups)
    zeros = None
    if parts.has(f"{name}_zero_point"):
        zeros = _zero_points(parts, f"{name}_zero_point", codes, scales, bits)
    columns = _columns(parts, name, codes, scales)
    return scaled(codes, as_floats(scales), rectangle, zeros=zeros, columns=columns)


def _zero_points(
    parts: Parts, name: str, codes: LazyTensor, scales: LazyTensor, bits: int
) -> LazyTensor:
    """Zero points, packed along the rows: (out * bits / 32, groups)."""
    zeros = parts.take(name, ("I32", "I8"), n_dims=(1, 2))
    if zeros.dtype == "I8":  # before they were packed
        parts.expect(zeros, scales.shape)
        return as_floats(zeros)
    height = codes.shape[0]
    across = scales.shape[-1] if len(scales.shape) == 2 else 1
    n_words = _n_words(height, bits)
    parts.expect(zeros, (n_words, across))
    offset = np.float32(1 << (bits - 1))

    def load(first: int, last: int) -> Floats:
        begin = first // WORD * WORD  # 32 integers are whole words, whatever their bits
        words = read_integers(
            zeros, begin // WORD * bits, min(-(-last // WORD) * bits, n_words)
        ).astype("<i4")
        data = np.ascontiguousarray(words.T).view(np.uint8)
        values = unpack_integers(data, bits, last - begin)[:, first - begin :]
        return np.ascontiguousarray(values.T).astype(np.float32) - offset

    return LazyTensor(name, (height, across), "F32", load)


def _small_floats(parts: Parts, packed: LazyTensor, module: str) -> LazyTensor:
    name = f"{module}.weight"
    scales = parts.take(f"{name}_scale", SCALES)
    height, width = packed.shape[0], 2 * packed.shape[1]

    def load(first: int, last: int) -> Floats:
        assert packed.raw is not None
        return E2M1[unpack_integers(packed.raw(first, last), 4, width)]

    codes = LazyTensor(name, (height, width), "F32", load)
    if scales.dtype == "U8":  # exponents
        scales = LazyTensor(scales.name, scales.shape, "F8_E8M0", scales.load, scales.raw)
    size = 32 if scales.dtype == "F8_E8M0" else 16
    parts.expect(scales, grid_shape(codes.shape, (1, size)))
    divisor = 1.0
    if parts.has(f"{name}_global_scale"):
        whole = parts.take(f"{name}_global_scale", FLOATS, n_dims=(0, 1))
        parts.expect(whole, (), (1,))
        divisor = float(whole.load(0, 1).reshape(-1)[0])
        if not 0 < divisor < float("inf"):
            raise parts.refuse(whole, "a number above 0", divisor)
    return scaled(codes, as_floats(scales), (1, size), divisor=divisor)


def _rectangle(
    parts: Parts, codes: LazyTensor, scales: LazyTensor, groups: list[_Group]
) -> Rectangle:
    """What one scale is for: a group of a row if a config group has such groups, or as for FP8."""
    for group in groups:
        if group.group_size and group.block is None:
            rectangle = (1, group.group_size)
            if scales.shape == grid_shape(codes.shape, rectangle):
                return rectangle
    block = next((group.block for group in groups if group.block), None)
    return fp8.find_rectangle(parts, codes, scales, block)


def _columns(parts: Parts, name: str, codes: LazyTensor, scales: LazyTensor) -> Any:
    """The group of each input, where they were put into groups out of order."""
    if not parts.has(f"{name}_g_idx"):
        return None
    stored = parts.take(f"{name}_g_idx", tuple(INTEGERS), n_dims=(1,))
    parts.expect(stored, codes.shape[-1:])
    columns = read_integers(stored, 0, 1)[0]
    n_groups = scales.shape[-1] if len(scales.shape) > 1 else 1
    if columns.max() < 0:  # -1 throughout: inputs are in order
        return None
    if columns.min() < 0 or columns.max() >= n_groups:
        found = f"{columns.min()} to {columns.max()}"
        raise parts.refuse(stored, f"groups from 0 to {n_groups - 1}", found)
    return columns


def _n_words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)
