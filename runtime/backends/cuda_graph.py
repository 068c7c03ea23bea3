"""A decode step captured once as a CUDA graph: one launch a token instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numba import config, cuda

from runtime.backends.cuda_draft import Launch


class Graph:
    """Launches that are replayed together, on a stream of their own."""

    def __init__(self, launches: Sequence[Launch]) -> None:
        """The kernels must have run before: loading one cannot be captured."""
        from cuda.core import Device

        device = Device(cuda.get_current_device().id)
        device.set_current()
        self._stream: Any = device.create_stream()
        builder: Any = self._stream.create_graph_builder()
        builder.begin_building()
        for launch in launches:
            launch(builder)
        self._graph: Any = builder.end_building().complete()
        self._graph.upload(self._stream)

    def __call__(self) -> None:
        """Run all of it, and wait for it."""
        self._graph.launch(self._stream)
        self._stream.sync()


def capture(
    launches: Sequence[Launch], result: Callable[[], bytes], forget: Callable[[], None]
) -> tuple[Graph | None, str]:
    """A graph of launches that begin with their input, or None and why there is none.

    `result` gives what they leave, `forget` takes it away. A graph counts only when it leaves what
    was left before: there are many pairs of bindings and drivers.
    """
    if config.ENABLE_CUDASIM:
        return None, "the simulator has no graphs"
    expected = result()
    try:
        for launch in launches:  # loads the kernels
            launch()
        cuda.synchronize()
        graph = Graph(launches)
        forget()
        graph()
        found = result()
    except Exception as error:  # whatever the installed bindings raise: launches work without
        return None, f"{type(error).__name__}: {error}"
    return (graph, "") if found == expected else (None, "a replay gave another result")
