"""AWQ of 4 bits in the layout "gemm", as AutoAWQ writes it.

X.qweight  I32  (in, out / 8)      codes of eight outputs, in the order 0 2 4 6 1 3 5 7
X.qzeros   I32  (groups, out / 8)  zero points in the same order
X.scales   F16  (groups, out)

weight[out, in] = (code - zero[in / group_size, out]) * scale[in / group_size, out]
"""

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.packed.columns import Columns
from gguf_tools.packed.numbers import FLOATS
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import Floats, LazyTensor

BITS = 4
LAYOUT = "gemm"
PER_WORD = 8
SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)  # of output 0, 1, 2...


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights."""
    for keys, expected in ((("bits", "w_bit"), BITS), (("version", "format"), LAYOUT)):
        key = next((key for key in keys if config.has(key)), keys[0])
        found = config.values.get(key, expected)
        if (found.lower() if isinstance(found, str) else found) != expected:
            raise config.refuse(key, str(expected), found)
    columns = Columns()
    for module in parts.modules(".qweight"):
        parts.add(_weight(parts, module, columns))


def describe(config: HFConfig) -> str:
    return f"AWQ, {BITS} bits"


def _weight(parts: Parts, module: str, columns: Columns) -> LazyTensor:
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
