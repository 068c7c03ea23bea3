"""FP8: weights of 8-bit floats beside their scales (E4M3 or E5M2).

    X                 F8      (..., out, in)
    X_scale_inv       F32, BF16, F16 or F8_E8M0: one for each block of 128 x 128, as DeepSeek has it
    X_scale           the same for a tensor or for each row (AutoFP8, FBGEMM, ModelOpt)

    weight = code * scale

Despite its name `scale_inv` is a factor: it is the inverse of the scale used for quantising.
"""

from gguf_tools.archs.config import HFConfig
from gguf_tools.packed.grid import Rectangle, grid_shape, scaled
from gguf_tools.packed.numbers import FLOATS, as_floats
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import LazyTensor

CODES = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0")
SUFFIXES = ("_scale_inv", "_scale")
MAX_BLOCK = 1 << 16
# Scales of what goes in, or of the cache: not needed to know the weights.
OTHER_SCALES = (
    ".activation_scale", ".activation_scale_ub", "_activation_scale", ".input_scale",
    ".input_scale_ub", "_input_scale", ".k_scale", ".v_scale", ".output_scale",
)  # fmt: skip


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights of 8-bit floats."""
    block = _read_block(config)
    for name in parts.of_dtype(CODES):
        suffix = next((suffix for suffix in SUFFIXES if parts.has(name + suffix)), SUFFIXES[0])
        codes = parts.take(name, CODES, n_dims=(2, 3))
        scales = parts.take(name + suffix, SCALES, n_dims=range(4))
        rectangle = find_rectangle(parts, codes, scales, block)
        parts.add(scaled(as_floats(codes), as_floats(scales), rectangle))
    parts.drop(OTHER_SCALES)


def describe(config: HFConfig) -> str:
    return "FP8"


def find_rectangle(
    parts: Parts, codes: LazyTensor, scales: LazyTensor, block: Rectangle | None
) -> Rectangle:
    """What one scale is for, by the scales' shape: the tensor, a row, or a block."""
    *outer, height, width = codes.shape
    if scales.n_elements == 1 and not (block and height <= block[0] and width <= block[1]):
        return height, width
    rows = ((*outer, height), (*outer, height, 1))
    if block is None:
        each = (*outer, 1, 1)
        if outer and scales.shape in (each, tuple(outer)):
            return height, width
        parts.expect(scales, (), (1,), *rows)
        return 1, width
    if scales.shape in rows and grid_shape(codes.shape, block) != scales.shape:
        return 1, width
    parts.expect(scales, grid_shape(codes.shape, block), *rows)
    return block


def _read_block(config: HFConfig) -> Rectangle | None:
    found = config.values.get("weight_block_size")
    if found is None:
        return None
    if (
        not isinstance(found, list)
        or len(found) != 2
        or not all(type(size) is int and 1 <= size <= MAX_BLOCK for size in found)
    ):
        raise config.refuse("weight_block_size", "two sizes, of rows and of columns", found)
    return found[0], found[1]
