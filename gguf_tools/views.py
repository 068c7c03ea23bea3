"""Other shapes of a checkpoint's tensors, still read a band of rows at a time."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np

from gguf_tools.quants import by_name
from gguf_tools.safetensors_file import Bytes, Floats, LazyTensor

MXFP4 = "MXFP4"


def stacked(tensors: Sequence[LazyTensor], name: str) -> LazyTensor:
    """Tensors of one shape as one, with an axis more in front: (len(tensors), *shape)."""
    first = tensors[0]
    each = first.n_rows

    def load(begin: int, end: int) -> Floats:
        bands = []
        while begin < end:
            index, row = divmod(begin, each)
            last = min(end - index * each, each)
            bands.append(tensors[index].load(row, last))
            begin += last - row
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    return replace(first, name=name, shape=(len(tensors), *first.shape), load=load, raw=None)


def part(tensor: LazyTensor, index: int, count: int) -> LazyTensor:
    """Part `index` of `count` equal parts of the rows (for three axes, of every matrix's rows)."""
    *outer, height, width = tensor.shape
    each = height // count

    def load(begin: int, end: int) -> Floats:
        bands = []
        while begin < end:
            matrix, row = divmod(begin, each)
            last = min(end - matrix * each, each)
            start = matrix * height + index * each
            bands.append(tensor.load(start + row, start + last))
            begin += last - row
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    return replace(tensor, shape=(*outer, each, width), load=load, raw=None)


def regrouped(tensor: LazyTensor, n_groups: int, n_parts: int) -> LazyTensor:
    """Rows of n_groups groups of n_parts parts, with all first parts first, then all second...

    The elements of a vector are regrouped as a matrix's rows are.
    """
    height = tensor.shape[0] // (n_groups * n_parts)  # rows of one part of one group

    def load(begin: int, end: int) -> Floats:
        bands = []
        while begin < end:
            index, row = divmod(begin, height)
            last = min(end - index * height, height)
            part, group = divmod(index, n_groups)
            start = (group * n_parts + part) * height
            bands.append(tensor.load(start + row, start + last))
            begin += last - row
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    def load_vector(begin: int, end: int) -> Floats:
        vector = tensor.load(begin, end)
        groups = vector.reshape(n_groups, n_parts, height)
        return np.ascontiguousarray(groups.swapaxes(0, 1)).reshape(vector.shape)

    loader = load if len(tensor.shape) > 1 else load_vector
    return replace(tensor, load=loader, raw=None)


def cut(tensor: LazyTensor, n_groups: int, height: int, first: int, n: int) -> LazyTensor:
    """Of n_groups groups of `height` rows each the n from `first` on: (n_groups, n, width)."""
    width = tensor.shape[-1]

    def load(begin: int, end: int) -> Floats:
        bands = []
        while begin < end:
            group, row = divmod(begin, n)
            last = min(end - group * n, n)
            start = group * height + first
            bands.append(tensor.load(start + row, start + last))
            begin += last - row
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    return replace(tensor, shape=(n_groups, n, width), load=load, raw=None)


def mxfp4(blocks: LazyTensor, scales: LazyTensor, *, index: int = 0, count: int = 1) -> LazyTensor:
    """Rows index, index + count... of what OpenAI's MXFP4 holds, in ggml's order.

    A byte of `blocks` (..., n_blocks, 16) has two neighbours; ggml's has weight i and i + 16 of a
    block, behind the block's scale. No weight changes.
    """
    *outer, height, n_blocks = scales.shape
    quant = by_name(MXFP4)

    def raw(begin: int, end: int) -> Bytes:
        assert blocks.raw is not None and scales.raw is not None
        rows = begin * count + index, (end - 1) * count + index + 1
        scale = scales.raw(*rows)[::count]
        pairs = blocks.raw(rows[0] * n_blocks, rows[1] * n_blocks).reshape(-1, n_blocks, 16)
        pairs = pairs[::count]
        codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1, n_blocks, 32)
        result = np.empty((end - begin, n_blocks, 17), np.uint8)
        result[:, :, 0] = scale
        result[:, :, 1:] = codes[:, :, :16] | codes[:, :, 16:] << 4
        return result.reshape(end - begin, -1)

    def load(begin: int, end: int) -> Floats:
        return quant.dequantize(raw(begin, end))

    return LazyTensor(blocks.name, (*outer, height // count, n_blocks * 32), MXFP4, load, raw)


def every(tensor: LazyTensor, index: int, count: int) -> LazyTensor:
    """Of every row the elements index, index + count, index + 2 count..."""
    *outer, width = tensor.shape

    def load(begin: int, end: int) -> Floats:
        return np.ascontiguousarray(tensor.load(begin, end)[..., index::count])

    return replace(tensor, shape=(*outer, width // count), load=load, raw=None)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """The last two axes exchanged. A whole matrix is read for each of its bands."""
    *outer, height, width = tensor.shape

    def load(begin: int, end: int) -> Floats:
        bands = []
        while begin < end:
            matrix, row = divmod(begin, width)
            last = min(end - matrix * width, width)
            whole = tensor.load(matrix * height, (matrix + 1) * height)
            bands.append(np.ascontiguousarray(whole[:, row:last].T))
            begin += last - row
        return bands[0] if len(bands) == 1 else np.concatenate(bands)

    assert prod(outer) * height == tensor.n_rows
    return replace(tensor, shape=(*outer, width, height), load=load, raw=None)
