"""What kernels need besides arithmetic: atomics, spinning, and calls by address.

The operations are those of gguf_tools/compiler/control.py.
"""

from typing import Any

from gguf_tools.deferred import named


def __getattr__(name: str) -> Any:
    return named("gguf_tools.compiler.control", name)
