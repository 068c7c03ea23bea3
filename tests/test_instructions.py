"""Each instruction by itself on the CPU backend, against the reference."""

import numpy as np
import pytest

from gguf_tools.jit import CACHE_FOLDER, Kernel
from runtime.backends.cpu import CPUBackend
from runtime.kernels import attention, elementwise, experts, gates
from runtime.program import (
    ACTIVATIONS,
    Activate,
    Add,
    AddBias,
    Attend,
    ExpertBias,
    ExpertMatMul,
    ExpertSum,
    Gate,
    KVShape,
    LayerNorm,
    MatMul,
    RMSNorm,
    Route,
    Scale,
    SigmoidScale,
    SoftCap,
    StoreKV,
)
from tests.programs import (
    N_TOKENS,
    agree,
    program_of,
    random_experts,
    random_matrix,
    random_vector,
    run,
)

EXACT = 2e-6  # of the largest result
WIDTHS = (1, 15, 40, 100, 256)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, rng: np.random.Generator) -> None:
    for bias in (None, random_vector(rng, width)):
        norm = LayerNorm("x", "x", random_vector(rng, width, 1), bias, 1e-5)
        agree(program_of([norm], width), EXACT)
        apart = LayerNorm("x", "normed", norm.weight, bias, 1e-5)
        steps = [apart, Add("normed", "x")]
        agree(program_of(steps, width, buffers={"normed": width}), EXACT)


@pytest.mark.parametrize("size", [5, 16, 40])
def test_layer_norms_of_heads(size: int, rng: np.random.Generator) -> None:
    """With a weight for all, or one for each."""
    one = LayerNorm("x", "x", random_vector(rng, size, 1), random_vector(rng, size), 1e-5)
    shape = (3, size)
    weight, bias = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    for norm in (one, LayerNorm("x", "x", weight, bias, 1e-5)):
        agree(program_of([norm], 3 * size), EXACT)


@pytest.mark.parametrize("width", WIDTHS)
def test_columns(width: int, rng: np.random.Generator) -> None:
    bias = random_vector(rng, width)
    steps = [Scale("x", 0.3), AddBias("x", bias), SoftCap("x", 2.0), Add("x", "x")]
    agree(program_of(steps, width), EXACT)
    gate = MatMul("x", "gate", random_matrix(rng, 1, width))
    agree(program_of([gate, SigmoidScale("gate", "x")], width, buffers={"gate": 1}), EXACT)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates(activation: str, rng: np.random.Generator) -> None:
    for width in (15, 100):
        up = MatMul("x", "up", random_matrix(rng, width, width, spread=3.0))
        gate = Gate("x", "up", "x", activation)
        agree(program_of([up, gate], width, buffers={"up": width}), EXACT)


# Of numbers near zero, of both signs, of every size: the error of each result in itself.
SPREAD = np.concatenate(
    [sign * np.geomspace(1e-6, size, 600) for sign in (1, -1) for size in (1, 8, 60)]
).reshape(60, 60)


def each(steps: list, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    program = program_of(steps, inputs.shape[1], inputs=inputs)
    return run(program, (60,), 1), run(program, (60,))


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "swiglu_oai"])
def test_activations(activation: str) -> None:
    agree(program_of([Activate("x", activation)], 100), EXACT)
    got, expected = each([Activate("x", activation)], SPREAD)
    assert (np.abs(got - expected) <= 1e-6 * np.abs(SPREAD)).all()
    near = np.abs(SPREAD) < 4
    assert (np.abs(got - expected)[near] <= 5e-6 * np.abs(expected[near])).all()


def test_soft_caps_of_every_size() -> None:
    for cap in (0.5, 30.0):
        got, expected = each([SoftCap("x", cap)], SPREAD)
        assert np.allclose(got, expected, rtol=1e-6, atol=0)


def test_what_is_not_a_number_stays_so() -> None:
    inputs = np.random.default_rng(1).normal(size=(N_TOKENS, 40))
    inputs[:, 3] = np.nan
    names = [name for name in ACTIVATIONS if name != "swiglu_oai"]
    for step in (SoftCap("x", 3.0), *(Activate("x", name) for name in names)):
        # the matrix that copies to the logits would spread it
        steps = [step, Scale("x", 1.0)]
        got, expected = each(steps, inputs)
        assert np.isnan(got).all() and np.isnan(expected).all()


def test_an_activation_that_needs_two_sides() -> None:
    with pytest.raises(KeyError):
        run(program_of([Activate("x", "swiglu_oai")], 32), (1,), 1)


def test_learned_positions(rng: np.random.Generator) -> None:
    positions = random_matrix(rng, 128, 40, "F16")
    agree(program_of([Scale("x", 2.0)], 40, positions=positions, embedding_scale=3.0), EXACT)


# --- attention -------------------------------------------------------------------------------

HEADS = {  # n_heads, n_kv_heads, key_dim, value_dim
    "one head of 16": (1, 1, 16, 16),
    "heads of 64": (6, 2, 64, 64),
    "heads of 80": (2, 2, 80, 80),
    "keys and values apart": (4, 2, 48, 24),
    "heads of 256": (4, 1, 256, 256),
}


def attention_program(
    shape: tuple[int, int, int, int],
    rng: np.random.Generator,
    *,
    softcap: float = 0.0,
    sinks: bool = False,
    window: int = 0,
) -> object:
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


KV_TOLERANCE = {"f16": 2e-3, "q8_0": 2e-2}


@pytest.mark.parametrize("kv_type", KV_TOLERANCE)
@pytest.mark.parametrize("heads", HEADS)
def test_soft_caps_and_sinks(heads: str, kv_type: str, rng: np.random.Generator) -> None:
    for softcap, sinks, window in ((0.7, False, 0), (0.0, True, 0), (1.5, True, 11)):
        program = attention_program(HEADS[heads], rng, softcap=softcap, sinks=sinks, window=window)
        agree(program, KV_TOLERANCE[kv_type], kv_type=kv_type)


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_sink_far_from_the_scores(shift: float, rng: np.random.Generator) -> None:
    program = attention_program(HEADS["heads of 64"], rng, sinks=True)
    for step in program.layers[0]:
        if isinstance(step, Attend):
            step.sinks[:] = shift
    for batches in ((1,) * 5, (20,)):
        got, expected = run(program, batches, 2), run(program, batches)
        assert np.abs(got - expected).max() <= 2e-3 * max(np.abs(expected).max(), 1e-3)


def test_many_chunks_with_a_sink_and_a_cap(rng: np.random.Generator) -> None:
    """Several chunks of positions: the sink counts once."""
    program = attention_program(HEADS["heads of 64"], rng, softcap=2.0, sinks=True)
    batches = (500, 1, 1, 200, 1)
    got, expected = run(program, batches, 2, n_ctx=1024), run(program, batches, n_ctx=1024)
    assert np.abs(got - expected).max() <= 2e-3 * np.abs(expected).max()


# --- mixtures of experts ---------------------------------------------------------------------


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
        choose = random_matrix(rng, n_experts, width)
        choose.data[:] = np.eye(n_experts, width, dtype=np.float32).view(np.uint8)
        steps = [
            MatMul("x", "scores", choose),
            Route("scores", "routes", n_used, gating, normalize, 2.5, extra),
            Scale("x", 0.0),
            MatMul("routes", "delta", square(2 * n_used, width)),
            Add("delta", "x"),
        ]
        buffers = {"scores": n_experts, "routes": 2 * n_used, "delta": width}
        agree(program_of(steps, width, buffers=buffers, inputs=inputs), EXACT)


def square(k: int, n_rows: int) -> object:
    """A matrix that copies k numbers to the first of n_rows."""
    matrix = random_matrix(np.random.default_rng(0), n_rows, k)
    matrix.data[:] = np.eye(n_rows, k, dtype=np.float32).view(np.uint8)
    return matrix


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


def mixture(
    rng: np.random.Generator,
    *,
    dim: int = 64,
    ffn_dim: int = 96,
    n_experts: int = 6,
    n_used: int = 2,
    quant: str = "F32",
    biases: bool = False,
    skew: np.ndarray | None = None,
    activation: str = "silu",
    norm: bool = True,
) -> object:
    """x = the sum of the chosen experts' feed-forwards."""
    router = random_matrix(rng, n_experts, dim, spread=0.5)

    def bias(target: str, n_rows: int) -> list:
        values = rng.normal(size=(n_experts, n_rows)).astype(np.float32)
        return [ExpertBias(target, "routes", n_used, values)] if biases else []

    def product(source: str, target: str, n_rows: int, k: int) -> list:
        matrices = random_experts(rng, n_experts, n_rows, k, quant)
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
    from runtime.kernels.table import FORMATS

    program = mixture(rng, quant="Q8_0")
    monkeypatch.delitem(FORMATS, "Q8_0")
    backend = CPUBackend(program, n_ctx=32, n_threads=1, n_batch=8)
    assert len(backend.notes) == 1 and "Q8_0" in backend.notes[0]
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


# --- what is compiled ------------------------------------------------------------------------


def test_only_what_is_needed_is_compiled(rng: np.random.Generator) -> None:
    plain = attention_program(HEADS["heads of 64"], rng)
    capped = attention_program(HEADS["heads of 64"], rng, softcap=1.0)
    mixed = mixture(rng)
    assert attention.cap_scores not in CPUBackend.kernels(plain)
    assert attention.cap_scores in CPUBackend.kernels(capped)
    mine = {k for k in vars(experts).values() if hasattr(k, "address")}
    assert not mine & {*CPUBackend.kernels(plain), *gates.GATES.values()}
    assert experts.expert_matmul in CPUBackend.kernels(mixed)
    assert gates.gate_gelu not in CPUBackend.kernels(mixed)
    assert elementwise.layer_norm not in CPUBackend.kernels(mixed)


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("kernel", [*gates.GATES.values(), *gates.ALONE.values()], ids=repr)
def test_gates_can_be_kept_on_disk(kernel: Kernel, recwarn: pytest.WarningsRecorder) -> None:
    """numba only warns about kernels that it cannot write down."""
    kernel._build(cache=CACHE_FOLDER is not None)
    assert not [str(warning.message) for warning in recwarn]


def test_all_that_runs_was_announced(rng: np.random.Generator) -> None:
    """No kernel is compiled behind the progress display."""
    programs = [
        mixture(rng, biases=True),
        mixture(rng, quant="Q8_0"),
        attention_program(HEADS["heads of 64"], rng, softcap=1.0, sinks=True),
    ]
    for program in programs:
        announced = {kernel.address for kernel in CPUBackend.kernels(program)}
        backend = CPUBackend(program, n_ctx=32, n_threads=1, n_batch=8)
        for part in (*backend._decode, *backend._prompt, *backend._head_many):
            assert set(part.operations[:, 0].tolist()) <= announced
        backend.close()


def test_an_instruction_that_is_not_known() -> None:
    class Unheard:
        source = target = "x"

    with pytest.raises(ValueError, match="no such instruction"):
        run(program_of([Unheard()], 8), (1,), 1)  # type: ignore[list-item]
