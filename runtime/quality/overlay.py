"""A source with some tensors of a file made from it: what these cost, and nothing else, shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gguf_tools.reader import TensorInfo
from runtime.program import Floats
from runtime.sources import Source
from runtime.streamed_rows import Bytes


class Overlay:
    """A Source. Both others must stay open."""

    def __init__(self, source: Source, file: Source, names: Collection[str]) -> None:
        """`names` are the tensors that are read from `file`."""
        self.path = source.path
        self.metadata: Mapping[str, Any] = source.metadata
        self._of = {name: file if name in names else source for name in source.tensors}
        self.tensors: Mapping[str, TensorInfo] = {
            name: holder.tensors[name] for name, holder in self._of.items()
        }

    def raw(self, name: str) -> Bytes:
        return self._of[name].raw(name)

    def rows(self, name: str, first: int, last: int) -> Bytes:
        return self._of[name].rows(name, first, last)

    def load(self, name: str) -> Floats:
        return self._of[name].load(name)
