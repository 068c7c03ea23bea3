"""`python -m runtime [run] ...` is the same as `run ...`."""

import sys

from runtime.cli import run_main

COMMANDS = ("run",)

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        del sys.argv[1]
    run_main()
