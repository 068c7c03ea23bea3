"""What only the compiler knows, named before there is one.

Kernels name vectors, scalar types and operations. These are numba's; but numba takes a third of a
second to import, and a kernel that comes from disk needs nothing of it. So what a kernel's module
holds is `Deferred`: it becomes the real thing where a kernel is compiled (gguf_tools/compiler).
"""

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any


class Deferred:
    """Something that is made when it is first needed."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    @cached_property
    def real(self) -> Any:
        """The thing itself; imports the compiler."""
        return self._make()

    @property
    def is_made(self) -> bool:
        return "real" in vars(self)

    def __call__(self, *arguments: Any) -> Any:
        """Call the thing itself from Python."""
        return self.real(*arguments)


def named(module: str, name: str) -> Deferred:
    """What a module of the compiler has by that name. AttributeError for what no kernel names."""
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return Deferred(lambda: getattr(import_module(module), name))
