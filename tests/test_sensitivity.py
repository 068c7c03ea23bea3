"""What quantising single tensors costs a model, measured."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from gguf_tools.conversion import plan_conversion, quantise_band
from gguf_tools.errors import FormatError
from gguf_tools.imatrix import read_importance_matrix
from gguf_tools.plan import Plan
from gguf_tools.recipes import find_file_type, is_quantisable
from runtime.layerwise import LayerwiseModel
from runtime.quality.answers import Answers
from runtime.quality.product_errors import ProductErrors
from runtime.quality.sensitivity import (
    Costs,
    Divergences,
    Effort,
    Group,
    Sensitivity,
    Step,
    choose_effort,
    make_groups,
    shared_costs,
)
from runtime.quality.trial_types import TrialTypes
from runtime.sources import PlannedWeights
from tests.architectures import FOLDER, prompts
from tests.test_convert_options import make_matrix


def plan_of(name: str, file_type: str = "Q8_0", **options: object) -> Plan:
    return plan_conversion(FOLDER / name, find_file_type(file_type), **options)


def trial_of(plan: Plan, matrix: object = None) -> TrialTypes:
    names = [t.name for t in plan.tensors if is_quantisable(t.name, t.shape)]
    source = PlannedWeights(FOLDER, plan.tensors, plan.metadata)
    return TrialTypes(source, names, matrix)


@contextmanager
def sensitivity_of(name: str) -> Iterator[tuple[Sensitivity, TrialTypes, np.ndarray]]:
    trial = trial_of(plan_of(name))
    *_, longest = prompts(name)
    windows = np.array([longest.ids[:24], longest.ids[7:31]])
    with LayerwiseModel(trial, n_tokens=24, threads=1) as model:
        yield Sensitivity(model, trial), trial, windows


def last(events: Iterator[object], kind: type) -> object:
    *steps, found = events
    assert isinstance(found, kind) and all(isinstance(step, Step) for step in steps)
    assert steps[-1].done == steps[-1].total
    return found


def test_divergence_is_that_of_float64() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (70, 1000)).astype(np.float32)
    for size in (1e-4, 1e-2, 1.0, 30.0):
        other = (logits + size * rng.normal(0, 1, logits.shape)).astype(np.float32)
        log_p, log_q = (
            x - np.log(np.exp(x).sum(1, keepdims=True)) for x in map(np.float64, (logits, other))
        )
        expected = (np.exp(log_p) * (log_p - log_q)).sum(1)
        got = Answers(logits).divergences(other)
        assert np.allclose(got, expected, rtol=1e-2, atol=1e-9), size
    assert Answers(logits).divergences(logits + np.float32(0.1)).max() < 1e-6
    with pytest.raises(FormatError, match="answers with no number"):
        Answers(logits).divergences(np.full_like(logits, np.nan))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tried_weights_are_those_of_the_file(name: str, tmp_path) -> None:
    matrix = read_importance_matrix(make_matrix(tmp_path / "m", plan_of(name), never=1))
    for importance in (None, matrix):
        plan = plan_of(name, "Q4_1", matrix=importance)
        trial = trial_of(plan, importance)
        for tensor in plan.tensors:
            if tensor.quant.name not in ("Q4_1", "Q8_0"):
                continue
            n_rows = tensor.source.n_rows
            blocks = quantise_band(tensor, 0, n_rows).blocks
            expected = tensor.quant.dequantize(blocks).reshape(tensor.shape)
            plain = trial.load(tensor.name)
            trial.types = {tensor.name: tensor.quant.name}
            assert np.array_equal(trial.load(tensor.name), expected)
            part = trial.rows(tensor.name, 1, n_rows).view(np.float32)
            assert np.array_equal(part, expected.reshape(n_rows, -1)[1:])
            trial.types = {}
            trial.forget()
            assert np.array_equal(trial.load(tensor.name), plain)
            assert not np.array_equal(plain, expected)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "qwen2"])
def test_what_is_measured_is_what_the_whole_model_does(name: str) -> None:
    """From the layer on, with what was kept before it, or all of it: the same divergence."""
    with sensitivity_of(name) as (sensitivity, trial, windows):
        types = {tensor: ["Q4_0", "Q8_0"] for tensor in trial.tensors if tensor in trial.tried}
        types = {n: t for n, t in types.items() if trial.tensors[n].row_length % 32 == 0}
        tried = dict.fromkeys(types, "Q4_0")
        found = last(sensitivity.measure(types, tried, windows), Costs)
        assert found.by_name.keys() == types.keys()
        mixtures = [{tensor: "Q4_0"} for tensor in types]
        whole = last(sensitivity.compare(mixtures, windows), Divergences)
        for kl, (tensor, costs) in zip(whole.kl, found.by_name.items(), strict=True):
            assert costs["Q4_0"] == pytest.approx(kl, rel=0.02, abs=1e-7), tensor
            assert 0 <= costs["Q8_0"] < 0.05 * costs["Q4_0"] or not costs["Q4_0"], tensor
        assert sum(whole.kl) > 0


def test_together() -> None:
    names = [f"blk.{i}.{kind}.weight" for i in range(5) for kind in ("attn_q", "ffn_up")]
    groups = make_groups(["token_embd.weight", *names, "output.weight"], 5, 2)
    assert groups[0] == Group(-1, ("token_embd.weight",))
    assert groups[-1] == Group(5, ("output.weight",))
    assert groups[1] == Group(0, ("blk.0.attn_q.weight", "blk.1.attn_q.weight"))
    assert groups[-2] == Group(4, ("blk.4.ffn_up.weight",))
    assert len(groups) == 2 + 6
    with sensitivity_of("llama") as (sensitivity, trial, windows):
        types = {name: ["Q4_0"] for name in trial.tried if trial.tensors[name].row_length == 64}
        tried = dict.fromkeys(types, "Q4_0")
        apart = last(sensitivity.measure(types, tried, windows), Costs).by_name
        whole = last(sensitivity.measure(types, tried, windows, together=9), Costs).by_name
        sums = [sum(each["Q4_0"] for each in costs.values()) for costs in (apart, whole)]
        assert types and sums[0] == pytest.approx(sums[1], rel=0.7)


def test_costs_are_shared_by_the_errors() -> None:
    errors = {
        "a": ProductErrors({"Q4_0": 2.0, "Q8_0": 0.5}, 10.0),
        "b": ProductErrors({"Q4_0": 6.0, "Q8_0": 0.0}, 10.0),
        "c": ProductErrors({"Q4_0": 0.0, "Q8_0": 0.0}, 0.0),  # of weights that are all 0
    }
    tried = dict.fromkeys("abc", "Q4_0")
    costs = shared_costs(Group(0, ("a", "b", "c")), 0.4, tried, errors)
    expected = {"a": (0.1, 0.025), "b": (0.3, 0.0), "c": (0.0, 0.0)}
    for name, (q4_0, q8_0) in expected.items():
        assert costs[name] == pytest.approx({"Q4_0": q4_0, "Q8_0": q8_0})


@pytest.mark.parametrize(
    ("n_layers", "weights", "head", "dim", "expected"),
    [
        (5, 40_000, 32_000, 64, Effort(1, 16)),
        (30, 3_500_000, 28_000_000, 576, Effort(1, 9)),
        (32, 200_000_000, 130_000_000, 4096, Effort(8, 2)),
    ],
)
def test_effort(n_layers: int, weights: int, head: int, dim: int, expected: Effort) -> None:
    layers = [weights] * n_layers
    assert choose_effort(layers, head, 7, n_tokens=10**6, dim=dim) == expected
    assert choose_effort(layers, head, 7, n_tokens=300, dim=dim).n_windows == 2
