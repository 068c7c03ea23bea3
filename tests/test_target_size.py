"""`convert --target-size` and `--target-bpw`: a choice that fits, and that can be repeated."""

import json
import os
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gguf_tools.conversion import convert as write_file
from gguf_tools.conversion import plan_conversion
from gguf_tools.describe import bits_per_weight, short_size
from gguf_tools.errors import GGUFError
from gguf_tools.overrides import NO_OVERRIDES, Overrides
from gguf_tools.plan import Plan
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.self_check import Source
from gguf_tools.target_options import Target, parse_size, read_target
from gguf_tools.target_size import Settled, settle
from gguf_tools.type_trials import Doing, Measured, TypeTrials
from tests.checkpoints import STORIES
from tests.test_convert_cli import convert as run_convert
from tests.test_convert_cli import fields

ROOT = Path(__file__).resolve().parent.parent
Types = Mapping[str, str]


def types_of(path: Path) -> dict[str, str]:
    with GGUFFile(path) as file:
        return {tensor.name: tensor.quant.name for tensor in file.tensors.values()}


def blocks_of(path: Path) -> dict[str, bytes]:
    with GGUFFile(path) as file:
        return {name: file.raw(name).tobytes() for name in file.tensors}


def metadata_of(path: Path) -> dict[str, object]:
    with GGUFFile(path) as file:
        return dict(file.metadata)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("105453984", 105_453_984),
        ("4.2GiB", int(4.2 * 2**30)),
        ("700MB", 700_000_000),
        (" 700 mb ", 700_000_000),
        ("1.5k", 1500),
        ("2TiB", 2**41),
        ("12B", 12),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-4GiB", "4 QiB", "1e9", "4.2.1GiB", "9" * 400, "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(GGUFError, match="expected a size, such as"):
        parse_size(text)


def test_options(tmp_path: Path) -> None:
    assert read_target(None, None, None) is None
    target = read_target(None, 4.5, "default")
    assert target is not None and (target.name, target.text) == ("4.5bpw", None)
    wrong = [
        ((None, None, "default"), "give --target-size, too"),
        (("1GB", 4.5, None), "exclude each other"),
        ((None, 0.0, None), "expected bits for each weight"),
        ((None, float("nan"), None), "expected bits for each weight"),
        (("1GB", None, str(tmp_path / "no.txt")), "found none of that name"),
    ]
    for options, message in wrong:
        with pytest.raises(GGUFError, match=message):
            read_target(*options)


def test_from_measuring_to_the_same_file_again(tmp_path: Path) -> None:
    size = 300_000
    ended = run_convert(tmp_path, STORIES, "--target-size", str(size), "-o", "o.gguf")
    assert ended.returncode == 0, ended.stderr
    path = tmp_path / "o.gguf"
    # Everything counts: the header with its vocabulary, and what fills up the file.
    assert 0.97 * size < path.stat().st_size <= size
    types = types_of(path)
    assert len({type_ for name, type_ in types.items() if name.startswith("blk")}) > 3
    metadata = metadata_of(path)
    found = {key.removeprefix("gguf_tools.target."): value for key, value in metadata.items()}
    assert (found["size"], found["text"]) == (size, "gguf-tools calibration.txt")
    assert len(found["text_sha256"]) == 64 and found["tokens"] > 500 < found["kl_tokens"]
    assert 0 < found["kl"] < found["file_type_kl"]
    closing = fields(ended.stdout)
    assert closing["target"].startswith(f"mean KL {found['kl']:.5f} on ")
    assert f"{found['file_type']}, " in closing["target"]
    assert "blk.*.ffn_down.weight" in ended.stdout.split("\nfile ")[0]
    shown = run_convert(tmp_path, "info", "o.gguf", command=("-m", "gguf_tools")).stdout
    assert f"for {size} bytes: mean KL {found['kl']:.7g} ({found['file_type']}: " in shown
    assert found["command"] in shown
    closest = plan_conversion(STORIES, find_file_type(found["file_type"]))
    assert f"{short_size(closest.total_size)}: " in closing["target"]
    # The command of the file makes it without measuring.
    command = shlex.split(found["command"])
    assert command[:2] == ["convert", "MODEL"]
    ended = run_convert(tmp_path, STORIES, *command[2:], "-o", "again.gguf", "--no-check")
    assert ended.returncode == 0, ended.stderr
    again = tmp_path / "again.gguf"
    assert blocks_of(again) == blocks_of(path)
    assert metadata_of(again)["general.file_type"] == metadata["general.file_type"]


def test_a_gguf_file_with_wishes(tmp_path: Path) -> None:
    """Bits per weight, a source in F16, types that the user chose, and nothing written."""
    source = tmp_path / "s-F16.gguf"
    for _ in write_file(plan_conversion(STORIES, find_file_type("F16")), source, threads=1):
        pass
    wishes = ("--tensor-type", "attn_v=Q4_0", "--keep", "blk.1.ffn_up.weight")
    options = ("s-F16.gguf", "--target-bpw", "9", *wishes, "--no-check")
    ended = run_convert(tmp_path, *options, "--dry-run")
    assert ended.returncode == 0, ended.stderr
    assert os.listdir(tmp_path) == ["s-F16.gguf"]
    assert fields(ended.stdout)["file"] == "s-9bpw.gguf (not written)"
    ended = run_convert(tmp_path, *options)
    assert ended.returncode == 0, ended.stderr
    path = tmp_path / "s-9bpw.gguf"
    with GGUFFile(path) as file:
        assert 8.7 < (bits_per_weight(file) or 0) <= 9
    types = types_of(path)
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(5)} == {"Q4_0"}
    assert types["blk.1.ffn_up.weight"] == "F16"
    command = shlex.split(str(metadata_of(path)["gguf_tools.target.command"]))
    assert command[4:6] == list(wishes[:2]) and command[-2:] == list(wishes[2:])
    ended = run_convert(tmp_path, "s-F16.gguf", *command[2:], "-o", "again.gguf", "--no-check")
    assert ended.returncode == 0, ended.stderr
    assert blocks_of(tmp_path / "again.gguf") == blocks_of(path)


def make_adapter(folder: Path) -> None:
    """A LoRA adapter for STORIES, of one matrix."""
    folder.mkdir()
    asked = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(asked))
    rng = np.random.default_rng(3)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora"
    pair = {
        f"{name}_{end}.weight": rng.normal(0, 0.1, shape).astype(np.float32)
        for end, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_file(pair, folder / "adapter_model.safetensors")


def test_the_command_names_all_that_decides_bytes(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    prose = (ROOT / "tests" / "data" / "prose.txt").read_text()
    (tmp_path / "a text.txt").write_text(prose * 8)
    (tmp_path / "short.txt").write_text(prose * 4)
    given = ("--lora", "adapter:0.5", "--calibrate", "a text.txt", "--method", "imatrix")
    options = ("--target-size", "300000", "--target-text", "short.txt", *given, "--threads", "1")
    ended = run_convert(tmp_path, STORIES, *options, "--no-check", "-o", "o.gguf")
    assert ended.returncode == 0, ended.stderr
    metadata = metadata_of(tmp_path / "o.gguf")
    command = shlex.split(str(metadata["gguf_tools.target.command"]))
    named = (*given, "--calibrate-windows", "58", "--threads", "1", "--no-quality")
    assert " ".join(named) in " ".join(command)
    ended = run_convert(tmp_path, STORIES, *command[2:], "-o", "again.gguf", "--no-check")
    assert ended.returncode == 0, ended.stderr
    assert blocks_of(tmp_path / "again.gguf") == blocks_of(tmp_path / "o.gguf")
    made_again = metadata_of(tmp_path / "again.gguf")
    others = [key for key in metadata if not key.startswith("gguf_tools.target.")]
    assert list(made_again) == others
    assert [repr(made_again[key]) for key in others] == [repr(metadata[key]) for key in others]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-size", "100kB"), "--target-size 100kB: this model takes at least 242,"),
        (("--target-bpw", "20"), "all weights in F16 this model takes"),
        (("--target-size", "1GB"), "choose --type F16 or BF16"),
        (("--target-bpw", "9", "--type", "Q8_0"), "--type and a target exclude each other"),
        (("--target-bpw", "9", "--pure"), "--pure and a target exclude each other"),
        (("--target-bpw", "9", "--target-text", "short.txt"), "give a longer text"),
        (("--target-bpw", "9", "-o", "short.txt"), "short.txt exists already"),
    ],
)
def test_what_cannot_be(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time")
    ended = run_convert(tmp_path, STORIES, *options)
    assert ended.returncode in (1, 2)
    assert message in " ".join(ended.stderr.split()) and "Traceback" not in ended.stderr
    assert os.listdir(tmp_path) == ["short.txt"]


def bits_of(type_: str) -> float:
    quant = by_name(type_)
    return 8 * quant.block_bytes / quant.block_size


class ToldTrials(TypeTrials):
    """Trials whose outcome is told beforehand: no model is run."""

    def __init__(self, kl: Callable[[Types], float]) -> None:
        super().__init__(Source(STORIES, is_checkpoint=True), text=None, imatrix=None, threads=1)
        self.kl = kl
        self.asked: list[Types] = []

    def measure(
        self, types: Mapping[str, Sequence[str]], tried: Types
    ) -> Generator[Doing, None, Measured]:
        yield Doing("measuring")
        costs = {
            name: {type_: 4.0 ** -bits_of(type_) for type_ in each} for name, each in types.items()
        }
        return Measured(costs, 512, 1, "told", "0" * 64)

    def compare(
        self, mixtures: Sequence[Types]
    ) -> Generator[Doing, None, tuple[Sequence[float], int]]:
        yield Doing("comparing")
        self.asked += mixtures
        return [self.kl(types) for types in mixtures], 2048


def settled(trials: TypeTrials, **target: object) -> Settled:
    def plan_for(file_type: object, overrides: Overrides) -> Plan:
        return plan_conversion(STORIES, file_type, overrides=overrides)

    steps = settle(
        Target(**target),
        plan_for(find_file_type("Q4_K_M"), NO_OVERRIDES),
        NO_OVERRIDES,
        plan_for,
        trials,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_never_worse_than_the_file_type() -> None:
    """Where a mixture turns out worse than was expected of it, the file type is written."""
    recipe = plan_conversion(STORIES, find_file_type("Q8_0"))
    of_recipe = {tensor.name: tensor.quant.name for tensor in recipe.tensors}

    def kl(types: Types) -> float:
        return 0.1 if types.items() <= of_recipe.items() else 0.2

    trials = ToldTrials(kl)
    found = settled(trials, n_bytes=recipe.total_size + 5000)
    assert found.plan.file_type.name == "Q8_0" and found.plan.specs == recipe.specs
    assert found.plan.metadata == recipe.metadata and not found.lines
    assert found.line.startswith("Q8_0: ") and "0.20000, Q8_0 0.10000" in found.line
    trials.kl = lambda types: 0.3 if types.items() <= of_recipe.items() else 0.2
    better = settled(trials, n_bytes=recipe.total_size + 5000)
    assert better.plan.metadata["gguf_tools.target.kl"].value == 0.2
    assert better.plan.total_size <= recipe.total_size + 5000


def test_smaller_than_every_file_type() -> None:
    """There is nothing to compare with, and nothing is said of it."""
    smallest = min(
        plan_conversion(STORIES, find_file_type(name)).total_size
        for name in ("Q4_0", "Q2_K", "Q3_K_S")
    )
    found = settled(ToldTrials(lambda types: 0.5), n_bytes=smallest - 500)
    assert found.plan.total_size <= smallest - 500
    assert "gguf_tools.target.file_type_kl" not in found.plan.metadata
    assert found.line == "mean KL 0.50000 on 2,048 tokens"
