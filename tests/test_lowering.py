"""What the lowering decides: barriers, what is quantised again, and what threads own."""

from pathlib import Path

import numpy as np

from gguf_tools.reader import GGUFFile
from runtime.backends.cpu import CPUBackend
from runtime.backends.lowering import Table, columns, items, reads, writes
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.kernels import attention, elementwise, matmul
from runtime.kernels.interpreter import ROWS, run_table
from tests.tiny import llama_file


def barriers(*operations) -> list[int]:
    table = Table()
    for accesses in operations:
        table.add(elementwise.add, (), accesses)
    return [row[1] for row in table.rows]


def test_barriers_only_where_threads_meet() -> None:
    own, other = columns(64), items(1)
    # written and read in the same parts: none; in other parts: one
    assert barriers([writes("a", own)], [reads("a", own)]) == [0, 0]
    assert barriers([writes("a", own)], [reads("a", other)]) == [0, 1]
    assert barriers([writes("a", own)], [reads("a")]) == [0, 1]
    # reading twice is free; overwriting what another thread may still read is not
    assert barriers([reads("a")], [reads("a", own)]) == [0, 0]
    assert barriers([reads("a")], [writes("a", own)]) == [0, 1]
    # another buffer never matters, and one barrier clears what came before it
    assert barriers([writes("a", own)], [writes("b", other)], [reads("b", other)]) == [0, 0, 0]
    assert barriers([writes("a", own)], [reads("a")], [reads("a", other)]) == [0, 1, 0]
    assert barriers([writes("a", own)], [writes("b", own)], [reads("b")], [reads("a")]) == [
        0,
        0,
        1,
        0,
    ]


def decode_kernels(path: Path, threads: int = 2) -> list[tuple[str, int]]:
    names = {
        kernel.address: name
        for module in (attention, elementwise, matmul)
        for name, kernel in vars(module).items()
        if hasattr(kernel, "address")
    }
    with GGUFFile(path) as file:
        program = build_program(file, read_config(file))
        backend = CPUBackend(program, n_ctx=64, n_threads=threads, n_batch=32)
        (table,) = backend._decode
        backend.close()
        return [(names[int(row[0])], int(row[1])) for row in table]


def test_a_decode_layer(tmp_path: Path) -> None:
    """Norms and quantising are every thread's own; six barriers a layer."""
    path = llama_file(tmp_path / "m.gguf", quant="Q8_0", n_layers=1)
    steps = decode_kernels(path)
    assert [name for name, _ in steps] == [
        *("rms_norm", "quantise", "matvec", "matvec", "matvec"),
        *("rope", "rope", "store_kv", "attend_chunks", "combine"),
        *("quantise", "matvec", "add", "rms_norm", "quantise", "matvec", "matvec"),
        *("gate_silu", "quantise", "matvec", "add"),
        *("rms_norm", "quantise", "matvec"),
    ]
    waits = [i for i, (_, barrier) in enumerate(steps) if barrier]
    assert [steps[i][0] for i in waits] == [
        *("rope", "attend_chunks", "combine"),  # q, k, v done; cache written; chunks done
        *("rms_norm", "quantise", "rms_norm"),  # x done; gate done; x done
    ]


def test_float_weights_need_no_quantising(tmp_path: Path) -> None:
    steps = decode_kernels(llama_file(tmp_path / "m.gguf", quant="F16", n_layers=1))
    assert "quantise" not in [name for name, _ in steps]


def test_shares_cover_every_column_once() -> None:
    """Threads' columns, as the compiled `share` computes them, through a real operation."""
    for width, threads in ((1, 3), (31, 2), (64, 3), (172, 4), (576, 5)):
        padded = (width + ROWS - 1) // ROWS * ROWS + 32
        x = np.ones((1, padded), np.float32)
        y = np.zeros((1, padded), np.float32)
        table = Table()
        place = lambda a: (a.ctypes.data, 0, a.strides[0])  # noqa: E731
        table.add(elementwise.add, (*place(x), *place(y), width), [])
        rows = table.array()
        barrier = np.zeros(32, np.int32)
        for thread in range(threads):
            # One thread after another: a count of 1 at the barrier never waits.
            state = np.array([1, 0, threads, barrier.ctypes.data, 0, 0], np.int64)
            _run_alone(rows, state, thread)
        assert (y[0, :width] == 1).all()


def _run_alone(rows: np.ndarray, state: np.ndarray, thread: int) -> None:
    """Run a table of one operation without the meeting at its end."""
    import ctypes

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    kind(int(rows[0, 0]))(rows.ctypes.data, state.ctypes.data, thread)
    assert run_table.letters == "iiii"
