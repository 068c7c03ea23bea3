"""Mixtures of experts on the CPU backend, against the reference."""

from dataclasses import replace

import numpy as np
import pytest

from runtime.backends.cpu import CPUBackend
from runtime.backends.frame import Batch
from runtime.backends.lowering import Lowering
from runtime.backends.reference import route, sigmoid, softmax
from runtime.program import (
    Add,
    Attend,
    ExpertMatMul,
    ExpertSum,
    Gate,
    KVShape,
    MatMul,
    RMSNorm,
    Route,
    Scale,
    SigmoidScale,
    StoreKV,
)
from runtime.stages import whole
from tests.programs import (
    EXACT,
    N_TOKENS,
    agree,
    mixture,
    program_of,
    random_experts,
    random_matrix,
    random_vector,
    run,
    select,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "chosen"])
def test_routes(gating: str, normalize: bool, bias: bool, rng: np.random.Generator) -> None:
    for n_experts, n_used in ((4, 2), (16, 16), (60, 6), (7, 1)):
        inputs = rng.normal(size=(N_TOKENS, n_experts)) * 2
        inputs[0], inputs[1, ::2] = 1.5, 1.5  # equal scores: the lower number
        inputs = np.tile(inputs, (1, 8))[:, : max(n_experts, 2 * n_used)]
        extra = random_vector(rng, n_experts) if bias else None
        width = inputs.shape[1]
        steps = [
            MatMul("x", "scores", select(width, n_experts)),
            Route("scores", "routes", n_used, gating, normalize, 2.5, extra),
            Scale("x", 0.0),
            MatMul("routes", "delta", select(2 * n_used, width)),
            Add("delta", "x"),
        ]
        buffers = {"scores": n_experts, "routes": 2 * n_used, "delta": width}
        agree(program_of(steps, width, buffers=buffers, inputs=inputs), EXACT)


@pytest.mark.parametrize(("gating", "n_compared"), [("softmax", 1), ("sigmoid", 2)])
def test_routes_within_the_best_groups(
    gating: str, n_compared: int, rng: np.random.Generator
) -> None:
    """On both backends, and against the definition in DeepSeek's own code, a token at a time."""
    for n_experts, n_groups, n_groups_used, n_used in ((16, 4, 2, 3), (24, 8, 3, 6), (6, 3, 1, 2)):
        inputs = (rng.normal(size=(N_TOKENS, n_experts)) * 2).astype(np.float32)
        inputs[0] = 1.5  # equal groups: the first ones
        extra = random_vector(rng, n_experts)
        step = Route("x", "routes", n_used, gating, False, 1.0, extra, *(n_groups, n_groups_used))
        step = replace(step, n_compared=n_compared)
        routes = route(inputs, step)
        compared = (softmax(inputs) if gating == "softmax" else sigmoid(inputs)) + extra
        for token, row in enumerate(compared):
            groups = row.reshape(n_groups, -1)
            worth = [sorted(group)[-1] + sum(sorted(group)[-n_compared:-1]) for group in groups]
            best = sorted(range(n_groups), key=lambda g: (-worth[g], g))[:n_groups_used]
            allowed = [e for e in range(n_experts) if e // groups.shape[1] in best]
            expected = sorted(allowed, key=lambda e: (-row[e], e))[:n_used]
            assert routes[token, :n_used].astype(int).tolist() == expected
        wide = np.tile(inputs, (1, 2))
        steps = [
            MatMul("x", "scores", select(2 * n_experts, n_experts)),
            replace(step, scores="scores"),
            Scale("x", 0.0),
            MatMul("routes", "delta", select(2 * n_used, 2 * n_experts)),
            Add("delta", "x"),
        ]
        buffers = {"scores": n_experts, "routes": 2 * n_used, "delta": 2 * n_experts}
        agree(program_of(steps, 2 * n_experts, buffers=buffers, inputs=wide), EXACT)


@pytest.mark.parametrize("groups", [(3, 1), (2, 3), (2, 0), (64, 1)])
def test_groups_that_cannot_be(groups: tuple[int, int]) -> None:
    step = replace(Route("x", "routes", 1), n_groups=groups[0], n_groups_used=groups[1])
    program = program_of([step], 64, buffers={"routes": 2})
    with pytest.raises(ValueError, match="groups"):
        run(program, (1,), 1)


def test_routes_of_scores_that_are_not_numbers() -> None:
    inputs = np.full((N_TOKENS, 8), np.nan, np.float32)
    rng = np.random.default_rng(0)
    steps = [
        Route("x", "routes", 3),
        ExpertMatMul("x", "each", "routes", 3, random_experts(rng, 8, 8, 8)),
        ExpertSum("each", "routes", 3, "x"),
    ]
    program = program_of(steps, 8, buffers={"routes": 6, "each": 24}, inputs=inputs)
    for batches in ((1, 1), (20,)):
        assert np.isnan(run(program, batches, 2)).all()


def test_more_experts_than_there_are() -> None:
    program = program_of([Route("x", "routes", 9)], 8, buffers={"routes": 18})
    with pytest.raises(ValueError, match="9 of 8 experts"):
        run(program, (1,), 1)


@pytest.mark.parametrize(
    ("dim", "ffn_dim", "n_experts", "n_used"),
    [(64, 96, 6, 2), (40, 52, 5, 3), (7, 33, 3, 3), (128, 16, 16, 1), (32, 200, 2, 2)],
)
@pytest.mark.parametrize("biases", [False, True])
def test_mixtures(
    dim: int, ffn_dim: int, n_experts: int, n_used: int, biases: bool, rng: np.random.Generator
) -> None:
    sizes = {"dim": dim, "ffn_dim": ffn_dim, "n_experts": n_experts, "n_used": n_used}
    activation = "swiglu_oai" if biases else "silu"
    agree(mixture(rng, biases=biases, activation=activation, **sizes), 1e-5)


def test_one_expert_takes_all(rng: np.random.Generator) -> None:
    """And most have no token."""
    skew = np.zeros(12, np.float32)
    skew[7] = 100
    agree(mixture(rng, n_experts=12, n_used=1, skew=skew), 1e-5)
    agree(mixture(rng, n_experts=12, n_used=3, skew=skew), 1e-5)


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_mixtures_of_formats(quant: str, rng: np.random.Generator) -> None:
    sizes = {"dim": 256, "ffn_dim": 256, "n_experts": 4}
    tolerance = 1e-4 if quant in ("F16", "BF16") else 0.03
    agree(mixture(rng, quant=quant, **sizes), tolerance)


@pytest.mark.parametrize("quants", [("Q4_K", "Q5_K"), ("Q8_0", "Q5_0"), ("F16", "Q6_K")])
def test_mixtures_of_several_formats(quants: tuple[str, str], rng: np.random.Generator) -> None:
    """Which need the same activations in different forms."""
    sizes = {"dim": 256, "ffn_dim": 256, "n_experts": 4}
    agree(mixture(rng, quant=quants[0], quant_up=quants[1], **sizes), 0.03)


def test_experts_in_tensors_of_their_own(rng: np.random.Generator) -> None:
    """As old files have them: anywhere in memory."""
    program = mixture(rng, quant="Q8_0")
    steps = []
    for step in program.layers[0]:
        if isinstance(step, ExpertMatMul):
            apart = [random_experts(rng, 1, e.n_rows, e.n_columns, "Q8_0") for e in step.experts]
            experts = tuple(e for (e,) in apart)
            step = ExpertMatMul(step.source, step.target, step.routes, step.n_used, experts)
        steps.append(step)
    agree(program_of(steps, 64, buffers=program.buffers), 0.03)


def test_experts_without_kernels(rng: np.random.Generator, monkeypatch) -> None:
    """A format that has none goes through NumPy, with a note."""
    from runtime.kernels.table import PLACES

    program = mixture(rng, quant="Q8_0")
    monkeypatch.delitem(PLACES, "Q8_0")
    backend = CPUBackend(whole(program), n_ctx=32, n_threads=1, n_batch=8)
    assert len(backend.notes) == 1 and "Q8_0" in backend.notes[0]
    # A thread that is late for one table would miss what it was to make there for the next.
    frame = Lowering(backend.stage, backend._engine.memory, Batch.ONE).frame
    assert not any(place.thread_stride for place in frame.places.values())
    backend.close()
    agree(program, 1e-5)


def test_sources_that_do_not_fit(rng: np.random.Generator) -> None:
    steps = [
        Route("x", "routes", 2),
        ExpertMatMul("x", "each", "routes", 2, random_experts(rng, 8, 8, 5), "blk.0.some"),
    ]
    program = program_of(steps, 8, buffers={"routes": 4, "each": 16})
    with pytest.raises(ValueError, match=r"blk\.0\.some: rows of 5 cannot take a source of 8"):
        run(program, (1,), 1)


def test_a_whole_model(rng: np.random.Generator) -> None:
    """Attention, experts and an expert that all tokens use, twice, of quantised weights."""
    heads, dim, ffn_dim, quant = (4, 2, 32, 32), 128, 64, "Q8_0"
    shapes = {"q": dim, "k": 64, "v": 64}
    steps: list = []

    def product(source: str, target: str, n_rows: int, k: int) -> None:
        steps.append(MatMul(source, target, random_matrix(rng, n_rows, k, quant)))

    def experts(source: str, target: str, n_rows: int, k: int) -> None:
        matrices = random_experts(rng, 8, n_rows, k, quant)
        steps.append(ExpertMatMul(source, target, "routes", 3, matrices))

    def norm() -> None:
        steps.append(RMSNorm("x", "normed", random_vector(rng, dim, 1.0), 1e-5))

    for layer in range(2):
        norm()
        for name, width in shapes.items():
            product("normed", name, width, dim)
        steps += [StoreKV("k", "v", layer), Attend("q", "mixed", layer, 0.2, 0)]
        product("mixed", "delta", dim, dim)
        steps.append(Add("delta", "x"))
        norm()
        steps.append(MatMul("normed", "scores", random_matrix(rng, 8, dim)))
        steps.append(Route("scores", "routes", 3))
        experts("normed", "wide gate", ffn_dim, dim)
        experts("normed", "wide up", ffn_dim, dim)
        steps.append(Gate("wide gate", "wide up", "wide gate"))
        experts("wide gate", "each", dim, ffn_dim)
        steps.append(ExpertSum("each", "routes", 3, "delta"))
        product("normed", "gate", ffn_dim, dim)
        product("normed", "up", ffn_dim, dim)
        steps.append(Gate("gate", "up", "gate"))
        product("gate", "shared", dim, ffn_dim)
        product("normed", "share", 1, dim)
        steps += [SigmoidScale("share", "shared"), Add("shared", "delta"), Add("delta", "x")]
    buffers = {
        **shapes,
        **dict.fromkeys(("normed", "mixed", "delta", "shared"), dim),
        **dict.fromkeys(("wide gate", "wide up"), 3 * ffn_dim),
        **dict.fromkeys(("gate", "up"), ffn_dim),
        "scores": 8,
        "routes": 6,
        "share": 1,
        "each": 3 * dim,
    }
    caches = (KVShape(*heads),) * 2
    program = program_of(steps, dim, buffers=buffers, caches=caches)
    agree(program, 0.05)
