"""How a command ends: the exit code, and at most one line on standard error."""

import subprocess
import sys
from pathlib import Path

import pytest


def run_main(body: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import os, sys\n"
        "from gguf_tools.command import run_command\n"
        "from gguf_tools.errors import FormatError\n"
        f"def main():\n    {body}\n"
        "run_command(main)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "code", "errors"),
    [
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("raise FormatError('a: b:\\n c')", 1, "error: a: b: c\n"),
        ("open('/no/such')", 1, "error: /no/such: No such file or directory\n"),
        ("open('/no/su\\x1bch')", 1, "error: /no/su\\x1bch: No such file or directory\n"),
        ("raise OSError('odd')", 1, "error: odd\n"),
        ("raise MemoryError", 1, "error: there is not enough memory for this\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("os.kill(os.getpid(), 15)", 143, ""),
        ("raise BrokenPipeError", 1, ""),
    ],
)
def test_endings(body: str, code: int, errors: str) -> None:
    ended = run_main(body)
    assert (ended.returncode, ended.stderr, ended.stdout) == (code, errors, "")


def test_our_own_mistakes_are_not_hidden() -> None:
    ended = run_main("raise ValueError('a wrong call')")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


def test_characters_that_the_terminal_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    ended = run_main("print('\\u4e16'); raise FormatError('\\u4e16')")
    assert (ended.stdout, ended.stderr) == ("\\u4e16\n", "error: \\u4e16\n")
