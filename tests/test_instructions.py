"""Each instruction by itself on the CPU backend, against the reference."""

import numpy as np
import pytest

from runtime.program import (
    ACTIVATIONS,
    Activate,
    Add,
    AddBias,
    Attend,
    Gate,
    LayerNorm,
    MatMul,
    Scale,
    SigmoidScale,
    SoftCap,
)
from tests.programs import (
    EXACT,
    N_TOKENS,
    agree,
    attention_program,
    program_of,
    random_matrix,
    random_vector,
    run,
)

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
