"""The command lines before they do anything: help, names, and what they do not load."""

import subprocess
import sys

import pytest

HEAVY = ("numpy", "numba", "gguf", "tokenizers", "sentencepiece", "jinja2", "prompt_toolkit")
ENTRIES = {
    "run": ("runtime.cli", "run_main"),
    "gguf": ("runtime.umbrella", "main"),
    "convert": ("gguf_tools.cli", "convert_main"),
}


def call(entry, *arguments):
    """Call a console script's function; the last line of output lists what it has loaded."""
    module, function = ENTRIES[entry]
    code = f"""
import sys
sys.argv = {[entry, *arguments]!r}
from {module} import {function}
try:
    {function}()
finally:
    print("loaded", [name for name in {HEAVY!r} if name in sys.modules])
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    "arguments",
    [("run", "--help"), ("run", "-h"), ("gguf", "--help"), ("gguf", "run", "--help"),
     ("convert", "--help"), ("gguf", "convert", "--help"), ("gguf", "info", "--help"),
     ("gguf", "tokenize", "--help"), ("gguf", "imatrix", "--help")],
)  # fmt: skip
def test_help_loads_nothing_heavy(arguments):
    done = call(*arguments)
    assert done.returncode == 0 and done.stderr == ""
    assert "Usage:" in done.stdout
    assert done.stdout.rstrip().endswith("loaded []")


def test_the_umbrella_names_every_command():
    shown = call("gguf", "--help").stdout
    assert all(name in shown for name in ("convert", "info", "run", "tokenize"))


def test_run_explains_every_option():
    shown = call("run", "--help").stdout
    options = (
        "prompt system max-tokens raw chat-template temp top-k top-p min-p repeat-penalty "
        "repeat-last-n seed stop ctx context-policy threads gpu-layers device "
        "vram-limit kv-offload cpu-moe plan json backend no-stats"
    )
    assert [name for name in options.split() if f"--{name}" not in shown] == []


def test_an_unknown_command():
    done = call("gguf", "fly")
    assert done.returncode == 2 and "fly" in done.stderr


def module(*arguments):
    command = [sys.executable, "-m", "runtime", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_module_is_the_command():
    assert module("--help").stdout == module("run", "--help").stdout
    assert "absent.gguf" in module("absent.gguf", "-p", "x").stderr
    assert "absent.gguf" in module("run", "absent.gguf", "-p", "x").stderr
