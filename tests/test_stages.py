"""Programs cut into stages: the same logits wherever the cuts are, and what a cut refuses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import DeviceMemoryError
from gguf_tools.reader import GGUFFile
from runtime.backends import Backend
from runtime.backends.cpu import CPUBackend
from runtime.backends.reference import ReferenceBackend
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.program import (
    Attend,
    ExpertMatMul,
    ExpertSum,
    Program,
    Route,
    Span,
    Stage,
    StoreKV,
)
from runtime.stages import Pipeline, cut_program, whole
from tests.programs import mixture
from tests.tiny import llama_file

IDS = np.random.default_rng(5).integers(0, 60, 40)
BATCHES = (17, 1, 3, 1, 18)  # many, one, a few
N_LAYERS = 4
TOLERANCE = 4e-3  # of the largest logit: the CPU's cache keeps half precision
HOST, DEVICE = 0, 1


def make_cpu(place: int, stage: Stage) -> Backend:
    return CPUBackend(stage, n_ctx=64, n_threads=2, n_batch=32)


def make_reference(place: int, stage: Stage) -> Backend:
    return ReferenceBackend(stage, n_ctx=64)


def make_mixed(place: int, stage: Stage) -> Backend:
    """The reference stands in for a device."""
    return make_reference(place, stage) if place == DEVICE else make_cpu(place, stage)


def logits(program: Program, places: Sequence[int], make=make_reference) -> np.ndarray:
    """Logits after every token; between batches some are read without logits, and again."""
    pipeline = Pipeline.open(program, cut_program(program, places), make)
    parts, first = [], 0
    for size in BATCHES:
        ids = IDS[first : first + size]
        assert pipeline.run(ids, first, 0).shape == (0, program.buffers["logits"])
        parts.append(pipeline.run(ids, first, size))
        assert close(pipeline.run(ids, first, 1), parts[-1][-1:], TOLERANCE)
        first += size
    pipeline.close()
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return make_program(tmp_path_factory.mktemp("stages"), "F16")


def make_program(folder: Path, quant: str) -> Program:
    path = llama_file(folder / "m.gguf", quant=quant, n_layers=N_LAYERS, biases=True, tied=False)
    file = GGUFFile(path)
    return build_program(file, read_config(file), n_ctx=64)


def by_layers(program: Program, first: int) -> list[int]:
    """The layers from `first` on, and the head, on the device."""
    body = [HOST if i < first else DEVICE for i, layer in enumerate(program.layers) for _ in layer]
    return body + [DEVICE] * len(program.head)


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


@pytest.mark.parametrize("first", range(N_LAYERS + 1))
def test_every_split_by_layers_gives_the_same_logits(dense: Program, first: int) -> None:
    places = by_layers(dense, first)
    alone = [HOST] * len(places)
    assert np.array_equal(logits(dense, places), logits(dense, alone))
    expected = logits(dense, alone, make_cpu)
    assert np.array_equal(logits(dense, places, make_cpu), expected)
    assert close(logits(dense, places, make_mixed), expected, TOLERANCE)


def test_a_split_of_quantised_weights(tmp_path: Path) -> None:
    program = make_program(tmp_path, "Q8_0")
    alone, split = by_layers(program, N_LAYERS + 1), by_layers(program, 2)
    expected = logits(program, alone, make_cpu)
    assert np.array_equal(logits(program, split, make_cpu), expected)
    assert close(logits(program, split, make_mixed), expected, 0.03)  # 8-bit activations


@pytest.mark.parametrize("seed", range(6))
def test_cuts_inside_layers_give_the_same_logits(dense: Program, seed: int) -> None:
    """Any instruction anywhere, as long as caches and the head are whole."""
    rng = np.random.default_rng(seed)
    places = rng.integers(0, 3, len(dense.steps)).tolist()
    caches = rng.integers(0, 3, N_LAYERS).tolist()
    for i, step in enumerate(dense.steps):
        if isinstance(step, (StoreKV, Attend)):
            places[i] = caches[step.layer]
    places[-len(dense.head) :] = [DEVICE] * len(dense.head)
    alone = [HOST] * len(places)
    assert np.array_equal(logits(dense, places), logits(dense, alone))
    assert close(logits(dense, places, make_mixed), logits(dense, alone), TOLERANCE)
    assert close(logits(dense, places, make_cpu), logits(dense, alone, make_cpu), TOLERANCE)


def test_experts_elsewhere() -> None:
    """What --cpu-moe does: routed on the device, multiplied on the host."""
    program = mixture(np.random.default_rng(3), quant="Q8_0", biases=True)
    steps = program.layers[0]
    inside = [i for i, step in enumerate(steps) if isinstance(step, (ExpertMatMul, ExpertSum))]
    places = [DEVICE] * len(program.steps)
    places[inside[0] : inside[-1] + 1] = [HOST] * (inside[-1] + 1 - inside[0])
    cut = cut_program(program, places)
    assert cut.route == ((DEVICE, 0), (HOST, 0), (DEVICE, 1))
    (experts,) = cut.stages[HOST].spans
    (route,) = [step for step in steps if isinstance(step, Route)]
    assert experts.inputs == {"normed": 64, "routes": 2 * route.n_used}
    assert cut.stages[HOST].caches == ()
    alone = logits(program, [HOST] * len(places))
    assert np.array_equal(logits(program, places), alone)
    assert close(logits(program, places, make_mixed), alone, 0.03)  # 8-bit activations


def test_one_place_is_one_span(dense: Program) -> None:
    """Body and head stay together: one table for a decode step."""
    stage = whole(dense)
    (span,) = stage.spans
    assert (len(span.body), len(span.head)) == (len(dense.steps) - len(dense.head), 2)
    assert span.inputs == {"x": 64} and span.outputs == {"logits": 70}
    assert stage.caches == dense.caches
    assert [type(step) for step in stage.steps] == [type(step) for step in dense.steps]
    backend = make_cpu(HOST, stage)
    (lowered,) = backend.spans
    assert len(lowered.decode) == 1
    backend.close()


def test_caches_are_renumbered(dense: Program) -> None:
    cut = cut_program(dense, by_layers(dense, 3))
    stored = [s.layer for s in cut.stages[DEVICE].steps if isinstance(s, (StoreKV, Attend))]
    assert stored == [0, 0] and len(cut.stages[DEVICE].caches) == 1
    assert len(cut.stages[HOST].caches) == 3


def test_the_output_alone(dense: Program) -> None:
    """The head by itself gets the wanted tokens and no others."""
    seen = []

    class Watched(ReferenceBackend):
        def run(self, index, values, start, n_outputs):
            seen.append((len(values["x"]), start, n_outputs))
            return super().run(index, values, start, n_outputs)

    def make(place: int, stage: Stage) -> Backend:
        return Watched(stage, n_ctx=64) if place == DEVICE else make_reference(place, stage)

    cut = cut_program(dense, by_layers(dense, N_LAYERS))
    pipeline = Pipeline.open(dense, cut, make)
    pipeline.run(IDS[:9], 0, 0)
    pipeline.run(IDS[9:19], 9, 2)
    assert seen == [(2, 17, 2)]


def test_a_place_that_fails_closes_the_others(dense: Program) -> None:
    closed = []

    class Closing(ReferenceBackend):
        def close(self) -> None:
            closed.append(self)

    def make(place: int, stage: Stage) -> Backend:
        if place == HOST:
            raise DeviceMemoryError("no room")
        return Closing(stage, n_ctx=64)

    with pytest.raises(DeviceMemoryError):
        Pipeline.open(dense, cut_program(dense, by_layers(dense, 2)), make)
    assert len(closed) == 1


def test_what_cannot_be_cut(dense: Program) -> None:
    n = len(dense.steps)
    with pytest.raises(ValueError, match="places for"):
        cut_program(dense, [0] * (n - 1))
    with pytest.raises(ValueError, match="head must be in one place"):
        cut_program(dense, [0] * (n - 1) + [1])
    places = [DEVICE if isinstance(step, Attend) else HOST for step in dense.steps]
    with pytest.raises(ValueError, match="KV cache must be in one place"):
        cut_program(dense, places)


def test_nothing_that_crosses_is_a_threads_own(dense: Program) -> None:
    """A norm that is read elsewhere, or comes from there, lies where the host looks for it."""
    places = [HOST] * len(dense.steps)
    places[1] = DEVICE  # the product after the first norm
    cut = cut_program(dense, places)
    first: Span = cut.stages[HOST].spans[0]
    assert set(first.outputs) == {"normed"}
    alone = [HOST] * len(places)
    assert close(logits(dense, places, make_cpu), logits(dense, alone, make_cpu), TOLERANCE)


def test_one_thread_or_many_on_both_sides(dense: Program) -> None:
    places = by_layers(dense, 2)
    threads = iter((1, 3))

    def make(place: int, stage: Stage) -> Backend:
        return CPUBackend(stage, n_ctx=64, n_threads=next(threads), n_batch=32)

    assert np.array_equal(logits(dense, places, make), logits(dense, places, make_cpu))
