"""How many threads work gets when the user names none."""

import os

import psutil


def default_threads() -> int:
    """The physical cores that this process may use."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return choose_threads(psutil.cpu_count(logical=False), logical or 1)


def choose_threads(physical: int | None, logical: int) -> int:
    """The physical cores among `logical` ones; all, where the system keeps their number quiet.

    Some ARM systems and containers do; few ARM cores run two threads.
    """
    return min(physical or logical, logical)
