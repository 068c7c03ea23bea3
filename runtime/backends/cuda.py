"""The CUDA backend: the spans of a stage as kernel launches on one GPU.

Weights are uploaded once, with the bits of the file. What spans take and give passes through
memory of the host (cuda_host.py). For one token a span's launches are captured as a graph and
replayed.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numba import cuda
from numba.cuda.cudadrv.driver import CudaAPIError
from numba.cuda.cudadrv.error import CudaSupportError

from gguf_tools.errors import DeviceError, DeviceLostError, DeviceMemoryError, GGUFError, printable
from runtime.backends.cuda_check import check_products, choose_tiles
from runtime.backends.cuda_draft import Launch
from runtime.backends.cuda_formats import kept_as
from runtime.backends.cuda_graph import Graph, capture
from runtime.backends.cuda_host import HostArrays
from runtime.backends.cuda_launches import Launches
from runtime.backends.cuda_memory import OUT_OF_MEMORY, REMEDY, DeviceMemory
from runtime.backends.cuda_products import FEW_TOKENS
from runtime.backends.cuda_room import HEAD_ROWS, Buffer, make_room
from runtime.kernels.cuda.tiles import TILES, Tiles
from runtime.program import Floats, Span, Stage, matrices

MOST_OF_ERROR = 300  # characters of what a compiler says


@dataclass(eq=False)
class _ReadySpan:
    """The launches of a span: for one token, and those of the last other number of tokens."""

    span: Span
    one: list[Launch]
    graph: Graph | None = None
    has_tried_graph: bool = False
    n_many: int = 0
    many: list[Launch] = field(default_factory=list)


class CUDABackend:
    """Runs a stage on a GPU."""

    def __init__(
        self,
        stage: Stage,
        *,
        n_ctx: int,
        n_batch: int,
        kv_type: str = "f16",
        device: int = 0,
        memory_limit: int | None = None,
        capability: tuple[int, int] | None = None,
    ) -> None:
        """Uploads the weights; `memory_limit` in bytes, `capability` in place of the GPU's own.

        DeviceMemoryError when they, the cache and the buffers do not fit.
        """
        self.stage = stage
        self.notes: tuple[str, ...] = tuple(_notes(stage))
        self.no_graph_reason = ""  # once a token was decoded: why no graph is replayed
        self._device = device
        with self._on_device():
            self._memory = DeviceMemory(memory_limit)
            try:
                self._prepare(n_ctx, n_batch, kv_type, capability)
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)
                self.close()
                raise

    def _prepare(
        self, n_ctx: int, n_batch: int, kv_type: str, capability: tuple[int, int] | None
    ) -> None:
        stage = self.stage
        check_products(stage, self._device)
        tiles: Mapping[str, Tiles] = TILES
        if n_batch > FEW_TOKENS:
            found = capability or cuda.get_current_device().compute_capability
            tiles, notes = choose_tiles(stage, self._device, (found[0], found[1]))
            self.notes += notes
        self._room = make_room(stage, self._memory, n_ctx=n_ctx, n_batch=n_batch, kv_type=kv_type)
        self._launches = Launches(self._room, self._memory, tiles)
        self._spans = [
            _ReadySpan(span, self._launches.make((*span.body, *span.head), 1, holding=span.inputs))
            for span in stage.spans
        ]
        self._n_batch = n_batch
        self._head_rows = min(HEAD_ROWS, n_batch)
        given = {name: n_batch for span in stage.spans for name in span.inputs}
        made = {
            name: self._head_rows if name == "logits" else n_batch
            for span in stage.spans
            for name in span.outputs
        }
        self._host = HostArrays(self._room, given, made)

    @property
    def memory_bytes(self) -> int:
        """Bytes taken on the GPU."""
        return self._memory.size

    @property
    def n_launches(self) -> int:
        """Kernels that one token takes."""
        return sum(len(ready.one) for ready in self._spans)

    def run(
        self, index: int, values: Mapping[str, Floats], start: int, n_outputs: int
    ) -> dict[str, Floats]:
        """Backend.run"""
        ready, n = self._spans[index], len(next(iter(values.values())))
        span, host = ready.span, self._host
        with self._on_device():
            host.fill(values, start)
            if n == 1:
                self._run_one(ready)
            else:
                host.send(span.inputs, n)
                self._run_body(ready, n)
            if span.head:
                return {"logits": self._head(span, n, n_outputs)}
            if n > 1:
                host.fetch(span.outputs, n)
            return {name: host.rows(name, n, width) for name, width in span.outputs.items()}

    def try_out(self) -> None:
        """Run every span for one token, for a few and as a prompt, so that all kernels are there.

        What the KV cache then holds is overwritten before it is read. DeviceError when something
        cannot be computed here.
        """
        for n in sorted({1, min(2, self._n_batch), min(FEW_TOKENS + 1, self._n_batch)}):
            for index, span in enumerate(self.stage.spans):
                # Zeros are valid for all buffers, also where a number says which expert.
                given = {
                    name: np.zeros((n, width), np.float32) for name, width in span.inputs.items()
                }
                if "x" in given:
                    given["x"][:] = np.random.default_rng(0).normal(size=given["x"].shape)
                made = self.run(index, given, 0, 1)
                if not all(np.isfinite(values).all() for values in made.values()):
                    raise DeviceError(
                        f"GPU {self._device} makes values that are no numbers: --gpu-layers 0 "
                        "uses the processor alone"
                    )

    def close(self) -> None:
        """Frees the memory."""
        self._spans = []
        self._memory.drop()
        for name in ("_host", "_launches", "_room"):
            self.__dict__.pop(name, None)

    # --- one step --------------------------------------------------------------------------

    def _run_one(self, ready: _ReadySpan) -> None:
        """Body and head for one token: what they give is on the host."""
        if ready.graph is not None:
            ready.graph()
            return
        span, host = ready.span, self._host
        host.send(span.inputs, 1)
        _launch(ready.one)
        host.fetch(span.outputs, 1)
        if ready.has_tried_graph:
            return
        ready.has_tried_graph = True
        ready.graph, self.no_graph_reason = capture(
            [*host.sending(span.inputs), *ready.one, *host.fetching(span.outputs)],
            lambda: self._result(span),
            lambda: host.clear(span.outputs),
        )
        if ready.graph is None:  # whatever the attempt has left
            host.send(span.inputs, 1)
            _launch(ready.one)
            host.fetch(span.outputs, 1)

    def _run_body(self, ready: _ReadySpan, n: int) -> None:
        if ready.n_many != n:
            ready.many = self._launches.make(ready.span.body, n, holding=ready.span.inputs)
            ready.n_many = n
        _launch(ready.many)

    def _head(self, span: Span, n: int, n_outputs: int) -> Floats:
        """The logits of the last n_outputs of n tokens; of one alone they are there already."""
        n_vocab, host = span.outputs["logits"], self._host
        if n == 1:
            return host.rows("logits", n_outputs, n_vocab)
        logits = np.empty((n_outputs, n_vocab), np.float32)
        hidden = self._room.buffers["x"]
        for first in range(0, n_outputs, self._head_rows):
            rows, row = min(self._head_rows, n_outputs - first), n - n_outputs + first
            later = {"x": Buffer(hidden.array[row * hidden.stride :], hidden.stride)}
            _launch(self._launches.make(span.head, rows, instead=later))
            host.fetch(["logits"], rows)
            logits[first : first + rows] = host.rows("logits", rows, n_vocab)
        return logits

    def _result(self, span: Span) -> bytes:
        """What a step of one token has left on the host."""
        found = (self._host.rows(name, 1, width) for name, width in sorted(span.outputs.items()))
        return b"".join(values.tobytes() for values in found)

    # --- the device ------------------------------------------------------------------------

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        try:
            with cuda.gpus[self._device]:
                yield
        except CudaAPIError as error:
            if OUT_OF_MEMORY in str(error):
                raise DeviceMemoryError(
                    f"GPU {self._device} has no memory left for these layers: {REMEDY}"
                ) from error
            raise DeviceLostError(
                f"GPU {self._device} failed ({error}): --gpu-layers 0 uses the processor alone"
            ) from error
        except (CudaSupportError, IndexError) as error:
            raise DeviceError(
                f"GPU {self._device} cannot be used ({error}): --gpu-layers 0 uses the processor "
                "alone"
            ) from error
        except Exception as error:
            if isinstance(error, GGUFError) or not _is_of_cuda(error):
                raise
            what = printable(f"{type(error).__name__}: {error}", MOST_OF_ERROR)
            raise DeviceLostError(
                f"GPU {self._device} cannot go on ({what}): --gpu-layers 0 uses the processor alone"
            ) from error


def _is_of_cuda(error: BaseException) -> bool:
    """Whether a compiler, a linker or a binding of CUDA raised it; each has its own exceptions."""
    packages = ("numba.cuda", "numba_cuda", "numba.core", "cuda.", "llvmlite")
    return type(error).__module__.startswith(packages)


def _launch(launches: list[Launch]) -> None:
    for launch in launches:
        launch()


def _notes(stage: Stage) -> Iterator[str]:
    """What is other on a GPU than asked for, or than in the file."""
    kinds = {matrix.quant.name: kept_as(matrix.quant) for matrix in matrices(stage)}
    changed = sorted((name, kept) for name, kept in kinds.items() if name != kept)
    if changed:
        listed = ", ".join(f"{name} as {kept}" for name, kept in changed)
        yield f"the GPU keeps some formats as larger ones, which have kernels there: {listed}"
