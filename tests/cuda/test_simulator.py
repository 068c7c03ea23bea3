"""The kernels, their launches and the backend in numba-cuda's simulator.

The simulator replaces numba.cuda for a whole process, so each file of `simulated` runs in its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "device"
ROOT = FOLDER.parents[2]
SIMULATED = {
    "NUMBA_ENABLE_CUDASIM": "1",
    "NUMBA_DISABLE_JIT": "1",  # what kernels share with code for the CPU is plain Python there
    "GGUF_TOOLS_CACHE": "off",
}

needed = ("numba_cuda", "greenlet")
absent = [name for name in needed if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)}: pip install '.[dev]'")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("check_*.py")))
def test_simulated(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    options = ["-p", "tests.cuda.simulator", "-o", "python_files=check_*.py", FOLDER / file]
    result = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **SIMULATED, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
