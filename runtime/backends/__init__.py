"""The same stages of a program run several ways; `reference` is the definition of right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from runtime.program import Floats


class Backend(Protocol):
    """What runtime.stages needs of what runs a stage, which holds its part of the KV cache.

    A constructor that finds no room for the stage raises DeviceMemoryError and leaves nothing
    behind; a device that is gone raises DeviceLostError from `run`.
    """

    notes: tuple[str, ...]  # one-time remarks for the user, such as slow types

    def run(
        self, index: int, values: Mapping[str, Floats], start: int, n_outputs: int
    ) -> dict[str, Floats]:
        """Run span `index` of the stage for tokens at positions start, start + 1...

        `values` are the span's inputs, (n_tokens, width) each. Gives its outputs: for every token,
        or where the span has a head for the last n_outputs (0: (0, n_vocab)), none of which it may
        keep or write to later. A span without a body gets those tokens alone: never 0 of them.

        Positions before `start` must have been processed; those from `start` on are overwritten.
        """
        ...

    def close(self) -> None:
        """Stop threads, free the device's memory, drop views of the file."""
        ...
