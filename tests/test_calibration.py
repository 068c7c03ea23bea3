"""`convert --calibrate`: what is rounded how, and that it goes on where it was stopped."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.cache_folder import CACHE_VARIABLE
from gguf_tools.calibration import Calibrated, Settings, calibrate, read_settings
from gguf_tools.calibration_bar import COMPILING
from gguf_tools.calibration_file import (
    SUFFIX,
    CalibrationFile,
    Part,
    read_parts,
    read_rows,
    work_path,
)
from gguf_tools.conversion import convert, plan_conversion, quantise_band
from gguf_tools.errors import (
    GGUFError,
    OutputError,
    UnsupportedModelError,
    UnsupportedQuantError,
)
from gguf_tools.feedback.rounding import needed_kernels
from gguf_tools.kernel_files import CACHE_FOLDER
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.requantising import plan_requantisation
from gguf_tools.self_check import Source
from gguf_tools.values import Value
from gguf_tools.writer import GGUFWriter
from runtime.calibrating import check_reached
from runtime.layerwise import LayerwiseModel
from runtime.program import Floats, Matrix
from runtime.quality.evaluation import Evaluation, cut_windows, evaluate, with_bos
from runtime.quality.subjects import open_file
from runtime.sources import PlannedWeights
from runtime.tokenizer import Tokenizer
from tests.architectures import FOLDER
from tests.checkpoints import STORIES, make_llama
from tests.test_eval import TALE

ROOT = Path(__file__).resolve().parent.parent
DIGEST = "0" * 64
N_LAYERS = 5  # of STORIES


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text((ROOT / "tests" / "data" / "prose.txt").read_text() * 8)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gguf_tools", "convert", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT)


def tensors_of(path: Path) -> dict[str, bytes]:
    with GGUFFile(path) as file:
        return {name: file.raw(name).tobytes() for name in file.tensors}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, str]:
    """A file that was made in one go, and what was said."""
    path = tmp_path_factory.mktemp("made") / "x.gguf"
    options = ("--type", "Q4_0", "-o", path, "--calibrate", text, "--method", "imatrix")
    done = run(STORIES, *options, "--calibrate-windows", 4, "--no-check", "--threads", 1)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_columns_are_weighed_by_what_the_text_makes_of_them(
    calibrated: tuple[Path, str], text: Path
) -> None:
    path, said = calibrated
    plan = plan_conversion(STORIES, find_file_type("Q4_0"))
    source = PlannedWeights(STORIES, plan.tensors, plan.metadata)
    tokenizer = Tokenizer(source.metadata)
    ids = np.asarray(tokenizer.encode(text.read_text()))
    n_windows = len(ids) // 512
    squares: dict[str, np.ndarray] = {}

    def observe(matrix: Matrix, inputs: Floats) -> None:
        before = squares.get(matrix.name, 0)
        squares[matrix.name] = before + np.square(inputs, dtype=np.float64).sum(axis=0)

    with LayerwiseModel(source, n_tokens=512, threads=1) as model:
        for place in np.arange(4) * n_windows // 4:
            window = with_bos(ids[place * 512 : (place + 1) * 512], tokenizer.bos_id)
            x = model.embed(window.tolist())
            for index in range(len(model.program.layers)):
                x = model.layer(index, x, observe)
    made = tensors_of(path)
    for tensor in plan.tensors:
        name = tensor.name
        if name not in squares or tensor.quant.name != "Q4_0":
            continue
        importance = (squares[name] / 2048).astype(np.float32)
        assert tensor.quant.quantize is not None
        expected = tensor.quant.quantize(source.load(name), importance)
        # Sums of other orders differ in their last bits, and so may a block now and then.
        same = np.frombuffer(made[name], np.uint8) == expected.reshape(-1)
        plain = tensor.quant.quantize(source.load(name)).reshape(-1)
        assert same.mean() > 0.99 > (np.frombuffer(made[name], np.uint8) == plain).mean(), name
    assert re.search(r"imatrix on .*: 4 windows, 2,048 tokens, \d+\.\d s; 30 of 30 matrices", said)


def test_the_file_says_how_it_was_calibrated(calibrated: tuple[Path, str], text: Path) -> None:
    path, _ = calibrated
    with GGUFFile(path) as file:
        known = file.metadata
    assert known["gguf_tools.calibration.method"] == "imatrix"
    assert known["gguf_tools.calibration.text"] == str(text)
    assert known["gguf_tools.calibration.windows"] == 4
    assert known["gguf_tools.calibration.tokens"] == 2048
    assert known["quantize.imatrix.entries_count"] == 30
    assert known["quantize.imatrix.chunks_count"] == 4
    shown = subprocess.run(
        [sys.executable, "-m", "gguf_tools", "info", str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert "calibrated" in shown and "imatrix on" in shown
    assert not work_path(path).exists()
    plain = path.with_name("plain.gguf")
    done = run(STORIES, "--type", "Q4_0", "-o", plain, "--no-check")
    assert done.returncode == 0
    with GGUFFile(plain) as first, GGUFFile(path) as second:
        assert [(t.name, t.quant.name) for t in first.tensors.values()] == [
            (t.name, t.quant.name) for t in second.tensors.values()
        ]


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is kept on Windows")
def test_a_killed_run_goes_on_after_its_last_layer(
    calibrated: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    whole, _ = calibrated
    path = tmp_path / "x.gguf"
    options = (STORIES, "--type", "Q4_0", "-o", path, "--calibrate", text, "--method", "imatrix")
    options = (*options, "--calibrate-windows", 4, "--no-check", "--threads", 1)
    process = subprocess.Popen(
        command(*options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    work = work_path(path)
    end = time.monotonic() + 60
    while not (work.exists() and work.stat().st_size > 40_000):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert work.exists() and not path.exists()
    done = run(*options)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stderr
    assert path.read_bytes() == whole.read_bytes()
    assert not work.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


def steps_of(
    text: Path,
    output: Path,
    *,
    resume: bool = True,
    windows: int = 4,
    source: Path = STORIES,
    method: str = "imatrix",
    file_type: str = "Q4_0",
) -> Iterator[object]:
    plan = plan_conversion(source, find_file_type(file_type))
    return calibrate(
        plan,
        Source(source, is_checkpoint=True),
        output,
        Settings(text, method, windows),
        inputs=[source],
        threads=1,
        force=False,
        resume=resume,
    )


def blocks_in(step: object) -> dict[str, bytes]:
    assert isinstance(step, Calibrated)
    return {
        tensor.name: tensor.ready(0, tensor.source.n_rows).tobytes()
        for tensor in step.plan.tensors
        if tensor.ready is not None
    }


@pytest.mark.parametrize("method", ["gptq", "awq", "best"])
def test_a_calibrated_file_is_closer_to_its_source(method: str, text: Path, tmp_path: Path) -> None:
    *_, last = steps_of(text, tmp_path / "x.gguf", method=method, windows=8)
    assert isinstance(last, Calibrated) and "30 of 30 matrices" in last.line
    assert last.plan.metadata["gguf_tools.calibration.method"] == Value("str", method)
    kl = {}
    for name, plan in (
        ("source", plan_conversion(STORIES, find_file_type("F32"))),
        ("plain", plan_conversion(STORIES, find_file_type("Q4_0"))),
        ("calibrated", last.plan),
    ):
        path = tmp_path / f"{name}.gguf"
        for _ in convert(plan, path, threads=1):
            pass
        if name != "source":
            kl[name] = distance_from(tmp_path / "source.gguf", path)
    assert kl["calibrated"] < 0.95 * kl["plain"]


def distance_from(reference: Path, path: Path) -> float:
    """The mean KL divergence on a few windows of a story."""
    with (
        open_file(reference, n_ctx=128, threads=1) as first,
        open_file(path, n_ctx=128, threads=1) as second,
    ):
        windows = cut_windows(first.tokenizer, TALE, 128)
        bos = first.tokenizer.bos_id
        scorers = [subject.scorer(windows, bos) for subject in (first, second)]
        *_, last = evaluate(scorers[1:], windows, reference=scorers[0], bos=bos)
    assert isinstance(last, Evaluation) and last.distance is not None
    return last.distance.kl.value


def test_what_is_damaged_is_made_again(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    *_, first = steps_of(text, output)
    expected = blocks_in(first)
    assert isinstance(first, Calibrated)
    parts = read_parts(first.work, first.digest)
    assert len(parts) == N_LAYERS
    third = parts[2].tensors[0]
    data = bytearray(first.work.read_bytes())
    data[third.begin + 5] ^= 1
    first.work.write_bytes(data)
    assert len(read_parts(first.work, first.digest)) == 2
    *events, again = steps_of(text, output)
    assert blocks_in(again) == expected
    assert "going on" in getattr(events[0], "remark", "")
    assert first.work.read_bytes() != bytes(data)


def test_other_options_or_another_text_start_over(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    *_, first = steps_of(text, output)
    assert isinstance(first, Calibrated)
    for changed in ({"windows": 5}, {"resume": False}):
        *events, last = steps_of(text, output, **changed)  # type: ignore[arg-type]
        assert not any(getattr(event, "remark", "") for event in events)
        assert isinstance(last, Calibrated)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("the", "a"))
    *events, last = steps_of(other, output)
    assert not any(getattr(event, "remark", "") for event in events)
    assert isinstance(last, Calibrated) and last.digest != first.digest


@pytest.mark.skipif(CACHE_FOLDER is None, reason="kernels are compiled each time")
def test_that_kernels_are_compiled_is_said(text: Path, tmp_path: Path) -> None:
    """Once: with a cache in which one of them is missing."""
    assert CACHE_FOLDER is not None
    (kernel,) = needed_kernels()
    kernel.address  # noqa: B018 - compiles
    folder = tmp_path / "cache" / "kernels" / CACHE_FOLDER.name
    shutil.copytree(CACHE_FOLDER, folder)
    (kept,) = folder.glob("*feedback*round_rows*.o")
    kept.unlink()
    options = (STORIES, "--type", "Q4_0", "-o", tmp_path / "x.gguf", "--calibrate", text)
    options = (*options, "--method", "gptq", "--calibrate-windows", 4, "--no-check", "--force")
    told = []
    for _ in range(2):
        done = subprocess.run(
            command(*options),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, CACHE_VARIABLE: str(tmp_path / "cache")},
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stderr.count(COMPILING))
    assert told == [1, 0]
    assert kept.exists()


def test_experts_have_moments_of_their_own(text: Path, tmp_path: Path) -> None:
    *_, last = steps_of(text, tmp_path / "x.gguf", source=FOLDER / "mixtral")
    assert isinstance(last, Calibrated)
    made = blocks_in(last)
    assert any("_exps" in name for name in made)
    assert f"{len(made)} of {len(made)} matrices" in last.line


def test_a_gguf_file_of_floats_is_a_source_too(text: Path, tmp_path: Path) -> None:
    path = tmp_path / "f32.gguf"
    for _ in convert(plan_conversion(STORIES, find_file_type("F32")), path, threads=1):
        pass
    *_, expected = steps_of(text, tmp_path / "x.gguf")
    with GGUFFile(path) as file:
        *_, last = calibrate(
            plan_requantisation(file, find_file_type("Q4_0")),
            Source(path, is_checkpoint=False),
            tmp_path / "y.gguf",
            Settings(text, "imatrix", 4),
            inputs=[path],
            threads=1,
            force=False,
            resume=True,
        )
        assert blocks_in(last) == blocks_in(expected)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows are whole blocks of Q2_K."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    make_llama(folder, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    return folder


def test_types_that_need_an_importance_get_it(wide: Path, text: Path, tmp_path: Path) -> None:
    q2_k_s = find_file_type("Q2_K_S")
    with pytest.raises(UnsupportedQuantError, match="with --imatrix, --calibrate the file, or"):
        plan_conversion(wide, q2_k_s)
    options = ("--type", "Q2_K_S", "--calibrate", text, "--method", "imatrix", "--threads", 1)
    path = tmp_path / "x.gguf"
    done = run(wide, "-o", path, *options, "--calibrate-windows", 4, "--no-check")
    assert done.returncode == 0, done.stderr
    with GGUFFile(path) as file:
        types = {tensor.name: tensor.quant.name for tensor in file.tensors.values()}
    plan = plan_conversion(wide, q2_k_s, calibrates=True)
    assert types == {tensor.name: tensor.quant.name for tensor in plan.tensors}
    # llama-quantize makes head and embedding without an importance, and so do we.
    assert (types["output.weight"], types["token_embd.weight"]) == ("Q6_K", "Q2_K")
    made = tensors_of(path)
    n_weighed = 0
    for tensor in plan.tensors:
        if tensor.quant.name == "Q2_K":
            plain = quantise_band(tensor, 0, tensor.source.n_rows).blocks.tobytes()
            assert (made[tensor.name] != plain) == tensor.name.startswith("blk"), tensor.name
            n_weighed += tensor.name.startswith("blk")
    assert n_weighed >= 12


def test_what_no_layer_multiplies_with_gets_no_such_type() -> None:
    plan = plan_conversion(STORIES, find_file_type("F32"))
    source = PlannedWeights(STORIES, plan.tensors, plan.metadata)
    layers = [t.name for t in plan.tensors if t.name.startswith("blk") and len(t.shape) > 1]
    types = dict.fromkeys([*layers, "token_embd.weight"], "Q2_K")
    with LayerwiseModel(source, n_tokens=8, threads=1) as model:
        check_reached(model, layers, types)
        with pytest.raises(UnsupportedQuantError, match=r"tensor token_embd.weight as Q2_K .*give"):
            check_reached(model, [*layers, "token_embd.weight"], types)


def test_nobody_elses_file_is_written_over(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    (tmp_path / ("x.gguf" + SUFFIX)).write_text("my notes")
    with pytest.raises(OutputError, match="something else is there"):
        list(steps_of(text, output))
    assert (tmp_path / ("x.gguf" + SUFFIX)).read_text() == "my notes"


def test_errors_are_one_sentence(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time. " * 50)
    with pytest.raises(GGUFError, match=r"tokens, and it takes 2,048 at least"):
        list(steps_of(short, output))
    assert not output.exists()
    latin = tmp_path / "latin.txt"
    latin.write_bytes("na\xefve ".encode("latin-1") * 5000)
    with pytest.raises(GGUFError, match="expected UTF-8"):
        list(steps_of(latin, output))
    with pytest.raises(GGUFError, match="nothing to round"):
        list(steps_of(text, output, file_type="F16"))
    output.write_text("here already")
    with pytest.raises(OutputError, match="exists already"):
        list(steps_of(text, output))
    for arguments in (("x", "guess", None), (None, "imatrix", None), (None, None, 3)):
        with pytest.raises(GGUFError):
            read_settings(*arguments)
    with pytest.raises(GGUFError, match="expected a file of text"):
        read_settings(str(tmp_path / "nowhere.txt"), None, None)


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for more in (("--imatrix", "im.gguf"), ("--lora-only",)):
        done = run(STORIES, "-o", tmp_path / "x.gguf", "--calibrate", "default", *more)
        assert done.returncode == 2 and "exclude each other" in done.stderr


def test_an_architecture_without_a_decoder_is_refused(text: Path, tmp_path: Path) -> None:
    with GGUFFile(_renamed(STORIES, tmp_path / "odd.gguf")) as file:
        plan = plan_requantisation(file, find_file_type("Q4_0"))
        steps = calibrate(
            plan,
            Source(file.path, is_checkpoint=False),
            tmp_path / "x.gguf",
            Settings(text, "imatrix", 4),
            inputs=[file.path],
            threads=1,
            force=False,
            resume=True,
        )
        with pytest.raises(UnsupportedModelError, match="cannot be run yet"):
            list(steps)
    assert not (tmp_path / "x.gguf").exists()


def _renamed(folder: Path, path: Path) -> Path:
    """The model as a file of an architecture that nobody knows."""
    plan = plan_conversion(folder, find_file_type("F32"))
    source = PlannedWeights(folder, plan.tensors, plan.metadata)
    metadata = {key.replace("llama.", "odd."): value for key, value in plan.metadata.items()} | {
        "general.architecture": Value("str", "odd")
    }
    with GGUFWriter(path, metadata=metadata, tensors=plan.specs) as writer:
        for tensor in plan.tensors:
            writer.write(tensor.name, source.raw(tensor.name))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_a_process_that_dies_is_told_of(text: Path, tmp_path: Path) -> None:
    steps = steps_of(text, tmp_path / "x.gguf", windows=8)
    killed = False
    with pytest.raises(GGUFError, match="the same command goes on"):
        for _ in steps:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in children:
                words = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"runtime.calibrating" in words and not killed:
                    os.kill(int(child), signal.SIGKILL)
                    killed = True
    assert killed


def test_a_part_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf.calibration"
    rows = np.arange(12, dtype=np.uint8).reshape(3, 4)
    with CalibrationFile(path, DIGEST, resume=True) as work:
        work.append([("a", "Q4_0", rows), ("b", "Q8_0", rows[:2])], {"few": ["b[3]"]})
        with pytest.raises(OutputError, match="being written by another process"):
            CalibrationFile(path, DIGEST, resume=True)
        work.append([])
    (part, empty) = read_parts(path, DIGEST)
    assert isinstance(part, Part) and part.facts == {"few": ["b[3]"]} and empty.tensors == ()
    assert np.array_equal(read_rows(path, part.tensors[0], 1, 3), rows[1:])
    assert np.array_equal(read_rows(path, part.tensors[1], 0, 2), rows[:2])
    assert read_parts(path, "1" * 64) == []
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert len(read_parts(path, DIGEST)) == (length >= part.tensors[1].begin + 8)
