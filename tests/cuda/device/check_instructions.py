"""Every instruction, for one token, a few, and enough for tiles."""

from dataclasses import replace

import numpy as np
import pytest

from runtime.backends.cuda_launches import Launches
from runtime.backends.cuda_memory import DeviceMemory
from runtime.backends.cuda_room import Kept, make_room
from runtime.program import (
    ACTIVATIONS,
    Activate,
    Add,
    AddBias,
    Attend,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Program,
    RMSNorm,
    Rope,
    RopeTable,
    Route,
    Scale,
    SigmoidScale,
    SoftCap,
)
from runtime.stages import whole
from tests.cuda.device.agreement import FLOAT, INT8, worst
from tests.programs import attention_program, mixture, program_of, random_matrix, random_vector

DIM = 40  # no multiple of 32
EXACT = 1e-5


def on_x(*steps: Instruction, **buffers: int) -> Program:
    return program_of(steps, DIM, buffers=buffers)


def turned(rng: np.random.Generator, *, interleaved: bool) -> Program:
    table = RopeTable(8, interleaved, 0.5 ** np.arange(4.0), 1.1)
    return on_x(Rope("x", 2, 20, table))


STEPS = {
    "rms norm": lambda rng: on_x(RMSNorm("x", "x", random_vector(rng, DIM, 1.0), 1e-5)),
    "rms norm of heads": lambda rng: on_x(RMSNorm("x", "x", random_vector(rng, 8, 1.0), 1e-5)),
    "layer norm": lambda rng: on_x(
        LayerNorm("x", "x", random_vector(rng, DIM), random_vector(rng, DIM), 1e-5)
    ),
    "layer norm of heads": lambda rng: on_x(
        LayerNorm("x", "x", random_vector(rng, DIM).reshape(4, 10), None, 1e-5)
    ),
    "bias": lambda rng: on_x(AddBias("x", random_vector(rng, DIM))),
    "add": lambda rng: on_x(MatMul("x", "y", random_matrix(rng, DIM, DIM)), Add("y", "x"), y=DIM),
    "scale": lambda rng: on_x(Scale("x", -0.3)),
    "soft-cap": lambda rng: on_x(SoftCap("x", 1.5)),
    "rope of halves": lambda rng: turned(rng, interleaved=False),
    "rope of pairs": lambda rng: turned(rng, interleaved=True),
    "sigmoid of a gate": lambda rng: on_x(
        MatMul("x", "y", random_matrix(rng, 1, DIM)), SigmoidScale("y", "x"), y=1
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str, rng: np.random.Generator) -> None:
    assert worst(STEPS[name](rng), (9, 1, 2)) <= EXACT


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, rng: np.random.Generator) -> None:
    up = MatMul("x", "y", random_matrix(rng, DIM, DIM))
    steps: list[Instruction] = [up, Gate("x", "y", "x", activation)]
    if activation != "swiglu_oai":
        steps.append(Activate("x", activation))
    assert worst(on_x(*steps, y=DIM), (2, 1)) <= EXACT


@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 16), (4, 2, 20, 12), (1, 1, 72, 68)], ids=["one", "grouped", "wide"]
)
def test_attention(shape: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """600 positions of context: ten ranges for one token, of which the first is used."""
    program = attention_program(shape, rng)
    assert worst(program, (3, 1), n_ctx=600) <= FLOAT


@pytest.mark.parametrize("options", [{"window": 4}, {"softcap": 0.7}, {"sinks": True}], ids=str)
def test_attention_with(options: dict, rng: np.random.Generator) -> None:
    program = attention_program((2, 1, 16, 16), rng, **options)
    assert worst(program, (6, 1), n_ctx=600) <= FLOAT


@pytest.mark.parametrize("n_heads", [1, 3])
def test_attention_over_several_chunks(n_heads: int, rng: np.random.Generator) -> None:
    """A prompt in one range, a token and a few in several; queries of tokens, and of heads."""
    program = attention_program((n_heads, 1, 8, 8), rng, softcap=2.0, sinks=True, window=129)
    assert worst(program, (130, 1, 3), n_ctx=140) <= FLOAT


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (2, 1, 40, 36)], ids=["narrow", "wide"])
def test_a_cache_of_8_bits(shape: tuple[int, int, int, int], rng: np.random.Generator) -> None:
    """Near the reference; and what attention makes of the very numbers that the cache keeps."""
    program = attention_program(shape, rng, window=5, sinks=True)
    assert worst(program, (9, 1), n_ctx=300, kv_type="q8_0") <= INT8
    step = next(step for step in program.layers[0] if isinstance(step, Attend))
    stage, memory = whole(program), DeviceMemory()
    room = make_room(stage, memory, n_ctx=16, n_batch=9, kv_type="q8_0")
    x = rng.normal(size=(9, room.buffers["x"].stride)).astype(np.float32)
    room.buffers["x"].array.copy_to_device(x.reshape(-1))
    for launch in Launches(room, memory).make(program.layers[0], 9):
        launch()

    def held(name: str, dim: int) -> np.ndarray:  # (token, head, dim)
        buffer = room.buffers[name]
        rows = buffer.array.copy_to_host().reshape(9, buffer.stride)
        return rows[:, : room.widths[name]].reshape(9, -1, dim)

    def kept(kept: Kept) -> np.ndarray:
        numbers = kept.numbers.copy_to_host().reshape(-1, 32)
        scales = kept.scales.copy_to_host().view(np.float16).astype(np.float32)
        rows = (numbers * scales[:, None]).reshape(-1, 16, kept.padded)
        return rows[:, :9, : kept.dim].transpose(1, 0, 2)

    cache = room.caches[0]
    keys, values = kept(cache.keys), kept(cache.values)
    for name, found in (("k", keys), ("v", values)):
        made = held(name, found.shape[-1])
        assert np.abs(found - made).max() <= 0.51 / 127 * np.abs(made).max()
    queries, group = held("q", shape[2]).astype(np.float64), shape[0] // shape[1]
    scores = np.einsum("thd,shd->hts", queries, keys.repeat(group, 1)) * step.scale
    ago = np.arange(9)[:, None] - np.arange(9)
    scores[:, (ago < 0) | (ago >= 5)] = -np.inf
    weights = np.exp(scores)
    weights /= weights.sum(2, keepdims=True) + np.exp(step.sinks)[:, None, None]
    expected = np.einsum("hts,shd->thd", weights, values.repeat(group, 1))
    assert np.abs(held("mixed", shape[3]) - expected).max() <= 1e-5 * np.abs(expected).max()


ROUTES = {
    "softmax": {},
    "sums of one": {"normalize": False, "scale": 2.5},
    "sigmoid with a bias": {"gating": "sigmoid", "bias": np.linspace(0.5, -0.5, 8, dtype="f4")},
    "softmax of the chosen": {"gating": "chosen", "normalize": False},
    "groups": {"n_groups": 4, "n_groups_used": 2},
    "groups by two": {"n_groups": 2, "n_groups_used": 1, "n_compared": 2},
}


@pytest.mark.parametrize("name", ROUTES)
def test_routes(name: str, rng: np.random.Generator) -> None:
    program = mixture(rng, dim=32, ffn_dim=32, n_experts=8, n_used=2, biases=name == "softmax")
    layer = tuple(
        replace(step, **ROUTES[name]) if isinstance(step, Route) else step
        for step in program.layers[0]
    )
    assert worst(replace(program, layers=(layer,)), (3, 1)) <= EXACT


def test_equal_scores_go_to_the_first(rng: np.random.Generator) -> None:
    program = mixture(rng, dim=32, ffn_dim=32, n_experts=40, n_used=3)
    router = next(step for step in program.layers[0] if isinstance(step, MatMul))
    router.matrix.data[:] = 0
    assert worst(program, (1,)) <= EXACT
