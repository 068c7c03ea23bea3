"""Memory that the C library holds on to."""

import ctypes
from contextlib import suppress


def return_memory() -> None:
    """Give the system what is free again; glibc keeps it for what may come.

    For where much has just been dropped, and others wait for room. Elsewhere it does nothing.
    """
    with suppress(OSError, AttributeError):  # another system, or another C library
        ctypes.CDLL(None).malloc_trim(0)
