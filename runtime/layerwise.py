"""A model run layer by layer from where its weights lie, in memory that no model outgrows.

The weights may be a checkpoint's own (runtime.sources.PlannedWeights) or a GGUF file's. Each layer
is run for all windows of tokens before the next: it is read once, or as long as the system keeps
it, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gguf_tools.closing import Closeable
from gguf_tools.jit import compile_kernels
from runtime.backends.observing import Observe
from runtime.backends.reference import ReferenceBackend
from runtime.backends.streaming import StreamedBackend, cut_head, head_bands, layer_stage
from runtime.config import read_config
from runtime.decoders import build_program, check_architecture
from runtime.program import (
    Attend,
    Floats,
    Instruction,
    Program,
    StoreKV,
)
from runtime.sources import Source

# Weights of a damaged file may be NaN or huge. So then is what comes of them.
_damaged_weights = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class LayerwiseModel(Closeable):
    """Gives hidden states and logits of windows of tokens, each from position 0."""

    @_damaged_weights
    def __init__(
        self,
        source: Source,
        *,
        n_tokens: int,
        threads: int,
        layers: Sequence[int] | None = None,
        head_rows: npt.NDArray[np.intp] | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        compiles: bool = True,
    ) -> None:
        """`source` must stay open; windows have at most `n_tokens` tokens.

        With `layers` the others are left out, as if the model had only these; with `head_rows`
        there are no logits but those of these tokens. Kernels that are not
        in the cache yet are compiled now; `on_compile(done, total)` is called meanwhile. Without
        `compiles` NumPy takes their place, slowly (`is_compiled` tells).
        """
        check_architecture(source)
        self.config = read_config(source)
        program = build_program(source, self.config, n_ctx=n_tokens, stream=True)
        program = program if layers is None else with_layers(program, layers)
        self.program = program if head_rows is None else with_head_rows(program, head_rows)
        kernels = StreamedBackend.kernels(self.program)
        self.is_compiled = compiles or all(kernel.is_ready for kernel in kernels)
        self._backend: StreamedBackend | LayerwiseReference
        if not self.is_compiled:
            self._backend = LayerwiseReference(self.program, n_tokens=n_tokens)
            return
        for done, total in compile_kernels(kernels):
            if on_compile is not None:
                on_compile(done, total)
        self._backend = StreamedBackend(self.program, n_tokens=n_tokens, n_threads=threads)

    def embed(self, ids: Sequence[int]) -> Floats:
        """The hidden states (n_tokens, dim) before the first layer."""
        tokens = np.asarray(ids, np.int64)
        if not len(tokens) or tokens.min() < 0 or tokens.max() >= self.config.n_vocab:
            raise ValueError(f"token ids must be from 0 to {self.config.n_vocab - 1}")
        return self.program.embed(tokens, 0)

    @_damaged_weights
    def layer(self, index: int, hidden: Floats, observe: Observe | None = None) -> Floats:
        """The hidden states after a layer; `observe` is told of its products, each beforehand."""
        return self._backend.layer(index, hidden, observe)

    @_damaged_weights
    def head(self, hidden: Floats, observe: Observe | None = None) -> Floats:
        """The logits (n_tokens, n_vocab) of hidden states after the last layer.

        `observe` is told of the product with the output matrix, of some tokens at a time.
        """
        return self._backend.head(hidden, observe)

    def head_bands(self, hidden: Floats, observe: Observe | None = None) -> Iterator[Floats]:
        """The same in bands of the vocabulary, one after the other: (n_tokens, width).

        Models of one shape have the same bands. A band is valid until the next one; `hidden` has
        at most the tokens of a window.
        """
        for index in range(self._backend.n_bands):
            yield self._head_band(index, hidden, observe if index == 0 else None)

    @_damaged_weights
    def _head_band(self, index: int, hidden: Floats, observe: Observe | None) -> Floats:
        return self._backend.head_band(index, hidden, observe)

    def logits(self, windows: Sequence[Sequence[int]]) -> Iterator[npt.NDArray[np.float32]]:
        """The logits of each window in turn, (n_tokens, n_vocab)."""
        hidden = [self.embed(ids) for ids in windows]
        for index in range(len(self.program.layers)):
            hidden = [self.layer(index, x) for x in hidden]
        for x in hidden:
            yield self.head(x)

    def close(self) -> None:
        self._backend.close()


class LayerwiseReference:
    """What StreamedBackend does, by the reference backend."""

    def __init__(self, program: Program, *, n_tokens: int) -> None:
        stage = layer_stage(program, n_heads=head_bands(n_tokens))
        self._stage = ReferenceBackend(stage, n_ctx=n_tokens)
        self._n_layers = len(program.layers)
        self.n_bands = len(stage.spans) - self._n_layers

    def layer(self, index: int, x: Floats, observe: Observe | None = None) -> Floats:
        return self._stage.run(index, {"x": x}, 0, 0, observe)["x"]

    def head(self, x: Floats, observe: Observe | None = None) -> Floats:
        bands = [
            self.head_band(index, x, observe if index == 0 else None)
            for index in range(self.n_bands)
        ]
        return np.concatenate(bands, axis=1)

    def head_band(self, index: int, x: Floats, observe: Observe | None = None) -> Floats:
        return self._stage.run(self._n_layers + index, {"x": x}, 0, len(x), observe)["logits"]

    def close(self) -> None:
        self._stage.close()


def with_layers(program: Program, chosen: Sequence[int]) -> Program:
    """The program with only some of its layers, in this order."""

    def moved(step: Instruction, layer: int) -> Instruction:
        return replace(step, layer=layer) if isinstance(step, (StoreKV, Attend)) else step

    layers = tuple(
        tuple(moved(step, place) for step in program.layers[layer])
        for place, layer in enumerate(chosen)
    )
    return replace(program, layers=layers, caches=tuple(program.caches[layer] for layer in chosen))


def with_head_rows(program: Program, rows: npt.NDArray[np.intp]) -> Program:
    """The program with the logits of some tokens in the place of all."""
    buffers = {**program.buffers, "logits": len(rows)}
    return replace(program, buffers=buffers, head=cut_head(program.head, rows))
