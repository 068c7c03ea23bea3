"""A model that is ready to read tokens: program, backend, and what its KV cache holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import psutil

from gguf_tools.closing import Closeable
from gguf_tools.cores import default_threads
from gguf_tools.errors import ContextFullError, DeviceError, printable
from gguf_tools.reader import GGUFFile
from runtime.backends import Backend
from runtime.config import ModelConfig, read_config
from runtime.decoders import build_program, check_architecture
from runtime.devices import Device
from runtime.offload import Offload, make_device_backend, open_planned
from runtime.program import Floats, Stage
from runtime.split import Plan, measure_sizes
from runtime.stages import Pipeline

DEFAULT_CONTEXT = 8192  # at most, when the user names none: the KV cache costs memory
BATCH = 512  # tokens of a prompt that are read together
BACKENDS = ("cpu", "reference")
KV_TYPES = ("f16", "q8_0")

# Weights of a damaged file may be NaN or huge. So then are the logits; NumPy's warnings about it
# would come between the user's lines.
_damaged_weights = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class Model(Closeable):
    """Reads tokens and gives logits; remembers them in the KV cache until truncated."""

    def __init__(
        self,
        config: ModelConfig,
        open_pipeline: Callable[[Offload], tuple[Pipeline, Plan]],
        offload: Offload,
        *,
        n_ctx: int,
        n_threads: int,
        n_batch: int,
    ) -> None:
        self.config = config
        self.n_ctx = n_ctx
        self.n_threads = n_threads
        self.tokens: list[int] = []
        self._open_pipeline = open_pipeline
        self._pipeline, self.plan = open_pipeline(offload)
        self._n_batch = n_batch

    @classmethod
    @_damaged_weights
    def load(
        cls,
        file: GGUFFile,
        *,
        n_ctx: int | None = None,
        threads: int | None = None,
        backend: str = "cpu",
        n_batch: int = BATCH,
        kv_type: str = "f16",
        in_memory: bool = False,
        offload: Offload | None = None,
        on_compile: Callable[[int, int], None] | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> Model:
        """Make the model in `file` ready to run; the file must stay open.

        `n_ctx` tokens of context (default: the trained length, at most DEFAULT_CONTEXT);
        `threads` default to the physical cores; prompts are read `n_batch` tokens at a time;
        `kv_type` is how the KV cache keeps numbers (the reference backend's are always float32).
        `in_memory` copies the weights out of the mapped file, which takes as much memory more.
        `offload` says what goes to GPUs; which layers that are, and when they turn out not to fit,
        is told to `on_note(text)`.
        Kernels that are not in the cache yet are compiled now; `on_compile(done, total)` is called
        meanwhile.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend is one of {BACKENDS}, not {backend!r}")
        if kv_type not in KV_TYPES:
            raise ValueError(f"kv_type is one of {KV_TYPES}, not {kv_type!r}")
        if n_ctx is not None and n_ctx < 1:
            raise ValueError(f"n_ctx must be positive, not {n_ctx}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be positive, not {threads}")
        check_architecture(file)
        config = read_config(file)
        if in_memory:
            _check_room(file)
        size = context_size(config, n_ctx)
        program = build_program(file, config, n_ctx=size, in_memory=in_memory)
        n_threads = threads or default_threads()
        n_batch = min(n_batch, size)

        def say(text: str) -> None:
            if on_note is not None:
                on_note(text)

        def make(device: Device | None, stage: Stage) -> Backend:
            if device is not None:
                return make_device_backend(
                    device, stage, n_ctx=size, n_batch=n_batch, kv_type=kv_type, say=say
                )
            return _make_host_backend(
                backend,
                stage,
                n_ctx=size,
                n_threads=n_threads,
                n_batch=n_batch,
                kv_type=kv_type,
                on_compile=on_compile,
            )

        sizes = measure_sizes(program, n_ctx=size, n_batch=n_batch, kv_type=kv_type)

        def open_pipeline(wanted: Offload) -> tuple[Pipeline, Plan]:
            return open_planned(program, sizes, wanted, make, say)

        return cls(
            config,
            open_pipeline,
            offload or Offload(),
            n_ctx=size,
            n_threads=n_threads,
            n_batch=n_batch,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user, each worth saying once."""
        return self._pipeline.notes

    @_damaged_weights
    def forward(self, ids: Sequence[int], *, all_logits: bool = False) -> Floats:
        """Read `ids` after the tokens already held.

        Gives the logits that follow the last one, (n_vocab,), or those that follow each,
        (len(ids), n_vocab). Raises ContextFullError, with nothing read, when they do not fit.
        """
        if len(ids) == 0:
            raise ValueError("forward needs at least one token")
        tokens = np.asarray(ids, np.int64)
        if tokens.min() < 0 or tokens.max() >= self.config.n_vocab:
            raise ValueError(f"token ids must be from 0 to {self.config.n_vocab - 1}")
        held = len(self.tokens)
        if held + len(tokens) > self.n_ctx:
            raise ContextFullError(
                f"the context holds {self.n_ctx} tokens: {held} are used and {len(tokens)} more "
                "were asked for; use a larger --ctx or a shorter text"
            )
        wanted = []
        for first in range(0, len(tokens), self._n_batch):
            batch = tokens[first : first + self._n_batch]
            last = first + len(batch) == len(tokens)
            n_outputs = len(batch) if all_logits else int(last)
            wanted.append(self._pipeline.run(batch, held + first, n_outputs))
            self.tokens.extend(batch.tolist())
        return np.concatenate(wanted) if all_logits else wanted[-1][0]

    def truncate(self, n: int) -> None:
        """Forget all but the first n tokens."""
        if not 0 <= n <= len(self.tokens):
            raise ValueError(f"cannot keep {n} of {len(self.tokens)} tokens")
        del self.tokens[n:]

    @property
    def devices(self) -> tuple[str, ...]:
        """What runs it, by name."""
        used = tuple(share.device.name for share in self.plan.shares if share.n_units)
        return used if self.plan.gpu_layers > self.plan.n_layers else (*used, "CPU")

    def move_to_cpu(self) -> None:
        """Go on without GPUs, such as after one was lost; what was read must be read again."""
        self.tokens.clear()
        self._pipeline.close()
        self._pipeline, self.plan = self._open_pipeline(Offload())

    def close(self) -> None:
        self._pipeline.close()
        self.tokens.clear()


def context_size(config: ModelConfig, n_ctx: int | None) -> int:
    """The context to run with, when n_ctx tokens are asked for or none are named."""
    return n_ctx or min(config.n_ctx_train, DEFAULT_CONTEXT)


def _check_room(file: GGUFFile) -> None:
    """DeviceError when a copy of the weights does not fit in the memory that is free."""
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    free = psutil.virtual_memory().available
    if size > free:
        raise DeviceError(
            f"{printable(file.path)}: a copy of its {size:,} bytes of weights was asked for and "
            f"{free:,} bytes of memory are free: use the mapped file (--mmap)"
        )


def _make_host_backend(
    name: str,
    stage: Stage,
    *,
    n_ctx: int,
    n_threads: int,
    n_batch: int,
    kv_type: str,
    on_compile: Callable[[int, int], None] | None,
) -> Backend:
    if name == "reference":
        from runtime.backends.reference import ReferenceBackend

        return ReferenceBackend(stage, n_ctx=n_ctx)
    from gguf_tools.jit import compile_kernels
    from runtime.backends.cpu import CPUBackend

    for done, total in compile_kernels(CPUBackend.kernels(stage, kv_type)):
        if on_compile is not None:
            on_compile(done, total)
    return CPUBackend(stage, n_ctx=n_ctx, n_threads=n_threads, n_batch=n_batch, kv_type=kv_type)
