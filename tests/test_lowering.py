"""What the lowering decides: groups, waits, and what threads own; and how parts are claimed."""

from pathlib import Path

import numpy as np

from gguf_tools.reader import GGUFFile
from runtime.backends.cpu import CPUBackend
from runtime.backends.crew import Crew, ReadyTable, run
from runtime.backends.memory import Arena
from runtime.backends.table import Access, Table, Units, columns, items, reads, writes
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.kernels import attention, elementwise, experts, gates, kv_cache, matmul
from runtime.kernels.interpreter import (
    EPOCH,
    GROUP,
    N_THREADS,
    N_TOKENS,
    PROGRESS_BYTES,
    ROWS,
    STATE_FIELDS,
    WAIT_SINCE,
)
from runtime.program import Program
from runtime.stages import whole
from tests.programs import mixture
from tests.tiny import llama_file


def waits(*operations: tuple[str, list[Access]]) -> list[tuple[int, int]]:
    """(wait since, operations in the group) of each operation."""
    table = Table()
    for sharing, accesses in operations:
        table.add(elementwise.add, (), accesses, Units(2, parts=2), sharing)
    return [(row[WAIT_SINCE], row[GROUP]) for row in table.rows]


def test_waits_only_where_threads_meet() -> None:
    own, other = columns(64), items(1)
    make, use = [writes("a", own)], [reads("a", own)]
    # what follows on the same columns is claimed together; on other parts it waits
    assert waits((own, make), (own, use)) == [(-1, 2), (-1, 0)]
    assert waits((own, make), (other, [reads("a", other)])) == [(-1, 1), (0, 1)]
    assert waits((own, make), ("", [reads("a")])) == [(-1, 1), (0, 1)]
    assert waits((own, make), (own, [reads("a")])) == [(-1, 1), (0, 1)]
    # the same columns, but not claimed together: another thread may have made them
    between = (other, [writes("b", other)])
    assert waits((own, make), between, (own, use)) == [(-1, 1), (-1, 1), (0, 1)]
    # reading twice is free; overwriting what another thread may still read is not
    assert waits(("", [reads("a")]), (own, use)) == [(-1, 1), (-1, 1)]
    assert waits(("", [reads("a")]), (own, make)) == [(-1, 1), (0, 1)]
    # one wait covers all that came before it
    steps = [
        (own, make),
        (own, [writes("b", own)]),
        ("", [reads("b")]),
        (other, [reads("a", other)]),
    ]
    assert waits(*steps) == [(-1, 2), (-1, 0), (0, 1), (-1, 1)]


def decode_steps(path: Path) -> list[tuple[str, int, int]]:
    """(kernel, wait since, operations in the group) of each operation of a decode step."""
    with GGUFFile(path) as file:
        return steps_of(build_program(file, read_config(file)))


def steps_of(program: Program) -> list[tuple[str, int, int]]:
    names = {
        kernel.address: name
        for module in (attention, elementwise, experts, gates, kv_cache, matmul)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "address")
    }
    backend = CPUBackend(whole(program), n_ctx=64, n_threads=2, n_batch=32)
    (table,) = backend.spans[0].decode
    backend.close()
    rows = table.operations
    return [(names[int(row[0])], int(row[WAIT_SINCE]), int(row[GROUP])) for row in rows]


def groups_of(steps: list[tuple[str, int, int]]) -> list[list[str]]:
    """The kernels that are claimed together."""
    return [
        [name for name, _, _ in steps[i : i + size]]
        for i, (_, _, size) in enumerate(steps)
        if size > 1
    ]


def test_a_decode_layer(tmp_path: Path) -> None:
    """Norms and quantising are every thread's own; seven waits a layer."""
    path = llama_file(tmp_path / "m.gguf", quant="Q8_0", n_layers=1)
    steps = decode_steps(path)
    assert [name for name, _, _ in steps] == [
        *("rms_norm", "quantise", "matvec", "matvec", "matvec"),
        *("rope", "rope", "store_kv", "attend_chunks", "combine"),
        *("quantise", "matvec", "add", "rms_norm", "quantise", "matvec", "matvec"),
        *("gate_silu", "quantise", "matvec", "add"),
        *("rms_norm", "quantise", "matvec"),
    ]
    assert groups_of(steps) == [
        ["matvec", "matvec"],  # k and v, of the same width
        ["rope", "store_kv"],
        ["matvec", "add"],
        ["matvec", "matvec", "gate_silu"],
        ["matvec", "add"],
    ]
    assert [name for name, since, _ in steps if since >= 0] == [
        *("rope", "attend_chunks", "combine"),  # q, k, v made; cache written; chunks done
        *("rms_norm", "quantise", "rms_norm"),  # x made; gate made; x made
    ]


def test_a_decode_layer_of_experts() -> None:
    """Each thread routes for itself; the gate joins the products it needs, and so does the sum."""
    steps = steps_of(mixture(np.random.default_rng(0), quant="Q8_0", biases=True))
    assert [name for name, _, _ in steps] == [
        *("rms_norm", "matvec", "route", "quantise"),
        *("expert_matvec", "expert_bias", "expert_matvec", "expert_bias", "gate_silu"),
        *("quantise_slots", "expert_matvec", "expert_bias", "expert_sum", "add", "matvec"),
    ]
    assert groups_of(steps) == [
        ["expert_matvec", "expert_bias", "expert_matvec", "expert_bias", "gate_silu"],
        ["expert_matvec", "expert_bias", "expert_sum", "add"],
    ]
    assert [name for name, since, _ in steps if since >= 0] == [
        *("route", "quantise_slots", "matvec"),  # scores made; gate made; x made
    ]


def test_float_weights_need_no_quantising(tmp_path: Path) -> None:
    steps = decode_steps(llama_file(tmp_path / "m.gguf", quant="F16", n_layers=1))
    assert "quantise" not in [name for name, _, _ in steps]


def test_parts_cover_every_column_once() -> None:
    """A sum over odd widths and parts, claimed by real threads at once, in many steps."""
    for width, parts in ((1, 3), (31, 2), (64, 3), (172, 4), (576, 5), (2000, 64)):
        padded = (width + ROWS - 1) // ROWS * ROWS + 32
        x, y = np.ones((2, 1, padded), np.float32)
        y[:] = 0
        table = Table()
        place = [a for array in (x, y) for a in (array.ctypes.data, 0, array.strides[0])]
        units = Units((width + ROWS - 1) // ROWS, parts=parts)
        table.add(elementwise.add, (*place, width), [], units, columns(width))
        arena = Arena()
        ready = ReadyTable(table.array(), arena.zeros(PROGRESS_BYTES))
        crew = Crew(3)
        for epoch in range(1, 201):
            state = np.zeros(STATE_FIELDS, np.int64)
            state[[N_TOKENS, N_THREADS, EPOCH]] = 1, 3, epoch
            crew.run(ready, state)
            assert (y[0, :width] == epoch).all()
        crew.close()


def test_a_thread_that_comes_late_changes_nothing() -> None:
    """It finds the step's work done, or a newer step begun, and leaves."""
    x = np.ones((1, 64), np.float32)
    y = np.zeros((1, 64), np.float32)
    table = Table()
    place = [a for array in (x, y) for a in (array.ctypes.data, 0, array.strides[0])]
    table.add(elementwise.add, (*place, 64), [], Units(2, parts=2), columns(64))
    arena = Arena()
    ready = ReadyTable(table.array(), arena.zeros(PROGRESS_BYTES))

    def state(epoch: int) -> np.ndarray:
        block = np.zeros(STATE_FIELDS, np.int64)
        block[[N_TOKENS, N_THREADS, EPOCH]] = 1, 2, epoch
        return block

    run(ready, state(1), 0)
    run(ready, state(1), 1)  # late in its own step
    run(ready, state(2), 0)
    run(ready, state(1), 1)  # a step late
    assert (y == 2).all()
