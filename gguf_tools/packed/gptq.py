"""GPTQ, as AutoGPTQ and GPTQModel write it: 2, 3, 4 or 8 bits.

    X.qweight  I32  (in * bits / 32, out)      codes, packed along the inputs, low bits first
    X.qzeros   I32  (groups, out * bits / 32)  zero points, packed along the outputs
    X.scales   F16  (groups, out)
    X.g_idx    I32  (in)                       the group of each input (act-order)

    weight[out, in] = (code - zero[g_idx[in], out]) * scale[g_idx[in], out]

Integers follow each other without a gap; those of 3 bits may lie across two words. Version 1 stores
zero points less one: less 1 in each integer of a word, by one subtraction from the word, so that
adding gives back what was there even where a zero point was 0. (Of 3 bits each integer on its own.)
"""

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.config import HFConfig
from gguf_tools.errors import CheckpointError, printable
from gguf_tools.packed import marlin
from gguf_tools.packed.columns import Columns
from gguf_tools.packed.numbers import FLOATS, read_integers, unpack_integers
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import Floats, LazyTensor

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
MARLIN = "marlin"  # see marlin.py
WORD = 32
BUFFERS = (".wf", ".wf_unsqueeze_zero", ".wf_unsqueeze_neg_one")


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights."""
    if config.flag("is_marlin_format", default=False) or _format(config)[1] == MARLIN:
        marlin.unpack(parts, config)
        return
    bits, version = _read_settings(config)
    columns = Columns()
    for module in parts.modules(".qweight"):
        parts.add(_weight(parts, module, bits=bits, version=version, columns=columns))
    parts.drop(BUFFERS)


def describe(config: HFConfig) -> str:
    return f"GPTQ, {config.integer('bits')} bits"


def _read_settings(config: HFConfig) -> tuple[int, int]:
    """Bits, and the version of the zero points."""
    bits = config.integer("bits", low=1, high=32)
    if bits not in BITS:
        raise config.refuse("bits", f"one of {', '.join(map(str, BITS))}", bits)
    key, format_ = _format(config)
    if format_ not in FORMATS:
        known = f"{', '.join(FORMATS)} or {MARLIN} (the layouts of other kernels are not known)"
        raise config.refuse(key, known, format_)
    words = config.text("pack_dtype", default="int32").removeprefix("torch.")
    if words != "int32":
        raise config.refuse("pack_dtype", "int32", words)
    return bits, FORMATS.index(format_) + 1


def _format(config: HFConfig) -> tuple[str, str]:
    """The layout, and the key that gives it."""
    # GPTQModel calls `format` what it wrote as `checkpoint_format` before.
    key = next((key for key in ("checkpoint_format", "format") if config.has(key)), "format")
    return key, config.text(key, default=FORMATS[0])


def _weight(parts: Parts, module: str, *, bits: int, version: int, columns: Columns) -> LazyTensor:
    qweight = parts.take(f"{module}.qweight", ("I32",))
    qzeros = parts.take(f"{module}.qzeros", ("I32",))
    scales = parts.take(f"{module}.scales", FLOATS)
    stored_groups = None
    if parts.has(f"{module}.g_idx"):
        stored_groups = parts.take(f"{module}.g_idx", ("I32", "I64"), n_dims=(1,))
    n_words, height = qweight.shape
    n_groups = scales.shape[0]
    width = n_words * WORD // bits if stored_groups is None else stored_groups.shape[0]
    # Modules may have bits of their own, which are those that their shapes tell.
    if n_words * WORD != width * bits and n_words * WORD in {width * other for other in BITS}:
        bits = n_words * WORD // width
    if n_words * WORD != width * bits:
        raise parts.refuse(qweight, f"{width} inputs of {bits} bits in words of 32", qweight.shape)
    if height * bits % WORD:
        raise parts.refuse(qweight, f"outputs of {bits} bits in whole words of 32", qweight.shape)
    parts.expect(scales, (n_groups, height))
    parts.expect(qzeros, (n_groups, height * bits // WORD))
    where = f"{parts.where}: tensor {printable(module)}.g_idx"
    if stored_groups is None and width % n_groups:
        raise parts.refuse(scales, f"groups that divide {width} inputs", scales.shape)

    def load(first: int, last: int) -> Floats:
        if stored_groups is None:
            groups = np.arange(width) // (width // n_groups)
        else:
            groups = _read_groups(stored_groups, n_groups, where)
        words = columns.words(qweight, first, last)
        codes = _along_rows(words, bits)
        zeros = _zero_points(columns, qzeros, first, last, bits=bits, version=version)
        weights = codes.astype(np.float32)
        weights -= zeros.T[:, groups]
        weights *= columns.floats(scales, first, last).T[:, groups]
        return weights

    return LazyTensor(f"{module}.weight", (height, width), "F32", load)


def _read_groups(stored: LazyTensor, n_groups: int, where: str) -> npt.NDArray[np.int64]:
    """The group of each input; -1 is the last, as it is to the libraries."""
    groups: npt.NDArray[np.int64] = read_integers(stored, 0, 1)[0]
    low, high = int(groups.min()), int(groups.max())
    if low < -n_groups or high >= n_groups:
        raise CheckpointError(
            f"{where}: expected groups from 0 to {n_groups - 1}, found {low} to {high}"
        )
    return groups


def _along_rows(words: npt.NDArray[np.generic], bits: int) -> npt.NDArray[np.uint8]:
    """Integers packed along the first axis (n_words, n): (n, n_words * 32 / bits)."""
    data = np.ascontiguousarray(words.T).view(np.uint8)
    return unpack_integers(data, bits, words.shape[0] * WORD // bits)


def _zero_points(
    columns: Columns, qzeros: LazyTensor, first: int, last: int, *, bits: int, version: int
) -> Floats:
    """Zero points of outputs `first` to `last`: (groups, n)."""
    begin = first // WORD * WORD  # 32 integers are whole words, whatever their bits
    end = min(-(-last // WORD) * bits, qzeros.shape[1])
    words = np.ascontiguousarray(columns.words(qzeros, begin // WORD * bits, end), "<u4")
    packed_ones = bits != 3
    if version == 1 and packed_ones:
        words = words + np.uint32(sum(1 << shift for shift in range(0, WORD, bits)))
    zeros = unpack_integers(words.view(np.uint8), bits, last - begin)[:, first - begin :]
    if version == 1 and not packed_ones:
        zeros = zeros + np.uint8(1) & np.uint8((1 << bits) - 1)
    return zeros.astype(np.float32)
