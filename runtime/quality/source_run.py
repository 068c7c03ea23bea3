"""The text of the quality sheet, run by the weights that a file is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from gguf_tools.closing import Closeable
from gguf_tools.errors import GGUFError
from gguf_tools.recipes import block_number
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats
from runtime.quality.evaluation import Ids, with_bos
from runtime.quality.likely_costs import Probes, probed_positions
from runtime.sources import Source

WINDOW = 256  # tokens
SKIPPED = 32  # at a window's start, after which nobody could say much of what comes
SHORTEST = 64
WIDEST = 4 << 20  # floats of a window, in the widest place of a layer
SMALL = 200_000_000  # weights; models with more read one short window
SHORT_WINDOW = 128  # tokens of it; and where kernels are not compiled
COMPARED = 64  # tokens whose answers to a single tensor's change are compared, at most


class SourceRun(Closeable):
    """What the source's weights make of the text. For a `with` block; the source stays open."""

    def __init__(
        self,
        source: Source,
        ids: Sequence[int],
        *,
        bos: int | None,
        threads: Callable[[], int],
        compiles: bool,
    ) -> None:
        """Runs the layers. `ids` are the text's; each window begins with `bos`, where there is one.
        `threads` is asked again before each layer: there may be more by then.

        GGUFError where there is no decoder for the model, or where it knows other tokens. Kernels
        that are missing are compiled if it `compiles` them, and for a model that NumPy would take
        too long for.
        """
        self.source, self._threads = source, threads()
        self.n_weights = sum(tensor.n_elements for tensor in source.tensors.values())
        self._compiles = compiles or self.n_weights > SMALL
        self.windows = cut(ids, source, n_windows=2)
        if self.n_weights > SMALL:
            self.windows = self.windows[:1, :SHORT_WINDOW]
        self.model = self.run_as(source)
        try:
            if not self.model.is_compiled:
                self.windows = self.windows[:1, :SHORT_WINDOW]
            self.read = [with_bos(window, bos).tolist() for window in self.windows]
            if max(map(max, self.read)) >= self.model.config.n_vocab:
                raise GGUFError("its tokenizer has tokens that the model does not know")
            self.positions = probed_positions(len(self.read[0]))
            self.states: list[Floats] = []  # of the first window, before each layer and at the end
            self.probes: list[Probes] = []  # of each layer
            self.ends = [self._run(index, threads) for index in range(len(self.read))]
        except BaseException:
            self.model.close()
            raise

    def run_as(self, source: Source, layers: Sequence[int] | None = None) -> LayerwiseModel:
        """A model of some weights, all like the source's in shape."""
        return LayerwiseModel(
            source,
            n_tokens=self.windows.shape[1],
            threads=self._threads,
            layers=layers,
            compiles=self._compiles,
        )

    def use_threads(self, threads: int) -> None:
        """Run with so many from now on."""
        self.model.close()
        self._threads = threads
        self.model = self.run_as(self.source)

    @property
    def scored(self) -> slice:
        """The tokens of a window whose answers are compared."""
        last = len(self.read[0]) - 1
        return slice(min(SKIPPED, last // 2), last)

    def compared_positions(self) -> npt.NDArray[np.intp]:
        """Of the scored tokens in the first window's first half as many as are compared."""
        first, last = self.scored.start, max(SHORTEST, len(self.read[0]) // 2) - 2
        return np.linspace(first, last, min(COMPARED, last + 1 - first)).astype(np.intp)

    def head_inputs(self, name: str) -> Mapping[int, Floats]:
        """What the head, the matrix of this name, is multiplied with for a few tokens."""
        probes = Probes(np.arange(len(self.positions)))
        next(self.model.head_bands(self.states[-1][self.positions], probes.observe))
        return probes.inputs.get(name, {})

    def _run(self, index: int, threads: Callable[[], int]) -> Floats:
        """The hidden states of a window after all layers; those of the first are kept."""
        x = self.model.embed(self.read[index])
        for layer in range(len(self.model.program.layers)):
            if (count := threads()) != self._threads:
                self.use_threads(count)
            if index > 0:
                x = self.model.layer(layer, x)
                continue
            self.states.append(x)
            self.probes.append(Probes(self.positions))
            x = self.model.layer(layer, x, self.probes[-1].observe)
        if index == 0:
            self.states.append(x)
        return x

    def close(self) -> None:
        self.model.close()


def cut(text: Sequence[int], source: Source, *, n_windows: int) -> Ids:
    """A text's windows (n, n_tokens), as long as the model's positions allow."""
    name = source.metadata.get("general.architecture")
    n_ctx = source.metadata.get(f"{name}.context_length")
    ids = np.asarray(text, np.int64)
    widest = max(
        (max(t.shape[-2:]) for name, t in source.tensors.items() if block_number(name) >= 0),
        default=1,
    )
    limit = n_ctx if isinstance(n_ctx, int) and n_ctx > 0 else WINDOW
    width = min(WINDOW, len(ids), limit, WIDEST // widest)
    if width < SHORTEST:
        raise GGUFError(
            f"it takes windows of {SHORTEST} tokens, and {width} are what the text, the model's "
            "positions and the memory for its layers' widths allow"
        )
    n_windows = min(n_windows, len(ids) // width)
    return ids[: n_windows * width].reshape(n_windows, width)


def run_layers(model: LayerwiseModel, x: Floats) -> Floats:
    """The hidden states after all of the model's layers."""
    for index in range(len(model.program.layers)):
        x = model.layer(index, x)
    return x
