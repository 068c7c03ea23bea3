"""The folder for what can be made or fetched again: compiled kernels, models."""

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "GGUF_TOOLS_CACHE"
"""Environment variable that moves the cache folder; `off` keeps compiled kernels in memory only."""


def cache_root() -> Path | None:
    """The user's cache folder for this program (not made yet), or None when switched off."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return None if chosen.lower() == "off" else Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gguf-tools"
