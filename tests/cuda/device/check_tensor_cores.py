"""Prompts on tensor cores: the kernels against the plain ones, and what happens if they differ."""

import numpy as np
import pytest
from numba import config, cuda

from gguf_tools.quants import by_name
from runtime.backends import cuda_check
from runtime.backends.cuda import CUDABackend
from runtime.kernels.cuda.tensor_tiles import TENSOR_TILES
from runtime.kernels.cuda.tiles import TILES, Tiles
from runtime.program import Program
from runtime.stages import whole
from tests.cuda.device.agreement import INT8, logits
from tests.cuda.device.check_formats import product
from tests.programs import mixture, random_matrix

CAPABILITIES = {"ampere": (8, 0), "turing": (7, 5)}
WAYS = [("ampere", name) for name in ("Q4_0", "Q8_0", "Q4_K", "Q6_K")] + [
    ("turing", "Q5_1"),
    ("ampere", "F16"),
    ("ampere", "BF16"),
]


@pytest.fixture(autouse=True)
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been checked on this device yet."""
    monkeypatch.setattr(cuda_check, "_verdicts", {})


def need(generation: str) -> None:
    """Skip what the GPU has not; the simulator has everything."""
    found = cuda.get_current_device().compute_capability
    if not config.ENABLE_CUDASIM and (found[0], found[1]) < CAPABILITIES[generation]:
        pytest.skip(f"this GPU has no tensor cores like {generation}'s")


@pytest.mark.parametrize(("generation", "name"), WAYS)
def test_the_same_as_without(generation: str, name: str, rng: np.random.Generator) -> None:
    """A short last step of columns, two warps of rows and all of tokens, and edges of both."""
    need(generation)
    matrix = random_matrix(rng, 35, 256 if by_name(name).block_size == 256 else 160, name)
    assert cuda_check.why_wrong(TENSOR_TILES[generation][name], TILES[name], matrix) == ""


def prompt(program: Program, capability: tuple[int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Logits of 9 tokens read together, and notes."""
    backend = CUDABackend(whole(program), n_ctx=16, n_batch=9, capability=capability)
    return logits(backend, program, (9,)), backend.notes


@pytest.mark.parametrize("generation", CAPABILITIES)
def test_a_prompt(generation: str, rng: np.random.Generator) -> None:
    need(generation)
    program = product("Q4_1", 6, 64, rng)
    (plain, _), (fast, notes) = prompt(program, (6, 1)), prompt(program, CAPABILITIES[generation])
    assert notes == ()
    assert not np.array_equal(fast, plain)  # other sums in another order
    assert np.abs(fast - plain).max() <= 1e-5 * np.abs(plain).max()


def test_experts(rng: np.random.Generator) -> None:
    need("ampere")
    program = mixture(rng, dim=32, ffn_dim=64, n_experts=3, n_used=2, quant="Q4_1")
    (plain, _), (fast, notes) = prompt(program, (6, 1)), prompt(program, (9, 0))
    assert notes == () and np.abs(fast - plain).max() <= INT8 * np.abs(plain).max()


def test_switched_off(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_check.SWITCH, "off")
    program = product("Q4_1", 6, 64, rng)
    assert np.array_equal(prompt(program, (8, 0))[0], prompt(program, (6, 1))[0])


class Unloadable:
    """A kernel that this driver has no code for."""

    def __getitem__(self, launch: object) -> object:
        raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    ("tiles", "told"),
    [
        (TILES["Q4_0"], "their results differ by "),
        (Tiles(Unloadable(), Unloadable()), "no kernel image is available"),
    ],
    ids=["wrong", "not there"],
)
def test_a_kernel_that_fails_is_not_used(
    tiles: Tiles, told: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = product("Q4_1", 6, 64, rng)
    plain, _ = prompt(program, (6, 1))
    monkeypatch.setitem(TENSOR_TILES["ampere"], "Q4_1", tiles)
    found, (note,) = prompt(program, (8, 9))
    assert np.array_equal(found, plain)
    assert note.startswith("prompts are read without tensor cores where weights are Q4_1: ")
    assert told in note
