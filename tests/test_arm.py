"""ARM: which instructions are chosen, and that compiled code has them. Runs on every processor."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import pytest
from llvmlite import ir
from numba.core.registry import cpu_target

from gguf_tools.compiler import OPTIONS, control, vectors
from gguf_tools.processor import (
    ARM_DOTS,
    FEATURES,
    IS_ARM,
    choose_dot,
    decode_hwcaps,
    join_features,
    parse_features,
)
from runtime.kernels.interpreter import run_table

TRIPLE = "aarch64-unknown-linux-gnu"
BYTES, SUMS = ir.VectorType(vectors.I8, 64), ir.VectorType(vectors.I32, 16)


# --- what is chosen --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "is_arm", "dot"),
    [
        ("+neon,+dotprod,+i8mm", True, "i8mm"),
        ("+neon,+dotprod,-i8mm", True, "neon"),
        ("+dotprod", True, "neon"),  # a Mac, whose other features LLVM leaves out
        ("+neon,-dotprod,-i8mm", True, "armv8"),
        ("", True, "armv8"),
        ("-neon", True, "portable"),
        ("+avx2,+avx512vnni,+avx512vl,+avx512bw", False, "avx512vnni"),
        ("+avx2,+avx512vnni,+avx512bw", False, "avx2"),
        ("+avx2,+avxvnni", False, "avxvnni"),
        ("+sse4.2,-avx2", False, "portable"),
        ("+dotprod", False, "portable"),
    ],
)
def test_byte_products_by_features(features: str, is_arm: bool, dot: str) -> None:
    assert choose_dot(parse_features(features), is_arm=is_arm) == dot


def test_features_as_text() -> None:
    features = {"neon": True, "dotprod": True, "sve": False}
    assert join_features(features) == "+dotprod,+neon,-sve"
    assert parse_features(join_features(features)) == features
    assert parse_features("") == {}


def test_words_of_the_auxiliary_vector() -> None:
    assert decode_hwcaps(0x10_0000, 0) == {"dotprod": True, "i8mm": False}
    assert decode_hwcaps(0x10_0000, 0x2000) == {"dotprod": True, "i8mm": True}
    assert decode_hwcaps(0x8FF, 0) == {"dotprod": False, "i8mm": False}  # a Cortex-A72


@pytest.mark.skipif(not (IS_ARM and sys.platform == "linux"), reason="ARM under Linux only")
def test_features_as_the_kernel_lists_them() -> None:
    listed = re.search(r"^Features\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    assert listed
    words = listed[1].split()
    assert FEATURES["dotprod"] == ("asimddp" in words)
    assert FEATURES["i8mm"] == ("i8mm" in words)


def test_numba_compiles_for_the_features_that_were_found() -> None:
    """LLVM stops the process where it meets an instruction that it was not told about."""
    assert cpu_target.target_context.codegen()._tm_features == join_features(FEATURES)


# --- what is compiled ------------------------------------------------------------------------


def assemble(code: str, processor: str) -> str:
    """The assembly of LLVM code for an ARM processor."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    code = re.sub(r"^target (datalayout|triple) = .*$", "", code, flags=re.M)
    target = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=processor, opt=3)
    return str(target.emit_assembly(llvm.parse_assembly(code)))


def emitted(emit: Callable[..., Any], result: Any, arguments: list[Any], processor: str) -> str:
    """The assembly of a function whose body is made by `emit(builder, *arguments)`."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(result, arguments), "emitted")
    builder = ir.IRBuilder(function.append_basic_block())
    value = emit(builder, *function.args)
    builder.ret_void() if isinstance(result, ir.VoidType) else builder.ret(value)
    return assemble(str(module), processor)


def count(assembly: str, *instructions: str) -> list[int]:
    return [len(re.findall(rf"^\s+{name}\s", assembly, re.M)) for name in instructions]


@pytest.mark.parametrize(
    ("dot", "processor", "full", "small"),
    [  # counts of usdot, sdot, and addp
        ("i8mm", "neoverse-v1", [4, 0, 0], [4, 0, 0]),
        ("neon", "neoverse-n1", [0, 8, 0], [0, 4, 0]),  # 4 products, 4 sums of the signed bytes
        ("armv8", "cortex-a72", [0, 0, 4], [0, 0, 4]),
    ],
)
def test_byte_products(
    monkeypatch: pytest.MonkeyPatch,
    dot: str,
    processor: str,
    full: list[int],
    small: list[int],
) -> None:
    monkeypatch.setattr(vectors, "DOT", dot)
    for promise, expected in ((False, full), (True, small)):

        def emit(builder: Any, *operands: Any, promise: bool = promise) -> Any:
            return vectors.emit_dot(builder, *operands, small=promise)

        assembly = emitted(emit, SUMS, [SUMS, BYTES, BYTES], processor)
        assert count(assembly, "usdot", "sdot", "addp") == expected


@pytest.mark.parametrize("dot", ARM_DOTS)
def test_byte_tables(monkeypatch: pytest.MonkeyPatch, dot: str) -> None:
    monkeypatch.setattr(vectors, "DOT", dot)
    table = ir.VectorType(vectors.I8, 16)
    assembly = emitted(vectors.emit_lookup, BYTES, [table, BYTES], "cortex-a72")
    assert count(assembly, "tbl", "bsl", "bif", "bit") == [4, 0, 0, 0]


@pytest.mark.parametrize("dot", ARM_DOTS)
def test_spinning_takes_a_rest(monkeypatch: pytest.MonkeyPatch, dot: str) -> None:
    monkeypatch.setattr(control, "DOT", dot)
    assembly = emitted(control.emit_pause, ir.VoidType(), [], "cortex-a72")
    assert count(assembly, "isb") == [1]


# --- the order of memory ---------------------------------------------------------------------

# ARM lets loads and stores pass each other, where x86 keeps most of them in order: what a thread
# wrote must be published by a release and be read behind an acquire.


@pytest.fixture(scope="module")
def interpreter() -> str:
    """The compiled interpreter in LLVM's language, but for x86's name of a pause."""
    signature = numba.types.void(*[numba.types.int64] * 5)
    compiled = numba.cfunc(signature, nopython=True, cache=False, **OPTIONS)(run_table.function)
    return str(compiled.inspect_llvm()).replace("llvm.x86.sse2.pause", "pause")


def test_threads_meet_by_acquire_and_release(interpreter: str) -> None:
    """Reading the counters, claiming a part, and reporting it as done."""
    atomics = re.findall(r"= (?:load atomic|cmpxchg) .*", interpreter)
    exchanges = [line for line in atomics if "cmpxchg" in line]
    assert len(exchanges) >= 2 and len(atomics) - len(exchanges) >= 3
    for line in atomics:
        assert re.search(r"acq_rel acquire" if line in exchanges else r"acquire", line), line
    assert "monotonic" not in interpreter and "unordered" not in interpreter


def test_exchanges_without_large_atomics(interpreter: str) -> None:
    """ARM's first atomics: a loop of an acquiring load and a releasing store."""
    assembly = assemble(interpreter, "cortex-a72")
    acquiring, releasing = count(assembly, "ldaxr", "stlxr")
    assert acquiring == releasing >= 2
    assert count(assembly, "ldxr", "stxr") == [0, 0]
    assert count(assembly, "ldar")[0] >= 3


@pytest.mark.parametrize("processor", ["neoverse-n1", "apple-m1"])
def test_exchanges_in_one_instruction(interpreter: str, processor: str) -> None:
    assembly = assemble(interpreter, processor)
    assert count(assembly, "casal")[0] >= 2
    assert count(assembly, "cas", "casa", "casl", "ldxr", "stxr") == [0] * 5
    assert sum(count(assembly, "ldar", "ldapr", "ldapur")) >= 3
