"""The same program run several ways; `reference` is the definition of right."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.program import Floats


class Backend(Protocol):
    """What runtime.model needs of a backend, which holds the KV cache."""

    notes: tuple[str, ...]  # one-time remarks for the user, such as slow types

    def run(self, ids: npt.NDArray[np.int64], start: int, n_outputs: int) -> Floats:
        """Process ids at positions start, start + 1...; logits (n_outputs, n_vocab) of the last.

        Positions before `start` must have been processed; those from `start` on are overwritten.
        """
        ...

    def close(self) -> None:
        """Stop threads and drop views of the file."""
        ...
