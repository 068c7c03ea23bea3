"""What an installation contains."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in ("gguf_tools", "runtime")
        for path in (ROOT / package).rglob("*.py")
    }
    assert listed == folders | {"gguf_tools.embedded"}
    assert (ROOT / "models" / "stories260k" / "model.safetensors").is_file()


def test_every_data_file_is_listed() -> None:
    """Whatever lies beside the code is installed with it."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = {
        path
        for package, patterns in settings["tool"]["setuptools"]["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    present = {
        path
        for package in ("gguf_tools", "runtime")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert present <= listed
    assert ROOT / "runtime" / "quality" / "calibration.txt" in present
