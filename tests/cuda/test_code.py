"""What the CUDA toolkit makes of the kernels, for GPUs from 2018 on; no GPU is needed for it.

Every kernel is compiled for the arguments it is launched with, so that a stray float64 shows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install '.[dev]'", allow_module_level=True)

import numba
from numba import cuda
from numba.cuda import types
from numba.cuda.cudadrv import nvrtc, nvvm

from runtime.backends.cuda_draft import Launch
from runtime.backends.cuda_formats import NATIVE, way_of_tiles
from runtime.backends.cuda_launches import Launches
from runtime.backends.cuda_room import make_room
from runtime.kernels.cuda.products import BLOCKS
from runtime.kernels.cuda.tensor_tiles import TENSOR_TILES
from runtime.kernels.cuda.tiles import TILES, Tiles
from runtime.program import (
    ACTIVATIONS,
    Activate,
    AddBias,
    Gate,
    Instruction,
    LayerNorm,
    MatMul,
    Program,
    Rope,
    RopeTable,
    SigmoidScale,
    SoftCap,
)
from runtime.stages import whole
from tests.programs import attention_program, mixture, program_of, random_matrix, random_vector

CAPABILITIES = ((7, 5), (8, 0), (8, 9), (9, 0), (12, 0))
ONE, TILE = 1, 16  # tokens: a warp for two rows, or tiles


def find_toolkit() -> str:
    """Why kernels cannot be compiled here, or nothing."""
    try:
        nvvm.NVVM()
        nvrtc.get_supported_ccs()
    except Exception as error:  # each missing library has an exception of its own
        return f"the CUDA toolkit is not installed ({type(error).__name__}): pip install '.[cuda]'"
    return ""


pytestmark = pytest.mark.skipif(bool(reason := find_toolkit()), reason=reason)


class HostMemory:
    """Arrays of the types that a GPU would hold."""

    def empty(self, size, dtype):
        return np.empty(size, dtype)

    zeros = empty

    def hold(self, values):
        return np.ascontiguousarray(values).reshape(-1)

    def weights(self, matrices):
        return np.empty(16, np.uint8)


def launches(
    program: Program,
    n_tokens: int,
    kv_type: str = "f16",
    tiles: Mapping[str, Tiles] = TILES,
) -> list[Launch]:
    """Of the program's layers."""
    stage, memory = whole(program), HostMemory()
    room = make_room(stage, memory, n_ctx=600, n_batch=TILE, kv_type=kv_type)
    steps = [step for layer in program.layers for step in layer]
    return Launches(room, memory, tiles).make(steps, n_tokens)


def compiled(launch: Launch, capability: tuple[int, int]) -> str:
    """The PTX of a kernel, checked for what no kernel may have."""
    signature = types.void(*(numba.typeof(argument) for argument in launch.arguments))
    device = SimpleNamespace(compute_capability=capability)
    with mock.patch("numba.cuda.dispatcher.get_current_device", lambda: device):
        ptx, _ = cuda.compile(
            launch.kernel.py_func,
            signature,
            cc=capability,
            device=False,
            output="ptx",
            abi="numba",
        )
    assert f".target sm_{capability[0]}{capability[1]}" in ptx
    assert ".local" not in ptx, "registers do not suffice, or an index is not constant"
    assert ".f64" not in ptx
    assert ".f32.s64" not in ptx, "a whole number of 64 bits becomes a float, which is slow"
    return ptx


def product(name: str) -> Program:
    rng = np.random.default_rng(0)
    return program_of([MatMul("x", "y", random_matrix(rng, 8, 256, name))], 256, buffers={"y": 8})


def product_launch(name: str, n_tokens: int, tiles: Mapping[str, Tiles] = TILES) -> Launch:
    """The first product of the program above."""
    kernels = ("matvec", "matmul")
    made = launches(product(name), n_tokens, tiles=tiles)
    return next(each for each in made if kernel_name(each) in kernels)


def kernel_name(launch: Launch) -> str:
    return str(launch.kernel.py_func.__name__)


@pytest.mark.parametrize("name", NATIVE)
def test_a_row_of_every_format(name: str) -> None:
    ptx = compiled(product_launch(name, ONE), (8, 0))
    assert "ld.global.nc.v4.u32" in ptx
    assert ptx.count("shfl.sync") == 2 * 5  # two rows
    if name not in ("F32", "F16", "BF16"):
        assert ptx.count("dp4a.s32.s32") >= 2 * 8


def products_launch(*names: str) -> Launch:
    """Of two matrices together."""
    rng = np.random.default_rng(0)
    steps = [
        MatMul("x", target, random_matrix(rng, 8, 256, name))
        for target, name in zip("yz", names, strict=True)
    ]
    made = launches(program_of(steps, 256, buffers={"y": 8, "z": 8}), ONE)
    return next(each for each in made if kernel_name(each) == "matvecs")


@pytest.mark.parametrize("name", ["F16", "Q4_K", "Q6_K"])
def test_rows_of_several_matrices(name: str) -> None:
    """They share one copy of the code."""
    ptx = compiled(products_launch(name, name), (8, 0))
    assert ptx.count("shfl.sync") == 2 * 5  # two rows
    assert ptx.count("dp4a.s32.s32") == compiled(product_launch(name, ONE), (8, 0)).count(
        "dp4a.s32.s32"
    )


def test_rows_of_two_formats() -> None:
    """One launch has the code of both."""
    both = compiled(products_launch("Q4_K", "Q6_K"), (8, 0))
    each = [compiled(product_launch(name, ONE), (8, 0)) for name in ("Q4_K", "Q6_K")]
    assert both.count("dp4a.s32.s32") == sum(ptx.count("dp4a.s32.s32") for ptx in each)


@pytest.mark.parametrize("name", ["F16", "Q4_K", "Q6_K"])
def test_tiles(name: str) -> None:
    ptx = compiled(product_launch(name, TILE), (8, 0))
    products = ptx.count("dp4a.s32.s32")
    assert products == 0 if name == "F16" else products >= 64


TENSOR_WAYS = [
    *(("Q4_K", capability) for capability in CAPABILITIES),
    *((name, (8, 0)) for name in BLOCKS if name != "Q4_K"),
    ("Q6_K", (7, 5)),
]


@pytest.mark.parametrize(("name", "capability"), TENSOR_WAYS, ids=str)
def test_tensor_cores(name: str, capability: tuple[int, int]) -> None:
    """The instructions of each generation, over columns that share a scale; machine code."""
    way = way_of_tiles(capability, name, 256)
    tiles = {**TILES, **TENSOR_TILES[way]}
    columns = BLOCKS[name].per_scale
    launch = product_launch(name, TILE, tiles)
    ptx = compiled(launch, capability)
    shape = "m8n8k16" if way == "turing" else f"m16n8k{columns}"
    each = columns // 8 if way == "turing" else 1  # for 16 rows and 8 tokens
    text = f"mma.sync.aligned.{shape}.row.col.s32.s8.s8.s32"
    assert ptx.count(text) == ptx.count("mma.sync") == 4 * each * (32 // columns)
    assert ptx.count("ldmatrix.sync.aligned.m8n8.x4.shared.b16") == 3
    assert ptx.count(".shared .align 16") == 2  # where it reads
    assert "dp4a" not in ptx and "call" not in ptx
    check_machine_code(ptx, capability)


@pytest.mark.parametrize(("name", "capability"), [("F16", (8, 0)), ("BF16", (12, 0))], ids=str)
def test_tensor_cores_of_16_bits(name: str, capability: tuple[int, int]) -> None:
    tiles = {**TILES, **TENSOR_TILES["ampere"]}
    ptx = compiled(product_launch(name, TILE, tiles), capability)
    kind = name.lower()
    text = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    assert ptx.count(text) == ptx.count("mma.sync") > 0
    assert "ldmatrix.sync" in ptx and ptx.count(".shared .align 16") == 2
    assert f"cvt.rn.{kind}x2.f32" in ptx and "call" not in ptx
    check_machine_code(ptx, capability)


def one_token_kernels() -> Iterable[Launch]:
    """The ones that most of a token's time goes to."""
    program = attention_program((2, 1, 64, 64), np.random.default_rng(0), sinks=True)
    both = (*launches(program, ONE), *launches(program, ONE, "q8_0"))
    attention = (each for each in both if kernel_name(each) in ("attend", "store"))
    return product_launch("Q4_K", ONE), products_launch("Q4_K", "Q6_K"), *attention


def find_linker() -> str:
    """Why machine code cannot be made here, or nothing."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        load_nvidia_dynamic_lib("nvJitLink")
    except DynamicLibNotFoundError:
        return "nvJitLink is not installed: pip install '.[cuda]'"
    return ""


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_generation(capability: tuple[int, int]) -> None:
    for launch in one_token_kernels():
        check_machine_code(compiled(launch, capability), capability)


def check_machine_code(ptx: str, capability: tuple[int, int]) -> None:
    """That there is some, where nvJitLink is installed."""
    if find_linker():
        return
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=f"sm_{capability[0]}{capability[1]}")
    made = Linker(ObjectCode.from_ptx(ptx.encode()), options=options).link("cubin")
    assert bytes(made.code)[:4] == b"\x7fELF"


def small_steps() -> list[Instruction]:
    rng = np.random.default_rng(0)
    weight = random_vector(rng, 32)
    table = RopeTable(8, True, 0.5 ** np.arange(4.0), 1.0)
    gates: list[Instruction] = [Gate("x", "x", "x", name) for name in ACTIVATIONS]
    return [
        *gates,
        Activate("x", "gelu_erf"),
        LayerNorm("x", "x", weight, weight, 1e-5),
        AddBias("x", weight),
        Rope("x", 2, 16, table),
        SoftCap("x", 2.0),
        SigmoidScale("x", "x"),
    ]


def test_the_small_steps() -> None:
    small, mixed = program_of(small_steps(), 32), mixture(np.random.default_rng(0), biases=True)
    seen = set()
    for launch in (*launches(small, ONE), *launches(mixed, ONE), *launches(mixed, TILE)):
        if launch.kernel not in seen:
            seen.add(launch.kernel)
            compiled(launch, (8, 0))
    assert len(seen) >= 20
