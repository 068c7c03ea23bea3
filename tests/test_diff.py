"""`gguf diff`: what is told of metadata and tensors, and the errors against float64 ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.tools.diff import Difference, compare, describe_difference, difference_lines
from gguf_tools.values import Array, MetadataValue, Value
from gguf_tools.writer import GGUFWriter, TensorSpec
from tests.test_splitting import gguf, split_in

WEIGHTS = np.random.default_rng(3).normal(size=(5, 256)).astype(np.float32)
METADATA: dict[str, MetadataValue] = {
    "general.architecture": Value("str", "llama"),
    "a.list": Array("i32", list(range(1000))),
    "a.texts": Array("str", ["x", "y", "z"]),
    "a.nan": Value("f32", float("nan")),
}


def write(
    path: Path,
    tensors: dict[str, tuple[str, np.ndarray]],
    metadata: dict[str, MetadataValue] | None = None,
) -> Path:
    specs = [TensorSpec(name, by_name(kind), x.shape) for name, (kind, x) in tensors.items()]
    with GGUFWriter(
        path, metadata=METADATA if metadata is None else metadata, tensors=specs, force=True
    ) as writer:
        for name, (kind, x) in tensors.items():
            quantize = by_name(kind).quantize
            assert quantize is not None
            writer.write(name, quantize(x))
    return path


def found(a: Path, b: Path) -> Difference:
    with GGUFFile(a) as first, GGUFFile(b) as second:
        return compare(first, second)


def test_equal_files(tmp_path: Path) -> None:
    a = write(tmp_path / "a.gguf", {"x.weight": ("Q4_K", WEIGHTS), "n": ("F32", WEIGHTS[0])})
    b = tmp_path / "b.gguf"
    b.write_bytes(a.read_bytes())
    first, *_ = split_in(a, tmp_path / "c", max_tensors=1)
    for other in (a, b, first):
        difference = found(a, other)
        assert difference.equal
        (line,) = difference_lines(difference)
        assert line == "equal: 4 metadata keys and 2 tensors are the same"
    ended = gguf("diff", a, b)
    assert ended.returncode == 0 and ended.stdout.startswith("equal: ")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "BF16", "F16"])
def test_the_errors_are_those_of_float64(kind: str, tmp_path: Path) -> None:
    """Over several bands, and against the weights before quantisation."""
    x = np.random.default_rng(4).normal(size=(2100, 1024)).astype(np.float32)
    a = write(tmp_path / "a.gguf", {"x": ("F32", x)})
    b = write(tmp_path / "b.gguf", {"x": (kind, x)})
    (tensor,) = found(a, b).tensors
    with GGUFFile(b) as file:
        apart = file.load("x").astype(np.float64) - x
    assert tensor.largest == np.abs(apart).max()
    wanted = np.sqrt((apart**2).sum() / (x.astype(np.float64) ** 2).sum())
    assert tensor.relative_rms == pytest.approx(wanted, rel=1e-12)
    assert tensor.n_not_finite == 0


def test_all_that_can_differ(tmp_path: Path) -> None:
    y = WEIGHTS.copy()
    y[2, 7] += 0.5
    a = write(
        tmp_path / "a.gguf",
        {
            "same": ("F32", WEIGHTS),
            "one": ("F32", WEIGHTS),
            "type": ("F32", WEIGHTS),
            "shape": ("F32", WEIGHTS),
            "gone": ("F32", WEIGHTS),
        },
    )
    changed = {
        **METADATA,
        "a.list": Array("i32", [*range(500), -1, *range(501, 1000)]),
        "a.texts": Array("str", ["x", "y"]),
        "general.architecture": Value("str", "qwen2"),
        "b.new": Value("u32", 7),
    }
    del changed["a.nan"]
    b = write(
        tmp_path / "b.gguf",
        {
            "new": ("F32", WEIGHTS),
            "type": ("Q8_0", WEIGHTS),
            "same": ("F32", WEIGHTS),
            "one": ("F32", y),
            "shape": ("F32", WEIGHTS[:4]),
        },
        changed,
    )
    ended = gguf("diff", a, b, "--json")
    assert ended.returncode == 1 and ended.stderr == ""
    facts = json.loads(ended.stdout)
    assert facts == describe_difference(found(a, b))
    assert facts["equal"] is False
    assert facts["metadata"] == {
        "same": 0,
        "only_a": {"a.nan": "NaN"},
        "only_b": {"b.new": 7},
        "changed": {
            "general.architecture": {
                "a_type": "str",
                "b_type": "str",
                "a": "llama",
                "b": "qwen2",
            },
            "a.list": {
                "a_type": "arr[i32]",
                "b_type": "arr[i32]",
                "a_count": 1000,
                "b_count": 1000,
                "first_difference": 500,
                "a_there": 500,
                "b_there": -1,
            },
            "a.texts": {
                "a_type": "arr[str]",
                "b_type": "arr[str]",
                "a_count": 3,
                "b_count": 2,
                "first_difference": 2,
                "a_there": "z",
            },
        },
    }
    tensors = facts["tensors"]
    assert tensors["same"] == 1 and tensors["other_order"] is True
    assert tensors["only_a"] == ["gone"] and tensors["only_b"] == ["new"]
    assert [item["name"] for item in tensors["changed"]] == ["shape", "one", "type"]
    assert tensors["changed"][0]["a_shape"] == [256, 5]
    assert tensors["changed"][0]["relative_rms"] is None
    assert tensors["changed"][1]["largest"] == pytest.approx(0.5)
    assert tensors["changed"][2]["b_type"] == "Q8_0"
    shown = gguf("diff", a, b).stdout
    for text in (
        "metadata: 0 keys the same, 5 differ",
        "- a.nan = nan",
        "+ b.new = 7",
        "~ general.architecture: llama -> qwen2",
        "~ a.list: 1,000 values -> 1,000, the first difference at 500: [500] -> [-1]",
        "~ a.texts: 3 values -> 2, the first difference at 2: ['z'] -> its end",
        "tensors: 1 the same, 5 differ, and they come in another order",
        "- gone F32 256 x 5",
        "F32 -> Q8_0",
        "shape 256 x 5 -> 256 x 4",
    ):
        assert text in shown


def test_one_screen_the_worst_first(tmp_path: Path) -> None:
    n = 60
    names = [f"blk.{i}.weight" for i in range(n)]
    rng = np.random.default_rng(5)
    order = rng.permutation(n)
    keys = {f"k.{i}": Value("u32", i) for i in range(n)}
    a = write(tmp_path / "a.gguf", {name: ("F32", WEIGHTS) for name in names}, keys)
    noisy = {
        name: ("F32", WEIGHTS * np.float32(1 + 0.001 * (1 + order[i])))
        for i, name in enumerate(names)
    }
    others = {f"k.{i}": Value("u32", i + 1) for i in range(n)}
    b = write(tmp_path / "b.gguf", noisy, others)
    difference = found(a, b)
    lines = list(difference_lines(difference))
    assert len(lines) <= 30
    worst = [line.split()[0] for line in lines if line.startswith("  blk.")]
    assert worst == [names[i] for i in np.argsort(-order)][: len(worst)]
    everything = list(difference_lines(difference, everything=True))
    assert sum(line.startswith("  blk.") for line in everything) == n
    assert sum(line.startswith("  ~ ") for line in everything) == n
    with_all = gguf("diff", a, b, "--all")
    assert with_all.stdout.splitlines() == everything and with_all.returncode == 1


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    bad = WEIGHTS.copy()
    bad[0, :3] = np.nan, np.inf, -np.inf
    a = write(tmp_path / "a.gguf", {"x": ("F32", WEIGHTS), "zero": ("F32", 0 * WEIGHTS)})
    b = write(tmp_path / "b.gguf", {"x": ("F32", bad), "zero": ("F32", WEIGHTS)})
    tensors = {tensor.name: tensor for tensor in found(a, b).tensors}
    assert tensors["x"].n_not_finite == 3 and tensors["x"].relative_rms == 0
    assert tensors["zero"].relative_rms == np.inf
    facts = json.loads(gguf("diff", a, b, "--json").stdout)
    assert [item["name"] for item in facts["tensors"]["changed"]] == ["x", "zero"]
    assert facts["tensors"]["changed"][1]["relative_rms"] == "Infinity"
    assert found(b, b).equal


def test_long_texts_and_escapes(tmp_path: Path) -> None:
    text = "a" * 500
    a = write(tmp_path / "a.gguf", {}, {"t": Value("str", text), "\x1b[2J": Value("u32", 1)})
    b = write(tmp_path / "b.gguf", {}, {"t": Value("str", text[:-1] + "b")})
    shown = gguf("diff", a, b).stdout
    assert "500 characters -> 500, which differ from place 499" in shown
    assert "\x1b" not in shown and "- \\x1b[2J = 1" in shown


def test_the_types_of_values(tmp_path: Path) -> None:
    a = write(tmp_path / "a.gguf", {}, {"t": Value("u32", 1)})
    b = write(tmp_path / "b.gguf", {}, {"t": Value("i32", 1)})
    assert "~ t: 1 -> 1 (u32 -> i32)" in gguf("diff", a, b).stdout


def test_errors(tmp_path: Path) -> None:
    a = write(tmp_path / "a.gguf", {})
    ended = gguf("diff", a, tmp_path / "no.gguf")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert gguf("diff", a).returncode == 2
