"""Kernels kept on disk: compiled once, found again, and compiled again where they are damaged.

A stand-in says what the GPU can compute, and takes the machine code that is loaded on it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed: pip install '.[dev]'", allow_module_level=True)

from numba import cuda, types

from runtime.kernels.cuda import kept, products
from tests.cuda.test_code import find_linker, find_toolkit

ROOT = Path(__file__).parents[2]
needs_toolkit = pytest.mark.skipif(
    bool(reason := find_toolkit() or find_linker()), reason=reason or "it is there"
)
FLOATS = types.Array(types.float32, 1, "C")
NUMBERS = (FLOATS, types.int64, types.Array(types.int8, 1, "C"), FLOATS, FLOATS, types.int64)


class GPU:
    """What numba-cuda asks of a device and of its context."""

    def __init__(self) -> None:
        self.device = SimpleNamespace(compute_capability=(8, 0), id=0)
        self.loaded: list[bytes] = []

    def create_module_image(self, code: Any, *callbacks: object) -> SimpleNamespace:
        self.loaded.append(bytes(code.code))
        module = SimpleNamespace(initialized=True)
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(module=module))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    found = GPU()
    monkeypatch.setattr(cuda, "get_current_device", lambda: found.device)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: found.device)
    monkeypatch.setattr("numba.cuda.codegen.devices.get_context", lambda: found)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(kept, "CACHE_FOLDER", tmp_path / "kernels" / "0")
    kept.folder.cache_clear()
    found = kept.folder()
    assert found is not None and found.parent == tmp_path / "kernels"
    yield found
    kept.folder.cache_clear()


def start(gpu: GPU, name: str = "quantise") -> bool:
    """Load `quantise` on the GPU as a process that begins does: whether it came from disk."""
    fresh = cuda.jit(products.quantise.py_func)
    fresh._cache = kept.Entries(name)
    kernel = fresh.compile(NUMBERS)
    kernel.bind()
    assert kernel.argument_types == NUMBERS
    return sum(fresh.stats.cache_hits.values()) == 1


@needs_toolkit
def test_a_kernel_is_compiled_once(gpu: GPU, folder: Path) -> None:
    assert kept.is_empty()
    assert not start(gpu) and start(gpu)
    assert not kept.is_empty()
    first, again = gpu.loaded
    assert first == again and first[:4] == b"\x7fELF"
    assert not start(gpu, "another name")
    gpu.device.compute_capability = (8, 9)
    assert not start(gpu)
    names = sorted(path.name.split(".")[:2] for path in folder.iterdir())
    assert names == [["another name", "sm_80"], ["quantise", "sm_80"], ["quantise", "sm_89"]]


@needs_toolkit
@pytest.mark.parametrize("damage", ["empty", "zeros", "half", "a bit turned"])
def test_a_damaged_entry_is_compiled_again(damage: str, gpu: GPU, folder: Path) -> None:
    start(gpu)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    middle = len(whole) // 2
    turned = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    damaged = {"empty": b"", "zeros": bytes(100), "half": whole[:middle], "a bit turned": turned}
    entry.write_bytes(damaged[damage])
    assert not start(gpu) and start(gpu)


@needs_toolkit
def test_a_folder_that_is_gone(gpu: GPU, folder: Path) -> None:
    folder.rmdir()
    assert not start(gpu) and not start(gpu) and kept.is_empty()
    assert len(gpu.loaded) == 2


def test_nothing_is_kept_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "CACHE_FOLDER", None)
    kept.folder.cache_clear()
    assert kept.folder() is None and kept.is_empty()
    kept.folder.cache_clear()


def test_names_tell_kernels_apart() -> None:
    with pytest.raises(ValueError, match="quantise is the name of another kernel"):
        kept.kernel("quantise")


def test_sources() -> None:
    """What kernels import of the project is a part of the folder's name."""
    sources = {path for pattern in kept.SOURCES for path in ROOT.glob(pattern)}
    quants = (ROOT / "gguf_tools/quants/__init__.py", ROOT / "gguf_tools/quants/iq4.py")
    for path in ROOT.glob("runtime/kernels/cuda/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                ("gguf_tools", "runtime")
            ):
                found = ROOT / str(node.module).replace(".", "/")
                assert {found.with_suffix(".py"), found / "__init__.py"} & sources, (
                    f"{path.name} imports {node.module}"
                )
    assert quants[1] in sources
