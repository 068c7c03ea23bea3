"""How many threads work gets when the user names none."""

import os

import psutil


def default_threads() -> int:
    """The physical cores that this process may use."""
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(psutil.cpu_count(logical=False) or 1, logical or 1))
