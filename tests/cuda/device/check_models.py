"""Whole models, and what the backend does besides computing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numba import config, cuda
from numba.cuda.cudadrv.driver import CudaAPIError

from gguf_tools.errors import DeviceError, DeviceMemoryError
from gguf_tools.reader import GGUFFile
from runtime.backends import Backend, cuda_check, cuda_graph
from runtime.backends import cuda as cuda_backend
from runtime.backends.cuda import CUDABackend
from runtime.backends.cuda_draft import Launch
from runtime.backends.cuda_formats import allocated
from runtime.backends.cuda_host import HostArrays
from runtime.backends.cuda_launches import Launches
from runtime.backends.cuda_memory import DeviceMemory
from runtime.backends.cuda_room import make_room
from runtime.backends.reference import ReferenceBackend
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.devices import Device
from runtime.kernels.cuda.products import PRODUCTS
from runtime.kernels.cuda.tiles import TILES, Tiles
from runtime.model import KV_TYPES, Model
from runtime.offload import Offload
from runtime.program import Attend, Program, Stage, StoreKV
from runtime.split import FIXED, Wish, measure_sizes, plan_split, stage_bytes
from runtime.stages import Pipeline, cut_program, whole
from tests.architectures import converted
from tests.cuda.device.agreement import FLOAT, INT8, worst
from tests.cuda.device.agreement import logits as agreement_logits
from tests.cuda.device.check_formats import product
from tests.programs import attention_program, mixture
from tests.tiny import llama_file

N_CTX = 48


@pytest.fixture
def program(tmp_path: Path) -> Program:
    path = llama_file(
        tmp_path / "m.gguf", dim=32, ffn_dim=32, n_vocab=16, biases=True, n_heads=2, n_kv_heads=1
    )
    file = GGUFFile(path)
    return build_program(file, read_config(file), n_ctx=N_CTX)


@pytest.mark.parametrize("quant", ["F32", "Q4_0"])
def test_a_llama(quant: str, tmp_path: Path) -> None:
    path = llama_file(tmp_path / "m.gguf", quant=quant, n_layers=1, n_vocab=40, n_heads=2)
    with GGUFFile(path) as file:
        program = build_program(file, read_config(file), n_ctx=N_CTX)
        assert worst(program, (9, 1, 1)) <= (FLOAT if quant == "F32" else INT8)


@pytest.mark.parametrize("name", ["gemma2", "gptoss", "gpt2"])
def test_an_architecture(name: str, tmp_path: Path) -> None:
    with GGUFFile(converted(name, tmp_path)) as file:
        program = build_program(file, read_config(file), n_ctx=N_CTX)
        assert worst(program, (1, 1)) <= FLOAT


def make_reference(place: int, stage: Stage) -> Backend:
    return ReferenceBackend(stage, n_ctx=N_CTX)


def make_gpu(place: int, stage: Stage) -> Backend:
    return CUDABackend(stage, n_ctx=N_CTX, n_batch=9)


def make_mixed(place: int, stage: Stage) -> Backend:
    return make_gpu(place, stage) if place else make_reference(place, stage)


def logits(program: Program, places: list[int], make=make_mixed) -> np.ndarray:
    """Of a prompt, of one token, and of tokens that are read again."""
    pipeline = Pipeline.open(program, cut_program(program, places), make)
    ids = np.arange(12) % program.embedding.n_rows
    parts = [pipeline.run(ids[:9], 0, 2), pipeline.run(ids[9:10], 9, 1)]
    assert pipeline.run(ids[10:], 10, 0).shape == (0, program.buffers["logits"])
    parts.append(pipeline.run(ids[10:], 10, 2))
    pipeline.close()
    return np.concatenate(parts)


def test_a_slice_of_layers(program: Program) -> None:
    """The last layer and the head on the GPU; the first and the head, apart."""
    alone = logits(program, [0] * len(program.steps))
    first, second = map(len, program.layers)
    for places in (
        [0] * first + [1] * second + [1] * len(program.head),
        [1] * first + [0] * second + [1] * len(program.head),
    ):
        assert np.abs(logits(program, places) - alone).max() <= FLOAT * np.abs(alone).max()


def test_cuts_inside_layers(program: Program, rng: np.random.Generator) -> None:
    places = rng.integers(0, 2, len(program.steps)).tolist()
    for i, step in enumerate(program.steps):
        if isinstance(step, (StoreKV, Attend)):
            places[i] = 1 - step.layer % 2
    places[-len(program.head) :] = [1] * len(program.head)
    alone = logits(program, [0] * len(places))
    assert np.abs(logits(program, places) - alone).max() <= FLOAT * np.abs(alone).max()


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_the_plan_counts_what_is_taken(program: Program, kv_type: str) -> None:
    """To the byte, with everything on the GPU; a part of it never takes more than planned."""
    rng = np.random.default_rng(4)
    others = (attention_program((4, 2, 20, 12), rng), mixture(rng, quant="Q4_1", biases=True))
    options = {"n_ctx": 300, "n_batch": 40, "kv_type": kv_type}
    gpu = Device("cuda:0", "a GPU", 1 << 34, 1 << 34, (8, 0))
    for each in (program, *others):
        sizes = measure_sizes(each, **options)
        for n in range(1, sizes.most_layers + 1):
            plan = plan_split(sizes, [gpu], Wish(gpu_layers=n))
            stage = cut_program(each, plan.places(each)).stages[1]
            backend = CUDABackend(stage, **options)
            planned = plan.shares[0].used - FIXED
            assert backend.memory_bytes <= planned
            assert backend.memory_bytes == stage_bytes(stage, **options) - FIXED
            backend.close()
        spare = 0 if stage.caches else sizes.layers[0].kv  # a layer that does not attend
        assert stage_bytes(stage, **options) == plan.shares[0].used - spare


def test_what_passes_without_copies(program: Program, rng: np.random.Generator) -> None:
    """Launches that read and write the host's arrays, as a captured step has them."""
    stage, memory = whole(program), DeviceMemory()
    room = make_room(stage, memory, n_ctx=N_CTX, n_batch=2, kv_type="f16")
    host, (span,) = HostArrays(room, {"x": 2}, {"logits": 1}), stage.spans
    x = rng.normal(size=(1, span.inputs["x"])).astype(np.float32)
    made = Launches(room, memory).make((*span.body, *span.head), 1)
    found = []
    for captured in (False, True):
        host.clear(["logits"])
        host.fill({"x": x}, 3)
        if captured:
            for launch in (*host.sending(["x"]), *made, *host.fetching(["logits"])):
                launch()
            cuda.synchronize()
        else:
            host.send(["x"], 1)
            for launch in made:
                launch()
            host.fetch(["logits"], 1)
        assert room.state.copy_to_host()[0] == 3
        found.append(host.rows("logits", 1, span.outputs["logits"]))
    assert np.array_equal(*found) and found[0].any()


class Replay:
    """What stands for a graph in the simulator."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def __call__(self) -> None:
        for launch in self.launches:
            launch()


def test_a_captured_step(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens replayed are tokens launched one by one; a graph that gives another is not used."""

    def tokens() -> tuple[np.ndarray, str]:
        backend = CUDABackend(whole(program), n_ctx=N_CTX, n_batch=1)
        made = agreement_logits(backend, program, (1, 1, 1))
        return made, backend.no_graph_reason

    with monkeypatch.context() as patch:
        patch.setattr(cuda_backend, "capture", lambda *given: (None, "not wanted"))
        launched, reason = tokens()
    assert reason == "not wanted"
    if config.ENABLE_CUDASIM:
        monkeypatch.setattr(cuda_graph, "config", SimpleNamespace(ENABLE_CUDASIM=False))
        monkeypatch.setattr(cuda_graph, "Graph", Replay)
    replayed, reason = tokens()
    assert reason == "" and np.array_equal(replayed, launched)
    monkeypatch.setattr(cuda_graph, "Graph", lambda launches: Replay(launches[:-2]))
    alone, reason = tokens()
    assert reason == "a replay gave another result" and np.array_equal(alone, launched)


def test_too_little_memory(program: Program) -> None:
    needed = CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4).memory_bytes
    CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4, memory_limit=needed).close()
    with pytest.raises(DeviceMemoryError, match="use fewer --gpu-layers") as raised:
        CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4, memory_limit=needed - 1)
    assert raised.value.room == needed - 1


def test_a_gpu_that_runs_full(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver says then is what the next plan goes by."""
    free, take = [60_000], cuda.device_array

    def take_some(size: int, dtype: np.dtype) -> np.ndarray:
        array = take(size, dtype)
        if array.nbytes > free[0]:
            raise CudaAPIError(2, "[2] Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")
        free[0] -= allocated(array.nbytes)
        return array

    context = SimpleNamespace(get_memory_info=lambda: (free[0], 1 << 30))
    monkeypatch.setattr(cuda, "device_array", take_some)
    monkeypatch.setattr(cuda, "current_context", lambda: context)
    with pytest.raises(DeviceMemoryError, match="bytes left beside") as raised:
        CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4)
    assert raised.value.room == 60_000


def test_a_gpu_that_is_not_there(program: Program) -> None:
    with pytest.raises(DeviceError, match="GPU 7 cannot be used"):
        CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4, device=7)


class NoNumbers:
    """A kernel for tiles whose results are none."""

    def __getitem__(self, launch: object) -> Callable[..., None]:
        def fill(*arguments: Any) -> None:
            made = arguments[5]
            made.copy_to_device(np.full(len(made), np.nan, np.float32))

        return fill


@pytest.mark.parametrize(
    ("table", "kernels"),
    [
        (TILES, TILES["Q4_0"]),
        (PRODUCTS, PRODUCTS["Q4_0"]),
        (TILES, Tiles(NoNumbers(), NoNumbers())),
    ],
    ids=["tiles", "products", "no numbers"],
)
def test_a_gpu_that_multiplies_wrongly(
    table: dict[str, Any], kernels: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody gets its answers."""
    monkeypatch.setattr(cuda_check, "_checked", set())
    monkeypatch.setitem(table, "Q4_1", kernels)
    program = product("Q4_1", 6, 64, rng)
    with pytest.raises(DeviceError, match=r"GPU 0 multiplies wrongly with weights of Q4_1 \(by "):
        CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4)
    monkeypatch.undo()
    CUDABackend(whole(program), n_ctx=N_CTX, n_batch=4).close()


def test_a_gpu_is_tried_out(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is said to be there; what compilers raise becomes an error in words."""
    backend = CUDABackend(whole(program), n_ctx=N_CTX, n_batch=2)
    backend.try_out()
    expected = logits(program, [1] * len(program.steps), make_gpu)
    assert np.array_equal(logits(program, [1] * len(program.steps), make_tried), expected)

    class NvvmError(Exception):
        __module__ = "numba.cuda.cudadrv.error"

    def fail(*arguments: object) -> None:
        raise NvvmError("PTX that this driver does not know")

    monkeypatch.setattr(cuda_backend, "_launch", fail)
    with pytest.raises(DeviceError, match=r"GPU 0 cannot go on \(NvvmError: PTX that this driver"):
        backend.try_out()
    monkeypatch.undo()
    backend.stage.steps[0].weight[:] = np.nan
    broken = CUDABackend(backend.stage, n_ctx=N_CTX, n_batch=2)
    with pytest.raises(DeviceError, match="GPU 0 makes values that are no numbers"):
        broken.try_out()


def make_tried(place: int, stage: Stage) -> CUDABackend:
    backend = CUDABackend(stage, n_ctx=N_CTX, n_batch=9)
    backend.try_out()
    return backend


def test_layers_go_to_a_gpu_by_number(tmp_path: Path) -> None:
    """As --gpu-layers 2 does: the head and the last layer."""
    path = llama_file(tmp_path / "m.gguf", dim=32, ffn_dim=32, n_vocab=16, n_heads=2, n_kv_heads=1)
    gpu = Device("cuda:0", "a GPU", 1 << 34, 1 << 34, (8, 0))
    found, said = [], []
    options = {"n_ctx": N_CTX, "backend": "reference", "on_note": said.append}
    for offload in (Offload(), Offload((gpu,), Wish(gpu_layers=2))):
        with GGUFFile(path) as file, Model.load(file, offload=offload, **options) as model:
            found.append([model.forward([1, 2, 3]), model.forward([4])])
            devices = model.devices
    assert devices == ("cuda:0", "CPU")
    if config.ENABLE_CUDASIM:  # which keeps none
        assert "compiling the kernels for cuda:0: some ten seconds, this once" in said
    assert np.abs(np.subtract(*found)).max() <= FLOAT * np.abs(found[0]).max()
