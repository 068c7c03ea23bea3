"""`convert` with an importance matrix, with types asked for by name, and --strict."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_tools.conversion import convert, plan_conversion, quantise_band
from gguf_tools.errors import GGUFError
from gguf_tools.imatrix import read_importance_matrix
from gguf_tools.overrides import parse_overrides
from gguf_tools.plan import Plan
from gguf_tools.quants import by_name
from gguf_tools.recipes import find_file_type
from tests.architectures import FOLDER
from tests.checkpoints import STORIES, make_llama
from tests.test_convert_cli import convert as run_convert
from tests.test_convert_cli import error_of, fields
from tests.test_imatrix import new_file


def make_matrix(path: Path, plan: Plan, *, without: str = "-", never: int | None = None) -> Path:
    """An importance matrix of everything in the plan; one expert may have no counts."""
    rng = np.random.default_rng(1)
    tensors = {}
    for tensor in plan.tensors:
        if len(tensor.shape) < 2 or "token_embd" in tensor.name or without in tensor.name:
            continue
        n = int(np.prod(tensor.shape[:-2]))
        counts = np.full((n, 1), 10, np.float32)
        if never is not None and n > 1:
            counts[never] = 0
        sums = rng.random((n, tensor.shape[-1]), np.float32) * 100
        tensors[f"{tensor.name}.in_sum2"] = sums
        tensors[f"{tensor.name}.counts"] = counts
    path.write_bytes(new_file(tensors))
    return path


def test_an_importance_matrix(tmp_path: Path) -> None:
    plain = plan_conversion(STORIES, find_file_type("Q4_0"))
    path = make_matrix(tmp_path / "matrix.gguf", plain, without="blk.2.attn_k")
    ended = run_convert(
        tmp_path,
        STORIES,
        "--type",
        "Q4_0",
        "--imatrix",
        "matrix.gguf",
        "-o",
        "o.gguf",
        "--no-quality",
    )
    assert ended.returncode == 0, ended.stderr
    assert fields(ended.stdout)["importance"].startswith("29 of 30 tensors that can make use of it")
    assert "missing: blk.*.attn_k.weight\n" in ended.stdout
    reader = gguf.GGUFReader(tmp_path / "o.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if "imatrix" in key}
    assert keys == {
        "quantize.imatrix.file": "matrix.gguf",
        "quantize.imatrix.dataset": "prose.txt",
        "quantize.imatrix.entries_count": 34,
        "quantize.imatrix.chunks_count": 7,
    }
    assert list(reader.fields)[-4:] == list(keys)
    matrix = read_importance_matrix(path)
    for tensor in reader.tensors:
        planned = next(t for t in plain.tensors if t.name == tensor.name)
        if tensor.tensor_type.name != "Q4_0":
            continue
        rows = quantise_band(planned, 0, planned.source.n_rows).blocks
        found = matrix.find(tensor.name, planned.shape)
        same = np.array_equal(tensor.data.reshape(rows.shape), rows)
        assert same == (found is None), tensor.name


def test_every_expert_has_its_own(tmp_path: Path) -> None:
    folder = FOLDER / "mixtral"
    q4_1 = find_file_type("Q4_1")
    path = make_matrix(tmp_path / "matrix", plan_conversion(folder, q4_1), never=1)
    matrix = read_importance_matrix(path)
    plan = plan_conversion(folder, q4_1, matrix=matrix)
    stacked = [t for t in plan.tensors if "_exps" in t.name and t.choice.type == "Q4_1"]
    assert stacked
    for tensor in stacked:
        n_experts, height, _ = tensor.shape
        weights = tensor.source.load(0, n_experts * height).reshape(tensor.shape)
        importance = tensor.importance
        assert importance is not None and importance.without_counts == (1,)
        expected = np.concatenate(
            [
                by_name("Q4_1").quantize(weights[i], importance.of_matrix(i))  # type: ignore[misc]
                for i in range(n_experts)
            ]
        )
        whole = quantise_band(tensor, 0, n_experts * height).blocks
        np.testing.assert_array_equal(whole, expected)
        middle = quantise_band(tensor, height - 3, 2 * height + 5).blocks  # across two boundaries
        np.testing.assert_array_equal(middle, expected[height - 3 : 2 * height + 5])
    from gguf_tools.report import closing_rows

    texts = [text for _, text in closing_rows(plan, tmp_path / "x", None)]
    assert any("experts never reached (1), which count as without it" in text for text in texts)


def test_a_matrix_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "matrix").write_bytes(
        new_file({"x.in_sum2": np.ones((1, 4)), "x.counts": np.ones((1, 1))})
    )
    ended = run_convert(tmp_path, STORIES, "--imatrix", "matrix")
    assert "found none of them, but x and others" in error_of(ended)
    assert "matrix2: cannot be opened" in error_of(
        run_convert(tmp_path, STORIES, "--imatrix", "matrix2")
    )


def test_a_type_that_needs_a_matrix(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", hidden_size=256, intermediate_size=256)
    q2_k_s = find_file_type("Q2_K_S")
    with pytest.raises(GGUFError, match=r"as Q2_K of a Q2_K_S file needs an importance matrix"):
        plan_conversion(tmp_path / "model", q2_k_s)
    plain = plan_conversion(tmp_path / "model", find_file_type("Q2_K"))
    partial = make_matrix(tmp_path / "partial", plain, without="blk.1.ffn_up")
    with pytest.raises(GGUFError, match=r"tensor blk.1.ffn_up.weight .* which .*partial has not"):
        plan_conversion(tmp_path / "model", q2_k_s, matrix=read_importance_matrix(partial))
    whole = read_importance_matrix(make_matrix(tmp_path / "whole", plain))
    plan = plan_conversion(tmp_path / "model", q2_k_s, matrix=whole)
    for _ in convert(plan, tmp_path / "o.gguf", threads=2):
        pass
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q2_K"


def test_types_by_name(tmp_path: Path) -> None:
    options = ("--tensor-type", "ffn_(up|gate)=Q5_1", "--tensor-type", "attn=Q4_0")
    ended = run_convert(
        tmp_path, STORIES, *options, "--embedding-type", "F16", "--keep", "blk.[01].attn_v.weight",
        "-o", "o.gguf",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "o.gguf").tensors}
    assert types["token_embd.weight"] == "F16"
    assert types["blk.3.ffn_up.weight"] == types["blk.3.ffn_gate.weight"] == "Q5_1"
    assert types["blk.0.attn_v.weight"] == "F32"
    assert types["blk.2.attn_v.weight"] == types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == "F32"


def test_kept_types_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    for dtype in ("BF16", "F16"):
        make_llama(tmp_path / dtype, dtype=dtype)
        keep = parse_overrides(keep=["output.weight", "*_norm.weight"])
        plan = plan_conversion(tmp_path / dtype, find_file_type("Q8_0"), overrides=keep)
        types = {tensor.name: tensor.quant.name for tensor in plan.tensors}
        assert types["output.weight"] == dtype
        assert types["output_norm.weight"] == "F32"
        assert types["token_embd.weight"] == "Q8_0"


def test_strict_refuses_fallbacks(tmp_path: Path) -> None:
    message = error_of(run_convert(tmp_path, STORIES, "--type", "Q4_K_M", "--strict"))
    assert "--strict: token_embd.weight would be Q8_0 instead of Q6_K, and" in message
    assert list(tmp_path.iterdir()) == []
    fits = ("--strict", "--tensor-type", "ffn_down=F16")
    assert run_convert(tmp_path, STORIES, *fits, "-o", "o.gguf").returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tensor-type", "ffn_down"), "expected REGEX=TYPE"),
        (("--tensor-type", "nothing=Q4_0"), "no tensor of this model has such a name"),
        (("--output-type", "Q9"), "type Q9 cannot be written"),
        (("--embedding-type", "Q6_K"), "--embedding-type Q6_K: rows of 64 are not whole blocks"),
        (("--type", "F16", "--pure"), "--pure was given with --type F16"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    assert words in error_of(run_convert(tmp_path, STORIES, *options))
    assert list(tmp_path.iterdir()) == []


def test_dry_run_shows_coverage(tmp_path: Path) -> None:
    plain = plan_conversion(STORIES, find_file_type("Q4_0"))
    make_matrix(tmp_path / "matrix", plain)
    ended = run_convert(tmp_path, STORIES, "--dry-run", "--type", "Q4_0", "--imatrix", "matrix")
    lines = {line.split()[0]: line for line in ended.stdout.splitlines() if line.startswith("blk")}
    assert lines["blk.0.attn_q.weight"].endswith("  importance")
    assert "no importance" in lines["blk.0.attn_norm.weight"]
