"""Memory goes back to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Every other block is freed: what is between keeps the C library from shrinking its heap by itself.
PROGRAM = """
import re
import numpy as np
from gguf_tools.memory import return_memory

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

blocks = [np.ones(5000) for _ in range(4000)]
del blocks[::2]
before = held()
return_memory()
print(before - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep nothing")
def test_what_is_free_goes_back() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) > 40  # MiB, of 76
