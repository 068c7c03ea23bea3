"""Small programs built by hand, and what backends make of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from gguf_tools.jit import Kernel
from gguf_tools.quants import by_name
from runtime.backends.reference import ReferenceBackend
from runtime.program import (
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    Instruction,
    KVShape,
    LayerNorm,
    MatMul,
    Matrix,
    Program,
    RMSNorm,
    Rope,
    RopeTable,
    Route,
    Scale,
    StoreKV,
)
from runtime.stages import whole
from tests.kernels.blocks import random_rows

EXACT = 2e-6  # of the largest result: float32 in another order
HEADS = KVShape(2, 1, 32, 32)
N_TOKENS = 60  # a prompt's; more than the head makes logits of at a time


def random_matrix(
    rng: np.random.Generator, n_rows: int, k: int, quant: str = "F32", spread: float | None = None
) -> Matrix:
    scale = float(1 / np.sqrt(k)) if spread is None else spread
    data = random_rows(quant, n_rows, k, rng, spread=scale)
    return Matrix(f"random {n_rows} x {k}", by_name(quant), n_rows, k, data)


def random_experts(
    rng: np.random.Generator, n_experts: int, n_rows: int, k: int, quant: str = "F32"
) -> tuple[Matrix, ...]:
    """Slices of one stacked tensor, as files have them."""
    stacked = random_matrix(rng, n_experts * n_rows, k, quant, float(1 / np.sqrt(k)))
    data = stacked.data.reshape(n_experts, n_rows, -1)
    return tuple(Matrix("experts", stacked.quant, n_rows, k, each) for each in data)


def random_vector(rng: np.random.Generator, size: int, middle: float = 0.0) -> np.ndarray:
    return (middle + rng.normal(size=size)).astype(np.float32)


def select(k: int, n_rows: int) -> Matrix:
    """A matrix that copies the first of k numbers to n_rows."""
    same = np.eye(n_rows, k, dtype=np.float32)
    return Matrix(f"select {n_rows} of {k}", by_name("F32"), n_rows, k, same.view(np.uint8))


def program_of(
    steps: Sequence[Instruction],
    dim: int,
    *,
    buffers: Mapping[str, int] | None = None,
    caches: tuple[KVShape, ...] = (KVShape(1, 1, 16, 16),),
    inputs: np.ndarray | None = None,
    head: Sequence[Instruction] = (),
    **options: object,
) -> Program:
    """A program of one layer: `x` holds inputs[id]; what `steps` make of it is the logits."""
    if inputs is None:
        inputs = np.random.default_rng(1).normal(size=(N_TOKENS, dim)) * 3
    f32 = by_name("F32")
    rows = np.ascontiguousarray(inputs, np.float32)
    embedding = Matrix("inputs", f32, len(rows), dim, rows.view(np.uint8))
    copy = MatMul("x", "logits", select(dim, dim))
    return Program(
        buffers={"x": dim, "logits": dim, **(buffers or {})},
        embedding=embedding,
        layers=(tuple(steps),),
        head=(copy, *head),
        caches=caches,
        **options,  # type: ignore[arg-type]
    )


def run(
    program: Program, batches: Sequence[int], threads: int = 0, *, n_ctx: int = 128, **options: str
) -> np.ndarray:
    """Logits of ids 0, 1, 2..., so many at a time; by the reference backend for no threads."""
    if threads:
        # Not where numba compiles nothing.
        from runtime.backends.cpu import CPUBackend
        from runtime.backends.needs import few_kernels

        compile_all(few_kernels(program))
        backend = CPUBackend(
            whole(program), n_ctx=n_ctx, n_threads=threads, n_batch=max(batches), **options
        )
    else:
        backend = ReferenceBackend(whole(program), n_ctx=n_ctx)
    parts, first = [], 0
    for size in batches:
        ids = np.arange(first, first + size) % program.embedding.n_rows
        made = backend.run(0, {"x": program.embed(ids, first)}, first, size)
        parts.append(made["logits"])
        first += size
    backend.close()
    return np.concatenate(parts)


def compile_all(kernels: Iterable[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.address


WAYS = ((1,) * 20, (N_TOKENS,), (7, 1, 2, 13))  # token by token, at once, and mixed


def agree(program: Program, tolerance: float, **options: str) -> None:
    """The CPU backend gives what the reference does, and the same with any number of threads."""
    for batches in WAYS:
        expected = run(program, batches)
        one = run(program, batches, 1, **options)
        worst, largest = np.abs(one - expected).max(), np.abs(expected).max()
        assert worst <= tolerance * largest, (batches, worst / largest)
        for threads in (2, 3):
            assert np.array_equal(run(program, batches, threads, **options), one), batches


def attention_program(
    shape: tuple[int, int, int, int],
    rng: np.random.Generator,
    *,
    softcap: float = 0.0,
    sinks: bool = False,
    window: int = 0,
) -> Program:
    """x = attention of x."""
    n_heads, n_kv_heads, key_dim, value_dim = shape
    widths = {"q": n_heads * key_dim, "k": n_kv_heads * key_dim, "v": n_kv_heads * value_dim}
    dim = n_heads * value_dim
    steps = [
        MatMul("x", name, random_matrix(rng, width, dim, spread=0.5))
        for name, width in widths.items()
    ]
    extra = random_vector(rng, n_heads, 2.0) if sinks else None
    scale = 1 / np.sqrt(key_dim)
    steps += [
        StoreKV("k", "v", 0),
        Attend("q", "mixed", 0, scale, window, softcap, extra),
        MatMul("mixed", "delta", random_matrix(rng, dim, dim)),
        Scale("x", 0.0),
        Add("delta", "x"),
    ]
    buffers = {**widths, "mixed": dim, "delta": dim}
    inputs = rng.normal(size=(N_TOKENS, dim)) / np.sqrt(dim)
    return program_of(steps, dim, buffers=buffers, caches=(KVShape(*shape),), inputs=inputs)


def mixture(
    rng: np.random.Generator,
    *,
    dim: int = 64,
    ffn_dim: int = 96,
    n_experts: int = 6,
    n_used: int = 2,
    quant: str = "F32",
    quant_up: str | None = None,
    biases: bool = False,
    skew: np.ndarray | None = None,
    activation: str = "silu",
    norm: bool = True,
) -> Program:
    """x = the sum of the chosen experts' feed-forwards."""
    router = random_matrix(rng, n_experts, dim, spread=0.5)

    def bias(target: str, n_rows: int) -> list:
        values = rng.normal(size=(n_experts, n_rows)).astype(np.float32)
        return [ExpertBias(target, "routes", n_used, values)] if biases else []

    def product(source: str, target: str, n_rows: int, k: int) -> list:
        kind = quant_up or quant if target == "up" else quant
        matrices = random_experts(rng, n_experts, n_rows, k, kind)
        return [ExpertMatMul(source, target, "routes", n_used, matrices), *bias(target, n_rows)]

    steps = [
        RMSNorm("x", "normed", random_vector(rng, dim, 1.0), 1e-5),
        MatMul("normed", "scores", router),
        *([] if skew is None else [AddBias("scores", skew)]),
        Route("scores", "routes", n_used),
        *product("normed", "gate", ffn_dim, dim),
        *product("normed", "up", ffn_dim, dim),
        Gate("gate", "up", "gate", activation),
        *product("gate", "each", dim, ffn_dim),
        ExpertSum("each", "routes", n_used, "delta"),
        Add("delta", "x"),
    ]
    wide = n_used * ffn_dim
    buffers = {
        "normed": dim,
        "scores": n_experts,
        "routes": 2 * n_used,
        "gate": wide,
        "up": wide,
        "each": n_used * dim,
        "delta": dim,
    }
    return program_of(steps, dim, buffers=buffers)


def decoder_layer(
    rng: np.random.Generator,
    *,
    dim: int = 64,
    ffn_dim: int = 96,
    shape: KVShape = HEADS,
    quants: Mapping[str, str] | None = None,
    biases: bool = False,
    layer_norms: bool = False,
    head_norms: bool = False,
    after_norms: bool = False,
    n_dims: int = 32,
    activation: str = "silu",
) -> Program:
    """Attention and a gated feed-forward, in the order of runtime/decoders.

    `quants` are the formats of q, k, v, o, gate, up, down; F32 unless said. `after_norms` are of
    what is added; `n_dims` of a head turn.
    """
    kinds = {**dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "F32"), **(quants or {})}

    def linear(name: str, source: str, target: str, n_rows: int, k: int) -> list[Instruction]:
        matrix = random_matrix(rng, n_rows, k, kinds[name], spread=float(1 / np.sqrt(k)))
        bias = [AddBias(target, random_vector(rng, n_rows))] if biases else []
        return [MatMul(source, target, matrix), *bias]

    def norm(source: str, target: str, size: int = dim) -> Instruction:
        weight = random_vector(rng, size, 1.0)
        if layer_norms:
            return LayerNorm(source, target, weight, random_vector(rng, size), 1e-5)
        return RMSNorm(source, target, weight, 1e-5)

    heads = {"q": shape.n_heads, "k": shape.n_kv_heads}
    table = RopeTable(n_dims, True, 0.5 ** np.arange(n_dims / 2), 1.0)
    after = [norm("delta", "delta")] if after_norms else []
    wide, narrow = shape.n_heads * shape.value_dim, shape.n_kv_heads * shape.value_dim
    steps = [
        norm("x", "normed"),
        *linear("q", "normed", "q", shape.n_heads * shape.key_dim, dim),
        *linear("k", "normed", "k", shape.n_kv_heads * shape.key_dim, dim),
        *linear("v", "normed", "v", narrow, dim),
        *(norm(name, name, shape.key_dim) for name in heads if head_norms),
        *(Rope(name, n, shape.key_dim, table) for name, n in heads.items() if n_dims),
        StoreKV("k", "v", 0),
        Attend("q", "mixed", 0, float(1 / np.sqrt(shape.key_dim)), 0),
        *(*linear("o", "mixed", "delta", dim, wide), *after, Add("delta", "x")),
        norm("x", "normed"),
        *linear("gate", "normed", "gate", ffn_dim, dim),
        *linear("up", "normed", "up", ffn_dim, dim),
        Gate("gate", "up", "gate", activation),
        *(*linear("down", "gate", "delta", dim, ffn_dim), *after, Add("delta", "x")),
    ]
    buffers = {
        **{name: n * shape.key_dim for name, n in heads.items()},
        "v": narrow,
        "mixed": wide,
        "normed": dim,
        "delta": dim,
        "gate": ffn_dim,
        "up": ffn_dim,
    }
    return program_of(steps, dim, buffers=buffers, caches=(shape,))
