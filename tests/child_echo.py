"""What test_child starts: prints its arguments and returns their number."""

import sys
import textwrap
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    sys.stdout.buffer.write(textwrap.dedent(repr(list(arguments))).encode())
    return len(arguments)
