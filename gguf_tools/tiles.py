"""Register-blocked inner loops for kernels: those of gguf_tools/compiler/tiles.py."""

from typing import Any

from gguf_tools.deferred import named


def __getattr__(name: str) -> Any:
    return named("gguf_tools.compiler.tiles", name)
