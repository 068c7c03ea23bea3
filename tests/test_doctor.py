"""`doctor`: the facts about this machine, and how they are told."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gguf_tools.cores import choose_threads
from gguf_tools.kernel_files import CACHE_FOLDER
from gguf_tools.processor import DOT, core_name
from runtime.backends.cuda_toolkit import missing_packages
from runtime.bandwidth import buffer_size, last_level_cache, measure_bandwidth
from runtime.doctor import (
    CUDA,
    DOT_MEANINGS,
    Facts,
    KernelCache,
    VectorUnit,
    describe,
    dot_meaning,
    examine,
    name_in_cpuinfo,
    processor_name,
    to_json,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def facts() -> Facts:
    return examine()


def run_doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    code = "from runtime.umbrella import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=120,
        check=False,
    )


def lines(facts: Facts) -> dict[str, str]:
    """The texts by label, those of several lines together."""
    texts: dict[str, str] = {}
    last = ""
    for label, text in describe(facts):
        last = label or last
        texts[last] = f"{texts.get(last, '')}\n{text}".strip()
    return texts


def test_facts_hold_together(facts: Facts) -> None:
    processor = facts.processor
    assert processor.name and processor.architecture
    assert 1 <= processor.threads <= processor.allowed_cores <= processor.logical_cores
    assert 0 < facts.memory_available <= facts.memory_total == psutil.virtual_memory().total
    assert facts.vector_unit.dot == DOT
    assert [each.threads for each in facts.read_bandwidth] == sorted({1, processor.threads})
    assert all(each.bytes_per_second > 1e6 for each in facts.read_bandwidth)
    assert facts.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numba", "llvmlite", "numpy"} < set(facts.versions)
    assert facts.cuda.backend == (missing_packages() is None)


def test_the_memory_that_is_read_is_larger_than_the_caches() -> None:
    assert last_level_cache() > 0
    assert buffer_size() >= min(2 * last_level_cache(), 256 << 20)
    assert measure_bandwidth(3) > 0


def test_this_machine_s_choice_has_words() -> None:
    assert DOT in DOT_MEANINGS
    assert dot_meaning("some other") != ""


def test_a_processor_has_a_name() -> None:
    assert processor_name().strip()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel\t\t: 26\nmodel name\t: Some CPU @ 3 GHz\n", "Some CPU @ 3 GHz"),
        ("processor\t: 0\nCPU part\t: 0xd0b\n\nModel\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", ""),
    ],
    ids=["x86", "a board", "a server with ARM cores"],
)
def test_names_in_cpuinfo(text: str, name: str) -> None:
    assert name_in_cpuinfo(text) == name


def test_a_core_has_a_name_that_says_something() -> None:
    assert core_name() == core_name().strip() != "generic"


@pytest.mark.parametrize(
    ("physical", "logical", "threads"), [(4, 8, 4), (8, 2, 2), (None, 8, 8), (None, 1, 1)]
)
def test_threads_by_default(physical: int | None, logical: int, threads: int) -> None:
    """A system that tells no physical cores (some with ARM) gets more than one thread."""
    assert choose_threads(physical, logical) == threads


def test_what_is_told(facts: Facts) -> None:
    told = lines(facts)
    assert list(told) == [
        "processor",
        "cores",
        "byte products",
        "memory",
        "read bandwidth",
        "kernel cache",
        "versions",
        "CUDA",
    ]
    assert facts.processor.name in told["processor"]
    assert told["byte products"].startswith(f"{DOT}")
    assert "GB/s with 1 thread" in told["read bandwidth"]


def test_a_slow_machine_is_told_so(facts: Facts) -> None:
    unit = VectorUnit("portable", dot_meaning("portable"), True)
    assert "slow" in lines(replace(facts, vector_unit=unit))["byte products"]


@pytest.mark.skipif(CACHE_FOLDER is None, reason="kernels are kept in memory only")
def test_kernels_on_disk_are_counted(facts: Facts) -> None:
    """That which measures the memory is one of them."""
    cache = facts.kernel_cache
    assert cache.usable and cache.kernels >= 1 and cache.bytes > 1000 * cache.kernels


def test_a_missing_cache_is_told(facts: Facts) -> None:
    cache = KernelCache(None, False, "/x cannot be written (Read-only file system)", 0, 0)
    told = lines(replace(facts, kernel_cache=cache))["kernel cache"]
    assert told.startswith("none: /x cannot be written") and "compiles" in told


@pytest.mark.parametrize(
    ("cuda", "says"),
    [
        (CUDA(False, None, ()), "no NVIDIA driver is visible"),
        (CUDA(False, "12.4", ()), "driver for CUDA 12.4 is visible with no device"),
        (CUDA(True, "12.4", ("A\x1b[2J", "B")), r"visible with A\x1b[2J, B"),
    ],
)
def test_cuda_is_told_honestly(facts: Facts, cuda: CUDA, says: str) -> None:
    told = lines(replace(facts, cuda=cuda))["CUDA"]
    assert told.endswith(says)
    assert ("pip install 'gguf-tools[cuda]'" in told) == (not cuda.backend)


def test_json_object(facts: Facts) -> None:
    shown = json.loads(json.dumps(to_json(facts)))
    assert list(shown) == [
        "processor",
        "vector_unit",
        "memory_total",
        "memory_available",
        "read_bandwidth",
        "kernel_cache",
        "versions",
        "cuda",
    ]
    assert shown["vector_unit"]["dot"] == DOT


def test_command() -> None:
    ended = run_doctor("--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["kernel_cache"]["usable"] in (True, False)
    ended = run_doctor(GGUF_TOOLS_CACHE="off")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "none: switched off by GGUF_TOOLS_CACHE" in ended.stdout


def test_command_without_a_usable_cache_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    ended = run_doctor("--json", GGUF_TOOLS_CACHE=str(blocked))
    assert (ended.returncode, ended.stderr) == (0, "")
    cache = json.loads(ended.stdout)["kernel_cache"]
    assert not cache["usable"] and cache["folder"] is None and str(blocked) in cache["reason"]


def test_command_on_a_machine_without_a_known_vector_unit(tmp_path: Path) -> None:
    ended = run_doctor(GGUF_TOOLS_DOT="portable", GGUF_TOOLS_CACHE=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "portable (set by GGUF_TOOLS_DOT): no vector unit" in ended.stdout
    assert "slow" in ended.stdout
