"""Python processes of our own, for work on files that nobody vouches for.

What a file's regular expressions or templates do cannot be bounded from inside the interpreter: one
C call may take all memory or never return. In a process of its own it can be killed.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def python_command(module: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line that calls `main(arguments)` of a module of this project.

    The child looks for modules where this process does, but not in the working directory: a file
    there could take the place of a module of the library.
    """
    places = [path for path in sys.path if os.path.isabs(path) and not _is_here(path)]
    code = (
        f"import sys; sys.path[:] = {[ROOT, *places]!r}; from {module} import main; "
        f"sys.exit(main({list(arguments)!r}))"
    )
    return [sys.executable, "-c", code]


def _is_here(path: str) -> bool:
    try:
        return os.path.samefile(path, os.curdir)
    except OSError:  # one of the two is no folder
        return False
