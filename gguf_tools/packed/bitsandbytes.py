"""bitsandbytes: NF4 and FP4, with scales that are quantised themselves or not, and LLM.int8().

4 bits
    X.weight                 U8  (n / 2, 1)     codes, high half first, over the whole matrix
    X.weight.quant_map       F32 (16)           what the codes stand for
    X.weight.absmax          F32 (n_blocks)     the largest magnitude of each block of 64
    X.weight.quant_state.bitsandbytes__nf4      JSON: shape, blocksize, quant_type

    weight = quant_map[code] * absmax[block]

with double quantisation absmax is U8, and
    X.weight.nested_quant_map  F32 (256)        what the bytes of absmax stand for
    X.weight.nested_absmax     F32              one for each 256 blocks

    absmax = nested_quant_map[byte] * nested_absmax[block / 256] + nested_offset

8 bits
    X.weight  I8 (out, in)    X.SCB  F32 (out)  the largest magnitude of each row

    weight = code * SCB / 127
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gguf_tools.archs.config import HFConfig
from gguf_tools.errors import printable
from gguf_tools.json_files import parse_json
from gguf_tools.packed.columns import Columns
from gguf_tools.packed.grid import scaled
from gguf_tools.packed.numbers import FLOATS, as_floats, read_integers, unpack_integers
from gguf_tools.packed.parts import Parts
from gguf_tools.safetensors_file import Floats, LazyTensor

STATE = ".weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
MAX_STATE = 4096  # bytes of JSON
MAX_BLOCK = 1 << 20
ROWS = 0  # a weight_format


def unpack(parts: Parts, config: HFConfig) -> None:
    """Put together all weights: what is stored tells which of the kinds a weight has."""
    columns = Columns()
    for kind in KINDS:
        for module in parts.modules(STATE + kind):
            parts.add(_four_bits(parts, module, kind, columns))
    for module in parts.modules(".SCB"):
        parts.add(_eight_bits(parts, module))


def describe(config: HFConfig) -> str:
    eight = config.flag("load_in_8bit", default=False)
    if eight:
        return "bitsandbytes, LLM.int8()"
    return f"bitsandbytes, {config.text('bnb_4bit_quant_type', default='fp4').upper()}"


@dataclass(frozen=True)
class _Peaks:
    """The largest magnitudes of blocks, as floats or as bytes with scales of their own."""

    stored: LazyTensor
    nested: LazyTensor | None = None
    table: LazyTensor | None = None
    size: int = 1  # blocks that share a nested scale
    offset: float = 0.0

    def load(self, columns: Columns, first: int, last: int) -> Floats:
        """Of blocks `first` to `last`."""
        if self.nested is None or self.table is None:
            peaks: Floats = columns.floats(self.stored, first, last)[0]
            return peaks
        begin, end = first // self.size, -(-last // self.size)
        scales = columns.floats(self.nested, begin, end)[0]
        scales = scales[np.arange(first, last) // self.size - begin]
        codes = columns.words(self.stored, first, last)[0]
        found: Floats = self.table.load(0, 1)[0][codes] * scales
        found += np.float32(self.offset)
        return found


def _eight_bits(parts: Parts, module: str) -> LazyTensor:
    if parts.has(f"{module}.weight_format"):
        layout = parts.take(f"{module}.weight_format", ("U8",), n_dims=(0, 1))
        parts.expect(layout, (), (1,))
        if (found := int(read_integers(layout, 0, 1)[0, 0])) != ROWS:
            raise parts.refuse(layout, f"{ROWS}, rows one after the other", found)
    codes = parts.take(f"{module}.weight", ("I8",))
    peaks = parts.take(f"{module}.SCB", FLOATS, n_dims=(1, 2))
    parts.expect(peaks, codes.shape[:1], (codes.shape[0], 1))
    return scaled(as_floats(codes), peaks, (1, codes.shape[1]), divisor=127.0)


def _four_bits(parts: Parts, module: str, kind: str, columns: Columns) -> LazyTensor:
    name = f"{module}.weight"
    state = _read_state(parts, module, kind)
    sizes = state.values.get("shape")
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or not all(type(size) is int and 1 <= size < 1 << 32 for size in sizes)
    ):
        raise state.refuse("shape", "two sizes", sizes)
    height, width = sizes
    block = state.integer("blocksize", low=2, high=MAX_BLOCK)
    n = height * width
    n_blocks = -(-n // block)
    codes = parts.take(name, ("U8",), n_dims=(2,))
    parts.expect(codes, (-(-n // 2), 1))
    table = parts.take(f"{name}.quant_map", ("F32",), n_dims=(1,))
    parts.expect(table, (16,))
    peaks = _read_peaks(parts, name, n_blocks, state)

    def load(first: int, last: int) -> Floats:
        assert codes.raw is not None
        begin, end = first * width, last * width
        data = codes.raw(begin // 2, -(-end // 2)).reshape(1, -1)
        swapped = data >> np.uint8(4) | data << np.uint8(4)  # the high half is the first weight
        skip = begin % 2
        values = unpack_integers(swapped, 4, skip + end - begin)[0, skip:]
        scales = peaks.load(columns, begin // block, -(-end // block))
        blocks = np.arange(begin, end) // block - begin // block
        weights = table.load(0, 1)[0][values] * scales[blocks]
        found: Floats = weights.reshape(last - first, width)
        return found

    return LazyTensor(name, (height, width), "F32", load)


def _read_state(parts: Parts, module: str, kind: str) -> HFConfig:
    """The JSON object beside a weight."""
    stored = parts.take(f"{module}{STATE}{kind}", ("U8",), n_dims=(1,))
    if stored.n_elements > MAX_STATE:
        raise parts.refuse(stored, f"at most {MAX_STATE:,} bytes", stored.n_elements)
    assert stored.raw is not None
    text = stored.raw(0, 1).tobytes()
    where = f"{parts.where}: tensor {printable(stored.name)}"
    return HFConfig(
        parse_json(text, Path(parts.where), printable(stored.name), unique=False), where
    )


def _read_peaks(parts: Parts, name: str, n_blocks: int, state: HFConfig) -> _Peaks:
    stored = parts.take(f"{name}.absmax", ("F32", "U8"), n_dims=(1,))
    parts.expect(stored, (n_blocks,))
    if stored.dtype != "U8":
        return _Peaks(stored)
    size = state.integer("nested_blocksize", low=1, high=MAX_BLOCK)
    offset = state.real("nested_offset", low=-1e30, high=1e30)
    nested = parts.take(f"{name}.nested_absmax", ("F32",), n_dims=(1,))
    parts.expect(nested, (-(-n_blocks // size),))
    table = parts.take(f"{name}.nested_quant_map", ("F32",), n_dims=(1,))
    parts.expect(table, (256,))
    return _Peaks(stored, nested, table, size, offset)
