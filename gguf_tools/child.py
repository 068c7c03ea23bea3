"""Python processes of our own, for work on files that nobody vouches for.

What a file's regular expressions or templates do cannot be bounded from inside the interpreter: one
C call may take all memory or never return. In a process of its own it can be killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gguf_tools.closing import Closeable

ROOT = str(Path(__file__).resolve().parent.parent)
MEMORY_LIMIT = 4 << 30  # bytes of address space, where the system can limit it
FAILURES = (OSError, ValueError, subprocess.SubprocessError)  # of a process that is asked


class Question(Closeable):
    """`main(arguments)` of a module, running in a process of its own from now on.

    To be closed, by the end of a `with` block: the process ends there if it has not yet.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, waits: bool = False) -> None:
        """With `waits` its standard input stays open until the answer is asked for."""
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        try:
            self._process = subprocess.Popen(
                python_command(module, arguments),
                stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # Threads of these libraries would wait for each other by spinning.
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OPENBLAS_NUM_THREADS": "1"},
            )
        except OSError as error:  # no process can be had: that is the answer
            self._failure = error

    def tell(self, line: object) -> None:
        """Write a line of JSON to its standard input; if it is gone, `answer` will say so."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(line).encode() + b"\n")
                self._process.stdin.flush()

    def answer(self, *, seconds: float) -> Any:
        """The JSON that it writes, waited for so long.

        Raises one of FAILURES, subprocess.TimeoutExpired among them.
        """
        if self._process is None:
            raise self._failure or ValueError("the question is closed")
        written, _ = self._process.communicate(timeout=seconds)  # closes standard input
        if self._process.returncode != 0:
            raise subprocess.CalledProcessError(self._process.returncode, self._process.args)
        return json.loads(written)

    def close(self) -> None:
        if self._process is not None:
            with self._process as process:
                process.kill()
            self._process = None


def limit_memory(n_bytes: int = MEMORY_LIMIT) -> None:
    """Let this process have no more address space than this, where the system can limit it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def python_command(module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line that calls `main(arguments)` of a module of this project.

    The child looks for modules where this process does, but not in the working directory: a file
    there could take the place of a module of the library.
    """
    places = [path for path in sys.path if os.path.isabs(path) and not _is_here(path)]
    code = (
        f"import gc, sys; sys.path[:] = {[ROOT, *places]!r}; from {module} import main; "
        f"status = main({list(arguments)!r}); gc.freeze(); sys.exit(status)"  # ends at once
    )
    return [sys.executable, "-c", code]


def _is_here(path: str) -> bool:
    try:
        return os.path.samefile(path, os.curdir)
    except OSError:  # one of the two is no folder
        return False
