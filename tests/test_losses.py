"""What quantising cost: measured where weights are quantised twice, or were trained for a type."""

from pathlib import Path

import numpy as np
import pytest

from gguf_tools import conversion
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.journal import Journal
from gguf_tools.losses import EVERY, Loss, Losses, measure
from gguf_tools.plan import Plan
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.report import loss_notes
from gguf_tools.requantising import plan_requantisation
from tests.checkpoints import STORIES, llama_config, llama_tensors, make_llama
from tests.packed.recorded import make, read
from tests.quants.samples import plain_rows
from tests.test_convert_cli import convert as run_convert
from tests.test_convert_cli import error_of

Q4_0, Q8_0 = by_name("Q4_0"), by_name("Q8_0")


def write(plan: Plan, path: Path, *, journal: Journal | None = None) -> Losses:
    losses = Losses()
    for step in convert(plan, path, threads=2, journal=journal):
        if step.loss is not None:
            losses.add(step.tensor.name, step.loss)
    return losses


def relative(weights: np.ndarray, stored: np.ndarray) -> float:
    return float(np.sqrt(((weights - stored) ** 2).sum() / (weights**2).sum()))


def test_the_measure_is_the_relative_rms_error() -> None:
    rows = plain_rows(20, 256)[:EVERY]
    data = Q4_0.quantize(rows)  # type: ignore[misc]
    loss = measure(Q4_0, rows, data)  # of the first row
    assert loss.n_weights == rows.size
    assert loss.relative == pytest.approx(relative(rows[:1], Q4_0.dequantize(data[:1])), rel=1e-5)
    assert loss.size == pytest.approx(EVERY * float((rows[0] ** 2).sum()), rel=1e-5)


def test_nothing_means_nothing_at_all() -> None:
    """An error in a row that would not have been measured is found if there is no other."""
    rows = Q4_0.dequantize(Q4_0.quantize(plain_rows(40, 64)))  # type: ignore[misc]
    data = Q4_0.quantize(rows)  # type: ignore[misc]
    assert measure(Q4_0, rows, data) == Loss(0.0, pytest.approx((rows**2).sum()), rows.size)
    rows[EVERY + 3, 7] += np.abs(rows[EVERY + 3]).max() / 20
    assert measure(Q4_0, rows, data).relative > 0
    assert measure(Q4_0, rows[:0], data[:0]) == Loss()


def test_half_sentences() -> None:
    losses = Losses()
    assert losses.describe(["a"]) == ""
    losses.add("a", Loss(1.0, 300.0, 10))
    losses.add("a", Loss(3.0, 100.0, 10))
    assert (
        losses.describe(["a"])
        == "a relative RMS error of 10 % in 1 tensor (one row in 16 measured)"
    )
    losses.add("b", Loss(0.0, 400.0, 20))
    assert losses.describe(["a", "b", "c"]) == (
        "a relative RMS error of 7.1 % in 2 tensors, at most 10 % in a, none in 1 of them "
        "(one row in 16 measured)"
    )
    assert losses.describe(["b"]) == "nothing: 1 tensor holds exactly the same numbers"


def test_a_file_quantised_twice(tmp_path: Path) -> None:
    write(plan_conversion(STORIES, find_file_type("Q8_0")), tmp_path / "q8.gguf")
    with GGUFFile(tmp_path / "q8.gguf") as file:
        plan = plan_requantisation(file, find_file_type("Q4_0"), allow_requantize=True)
        losses = write(plan, tmp_path / "q4.gguf")
        with GGUFFile(tmp_path / "q4.gguf") as after:
            changed = [n for n in file.tensors if file.tensors[n].quant != after.tensors[n].quant]
            assert set(losses.tensors) == set(changed)
            pairs = [(file.load(name).ravel(), after.load(name).ravel()) for name in changed]
        expected = relative(*map(np.concatenate, zip(*pairs, strict=True)))  # type: ignore[arg-type]
    total = sum(losses.tensors.values(), Loss())
    assert total.relative == pytest.approx(expected, rel=0.05)
    (note,) = loss_notes(plan, losses)
    assert note.startswith("second quantisation (Q8_0): it cost a relative RMS error of ")
    assert f" in {len(changed)} tensors, at most " in note


def test_floats_quantised_once_are_not_measured(tmp_path: Path) -> None:
    plan = plan_conversion(STORIES, find_file_type("Q4_0"))
    assert write(plan, tmp_path / "q4.gguf").tensors == {}


@pytest.mark.parametrize(
    ("name", "file_type", "cost"),
    [
        ("gptq-4", "Q8_0", "nothing"),  # codes less their zero points are 8-bit numbers
        ("gptq-4", "Q4_0", "nothing"),  # those of symmetric ones are 4-bit numbers
        ("awq", "Q8_0", "nothing"),
        ("awq", "Q5_0", "nothing"),  # and with zero points 5-bit numbers
        ("gptq-2", "Q4_0", "nothing"),
        ("ct-pack4-group", "Q4_0", "a relative RMS error of 0.01"),  # its scales are F32
        ("awq", "Q4_0", "a relative RMS error"),
        ("bnb-nf4", "Q8_0", "a relative RMS error"),
        ("gptq-4", "F16", "a relative RMS error of 0.0"),
    ],
)
def test_packed_checkpoints(tmp_path: Path, name: str, file_type: str, cost: str) -> None:
    make(tmp_path / "model", read(name))
    plan = plan_conversion(tmp_path / "model", find_file_type(file_type))
    losses = write(plan, tmp_path / "out.gguf")
    assert set(losses.tensors) == {"blk.0.attn_k.weight", "blk.0.ffn_down.weight"}
    (note,) = loss_notes(plan, losses)
    assert f"it cost {cost}" in note
    assert plan.tensors[0].source.scheme == ""
    if cost == "nothing":
        with GGUFFile(tmp_path / "out.gguf") as file:
            for tensor in plan.tensors:
                if tensor.is_second:
                    weights = tensor.source.load(0, tensor.source.n_rows)
                    weights = (
                        weights if tensor.transform is None else tensor.transform.apply(weights)
                    )
                    np.testing.assert_array_equal(file.load(tensor.name), weights)


def test_views_keep_the_mark() -> None:
    from gguf_tools import views
    from gguf_tools.safetensors_file import LazyTensor

    def load(first: int, last: int) -> np.ndarray:
        return np.ones((last - first, 8), np.float32)

    tensor = LazyTensor("x", (12, 8), "F32", load, scheme="GPTQ, 4 bits")
    made = (
        views.stacked([tensor, tensor], "y"),
        views.part(tensor, 1, 2),
        views.regrouped(tensor, 2, 3),
        views.cut(tensor, 3, 4, 1, 2),
        views.every(tensor, 1, 2),
        views.transposed(tensor),
    )
    assert {view.scheme for view in made} == {tensor.scheme}


def rounded(rows: np.ndarray, dtype: str) -> np.ndarray:
    quant = by_name(dtype)
    return quant.dequantize(quant.quantize(rows))  # type: ignore[misc]


def trained_checkpoint(folder: Path, *, dtype: str = "F32") -> None:
    """Matrices of -7 to 7 times a 16-bit scale in each block of 32."""
    config = llama_config()
    rng = np.random.default_rng(3)
    tensors = llama_tensors(config)
    for name, values in tensors.items():
        if values.ndim == 2:
            k = np.clip(np.rint(rng.standard_normal((values.size // 32, 32)) * 3), -7, 7)
            d = (rng.random((values.size // 32, 1)) * 0.02 + 0.01).astype(np.float16)
            rows = (k * d.astype(np.float32)).astype(np.float32).reshape(values.shape)
            tensors[name] = rounded(rows, dtype)
    make_llama(folder, tensors=tensors, dtype=dtype)


def test_a_checkpoint_that_was_trained_for_q4_0(tmp_path: Path) -> None:
    trained_checkpoint(tmp_path / "model")
    ended = run_convert(tmp_path, "model", "--type", "Q4_0", "--pure", "-o", "o.gguf")
    assert ended.returncode == 0, ended.stderr
    assert "trained for their type" in ended.stderr
    assert "cost nothing: 16 tensors hold exactly the same numbers" in ended.stderr
    run_convert(tmp_path, "model", "--type", "F32", "-o", "f.gguf")
    with GGUFFile(tmp_path / "o.gguf") as file, GGUFFile(tmp_path / "f.gguf") as floats:
        assert file.tensors["blk.0.attn_q.weight"].quant.name == "Q4_0"
        for name in file.tensors:
            np.testing.assert_array_equal(file.load(name), floats.load(name))


def test_in_bf16_it_is_exact_up_to_that_rounding(tmp_path: Path) -> None:
    trained_checkpoint(tmp_path / "model", dtype="BF16")
    plan = plan_conversion(tmp_path / "model", find_file_type("Q4_0"))
    losses = write(plan, tmp_path / "o.gguf")
    types = {tensor.name: tensor.quant.name for tensor in plan.tensors}
    assert {types[name] for name in losses.tensors} == {"Q4_0"}  # not the head, which is Q8_0
    assert all(0 < loss.relative < 0.002 for loss in losses.tensors.values())
    with GGUFFile(tmp_path / "o.gguf") as file:
        for name in losses.tensors:
            tensor = next(tensor for tensor in plan.tensors if tensor.name == name)
            weights = tensor.source.load(0, tensor.source.n_rows)
            weights = weights if tensor.transform is None else tensor.transform.apply(weights)
            np.testing.assert_array_equal(rounded(file.load(name), "BF16"), weights)


def test_of_what_an_earlier_run_wrote_the_cost_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "BAND", 64 * 8)
    make(tmp_path / "model", read("awq"))

    def plan_and_journal() -> tuple[Plan, Journal]:
        plan = plan_conversion(tmp_path / "model", find_file_type("Q4_0"))
        return plan, Journal([tmp_path / "model"])

    plan, journal = plan_and_journal()
    steps = convert(plan, tmp_path / "o.gguf", threads=1, journal=journal)
    for step in steps:
        if step.tensor.name == "blk.0.attn_k.weight":
            break
    steps.close()
    plan, journal = plan_and_journal()
    losses = write(plan, tmp_path / "o.gguf", journal=journal)
    (note,) = loss_notes(plan, losses)
    n_weights = sum(tensor.source.n_elements for tensor in plan.tensors if tensor.is_second)
    left = n_weights - sum(loss.n_weights for loss in losses.tensors.values())
    assert left > 0
    assert note.endswith(f"; of {left:,} weights an earlier run wrote it is not known")


def test_the_command_says_it(tmp_path: Path) -> None:
    make(tmp_path / "model", read("awq"))
    ended = run_convert(tmp_path, "model", "--type", "Q4_0", "-o", "o.gguf")
    assert ended.returncode == 0, ended.stderr
    assert "note: second quantisation (AWQ, 4 bits): it cost a relative RMS error" in ended.stderr
    assert error_of(run_convert(tmp_path, "model", "--type", "Q4_0", "-o", "o.gguf"))
