"""The quality sheet: what it measures, what a file keeps of it, and what happens at a cliff."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.checkpoint import open_checkpoint
from gguf_tools.cliffs import (
    is_measurable,
    raised_types,
    request_sheet,
    type_bits,
    with_room,
    with_types,
)
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.plan import Plan
from gguf_tools.quality_sheet import (
    KEYS,
    LIMITS,
    PREFIX,
    ROOM,
    TEXT,
    Cost,
    Sheet,
    cliff_warning,
    fitting,
    from_metadata,
    sheet_lines,
    sheet_of_json,
)
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.requantising import plan_requantisation
from gguf_tools.tools.edit import apply_in_place, plan_change
from gguf_tools.tools.verify import verify
from gguf_tools.values import RESERVE_KEY
from gguf_tools.writer import GGUFWriter
from runtime.file_check import Texts, open_source
from runtime.quality.file_run import FileRun
from runtime.quality.overlay import Overlay
from runtime.quality.sheet import measure
from runtime.quality.source_run import SourceRun
from runtime.sources import plain_value
from tests.checkpoints import STORIES, pack

ROOT = Path(__file__).resolve().parent.parent
SHEET = Sheet(
    text=TEXT,
    tokens=446,
    bits=4,
    mean_kl=0.125,
    mean_kl_error=0.0078125,
    kl_99=0.75,
    same_top=0.75,
    same_top_error=0.03125,
    perplexity=25.5,
    perplexity_ratio=1.03125,
    perplexity_ratio_error=0.015625,
    costs=(Cost("blk.1.attn_v.weight", "Q4_0", 0.0625), Cost("blk.0.ffn_up.weight", "Q4_0", 0.01)),
)


@cache
def plan_of(folder: Path, file_type: str) -> Plan:
    return plan_conversion(folder, find_file_type(file_type))


def converted(plan: Plan, target: Path) -> Path:
    for _ in convert(plan, target, threads=2):
        pass
    return target


def measured(folder: Path, path: Path, *, bits: int = 4, threads: int = 2) -> Sheet:
    source = open_source({"source": str(folder), "is_checkpoint": True, "adapters": ()})
    with GGUFFile(path) as file:
        texts = Texts(file.metadata, None)
        with SourceRun(source, texts.long, bos=texts.bos, threads=lambda: 1, compiles=False) as run:
            return measure(FileRun(run), file, bits=bits, threads=threads)


def run_convert(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "convert.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a matrix in which every block has one weight that dwarfs the others.

    In the attention's output matrix of layer 1 one column in 8 is 2000 times as large, and the row
    of attn_v that feeds it so much smaller: the same function, which 8 bits cannot hold.
    """
    folder = tmp_path_factory.mktemp("models") / "Outliers"
    shutil.copytree(STORIES, folder)
    checkpoint = open_checkpoint(folder)
    tensors = {
        name: tensor.load(0, tensor.n_rows).reshape(tensor.shape).copy()
        for name, tensor in checkpoint.tensors.items()
    }
    down = tensors["model.layers.1.self_attn.o_proj.weight"]
    value = tensors["model.layers.1.self_attn.v_proj.weight"]
    n_shared = down.shape[1] // value.shape[0]  # heads that share a KV head
    assert n_shared >= 1
    for row in range(0, value.shape[0], 8):
        value[row] /= 2000
        head, place = divmod(row, 8)
        for shared in range(n_shared):
            down[:, (head * n_shared + shared) * 8 + place] *= 2000
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "model.safetensors").write_bytes(pack(tensors))
    return folder


# --- measuring ----------------------------------------------------------------------------------


def test_a_file_in_the_types_of_its_source_costs_nothing(tmp_path: Path) -> None:
    found = measured(STORIES, converted(plan_of(STORIES, "F32"), tmp_path / "x.gguf"))
    assert found.mean_kl == pytest.approx(0, abs=1e-6) and found.same_top == 1
    assert found.perplexity_ratio == pytest.approx(1, abs=1e-4)
    assert found.costs == ()


def test_fewer_bits_cost_more_whatever_the_threads(tmp_path: Path) -> None:
    paths = {
        file_type: converted(plan_of(STORIES, file_type), tmp_path / f"{file_type}.gguf")
        for file_type in ("Q8_0", "Q4_0")
    }
    sheets = {file_type: measured(STORIES, path) for file_type, path in paths.items()}
    assert 0 < sheets["Q8_0"].mean_kl < 0.05 * sheets["Q4_0"].mean_kl < 0.05
    assert sheets["Q4_0"].kl_99 > sheets["Q4_0"].mean_kl
    assert sheets["Q8_0"].same_top > sheets["Q4_0"].same_top > 0.5
    assert not sheets["Q4_0"].is_cliff
    assert len(sheets["Q4_0"].costs) == 3
    assert sum(cost.share for cost in sheets["Q4_0"].costs) < 1
    assert measured(STORIES, paths["Q4_0"], threads=1) == sheets["Q4_0"]


def test_the_tensor_that_cannot_bear_it_is_named(outliers: Path, tmp_path: Path) -> None:
    path = converted(plan_of(outliers, "Q8_0"), tmp_path / "x.gguf")
    found = measured(outliers, path, bits=8)
    assert found.costs[0].name == "blk.1.attn_output.weight"
    assert found.costs[0].share > 0.5 > 10 * max(cost.share for cost in found.costs[2:])
    assert found.is_cliff and len(found.costs) == 8


def test_an_overlay_has_one_tensor_of_the_file(tmp_path: Path) -> None:
    path = converted(plan_of(STORIES, "Q4_0"), tmp_path / "x.gguf")
    source = open_source({"source": str(STORIES), "is_checkpoint": True, "adapters": ()})
    name, other = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"
    with GGUFFile(path) as file:
        mixed = Overlay(source, file, {name})
        assert mixed.tensors[name].quant.name == "Q4_0"
        np.testing.assert_array_equal(mixed.load(name), file.load(name))
        np.testing.assert_array_equal(mixed.raw(name), file.raw(name))
        np.testing.assert_array_equal(mixed.rows(other, 3, 5), source.rows(other, 3, 5))


# --- which files, and what they keep ------------------------------------------------------------


def test_which_files_get_a_sheet() -> None:
    assert request_sheet(plan_of(STORIES, "Q4_0"), asked=None, checks=True) is not None
    assert request_sheet(plan_of(STORIES, "Q4_0"), asked=None, checks=False) is None
    assert request_sheet(plan_of(STORIES, "Q4_0"), asked=False, checks=True) is None
    asked = request_sheet(plan_of(STORIES, "Q8_0"), asked=True, checks=False, compiles=True)
    assert asked is not None and asked.compiles and asked.bits == 8
    for file_type in ("F32", "F16", "BF16"):
        assert not is_measurable(plan_of(STORIES, file_type))
    assert type_bits(plan_of(STORIES, "Q4_0")) == 4


def test_keys_and_back() -> None:
    metadata = {key: plain_value(value) for key, value in fitting(SHEET).items()}
    assert set(metadata) == {PREFIX + key for key in KEYS}
    found = from_metadata(metadata)
    assert found is not None
    assert replace(found, costs=()) == replace(SHEET, costs=())
    assert [cost.name for cost in found.costs] == [cost.name for cost in SHEET.costs]
    assert sheet_of_json(json.loads(json.dumps(asdict(SHEET)))) == SHEET
    assert from_metadata({}) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", 3),
        ("tokens", -1),
        ("tokens", True),
        ("bits", "4"),
        ("mean_kl", float("nan")),
        ("perplexity_ratio", None),
        ("mean_kl_error", [0.1]),
    ],
)
def test_a_damaged_sheet_is_none(key: str, value: Any) -> None:
    metadata = {key: plain_value(value) for key, value in fitting(SHEET).items()}
    assert from_metadata({**metadata, PREFIX + key: value}) is None


def test_odd_names_in_a_sheet_are_shown_escaped() -> None:
    metadata: dict[str, Any] = {k: plain_value(value) for k, value in fitting(SHEET).items()}
    metadata[PREFIX + "costly_names"] = ["\x1b[31mred", 7]
    found = from_metadata(metadata)
    assert found is not None and len(found.costs) == 1
    assert "\\x1b[31mred" in "".join(sheet_lines(found))
    metadata[PREFIX + "costly_shares"] = "no list"
    found = from_metadata(metadata)
    assert found is not None and found.costs == ()


def test_tensors_are_left_out_where_there_is_no_room() -> None:
    costs = tuple(Cost(f"blk.{i}.{'x' * 50}.weight", "IQ4_NL", 0.1) for i in range(30))
    entries = fitting(replace(SHEET, costs=costs))
    assert 4 <= len(entries[PREFIX + "costly_names"].values) < 30  # type: ignore[union-attr]


def test_filling_the_room_moves_nothing(tmp_path: Path) -> None:
    plan = with_room(plan_of(STORIES, "Q4_0"))
    empty = converted(plan, tmp_path / "empty.gguf")
    filled = tmp_path / "filled.gguf"
    for _ in convert(plan, filled, threads=2, check=lambda part: fitting(SHEET)):
        pass
    with GGUFFile(empty) as a, GGUFFile(filled) as b:
        assert from_metadata(a.metadata) is None and from_metadata(b.metadata) is not None
        assert len(a.metadata[RESERVE_KEY]) == ROOM > len(b.metadata[RESERVE_KEY]) > 0
        assert a.file_size == b.file_size == plan.total_size
        assert list(b.metadata)[: len(a.metadata) - 1] == list(a.metadata)[:-1]
        for name in a.tensors:
            assert a.tensors[name].offset == b.tensors[name].offset
            np.testing.assert_array_equal(a.raw(name), b.raw(name))
        assert verify(b).findings == ()
        change = plan_change(b, "general.name", "A longer name than before")
    assert change.in_place
    apply_in_place(change)
    with GGUFFile(filled) as b:
        assert from_metadata(b.metadata) is not None and verify(b).findings == ()


def test_too_much_for_the_room(tmp_path: Path) -> None:
    plan = plan_of(STORIES, "Q4_0")
    writer = GGUFWriter(tmp_path / "x.gguf", metadata=plan.metadata, tensors=plan.specs)
    with pytest.raises(ValueError, match="do not fit"):
        writer.fill_room(fitting(SHEET))


def test_a_sheet_is_not_carried_over(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    plan = with_room(plan_of(STORIES, "Q8_0"))
    for _ in convert(plan, path, threads=2, check=lambda part: fitting(SHEET)):
        pass
    with GGUFFile(path) as file:
        again = plan_requantisation(file, find_file_type("Q4_0"), allow_requantize=True)
    assert not [key for key in again.metadata if key.startswith(PREFIX)]


# --- cliffs -------------------------------------------------------------------------------------


def test_limits_are_more_than_their_errors() -> None:
    for bits, kl, ratio in LIMITS:
        fine = replace(SHEET, bits=bits, mean_kl=kl, perplexity_ratio=ratio)
        assert not fine.is_cliff
        assert not replace(fine, mean_kl=1.5 * kl, mean_kl_error=kl / 3).is_cliff
        assert replace(fine, mean_kl=1.5 * kl, mean_kl_error=kl / 5).is_cliff
        beyond = replace(fine, perplexity_ratio=ratio + 0.05)
        assert replace(beyond, perplexity_ratio_error=0.01).is_cliff
    kls, ratios = ([limit[i] for limit in LIMITS] for i in (1, 2))
    assert kls == sorted(kls) and ratios == sorted(ratios)


def test_what_a_sheet_says() -> None:
    lines = list(sheet_lines(SHEET))
    assert len(lines) == 5
    assert lines[0] == ("mean KL divergence 0.1250 \xb1 0.0078 nats, 99 % of 446 tokens below 0.75")
    assert lines[2] == "perplexity 25.5, 1.031 \xb1 0.016 times the source's"
    assert lines[3] == "cost most, each alone: blk.1.attn_v.weight (Q4_0) 6 %"
    assert lines[4].startswith("no cliff: within what 4 bits may cost")
    bad = replace(SHEET, mean_kl=9.0)
    assert list(sheet_lines(bad))[4].startswith("a cliff: beyond")
    assert "blk.1.attn_v.weight cost most: give them more bits" in cliff_warning(bad)
    assert "choose a --type with more bits" in cliff_warning(replace(bad, costs=()))


def test_tensors_are_raised_by_what_is_missing() -> None:
    plan = plan_of(STORIES, "Q4_0")
    name = "blk.1.attn_v.weight"
    assert raised_types(replace(SHEET, mean_kl=0.36), plan) == {name: "Q5_0"}
    assert raised_types(replace(SHEET, mean_kl=9.0), plan) == {name: "Q8_0"}
    assert raised_types(replace(SHEET, mean_kl=0.36), plan, steps=4) == {name: "F16"}
    assert raised_types(replace(SHEET, mean_kl=9.0, costs=()), plan) == {}
    raised = with_types(plan, {name: "F16"})
    assert raised_types(replace(SHEET, mean_kl=9.0), raised) == {}
    changed = [a.name for a, b in zip(plan.tensors, raised.tensors, strict=True) if a != b]
    assert changed == [name]


# --- the command --------------------------------------------------------------------------------


def test_convert_and_info_tell(tmp_path: Path) -> None:
    done = run_convert(tmp_path, STORIES, "--type", "Q4_0", "-o", "x.gguf")
    assert (done.returncode, done.stderr) == (0, "")
    first = next(line for line in done.stdout.splitlines() if line.startswith("quality"))
    command = [sys.executable, "-m", "gguf_tools", "info", "x.gguf"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert first.split(maxsplit=1)[1] in shown.stdout
    told = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, check=True)
    quality = json.loads(told.stdout)["quality"]
    assert quality["tokens"] > 50 and not quality["is_cliff"] and quality["costs"]
    again = run_convert(tmp_path, STORIES, "--type", "Q4_0", "-o", "y.gguf", "--threads", "1")
    assert again.returncode == 0
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_without_a_sheet_nothing_is_left_of_it(tmp_path: Path) -> None:
    plain = converted(plan_of(STORIES, "Q4_0"), tmp_path / "plain.gguf")
    done = run_convert(tmp_path, STORIES, "--type", "Q4_0", "-o", "x.gguf", "--no-quality")
    assert done.returncode == 0 and "quality" not in done.stdout
    assert (tmp_path / "x.gguf").read_bytes() == plain.read_bytes()


def test_a_cliff_is_told_refused_or_raised(outliers: Path, tmp_path: Path) -> None:
    options = (outliers, "--type", "Q8_0", "--tensor-type", "ffn_down=F16", "-o", "x.gguf")
    done = run_convert(tmp_path, *options, "--strict")
    assert done.returncode == 1
    assert "as --strict asks: a precision cliff: KL divergence" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run_convert(tmp_path, *options, "--raise-cliff", "--no-check")
    assert done.returncode == 0, done.stderr
    assert "note: a precision cliff" not in done.stderr
    assert "raised" in done.stdout and "blk.1.attn_output.weight from Q8_0 to F16" in done.stdout
    with GGUFFile(tmp_path / "x.gguf") as file:
        sheet = from_metadata(file.metadata)
        assert sheet is not None and not sheet.is_cliff
        types = {tensor.name: tensor.quant.name for tensor in plan_of(outliers, "Q8_0").tensors}
        changed = {n for n, tensor in file.tensors.items() if tensor.quant.name != types[n]}
        assert "blk.1.attn_output.weight" in changed and len(changed) < 6


def test_a_calibrated_file_is_raised_too(outliers: Path, tmp_path: Path) -> None:
    """It is the file that the raised types make when they are asked for."""
    (tmp_path / "a.txt").write_text((ROOT / "tests" / "data" / "prose.txt").read_text() * 8)
    options = (outliers, "--calibrate", "a.txt", "--calibrate-windows", "4", "--threads", "1")
    types = ("--tensor-type", "ffn_down=F16", "--tensor-type", "attn_q=Q5_0")
    raising = ("--method", "imatrix", "--no-check", "--raise-cliff")
    done = run_convert(tmp_path, *options, *types, *raising, "-o", "x.gguf")
    assert done.returncode == 0, done.stderr
    assert "blk.1.attn_output.weight from Q8_0 to F16" in done.stdout
    with GGUFFile(tmp_path / "x.gguf") as file:
        sheet = from_metadata(file.metadata)
        assert sheet is not None and not sheet.is_cliff
        assert file.metadata["gguf_tools.calibration.method"] == "imatrix"
        made = {name: (t.quant.name, file.raw(name).tobytes()) for name, t in file.tensors.items()}
    raised = dict(re.findall(r"(blk\S+) from \S+ to (\w+):", done.stdout))
    asked = [word for n, type_ in raised.items() for word in ("--tensor-type", f"^{n}$={type_}")]
    plain = (*asked, *types, "--method", "imatrix", "--no-check")
    done = run_convert(tmp_path, *options, *plain, "-o", "y.gguf")
    assert done.returncode == 0, done.stderr
    with GGUFFile(tmp_path / "y.gguf") as file:
        again = {name: (t.quant.name, file.raw(name).tobytes()) for name, t in file.tensors.items()}
    assert made == again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "x.gguf", "y.gguf"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no-quality",), "--raise-cliff and --no-quality exclude each other"),
        (("--calibrate", "default"), "--raise-cliff and --method best exclude each other"),
    ],
)
def test_options_that_exclude_each_other(
    options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run_convert(tmp_path, STORIES, "--raise-cliff", *options)
    assert done.returncode == 2
    words = done.stderr.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split()
    assert message in " ".join(words)
