"""Tuning: lines and advice from timings that are given, measuring with fakes, what is kept."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_tools.cache_folder import CACHE_VARIABLE
from gguf_tools.errors import ContextFullError, GGUFError
from gguf_tools.reader import GGUFFile
from runtime.bench import Note, Step
from runtime.devices import FAKES_VARIABLE, find_devices
from runtime.offload import Offload, read_offload
from runtime.split import Wish
from runtime.tune_terminal import chart, check_plots, draw_picture
from runtime.tuned import Tuned, device_names, recall, remember
from runtime.tuning import (
    Line,
    Timing,
    Work,
    advise,
    describe,
    fewest,
    fit_line,
    layer_counts,
    measure,
    thread_counts,
    to_json,
)
from tests.test_run_cli import GREEDY, STORY, run
from tests.tiny import llama_file

WORK = Work(prompt=100, answer=10)
CPU = [Timing(0, 1, 0.02, 0.2), Timing(0, 2, 0.01, 0.1), Timing(0, 4, 0.01, 0.099)]  # 4, 2, 1.99 s


def gpu(n: int, prompt: float, decode: float) -> Timing:
    return Timing(n, 2, prompt, decode)


def test_lines() -> None:
    assert fit_line([2, 4, 6], [5.0, 4.0, 3.0]) == Line(6.0, -0.5)
    assert fit_line([3], [0.25]) == Line(0.25, 0.0)
    line = fit_line([1, 2, 3, 4], [1.0, 0.7, 0.8, 0.5])
    assert line.start == pytest.approx(1.1) and line.slope == pytest.approx(-0.14)
    assert Line(1.0, -0.5).at(4) == 0.0  # no time is negative


def test_few_threads_are_preferred() -> None:
    assert fewest(CPU, WORK).threads == 2  # four are hardly faster
    assert fewest(CPU[:1], WORK).threads == 1


def test_more_layers_where_they_help() -> None:
    timings = [*CPU, gpu(2, 0.008, 0.09), gpu(4, 0.006, 0.08), gpu(6, 0.004, 0.07)]
    advice = advise(timings, WORK)
    assert (advice.gpu_layers, advice.threads) == (6, 2)
    assert advice.seconds == pytest.approx(1.1) and advice.cpu_seconds == pytest.approx(2.0)
    words = "\n".join(describe(advice))
    assert "for an answer of 10 tokens to a prompt of 100: --gpu-layers 6 --threads 2" in words
    assert "saves 1 ms of every token read" in words and "saves 5 ms of every token wr" in words
    assert "the CPU alone takes 2 seconds" in words


def test_none_where_they_do_not() -> None:
    """A step to the GPU that costs more than its layers save."""
    timings = [*CPU, gpu(2, 0.02, 0.3), gpu(6, 0.015, 0.2)]
    advice = advise(timings, WORK)
    assert (advice.gpu_layers, advice.seconds) == (0, advice.cpu_seconds)
    assert "the CPU alone is fastest: layers on a GPU gain nothing here" in describe(advice)
    close = [*CPU, gpu(2, 0.0099, 0.0995), gpu(6, 0.0099, 0.0995)]
    assert advise(close, WORK).gpu_layers == 0  # a gain too small to be one


def test_what_is_asked_for_decides() -> None:
    """Layers that speed up reading and slow down writing."""
    timings = [*CPU, gpu(2, 0.008, 0.12), gpu(6, 0.002, 0.16)]
    assert advise(timings, Work(1000, 1)).gpu_layers == 6
    assert advise(timings, Work(1, 1000)).gpu_layers == 0
    costs = "\n".join(describe(advise(timings, Work(1000, 1))))
    assert "saves 1.5 ms of every token read" in costs and "costs 10 ms of every token" in costs


def test_without_a_gpu() -> None:
    advice = advise(CPU, WORK)
    assert (advice.gpu_layers, advice.threads) == (0, 2)
    assert len(list(describe(advice))) == 1
    with pytest.raises(GGUFError, match="nothing was measured"):
        advise([], WORK)


def test_numbers_to_try() -> None:
    assert [layer_counts(n) for n in (0, 1, 2, 3, 33)] == [
        [], [1], [1, 2], [1, 2, 3], [11, 22, 33],
    ]  # fmt: skip
    counts = thread_counts()
    assert counts == sorted(set(counts)) and counts[0] >= 1
    assert counts[-1] <= (os.cpu_count() or 1)


def test_a_chart() -> None:
    lines = list(chart([*CPU[:2], gpu(6, 0.004, 0.06)], WORK))
    assert lines[0].split() == [
        "gpu-layers", "threads", "prompt", "tokens/s", "decode", "tokens/s", "seconds",
    ]  # fmt: skip
    assert lines[1].split() == ["0", "1", "50.0", "5.0", "4", "#" * 32]
    assert lines[2].split()[-1] == "#" * 16 and lines[3].split()[-1] == "#" * 8


# Measuring.


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama_file(tmp_path / "m.gguf", quant="Q8_0", n_layers=3)


def test_measuring(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKES_VARIABLE, "1GiB")
    with GGUFFile(model) as file:
        events = list(measure(file, WORK, read_offload("auto"), threads=(1, 2), seconds=0.2))
    timings = [event for event in events if isinstance(event, Timing)]
    assert [t.gpu_layers for t in timings] == [0, 0, 4, 1, 3]
    assert [t.threads for t in timings[:2]] == [1, 2]
    assert all(timing.prompt > 0 and timing.decode > 0 for timing in timings)
    steps = [event for event in events if isinstance(event, Step)]
    assert [step.done for step in steps] == list(range(5)) and steps[0].total == 5
    assert len([event for event in events if isinstance(event, Note)]) == 1  # once each
    advice = advise(timings, WORK)
    found = to_json(advice, timings)
    assert found["work"] == {"prompt": 100, "answer": 10} and len(found["timings"]) == 5
    assert set(found["decode_line"]) == {"start", "slope"}


def test_time_is_bounded(model: Path) -> None:
    """A prompt too long for the time is read in part."""
    with GGUFFile(model) as file:
        work = Work(400, 100)
        events = list(measure(file, work, Offload(), threads=(1,), seconds=1e-6))
    (timing,) = [event for event in events if isinstance(event, Timing)]
    assert timing.seconds(work) > 0


def test_work_that_does_not_fit(model: Path) -> None:
    with GGUFFile(model) as file, pytest.raises(ContextFullError, match="trained for 512"):
        list(measure(file, Work(500, 100), Offload(), threads=(1,), seconds=1))


# What is kept.


def test_what_is_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(FAKES_VARIABLE, "1GiB")
    devices = find_devices()
    fine_tune = llama_file(tmp_path / "f.gguf", quant="Q8_0", n_layers=3, seed=9)
    other = llama_file(tmp_path / "o.gguf", quant="Q8_0", n_layers=4)
    tuned = Tuned(2, 1, device_names(devices))
    with GGUFFile(model) as file, GGUFFile(fine_tune) as same, GGUFFile(other) as larger:
        assert recall(file, Wish()) is None
        path = remember(file, tuned, Wish())
        assert path is not None and list(path.parent.iterdir()) == [path]
        assert recall(file, Wish()) == recall(same, Wish()) == tuned
        assert recall(file, Wish(gpu_layers=1)) == tuned  # its threads
        limited = Wish(vram_limit=1 << 30)
        for wish in (limited, Wish(cpu_moe=2), Wish(kv_offload=False)):
            assert recall(file, wish) is None
        other = Tuned(1, 1, device_names(devices))
        assert remember(file, other, limited) != path
        assert (recall(file, limited), recall(file, Wish())) == (other, tuned)
        assert recall(larger, Wish()) is None
        assert tuned.layers_on(devices) == 2 and tuned.layers_on(()) is None
        for damaged in (
            "{", "[]", "{}", '{"version": 1, "gpu_layers": "2", "threads": 1, "devices": []}',
            '{"version": 1, "gpu_layers": -1, "threads": 1, "devices": []}',
            '{"version": 1, "gpu_layers": 2, "threads": 100000, "devices": []}',
            '{"version": 2, "gpu_layers": 2, "threads": 1, "devices": []}',
        ):  # fmt: skip
            path.write_text(damaged)
            assert recall(file, Wish()) is None
        monkeypatch.setenv(CACHE_VARIABLE, "off")
        assert remember(file, tuned, Wish()) is None and recall(file, Wish()) is None


# The command, and what `run` makes of it.


def tune(*arguments, environment):
    command = [sys.executable, "-c", "from runtime.umbrella import main; main()", "tune"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def test_run_uses_what_tune_found(stories260k_gguf, tmp_path):
    environment = {CACHE_VARIABLE: str(tmp_path), FAKES_VARIABLE: "1GiB"}
    for folder in (Path(os.environ.get(CACHE_VARIABLE, "")),):  # compiled kernels stay at hand
        if folder.is_absolute() and (folder / "kernels").is_dir():
            (tmp_path / "kernels").symlink_to(folder / "kernels")
    options = ("--prompt", 40, "--answer", 10, "--seconds", 1, "--threads", 1, "--json")
    done = tune(stories260k_gguf, *options, environment=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["threads"] == 1 and found["gpu_layers"] == 0  # NumPy is no GPU
    assert "`run` uses this for the model" in done.stderr
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 4, environment=environment)
    assert "no layer on a GPU: `gguf tune` found the CPU alone to be faster" in done.stderr
    assert "; CPU, 1 thread]" in done.stderr
    options = ("-n", 4, "--threads", 2, "--gpu-layers", 1)
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, *options, environment=environment)
    assert "; fake:0 + CPU, 2 threads]" in done.stderr  # what is asked for counts


def test_pictures(stories260k_gguf, tmp_path):
    pytest.importorskip("matplotlib")
    check_plots()
    for timings in (CPU, [*CPU, gpu(2, 0.008, 0.09), gpu(6, 0.004, 0.07)]):
        path = tmp_path / "curve.png"
        draw_picture(path, timings, advise(timings, WORK), "some model")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pictures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GGUFError, match=r"pip install 'gguf-tools\[plots\]'"):
        check_plots()
