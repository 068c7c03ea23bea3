"""What the CUDA backend makes of a program, held against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from runtime.backends import Backend
from runtime.backends.cuda import CUDABackend
from runtime.backends.reference import ReferenceBackend
from runtime.program import Program
from runtime.stages import whole

FLOAT = 2e-3  # of the largest result: the KV cache keeps float16
INT8 = 2e-2  # activations of 8 bits


def logits(backend: Backend, program: Program, batches: Sequence[int]) -> np.ndarray:
    """Of ids 0, 1, 2..., so many at a time."""
    parts, first = [], 0
    for size in batches:
        ids = np.arange(first, first + size) % program.embedding.n_rows
        made = backend.run(0, {"x": program.embed(ids, first)}, first, size)
        parts.append(made["logits"])
        first += size
    backend.close()
    return np.concatenate(parts)


def worst(
    program: Program,
    batches: Sequence[int] = (11, 1, 3, 1),
    *,
    n_ctx: int = 64,
    kv_type: str = "f16",
) -> float:
    """The largest difference of a logit, relative to the largest logit."""
    gpu = CUDABackend(whole(program), n_ctx=n_ctx, n_batch=max(batches), kv_type=kv_type)
    got = logits(gpu, program, batches)
    expected = logits(ReferenceBackend(whole(program), n_ctx=n_ctx), program, batches)
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())
