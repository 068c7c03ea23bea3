"""What goes together in one launch: as one by one, in every buffer, and as the reference has it."""

from collections.abc import Sequence

import numpy as np
import pytest

from runtime.backends.cuda_draft import Launch
from runtime.backends.cuda_launches import Launches
from runtime.backends.cuda_memory import DeviceMemory
from runtime.backends.cuda_room import Room, make_room
from runtime.program import (
    Activate,
    Add,
    AddBias,
    ExpertSum,
    Instruction,
    KVShape,
    LayerNorm,
    MatMul,
    Program,
    RMSNorm,
    StoreKV,
)
from runtime.stages import whole
from tests.cuda.device.agreement import FLOAT, INT8, worst
from tests.programs import decoder_layer, mixture, program_of, random_matrix, random_vector

EXACT = 1e-5  # of a buffer's largest number
SAME = 1e-3  # where a rounded number may become its neighbour
N_BATCH = 9


def differences(
    program: Program, n_tokens: int, *, kv_type: str = "f16"
) -> tuple[dict[str, float], int, int]:
    """Of each buffer and cache after a layer run together and one by one; how many launches each.

    The step begins at position 3.
    """
    together, n = held(program, n_tokens, kv_type, at_once=True)
    apart, n_apart = held(program, n_tokens, kv_type, at_once=False)
    found = {
        name: float(np.abs(together[name] - expected).max() / max(np.abs(expected).max(), 1e-9))
        for name, expected in apart.items()
    }
    return found, n, n_apart


def held(
    program: Program, n_tokens: int, kv_type: str, *, at_once: bool
) -> tuple[dict[str, np.ndarray], int]:
    memory, stage = DeviceMemory(), whole(program)
    room = make_room(stage, memory, n_ctx=16, n_batch=N_BATCH, kv_type=kv_type)
    room.state.copy_to_device(np.array([3], np.int32))
    fill(room)
    made = launches(Launches(room, memory), program.layers[0], n_tokens, at_once=at_once)
    for launch in made:
        launch()
    buffers = {name: buffer.array.copy_to_host() for name, buffer in room.buffers.items()}
    for i, kept in enumerate(part for cache in room.caches for part in (cache.keys, cache.values)):
        buffers[f"cache {i}"] = kept.numbers.copy_to_host().astype(np.float32)
    return buffers, len(made)


def fill(room: Room) -> None:
    rng = np.random.default_rng(2)
    for buffer in room.buffers.values():
        values = rng.normal(size=N_BATCH * buffer.stride).astype(np.float32)
        buffer.array[: len(values)].copy_to_device(values)


def launches(
    make: Launches, steps: Sequence[Instruction], n_tokens: int, *, at_once: bool
) -> list[Launch]:
    runs = [steps] if at_once else [[step] for step in steps]
    return [launch for run in runs for launch in make.make(run, n_tokens)]


LAYERS = {
    "floats": {},
    "one format": dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), "Q4_0"),
    "two formats": {"q": "Q4_1", "k": "Q4_1", "v": "Q8_0", "gate": "Q4_1", "up": "Q4_1"},
    "three formats": {"q": "Q4_0", "k": "Q8_0", "v": "F16", "o": "Q8_0", "gate": "Q8_0"},
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, rng: np.random.Generator) -> None:
    program = decoder_layer(rng, quants=LAYERS[name], biases=name != "one format")
    found, n, n_apart = differences(program, 2)
    assert max(found.values()) <= SAME, found
    assert n < n_apart


FORMS = {
    "layer norms": {"layer_norms": True, "biases": True},
    "norms of heads": {"head_norms": True},
    "norms after": {"after_norms": True, "head_norms": True, "activation": "gelu"},
    "a part turns": {"n_dims": 20},
    "norms without positions": {"head_norms": True, "n_dims": 0},
    "no positions": {"n_dims": 0},
    "other values": {"shape": KVShape(2, 2, 40, 24)},
}


IN_8_BITS = ("norms of heads", "a part turns", "other values")


@pytest.mark.parametrize(
    ("name", "kv_type"), [*((name, "f16") for name in FORMS), *((n, "q8_0") for n in IN_8_BITS)]
)
def test_a_form(name: str, kv_type: str, rng: np.random.Generator) -> None:
    quants = {"gate": "Q8_0", "up": "Q8_0", "down": "Q8_0"}
    program = decoder_layer(rng, quants=quants, **FORMS[name])
    found, n, n_apart = differences(program, 1, kv_type=kv_type)
    if kv_type == "q8_0":  # whole numbers may be one more or less
        assert max(found.pop(f"cache {i}") for i in range(2)) <= 1 / 127
        assert max(found.values()) <= INT8, found
    else:
        assert max(found.pop(f"cache {i}") for i in range(2)) <= 1 / 10_000
        assert max(found.values()) <= SAME, found
    assert n < n_apart


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_tokens_after_tokens(kv_type: str, rng: np.random.Generator) -> None:
    """A prompt in tiles, a token, a few, against the reference."""
    quants = {"q": "Q8_0", "k": "Q8_0", "v": "F16", "o": "Q8_0", "down": "Q5_1"}
    program = decoder_layer(rng, quants=quants, biases=True, head_norms=True)
    assert worst(program, (9, 1, 3), n_ctx=300, kv_type=kv_type) <= INT8


def test_floats_against_the_reference(rng: np.random.Generator) -> None:
    program = decoder_layer(
        rng, biases=True, layer_norms=True, shape=KVShape(2, 2, 20, 12), n_dims=16
    )
    assert worst(program, (2, 1)) <= FLOAT


@pytest.mark.parametrize("n_tokens", [1, 9])
def test_a_mixture(n_tokens: int, rng: np.random.Generator) -> None:
    """Biases of experts, int8 from their gates, and their sum that is added."""
    program = mixture(rng, dim=32, ffn_dim=64, n_experts=3, n_used=2, quant="Q4_1", biases=True)
    found, n, n_apart = differences(program, n_tokens)
    assert max(found.values()) <= SAME, found
    assert n < n_apart


def test_more_matrices_than_a_launch_takes(rng: np.random.Generator) -> None:
    sizes = {"a": 5, "b": 9, "c": 4, "d": 1, "e": 2}
    steps: list[Instruction] = [
        MatMul("x", name, random_matrix(rng, size, 32, "Q8_0")) for name, size in sizes.items()
    ]
    steps += [AddBias(name, random_vector(rng, sizes[name])) for name in "db"]
    found, n, n_apart = differences(program_of(steps, 32, buffers=sizes), 1)
    assert max(found.values()) <= EXACT
    assert (n, n_apart) == (3, 12)  # each quantises for itself


def test_int8_of_a_row_longer_than_a_block(rng: np.random.Generator) -> None:
    dim = 1056
    weight, bias = random_vector(rng, dim, 1.0), random_vector(rng, dim)
    steps = [
        LayerNorm("x", "y", weight, bias, 1e-5),
        MatMul("y", "z", random_matrix(rng, 2, dim, "Q4_0")),
        RMSNorm("y", "y", weight, 1e-5),
        Activate("y", "gelu"),
        MatMul("y", "z", random_matrix(rng, 2, dim, "Q4_0")),
        Add("z", "s"),
    ]
    found, n, n_apart = differences(program_of(steps, dim, buffers={"y": dim, "z": 2, "s": 2}), 1)
    assert max(found.values()) <= EXACT
    assert (n, n_apart) == (5, 8)


def test_queries_that_a_product_takes_too(rng: np.random.Generator) -> None:
    """The kernel that stores makes no int8."""
    steps = [
        RMSNorm("q", "q", random_vector(rng, 32, 1.0), 1e-5),
        RMSNorm("k", "k", random_vector(rng, 32, 1.0), 1e-5),
        StoreKV("k", "x", 0),
        MatMul("q", "y", random_matrix(rng, 4, 32, "Q8_0")),
    ]
    buffers, caches = {"q": 32, "k": 32, "y": 4}, (KVShape(1, 1, 32, 32),)
    found, n, _ = differences(program_of(steps, 32, buffers=buffers, caches=caches), 1)
    assert n == 3 and max(found.values()) <= SAME


def test_a_sum_of_experts_that_is_also_a_source(rng: np.random.Generator) -> None:
    """What is added to must not be what the kernel still reads."""
    steps = [ExpertSum("each", "routes", 2, "y"), Add("y", "each")]
    program = program_of(steps, 32, buffers={"each": 64, "routes": 4, "y": 32})
    found, n, _ = differences(program, 1)
    assert n == 2 and max(found.values()) <= EXACT
