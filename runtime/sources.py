"""Where a model's weights come from: a GGUF file, or a checkpoint as its file would have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gguf_tools.archs.transforms import Transform, transformed
from gguf_tools.quants import by_name
from gguf_tools.quants.quanttype import QuantType
from gguf_tools.reader import TensorInfo
from gguf_tools.safetensors_file import LazyTensor
from gguf_tools.values import SCALAR_BY_NAME, Array, MetadataValue, Value
from runtime.streamed_rows import Bytes, StreamedRows

AS_STORED = ("F32", "F16", "BF16", "MXFP4")  # types of checkpoints that are types of files, too


class Source(Protocol):
    """What a decoder is built from; GGUFFile is one. Arrays are as the file would hold them."""

    @property
    def path(self) -> Path: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def raw(self, name: str) -> Bytes:
        """All blocks of a tensor, (n_rows, row_bytes)."""
        ...

    def rows(self, name: str, first: int, last: int) -> Bytes:
        """Rows `first` to `last` (exclusive) of `raw`, in memory of their own."""
        ...

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """The weights of a tensor in its shape."""
        ...


class Planned(Protocol):
    """A tensor that a conversion would write: plan.TensorPlan, or matching.Matched."""

    @property
    def name(self) -> str: ...

    @property
    def source(self) -> LazyTensor: ...

    @property
    def transform(self) -> Transform | None: ...


class PlannedWeights:
    """The tensors that a conversion would write, before any is quantised, read when asked for.

    Names, order of rows, merged adapters and unpacked weights are those of the file. A tensor
    whose bytes would be written as they are has its own type, any other is F32.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[Planned],
        metadata: Mapping[str, MetadataValue],
    ) -> None:
        self.path = path
        self.metadata = {key: plain_value(value) for key, value in metadata.items()}
        self._planned = {tensor.name: tensor for tensor in tensors}
        self.tensors = {name: _describe(tensor) for name, tensor in self._planned.items()}

    def raw(self, name: str) -> Bytes:
        return self.rows(name, 0, self.tensors[name].n_rows)

    def rows(self, name: str, first: int, last: int) -> Bytes:
        tensor = self._planned[name]
        if _is_stored(tensor):
            assert tensor.source.raw is not None
            return tensor.source.raw(first, last)
        # Whole groups of the transform, from which the rows wanted are cut.
        is_matrix = len(tensor.source.shape) > 1
        group = tensor.transform.group if tensor.transform is not None and is_matrix else 1
        begin = first - first % group
        end = min(last + -last % group, tensor.source.n_rows)
        rows = tensor.source.load(begin, end)
        if tensor.transform is not None:
            rows = transformed(rows, tensor.transform, len(tensor.source.shape))
        wanted = np.ascontiguousarray(rows[first - begin : last - begin], np.float32)
        return wanted.view(np.uint8)

    def load(self, name: str) -> npt.NDArray[np.float32]:
        tensor = self.tensors[name]
        weights: npt.NDArray[np.float32] = tensor.quant.dequantize(self.raw(name))
        return weights.reshape(tensor.shape)


def streamed(source: Source, name: str) -> StreamedRows:
    """The blocks of a tensor, none of which is read yet."""
    tensor = source.tensors[name]

    def read(first: int, last: int) -> Bytes:
        return source.rows(name, first, last)

    return StreamedRows(read, 0, tensor.n_rows, tensor.row_bytes)


def plain_value(value: MetadataValue) -> Any:
    """A metadata value as GGUFFile would give it when it is read again."""
    if isinstance(value, Value):
        scalar = SCALAR_BY_NAME.get(value.type)
        return value.value if scalar is None else scalar.dtype.type(value.value).item()
    if isinstance(value, Array):
        scalar = SCALAR_BY_NAME.get(value.type)
        return list(value.values) if scalar is None else np.asarray(value.values, scalar.dtype)
    raise ValueError("a value in another file's bytes is read from that file")


def _is_stored(tensor: Planned) -> bool:
    source = tensor.source
    return tensor.transform is None and source.raw is not None and source.dtype in AS_STORED


def _describe(tensor: Planned) -> TensorInfo:
    quant: QuantType = by_name(tensor.source.dtype if _is_stored(tensor) else "F32")
    n_bytes = tensor.source.n_rows * quant.row_bytes(tensor.source.row_length)
    return TensorInfo(tensor.name, quant, tensor.source.shape, 0, n_bytes)
