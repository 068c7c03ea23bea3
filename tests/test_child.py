import subprocess
from pathlib import Path

import pytest

from gguf_tools.child import Question, python_command

MODULE = "tests.child_echo"


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = python_command(MODULE, arguments)
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


def test_arguments_and_exit_code() -> None:
    done = run("a b", "'\"\n", "\u00e9")
    assert (done.returncode, done.stdout) == (3, repr(["a b", "'\"\n", "\u00e9"]))


def test_working_directory_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "textwrap.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run().returncode == 0


def test_a_question_that_nobody_waits_for_ends() -> None:
    question = Question("time", [])
    with question:
        process = question._process
        assert process is not None
    assert process.returncode is not None and process.returncode != 0
    with pytest.raises(ValueError, match="closed"):
        question.answer(seconds=1.0)
