"""What quantising cost: the error of the blocks that were written, against what they were made of.

Measured while both are in memory, and only where it says more than the type does: of weights that
had been quantised before, and of weights that were trained for the type they get.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from gguf_tools.errors import printable
from gguf_tools.quants.quanttype import Bytes, Floats, QuantType

EVERY = 16  # rows of which one is measured


@dataclass(frozen=True)
class Loss:
    """Sums over weights; those that were not measured count as their neighbours."""

    error: float = 0.0  # of the squares of the differences
    size: float = 0.0  # of the squares of the weights
    n_weights: int = 0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.error + other.error, self.size + other.size, self.n_weights + other.n_weights
        )

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the weights; 0 only if there is none."""
        return sqrt(self.error / self.size) if self.size else 0.0


def measure(quant: QuantType, weights: Floats, data: Bytes) -> Loss:
    """The loss of rows of weights that are stored as `data`.

    Measured on every sixteenth row; if those have no error on all, so that 0 means exact.
    """
    n_rows = len(weights)
    for rows in (slice(None, None, EVERY), slice(None)):
        measured = weights[rows]
        error = _square(measured - quant.dequantize(data[rows]).reshape(measured.shape))
        if error:
            break
    scale = n_rows / max(len(measured), 1)
    return Loss(scale * error, scale * _square(measured), weights.size)


class Losses:
    """The losses of a file's tensors, added up while it is written."""

    def __init__(self) -> None:
        self.tensors: dict[str, Loss] = {}  # those that were measured

    def add(self, name: str, loss: Loss) -> None:
        """Of some rows of a tensor."""
        self.tensors[name] = self.tensors.get(name, Loss()) + loss

    def describe(self, names: Iterable[str]) -> str:
        """What was lost of these tensors, as far as they were measured: a half sentence.

        "a relative RMS error of 5.2 % ...", or "nothing: ..."; empty if none was measured.
        """
        found = {name: self.tensors[name] for name in names if name in self.tensors}
        if not found:
            return ""
        total = sum(found.values(), Loss())
        count = f"{len(found):,} tensor{'s' if len(found) > 1 else ''}"
        if not total.error:
            return f"nothing: {count} hold{'s' if len(found) == 1 else ''} exactly the same numbers"
        worst = max(found, key=lambda name: found[name].relative)
        text = f"a relative RMS error of {_percent(total.relative)} in {count}"
        if len(found) > 1:
            text += f", at most {_percent(found[worst].relative)} in {printable(worst)}"
        n_exact = sum(not loss.error for loss in found.values())
        text += f", none in {n_exact:,} of them" if n_exact else ""
        return f"{text} (one row in {EVERY} measured)"


def _square(numbers: Floats) -> float:
    flat = numbers.reshape(-1)
    return float(np.dot(flat, flat))


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.2g} %" if ratio < 0.1 else f"{100 * ratio:.0f} %"
