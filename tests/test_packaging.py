"""What an installation contains."""

from fnmatch import fnmatch
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


def test_every_file_that_is_no_module_is_listed() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    elsewhere = settings["tool"]["setuptools"]["package-dir"]
    listed = {
        f"{elsewhere.get(package, package.replace('.', '/'))}/{name}"
        for package, names in settings["tool"]["setuptools"]["package-data"].items()
        for name in names
    }
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("gguf_tools", "runtime")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert [path for path in sorted(found) if not any(fnmatch(path, each) for each in listed)] == []
