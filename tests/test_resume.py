"""A conversion that is stopped goes on: whatever happens, the file is the same or there is none."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools import conversion
from gguf_tools.cliffs import with_room
from gguf_tools.conversion import Progress, convert, plan_conversion, quantise_band
from gguf_tools.errors import CheckpointError, GGUFError, OutputError
from gguf_tools.journal import Journal
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.values import MetadataValue, Value
from tests.checkpoints import STORIES, llama_config, llama_tensors, make_llama

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is kept on Windows")

ROOT = Path(__file__).resolve().parent.parent
BAND = 64 * 20
STOP = 60  # steps; there are some 250
KILLED = """
    import os, signal, sys
    from pathlib import Path
    from gguf_tools import conversion
    from gguf_tools.journal import Journal
    from gguf_tools.recipes import find_file_type

    conversion.BAND = int(sys.argv[4])
    plan = conversion.plan_conversion(sys.argv[1], find_file_type("Q8_0"))
    journal = Journal([Path(sys.argv[1])])
    steps = conversion.convert(plan, sys.argv[2], threads=2, journal=journal)
    new = (step for step in steps if not step.kept)
    for number, step in enumerate(new):
        if number == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "BAND", BAND)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.gguf"


def run(
    model: Path,
    output: Path,
    *,
    stop: int | None = None,
    file_type: str = "Q8_0",
    then: Callable[[], None] | None = None,
    **options: Any,
) -> tuple[Journal, list[Progress]]:
    """Convert, or stop after so many steps (or do `then`); the journal and the steps."""
    journal = Journal([model], **options)
    plan = plan_conversion(model, find_file_type(file_type))
    steps = convert(plan, output, threads=2, journal=journal)
    taken = []
    for step in steps:
        taken.append(step)
        if len(taken) == stop:
            if then is None:
                steps.close()
                break
            then()
    return journal, taken


def whole(model: Path, file_type: str = "Q8_0") -> bytes:
    """The file of a conversion that nothing stops."""
    path = model.parent / "whole.gguf"
    plan = plan_conversion(model, find_file_type(file_type))
    for _ in convert(plan, path, threads=2, force=True):
        pass
    return path.read_bytes()


def left(output: Path) -> list[str]:
    return sorted(os.listdir(output.parent))


def journal_of(output: Path) -> Path:
    return output.with_name(output.name + ".part.journal")


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


STOPPED = ["x.gguf.part", "x.gguf.part.journal"]


def test_killed_again_and_again(model: Path, output: Path) -> None:
    """kill -9 after 5, 70 and 100 more bands, and then to the end."""
    for number in (5, 70, 100):
        code = textwrap.dedent(KILLED)
        command = [sys.executable, "-c", code, str(model), str(output), str(number), str(BAND)]
        ended = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
        assert ended.returncode == -signal.SIGKILL
        assert left(output) == STOPPED
    journal, steps = run(model, output)
    assert journal.remark.startswith("going on from")
    kept = sum(step.n_bytes for step in steps if step.kept)
    assert kept > 0.4 * sum(step.n_bytes for step in steps)
    assert left(output) == ["x.gguf"]
    assert output.read_bytes() == whole(model)


@pytest.mark.parametrize("stop", [1, 7, STOP, 200])
@pytest.mark.parametrize("file_type", ["F32", "Q4_K_M"])
def test_only_the_rest_is_made(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, stop: int, file_type: str
) -> None:
    first, before = run(model, output, stop=stop, file_type=file_type)
    assert "% of the file is kept in" in first.kept
    assert left(output) == STOPPED
    made = 0

    def counted(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        return quantise_band(*arguments)

    monkeypatch.setattr(conversion, "quantise_band", counted)
    journal, steps = run(model, output, file_type=file_type)
    new = [step for step in steps if not step.kept]
    assert len(new) == made
    kept = sum(step.n_bytes for step in steps if step.kept)
    assert kept == sum(step.n_bytes for step in before)
    plan = plan_conversion(model, find_file_type(file_type))
    assert sum(step.n_bytes for step in steps) == sum(tensor.nbytes for tensor in plan.tensors)
    assert (journal.remark[:13], journal.kept) == ("going on from", "")
    assert left(output) == ["x.gguf"]
    assert output.read_bytes() == whole(model, file_type)


def test_stopped_before_the_last_step(model: Path, output: Path) -> None:
    """All bands are there, but not the name."""

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    plan = plan_conversion(model, find_file_type("Q8_0"))
    with pytest.raises(KeyboardInterrupt):
        list(convert(plan, output, threads=2, check=interrupt, journal=Journal([model])))
    assert left(output) == STOPPED
    _, steps = run(model, output)
    assert all(step.kept for step in steps)
    assert output.read_bytes() == whole(model)


MEASURED = {"general.comment": Value("str", "what was measured of the file")}
KILLED_AT_THE_END = """
    import os, signal, sys
    from pathlib import Path
    from gguf_tools.conversion import convert, plan_conversion
    from gguf_tools.journal import Journal
    from gguf_tools.cliffs import with_room
    from gguf_tools.recipes import find_file_type
    from gguf_tools.values import Value

    model, output, left = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

    def before(function):
        def call(*arguments):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments)
        return call

    def measure(part):
        for name in ("fsync", "write", "replace", "unlink"):
            setattr(os, name, before(getattr(os, name)))
        return {"general.comment": Value("str", "what was measured of the file")}

    plan = with_room(plan_conversion(model, find_file_type("Q8_0")))
    for _ in convert(plan, output, threads=2, check=measure, journal=Journal([model])):
        pass
"""


def run_with_room(
    model: Path, output: Path, *, then: Callable[[], None] = lambda: None
) -> tuple[Journal, list[Progress]]:
    """Convert, and put into the header what was found out of the file; meanwhile do `then`."""

    def measure(part: Path) -> dict[str, MetadataValue]:
        then()
        return dict(MEASURED)

    journal = Journal([model])
    plan = with_room(plan_conversion(model, find_file_type("Q8_0")))
    return journal, list(convert(plan, output, threads=2, check=measure, journal=journal))


@pytest.mark.parametrize(
    ("calls", "next_call"),
    list(enumerate(["flush", "number of keys", "keys", "flush again", "name", "journal's end"])),
)
def test_killed_while_the_header_is_filled(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch, calls: int, next_call: str
) -> None:
    """Before each step of the end: nothing is made again, and the file is the same."""
    monkeypatch.undo()  # bands of a usual size, as those of the killed process
    code = textwrap.dedent(KILLED_AT_THE_END)
    command = [sys.executable, "-c", code, str(model), str(output), str(calls)]
    ended = subprocess.run(command, cwd=ROOT, check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    whole = model.parent / "whole.gguf"
    run_with_room(model, whole)
    if next_call == "journal's end":
        assert left(output) == ["x.gguf", STOPPED[1]]
    else:
        assert left(output) == STOPPED
        journal, steps = run_with_room(model, output)
        assert journal.remark.startswith("going on from") and "damaged" not in journal.remark
        assert all(step.kept for step in steps)
        assert left(output) == ["x.gguf"]
    assert output.read_bytes() == whole.read_bytes()


def test_an_output_that_appears_while_the_file_is_measured(model: Path, output: Path) -> None:
    """The header is filled already when that is found; it is no damage."""
    with pytest.raises(OutputError, match=r"exists already.*100 % of the file is kept in"):
        run_with_room(model, output, then=lambda: output.write_text("mine"))
    assert output.read_text() == "mine"
    output.unlink()
    journal, steps = run_with_room(model, output)
    assert journal.remark.startswith("going on from") and all(step.kept for step in steps)
    with GGUFFile(output) as file:
        assert file.metadata["general.comment"] == MEASURED["general.comment"].value


def cut_part(output: Path) -> None:
    os.truncate(part_of(output), part_of(output).stat().st_size - 77)


def extend_part(output: Path) -> None:
    with open(part_of(output), "ab") as file:
        file.write(b"torn band")


def zero_the_end_of_the_part(output: Path) -> None:
    """As after a power failure: the size is there, the bytes are not."""
    size = part_of(output).stat().st_size
    os.truncate(part_of(output), size - 4000)
    os.truncate(part_of(output), size)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def flip_in_the_part(output: Path) -> None:
    flip(part_of(output), part_of(output).stat().st_size // 2)


def tear_the_journal(output: Path) -> None:
    os.truncate(journal_of(output), journal_of(output).stat().st_size - 9)


def flip_in_the_journal(output: Path) -> None:
    flip(journal_of(output), journal_of(output).stat().st_size // 2)


def repeat_a_line(output: Path) -> None:
    lines = journal_of(output).read_bytes().splitlines(keepends=True)
    journal_of(output).write_bytes(b"".join([*lines[:9], *lines[7:]]))


def add_a_line(output: Path) -> None:
    """A line that is right in itself, about bytes that are not there."""
    import zlib

    line = b"%d 00000000" % (part_of(output).stat().st_size + 10**9)
    with open(journal_of(output), "ab") as file:
        file.write(line + b" %08x\n" % zlib.crc32(line))


def flip_in_the_header(output: Path) -> None:
    flip(part_of(output), 100)


@pytest.mark.parametrize(
    "damage",
    [
        flip_in_the_header,
        cut_part,
        extend_part,
        zero_the_end_of_the_part,
        flip_in_the_part,
        tear_the_journal,
        flip_in_the_journal,
        repeat_a_line,
        add_a_line,
    ],
)
def test_goes_on_from_what_is_whole(
    model: Path, output: Path, damage: Callable[[Path], None]
) -> None:
    _, before = run(model, output, stop=STOP)
    damage(output)
    journal, steps = run(model, output)
    kept = sum(step.n_bytes for step in steps if step.kept)
    assert 0 < kept <= sum(step.n_bytes for step in before)
    assert journal.remark.startswith("going on from")
    assert left(output) == ["x.gguf"]
    assert output.read_bytes() == whole(model)


def remove_journal(output: Path) -> None:
    journal_of(output).unlink()


def empty_journal(output: Path) -> None:
    journal_of(output).write_bytes(b"")


def flip_in_the_title(output: Path) -> None:
    flip(journal_of(output), 3)


def noise_as_journal(output: Path) -> None:
    journal_of(output).write_bytes(np.random.default_rng(0).bytes(5000))


def flip_in_the_first_band(output: Path) -> None:
    first = journal_of(output).read_bytes().splitlines()[1]
    flip(part_of(output), int(first.split()[0]) - 1)


def title_only(output: Path) -> None:
    journal_of(output).write_bytes(journal_of(output).read_bytes().splitlines(keepends=True)[0])


def another_program(output: Path) -> None:
    before = journal_of(output).read_bytes()
    digit = b"0" if before[21:22] != b"0" else b"1"  # the first of the program's digest
    journal_of(output).write_bytes(before[:21] + digit + before[22:])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_journal, "it has no journal"),
        (empty_journal, "it has no journal"),
        (flip_in_the_title, "its journal is damaged"),
        (noise_as_journal, "its journal is damaged"),
        (flip_in_the_first_band, "is damaged"),
        (title_only, "holds no whole band"),
        (another_program, "the program changed since"),
    ],
)
def test_starts_over(model: Path, output: Path, damage: Callable[[Path], None], words: str) -> None:
    run(model, output, stop=STOP)
    damage(output)
    journal, steps = run(model, output)
    assert journal.remark.startswith("starting over: ") and words in journal.remark
    assert not any(step.kept for step in steps)
    assert left(output) == ["x.gguf"]
    assert output.read_bytes() == whole(model)


def later(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(0, 12345))


def other_weights_of_the_same_time(model: Path) -> None:
    file = model / "model.safetensors"
    time = file.stat().st_mtime_ns
    flip(file, file.stat().st_size // 2)
    os.utime(file, ns=(time, time))


def written_again(model: Path) -> None:
    """Size, time and all samples are what they were, but what is between them may not be."""
    file = model / "model.safetensors"
    time = file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(time, time))


def other_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text() + "\n")


def new_shard(model: Path) -> None:
    (model / "z.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "change", [later, other_weights_of_the_same_time, written_again, other_config, new_shard]
)
def test_a_changed_checkpoint_starts_over(
    model: Path, output: Path, change: Callable[[Path], None]
) -> None:
    run(model, output, stop=STOP)
    change(model)
    journal, steps = run(model, output)
    assert "starting over: the checkpoint changed since" in journal.remark
    assert not any(step.kept for step in steps)
    assert output.read_bytes() == whole(model)


def test_other_options_start_over(model: Path, output: Path) -> None:
    words = "starting over: the options or the tokenizer changed since"
    run(model, output, stop=STOP)
    journal, _ = run(model, output, stop=STOP, file_type="F16")
    assert words in journal.remark
    journal, _ = run(model, output, stop=STOP, file_type="F16", options="imatrix")
    assert words in journal.remark
    journal, steps = run(model, output, file_type="F16", options="imatrix", resume=False)
    assert journal.remark == ""
    assert not any(step.kept for step in steps)
    assert output.read_bytes() == whole(model, "F16")


def test_a_vanished_file(model: Path, output: Path) -> None:
    """A drive that was pulled out, and comes back."""
    away = model.with_name("away")
    with pytest.raises(CheckpointError, match=r"cannot be opened.*is kept in .*same command"):
        run(model, output, stop=STOP, then=lambda: os.rename(model, away))
    assert left(output) == STOPPED
    os.rename(away, model)
    journal, _ = run(model, output)
    assert journal.remark.startswith("going on from")
    assert output.read_bytes() == whole(model)


def test_a_truncated_file(model: Path, output: Path) -> None:
    with pytest.raises(CheckpointError, match="the file has shrunk"):
        run(model, output, stop=STOP, then=lambda: os.truncate(model / "model.safetensors", 50000))
    assert left(output) == []


def test_a_file_that_changes_meanwhile(model: Path, output: Path) -> None:
    with pytest.raises(CheckpointError, match="changed while it was converted"):
        run(model, output, stop=STOP, then=lambda: later(model))
    assert left(output) == []


def test_another_link_to_a_file_is_no_change(model: Path, output: Path) -> None:
    """As a backup makes them, while a conversion of hours runs."""
    weights = model / "model.safetensors"
    run(model, output, stop=STOP, then=lambda: os.link(weights, model.parent / "backup"))
    assert output.read_bytes() == whole(model)


def test_an_output_that_appears_meanwhile(model: Path, output: Path) -> None:
    """It stays as it is, and the work is not lost."""
    with pytest.raises(OutputError, match=r"exists already.*100 % of the file is kept in"):
        run(model, output, stop=STOP, then=lambda: output.write_text("mine"))
    assert output.read_text() == "mine"
    assert left(output) == ["x.gguf", *STOPPED]
    output.unlink()
    _, steps = run(model, output)
    assert all(step.kept for step in steps)
    assert output.read_bytes() == whole(model)


def test_a_part_that_vanishes_meanwhile(model: Path, output: Path) -> None:
    """Nothing is kept, nothing is left, and nothing else is said."""
    with pytest.raises(OutputError, match=r"x.gguf.part: cannot be written: No such") as caught:
        run(model, output, stop=STOP, then=lambda: part_of(output).unlink())
    assert "kept" not in str(caught.value)
    assert left(output) == []


@pytest.mark.parametrize("name", [part_of, journal_of])
def test_a_folder_in_the_way(model: Path, output: Path, name: Callable[[Path], Path]) -> None:
    name(output).mkdir()
    with pytest.raises(OutputError, match=rf"{name(output).name}: cannot be written"):
        run(model, output)
    assert left(output) == [name(output).name]


def test_a_damaged_weight_leaves_nothing(tmp_path: Path, output: Path) -> None:
    """Nobody can go on from there."""
    tensors = llama_tensors(llama_config())
    tensors["model.norm.weight"][3] = np.nan
    make_llama(tmp_path / "model", tensors=tensors)
    with pytest.raises(CheckpointError, match="is nan"):
        run(tmp_path / "model", output)
    assert left(output) == []


def test_a_failed_check_leaves_nothing(model: Path, output: Path) -> None:
    def refuse(path: Path) -> None:
        raise GGUFError("no")

    plan = plan_conversion(model, find_file_type("Q8_0"))
    with pytest.raises(GGUFError, match="no"):
        list(convert(plan, output, threads=2, check=refuse, journal=Journal([model])))
    assert left(output) == []


def test_a_second_writer_is_refused(model: Path, output: Path) -> None:
    """It neither uses nor harms what the first has written."""

    def second() -> None:
        with pytest.raises(OutputError, match="being written by another process"):
            run(model, output)
        assert left(output) == STOPPED

    run(model, output, stop=STOP, then=second)
    assert output.read_bytes() == whole(model)


def test_a_link_instead_of_the_journal(model: Path, output: Path) -> None:
    precious = model / "precious"
    precious.write_text("precious")
    journal_of(output).symlink_to(precious)
    with pytest.raises(OutputError):
        run(model, output)
    assert precious.read_text() == "precious"
    assert not output.exists()


def test_a_full_disk(model: Path, output: Path) -> None:
    """A limit on the size of files stands in for it: one line, and the rest in a second run."""
    expected = whole(model)  # and its kernels are compiled: they would meet the limit, too

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = [sys.executable, "-m", "gguf_tools", "convert", str(model), "-o", str(output)]
    command += ["--no-quality"]
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    full = subprocess.run(command, preexec_fn=limit, check=False, **options)
    assert full.returncode == 1
    assert full.stdout == ""
    assert full.stderr.startswith("error: ") and full.stderr.count("\n") == 1
    assert "no room for" in full.stderr and "% of the file is kept in" in full.stderr
    assert "removed" not in full.stderr
    assert left(output) == STOPPED
    again = subprocess.run(command, check=False, **options)
    assert again.returncode == 0
    assert again.stderr.startswith("note: going on from ")
    assert left(output) == ["x.gguf"]
    assert output.read_bytes() == expected
