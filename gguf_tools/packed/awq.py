"""AWQ of 4 bits, as AutoAWQ writes it, in three of its layouts.

gemm
    X.qweight  I32  (in, out / 8)      codes of eight outputs, in the order 0 2 4 6 1 3 5 7
    X.qzeros   I32  (groups, out / 8)  zero points in the same order
    X.scales   F16  (groups, out)
gemv
    X.qweight  I32  (out, in / 8)      codes of eight inputs, low bits first
    X.qzeros   I32  (out, n)           zero points of eight groups; n may be more than needed
    X.scales   F16  (out, n * 8)
marlin: see marlin.py

weight[out, in] = (code - zero[in / group_size, out]) * scale[in / group_size, out]
"""

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.packed import marlin
from gguf_tools.packed.columns import Columns
from gguf_tools.packed.grid import group_size
from gguf_tools.packed.numbers import FLOATS, read_words, unpack_integers
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import Floats, LazyTensor

BITS = 4
LAYOUTS = ("gemm", "gemv", "marlin")
PER_WORD = 8
SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)  # of output 0, 1, 2...


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights."""
    key = _key(config, "bits", "w_bit")
    if config.values.get(key, BITS) != BITS:
        raise config.refuse(key, str(BITS), config.values[key])
    layout = _layout(config)
    columns = Columns()
    for module in parts.modules(".qweight"):
        if layout == "gemv":
            parts.add(_gemv(parts, module, config))
        elif layout == "marlin":
            names = "qweight", "scales"
            parts.add(marlin.weight(parts, module, config, columns, names=names))
        else:
            parts.add(_gemm(parts, module, columns))


def describe(config: HFConfig) -> str:
    return f"AWQ, {BITS} bits"


def _key(config: HFConfig, *names: str) -> str:
    """The name under which a setting is there: versions differ."""
    return next((name for name in names if config.has(name)), names[0])


def _layout(config: HFConfig) -> str:
    key = _key(config, "version", "format")
    found = config.values.get(key, LAYOUTS[0])
    layout = found.lower() if isinstance(found, str) else found
    if layout not in LAYOUTS:
        known = f"{', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}"
        raise config.refuse(key, f"{known} (the layouts of other kernels are not known)", found)
    return str(layout)


def _gemm(parts: Parts, module: str, columns: Columns) -> LazyTensor:
    qweight = parts.take(f"{module}.qweight", ("I32",))
    scales = parts.take(f"{module}.scales", FLOATS)
    qzeros = None
    if parts.has(f"{module}.qzeros"):
        qzeros = parts.take(f"{module}.qzeros", ("I32",))
    width, n_words = qweight.shape
    n_groups, height = scales.shape[0], n_words * PER_WORD
    parts.expect(scales, (n_groups, height))
    if qzeros is not None:
        parts.expect(qzeros, (n_groups, n_words))
    if width % n_groups:
        raise parts.refuse(scales, f"groups that divide {width} inputs", scales.shape)
    size = width // n_groups

    def codes(tensor: LazyTensor, first: int, last: int) -> npt.NDArray[np.float32]:
        begin, end = first // PER_WORD, -(-last // PER_WORD)
        words = columns.words(tensor, begin, end).view(np.uint32)
        values = (words[:, :, None] >> SHIFTS & 15).reshape(len(words), -1)
        return values[:, first - begin * PER_WORD : last - begin * PER_WORD].astype(np.float32)

    def load(first: int, last: int) -> Floats:
        weights = codes(qweight, first, last).reshape(n_groups, size, last - first)
        # Without zero points codes are around the middle.
        zeros = np.float32(8) if qzeros is None else codes(qzeros, first, last)[:, None]
        weights -= zeros
        weights *= columns.floats(scales, first, last)[:, None]
        return np.ascontiguousarray(weights.reshape(width, -1).T)

    return LazyTensor(f"{module}.weight", (height, width), "F32", load)


def _gemv(parts: Parts, module: str, config: HFConfig) -> LazyTensor:
    qweight = parts.take(f"{module}.qweight", ("I32",))
    scales = parts.take(f"{module}.scales", FLOATS)
    qzeros = parts.take(f"{module}.qzeros", ("I32",))
    height, n_words = qweight.shape
    width, n_zeros = n_words * PER_WORD, qzeros.shape[1]
    size = group_size(config, width)
    n_groups = width // size
    if n_zeros * PER_WORD < n_groups:
        raise parts.refuse(
            qzeros, f"the zero points of {width} inputs in groups of {size}", qzeros.shape
        )
    parts.expect(qzeros, (height, n_zeros))
    parts.expect(scales, (height, n_zeros * PER_WORD))

    def codes(tensor: LazyTensor, first: int, last: int, count: int) -> npt.NDArray[np.float32]:
        data = np.ascontiguousarray(read_words(tensor, first, last), "<i4").view(np.uint8)
        return unpack_integers(data, BITS, count).astype(np.float32)

    def load(first: int, last: int) -> Floats:
        weights = codes(qweight, first, last, width).reshape(last - first, n_groups, size)
        weights -= codes(qzeros, first, last, n_groups)[:, :, None]
        weights *= scales.load(first, last)[:, :n_groups, None]
        return weights.reshape(last - first, width)

    return LazyTensor(f"{module}.weight", (height, width), "F32", load)
