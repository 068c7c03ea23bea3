"""The cache of compiled kernels: shared by processes, absent, in the way, damaged."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_tools.errors import DeviceError
from gguf_tools.jit import check_processor, kernel
from gguf_tools.kernel_files import KERNEL_SOURCES

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gguf_tools.", "runtime.")
PROGRAM = """
import numpy as np
from gguf_tools import kernel_files
from gguf_tools.simd import ld_f32, st_f32
from runtime.kernels.floats import matvec_f32
x = np.arange(40, dtype=np.float32); y = np.zeros(1, np.float32)
matvec_f32(x.ctypes.data, 160, 0, 1, x.ctypes.data, y.ctypes.data, 40)
assert y[0] == (x * x).sum()
print(kernel_files.CACHE_FOLDER, kernel_files.NO_CACHE_REASON, sep="|")
"""
WITHOUT_COMPILER = """
import sys
assert "numba" not in sys.modules
"""


def start(cache: str, program: str = PROGRAM) -> subprocess.Popen[str]:
    environment = {**os.environ, "GGUF_TOOLS_CACHE": cache}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.strip()


def test_two_processes_at_once(tmp_path: Path) -> None:
    both = [start(str(tmp_path)) for _ in range(2)]
    folders = {finish(process) for process in both}
    assert len(folders) == 1
    kept = list(tmp_path.rglob("*.o"))
    assert kept
    before = {path: path.stat().st_mtime_ns for path in kept}
    finish(start(str(tmp_path)))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.o")} == before


def test_no_cache_folder(tmp_path: Path) -> None:
    assert finish(start("off")) == "None|switched off by GGUF_TOOLS_CACHE"
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    out = finish(start(str(blocked / "cache")))
    assert out.startswith("None|") and "cannot be written" in out


@pytest.mark.parametrize("damage", ["emptied", "cut", "changed"])
def test_damaged_cache_entry(tmp_path: Path, damage: str) -> None:
    """Machine code that is not what was compiled is not run: it is compiled again."""
    finish(start(str(tmp_path)))
    (path,) = tmp_path.rglob("*.o")
    whole = path.read_bytes()
    changed = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    path.write_bytes({"emptied": b"", "cut": whole[:2000], "changed": changed}[damage])
    finish(start(str(tmp_path)))
    finish(start(str(tmp_path), PROGRAM + WITHOUT_COMPILER))


def test_kernels_from_disk_need_no_compiler(tmp_path: Path) -> None:
    finish(start(str(tmp_path)))
    finish(start(str(tmp_path), PROGRAM + WITHOUT_COMPILER))


def test_kernels_compiled_by_two_processes(tmp_path: Path) -> None:
    """The progress counts up to all; each kernel is on disk afterwards, and works."""
    program = PROGRAM.replace(
        "x = np.arange",
        """
from gguf_tools.jit import compile_kernels
from runtime.kernels.floats import F16, F32
wanted = [F32.matvec, F32.rows, F16.matvec, F16.rows]
seen = list(compile_kernels(wanted))
assert seen[0] == (0, 4) and seen[-1] == (4, 4) and seen == sorted(seen), seen
assert all(kernel.is_ready for kernel in wanted)
assert list(compile_kernels(wanted)) == []
x = np.arange""",
    )
    assert finish(start(str(tmp_path), program))
    assert len(list(tmp_path.rglob("*.o"))) == 4
    finish(start("off", program))


BACKGROUND = """
import time
from gguf_tools.jit import Background
from runtime.kernels.floats import F32
wanted = [F32.matvec.for_columns(n) for n in (2, 3)]
background = Background(wanted)
assert not background.is_done()
for _ in range(600):
    if background.is_done():
        break
    time.sleep(0.1)
assert all(kernel.is_ready for kernel in wanted) and not F32.matvec.is_ready
again = Background([F32.matvec])
assert not again.is_done()
again.close()
"""


@pytest.mark.filterwarnings("error")
def test_compiling_in_the_background(tmp_path: Path) -> None:
    """Each number of columns is a kernel of its own; one that is stopped leaves no process."""
    finish(start(str(tmp_path), BACKGROUND))
    nowhere = start("off", BACKGROUND.replace("range(600)", "range(2)"))
    _, error = nowhere.communicate(timeout=120)
    assert nowhere.returncode != 0 and "AssertionError" in error  # nothing is ever ready


HELPERS = """
import sys
import numpy as np
from runtime.kernels import iq2_s, iq2_xs
for module in {modules}:
    blocks, q = np.arange(1, 83, dtype=np.uint8), np.zeros(256, np.uint8)
    scales = np.zeros(32, np.float32)
    module.rows(blocks.ctypes.data, q.ctypes.data, scales.ctypes.data, 0, 256)
    print(q.tobytes().hex())
"""


def test_kernels_from_disk_keep_their_own_helpers(tmp_path: Path) -> None:
    """Two kernels whose helpers come out of one function, compiled each in its process."""
    alone = [
        finish(start(str(tmp_path), HELPERS.format(modules=f"[{name}]")))
        for name in ("iq2_s", "iq2_xs")
    ]
    assert alone[0] != alone[1]
    assert finish(start(str(tmp_path), HELPERS.format(modules="iq2_s, iq2_xs"))).split() == alone


def test_wrong_letters() -> None:
    with pytest.raises(ValueError, match="not"):
        kernel("ix")


def test_processors_without_half_floats() -> None:
    check_processor("x86_64", {"f16c": True})
    check_processor("aarch64", {})
    with pytest.raises(DeviceError, match=r"F16C.*--backend reference"):
        check_processor("AMD64", {"avx": True})


def test_kernel_sources() -> None:
    """Whatever kernels import of the project decides what they are compiled to, with exceptions."""
    sources = {path for pattern in KERNEL_SOURCES for path in ROOT.glob(pattern)}
    uncompiled = {"gguf_tools.cache_folder", "gguf_tools.child", "gguf_tools.errors"}
    imported = set()
    for path in sources:
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported |= {name for node in froms for name in project_modules(node)}
    missing = {name for name in imported if module_path(name) not in sources} - uncompiled
    assert imported >= {"gguf_tools.simd", "gguf_tools.quants.search", "runtime.kernels.formats"}
    assert not missing


def project_modules(node: ast.ImportFrom) -> set[str]:
    module = node.module or ""
    found = {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith(PACKAGES) and module_path(name).exists()}


def module_path(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"
