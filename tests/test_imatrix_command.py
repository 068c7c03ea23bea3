"""`gguf imatrix`: importance matrices made, gone on with, added up and described."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from gguf_tools.command import describe_os_error
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import FormatError, GGUFError
from gguf_tools.imatrix import Entry, ImportanceMatrix, read_importance_matrix
from gguf_tools.imatrix_statistics import (
    describe_coverage,
    layer_statistics,
    tensor_statistics,
    without_data,
)
from gguf_tools.imatrix_writing import merge, write_importance_matrix
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.writer import GGUFWriter, TensorSpec
from runtime.layerwise import LayerwiseModel, LayerwiseReference
from runtime.program import Floats, Matrix
from runtime.quality.evaluation import cut_windows, with_bos
from runtime.quality.importance import Collected, collect, tensors_of
from runtime.quality.subjects import open_layered
from runtime.quality.texts import DEFAULT, SHIPPED, read_text
from runtime.umbrella import app
from tests.architectures import FOLDER, prompts
from tests.test_eval import STORIES, TALE
from tests.test_imatrix import new_file, old_entry, old_file

ROOT = Path(__file__).resolve().parent.parent
N_CTX = 64


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "stories.gguf"
    for _ in convert(plan_conversion(STORIES, find_file_type("F32")), path, threads=1):
        pass
    return path


def run(*arguments: str | Path, folder: Path) -> Any:
    """`gguf imatrix` in this process, with `folder` as the current one."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return CliRunner().invoke(app, ["imatrix", *map(str, arguments)])
    finally:
        os.chdir(before)


def refusal(*arguments: str | Path, folder: Path) -> str:
    """What the user is told."""
    done = run(*arguments, folder=folder)
    assert done.exit_code == 1 and done.stdout == "", done.stdout
    assert not list(folder.glob("*.part*"))
    if isinstance(done.exception, OSError):
        return describe_os_error(done.exception)
    assert isinstance(done.exception, GGUFError), done.exception
    assert "\n" not in str(done.exception)
    return str(done.exception)


def text_of(folder: Path, content: str = TALE) -> Path:
    path = folder / "tale.txt"
    path.write_text(content)
    return path


def last(events: object) -> Collected:
    *_, end = events  # type: ignore[misc]
    assert isinstance(end, Collected)
    return end


def matrix_of(folder: Path, data: bytes, name: str = "matrix") -> ImportanceMatrix:
    path = folder / name
    path.write_bytes(data)
    return read_importance_matrix(path)


# --- collecting ---------------------------------------------------------------------------


def test_sums_are_those_of_the_reference(stories: Path) -> None:
    with open_layered(stories, n_ctx=N_CTX, threads=2) as subject:
        model, tokenizer = subject.model, subject.tokenizer
        windows = cut_windows(tokenizer, TALE, N_CTX, 3)
        bos = tokenizer.bos_id
        found = last(collect(model, subject.source, windows, bos=bos, with_output=True, group=2))
        assert set(found.entries) == set(tensors_of(model, with_output=True))
        expected: dict[str, list[Floats]] = {}

        def observe(matrix: Matrix, inputs: Floats) -> None:
            squares = inputs.astype(np.float64) ** 2
            expected.setdefault(matrix.name, []).append(squares.sum(axis=0))

        reference = LayerwiseReference(model.program, n_tokens=N_CTX)
        for window in windows:
            x = model.embed(with_bos(window, bos).tolist())
            for layer in range(len(model.program.layers)):
                x = reference.layer(layer, x, observe)
            reference.head(x, observe)
    assert found.windows == 3 and found.entries.keys() == expected.keys()
    for name, entry in found.entries.items():
        assert entry.counts.tolist() == [3 * N_CTX], name
        np.testing.assert_allclose(entry.sums, np.sum(expected[name], axis=0), rtol=1e-2)


@pytest.mark.parametrize("name", ["mixtral", "qwen2moe", "deepseek2"])
def test_experts_and_stacks_fit_their_tensors(name: str, tmp_path: Path) -> None:
    """What is written is what `convert` and llama-quantize look for."""
    *_, prompt = prompts(name)
    ids = np.array([prompt.ids[:24], prompt.ids[4:28]])
    path = tmp_path / "m.gguf"
    with open_layered_checkpoint(FOLDER / name) as (source, model):
        found = last(collect(model, source, ids, bos=None))
        write_importance_matrix(path, found.entries, datasets=["x"], n_chunks=2, chunk_size=24)
        matrix = read_importance_matrix(path)
        for tensor in tensors_of(model, with_output=False):
            importance = matrix.find(tensor, source.tensors[tensor].shape)
            assert importance is not None, tensor
            for index in range(len(importance.counts)):
                assert np.isfinite(importance.of_matrix(index)).all()
        stacks = [name for name in matrix.entries if "_exps." in name]
        used = {name: int(matrix.entries[name].counts.sum()) for name in stacks}
    assert stacks and len(set(used.values())) == 1 and min(used.values()) >= 48


def open_layered_checkpoint(folder: Path):  # type: ignore[no-untyped-def]
    from contextlib import contextmanager

    from tests.test_layerwise import planned

    @contextmanager
    def opened():  # type: ignore[no-untyped-def]
        source = planned(folder)
        with LayerwiseModel(source, n_tokens=24, threads=1) as model:
            yield source, model

    return opened()


def test_weights_that_give_no_number_are_told_of(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "nan.gguf"
    with GGUFFile(stories) as file:
        specs = [TensorSpec(t.name, t.quant, t.shape) for t in file.tensors.values()]
        metadata = {key: file.encoded(key) for key in file.metadata}
        with GGUFWriter(path, metadata=metadata, tensors=specs) as writer:
            for tensor in file.tensors.values():
                blocks = file.raw(tensor.name).copy()
                if tensor.name == "blk.1.ffn_up.weight":
                    blocks.reshape(-1).view("<f4")[0] = np.nan
                writer.write(tensor.name, blocks)
    with open_layered(path, n_ctx=N_CTX, threads=1) as subject:
        windows = cut_windows(subject.tokenizer, TALE, N_CTX, 1)
        with pytest.raises(FormatError, match=r"blk.1.ffn_down.weight .* no number"):
            last(collect(subject.model, subject.source, windows, bos=None))


# --- the command --------------------------------------------------------------------------


def test_a_matrix_is_made_and_used(stories: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path)
    code = "from runtime.umbrella import main; main()"
    options = ("--text", text, "--ctx", "64", "--windows", "3", "--json")
    done = subprocess.run(
        [sys.executable, "-c", code, "imatrix", stories, *options],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["output"] == "stories.imatrix.gguf" and made["windows"] == 3
    assert made["missing"] == [] and made["experts_without_data"] == {}
    path = tmp_path / "stories.imatrix.gguf"
    matrix = read_importance_matrix(path)
    assert (matrix.datasets, matrix.n_chunks, matrix.chunk_size) == ((str(text),), 3, 64)
    # The form that llama.cpp reads: sorted, sums (columns, matrices), counts (1, matrices).
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    names = [tensor.name for tensor in reader.tensors]
    assert names[:2] == ["blk.0.attn_k.weight.in_sum2", "blk.0.attn_k.weight.counts"]
    assert names[::2] == sorted(names[::2]) and "output.weight.in_sum2" not in names
    assert reader.tensors[0].shape.tolist() == [64, 1]
    assert reader.tensors[1].shape.tolist() == [1, 1]
    plan = plan_conversion(STORIES, find_file_type("Q4_0"), matrix=matrix)
    for _ in convert(plan, tmp_path / "q.gguf", threads=1):
        pass
    again = refusal(stories, *options, folder=tmp_path)
    assert "exists already, with 3 windows" in again


def test_a_stopped_run_goes_on_as_if_it_had_not(stories: Path, tmp_path: Path) -> None:
    options = (stories, "--text", text_of(tmp_path), "--ctx", "64", "--save-every", "2")
    assert run(*options, "--windows", "6", "-o", "whole.gguf", folder=tmp_path).exit_code == 0
    for n in ("2", "6"):
        done = run(*options, "--windows", n, "-o", "parts.gguf", folder=tmp_path)
        assert done.exit_code == 0, done.stderr
    assert "goes on from parts.gguf, after window 2" in done.stderr
    assert (tmp_path / "parts.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    # Nor is what was begun with believed.
    path = tmp_path / "parts.gguf"
    saved = read_importance_matrix(path)
    worse = {name: Entry(entry.sums[:-1], entry.counts) for name, entry in saved.entries.items()}
    made = dict(datasets=["x"], n_chunks=2, chunk_size=64, identity=saved.identity)
    write_importance_matrix(tmp_path / "damaged.gguf", worse, **made)  # type: ignore[arg-type]
    damaged = refusal(*options, "--windows", "4", "-o", "damaged.gguf", folder=tmp_path)
    assert "blk.0.attn_q.weight: expected 64 sums" in damaged and "--force" in damaged
    # Another text, context or option is not what it was begun with.
    option = refusal(*options, "--process-output", "-o", "parts.gguf", folder=tmp_path)
    assert "not of this model, text and options" in option
    changed = (stories, "--text", text_of(tmp_path, "But " + TALE), "-o", "parts.gguf")
    assert "not of this model" in refusal(*changed, "-c", "64", folder=tmp_path)
    done = run(*changed, "-c", "64", "--windows", "1", "--force", folder=tmp_path)
    assert done.exit_code == 0
    assert read_importance_matrix(tmp_path / "parts.gguf").n_chunks == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_keeps_what_is_saved(stories: Path, tmp_path: Path) -> None:
    code = "from runtime.umbrella import main; main()"
    options = (stories, "--text", text_of(tmp_path, 40 * TALE), "--ctx", "64", "-o", "o.gguf")
    running = subprocess.Popen(
        [sys.executable, "-c", code, "imatrix", *options, "--save-every", "1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    path, deadline = tmp_path / "o.gguf", time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=60)
    assert running.returncode == 130
    n = read_importance_matrix(path).n_chunks
    assert f"o.gguf has {n} of" in error and "the same command goes on from there" in error
    done = run(*options, "--windows", str(n + 1), folder=tmp_path)
    assert f"goes on from o.gguf, after window {n}" in done.stderr
    assert not list(tmp_path.glob("*.part*"))


def test_a_checkpoint_gives_what_its_file_gives(stories: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path)
    for model, name in ((stories, "a"), (STORIES, "b")):
        options = (model, "-f", text, "-c", "64", "--windows", "2", "-o", name)
        assert run(*options, folder=tmp_path).exit_code == 0
    a, b = (read_importance_matrix(tmp_path / name) for name in "ab")
    assert a.entries.keys() == b.entries.keys()
    for name, entry in a.entries.items():
        np.testing.assert_allclose(entry.sums, b.entries[name].sums, rtol=1e-4)


def test_what_cannot_be_done_is_one_line(stories: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path)
    assert "the text has" in refusal(stories, "-f", text, "-c", "8192", folder=tmp_path)
    absent = refusal(stories, "-f", text, "-o", "no/x.gguf", folder=tmp_path)
    assert "folder no does not exist" in absent
    (tmp_path / "other.txt").write_bytes(b"caf\xe9")
    assert "0xe9 at position 3" in refusal(stories, "-f", "other.txt", folder=tmp_path)
    assert "being read" in refusal(stories, "-f", text, "-o", text, folder=tmp_path)
    assert "being read" in refusal(stories, "-f", text, "-o", stories, folder=tmp_path)
    assert text.read_text() == TALE
    assert "No such file" in refusal(stories, "-f", "absent.txt", folder=tmp_path)
    assert "expected an importance matrix" in refusal("--show-statistics", stories, folder=tmp_path)
    assert run(stories, stories, folder=tmp_path).exit_code == 2
    assert run("--merge", stories, folder=tmp_path).exit_code == 2


# --- adding up ----------------------------------------------------------------------------


def entries(scale: float = 1.0) -> dict[str, np.ndarray]:
    return {
        "blk.0.a.weight.in_sum2": np.array([[1, 4, 9, 16]], np.float32) * scale,
        "blk.0.a.weight.counts": np.array([[2]], np.float32),
        "blk.0.e_exps.weight.in_sum2": np.arange(8, dtype=np.float32).reshape(2, 4),
        "blk.0.e_exps.weight.counts": np.array([[3], [0]], np.float32),
    }


def test_merge_adds_sums_and_counts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(new_file(entries()))
    other = {**entries(3.0), "blk.0.b.weight.in_sum2": np.ones((1, 2), np.float32)}
    other["blk.0.b.weight.counts"] = np.array([[5]], np.float32)
    (tmp_path / "b").write_bytes(new_file(other))
    done = run("--merge", "a", "b", "-o", "c.gguf", folder=tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "never chosen, whose columns will all count alike: blk.0.e_exps.weight" in done.stdout
    merged = read_importance_matrix(tmp_path / "c.gguf")
    assert merged.entries["blk.0.a.weight"].sums.tolist() == [4, 16, 36, 64]
    assert merged.entries["blk.0.a.weight"].counts.tolist() == [4]
    assert merged.entries["blk.0.e_exps.weight"].counts.tolist() == [6, 0]
    assert merged.entries["blk.0.b.weight"].counts.tolist() == [5]
    assert (merged.n_chunks, merged.chunk_size) == (14, 512)
    assert merged.datasets == ("prose.txt", "prose.txt")
    assert "exists already" in refusal("--merge", "a", "b", "-o", "c.gguf", folder=tmp_path)
    assert "being read" in refusal("--merge", "a", "b", "-o", "a", "--force", folder=tmp_path)


def test_merge_knows_the_old_form(tmp_path: Path) -> None:
    """There a count is of chunks, and sums are means times it."""
    old = matrix_of(tmp_path, old_file(old_entry("blk.0.a.weight", 2, np.arange(4))), "old")
    new = matrix_of(tmp_path, new_file(entries()), "new")
    merged, n_chunks, size = merge([old, new])
    assert merged["blk.0.a.weight"].sums.tolist() == [1, 516, 1033, 1552]
    assert merged["blk.0.a.weight"].counts.tolist() == [1026]
    assert size == 512 and n_chunks == 2  # how many the old file had it does not say


def test_merge_refuses_other_models(tmp_path: Path) -> None:
    one = matrix_of(tmp_path, new_file(entries()), "one")
    wide = {"blk.0.a.weight.in_sum2": np.ones((1, 6)), "blk.0.a.weight.counts": np.ones((1, 1))}
    with pytest.raises(GGUFError, match=r"expected 4 sums and 1 counts .* found 6 and 1"):
        merge([one, matrix_of(tmp_path, new_file(wide), "two")])
    other = {name.replace("blk.0", "v.blk.0"): value for name, value in wide.items()}
    with pytest.raises(GGUFError, match="no tensor in common"):
        merge([one, matrix_of(tmp_path, new_file(other), "three")])


# --- statistics ---------------------------------------------------------------------------


def test_statistics_by_hand(tmp_path: Path) -> None:
    tensors = {
        "blk.0.a.weight.in_sum2": np.array([[4, 4, 4, 4]], np.float32),
        "blk.0.a.weight.counts": np.array([[2]], np.float32),
        "blk.1.a.weight.in_sum2": np.array([[0, 0, 0, 8]], np.float32),
        "blk.1.a.weight.counts": np.array([[2]], np.float32),
        "output.weight.in_sum2": np.array([[1, 2], [6, 6], [0, 0]], np.float32),
        "output.weight.counts": np.array([[1], [3], [0]], np.float32),
    }
    matrix = matrix_of(tmp_path, new_file(tensors))
    one, two, head = tensor_statistics(matrix.entries)
    assert (one.name, one.layer, one.total, one.entropy) == ("blk.0.a.weight", 0, 8.0, 2.0)
    assert (one.zd, one.similarity, one.active, one.normalized_entropy) == (0.0, 0.0, 1.0, 1.0)
    assert (two.kind, two.total, two.entropy, two.active) == ("a", 4.0, 0.0, 0.25)
    assert two.zd == 0.25 and two.similarity == pytest.approx(0.5)
    assert two.deviation == pytest.approx(3**0.5)
    assert (head.layer, head.columns, head.total, head.tokens) == (None, 4, 7.0, (0, 3))
    layers = layer_statistics([one, two, head])
    assert [each.layer for each in layers] == [0, 1]
    assert layers[1].total == 4.0 and layers[1].similarity == pytest.approx(0.5)
    assert without_data(matrix.entries) == {"output.weight": (2,)}
    lines = list(describe_coverage(matrix.entries, ["blk.0.a.weight", "blk.2.a.weight"]))
    assert lines[0] == "no data for blk.2.a.weight"
    assert "output.weight (of 3: 2)" in lines[1]


def test_statistics_are_shown(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(new_file(entries()))
    shown = run("--show-statistics", "m.gguf", folder=tmp_path).stdout
    assert "2 tensors, 7 windows of 512 tokens, from prose.txt" in shown
    assert "e_exps" in shown and "0 to 3" in shown and "never chosen" in shown
    told = json.loads(run("--show-statistics", "m.gguf", "--json", folder=tmp_path).stdout)
    assert [each["name"] for each in told["tensors"]] == [
        "blk.0.a.weight",
        "blk.0.e_exps.weight",
    ]
    assert told["experts_without_data"] == {"blk.0.e_exps.weight": [1]}
    assert told["layers"][0]["layer"] == 0


# --- the text that ships ------------------------------------------------------------------


def test_the_text_that_ships() -> None:
    shipped = read_text(None)
    assert shipped == read_text(Path(DEFAULT)) and shipped.name.endswith(SHIPPED.name)
    assert 120_000 < len(shipped.content.encode()) < 250_000
    assert "\0" not in shipped.content and "\ufffd" not in shipped.content
    # Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Bengali, Tamil, Thai, kana, Han, Hangul.
    starts = (0x41, 0x370, 0x400, 0x5D0, 0x621, 0x904, 0x985, 0xB85, 0xE01, 0x3041, 0x4E00, 0xAC00)
    for start in starts:
        assert sum(start <= ord(c) < start + 0x60 for c in shipped.content) > 10, hex(start)
    origin = SHIPPED.with_suffix(".md").read_text()
    assert "public domain" in origin and "MIT" in origin
