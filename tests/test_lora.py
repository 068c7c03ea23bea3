"""LoRA adapters: merged weights and logits as PEFT has them, GGUF adapters, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from safetensors.numpy import save_file

from gguf_tools import archs
from gguf_tools.archs.config import HFConfig
from gguf_tools.checkpoint import Checkpoint, open_checkpoint
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import CheckpointError, UnsupportedQuantError
from gguf_tools.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_adapter
from gguf_tools.lora_file import plan_adapter
from gguf_tools.lora_merging import Scaled, read_scaled, with_adapters
from gguf_tools.plan import Plan
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from tests.architectures import FOLDER as BASES
from tests.architectures import Prompt, disagreement

FOLDER = Path(__file__).parent / "data" / "lora"
EMBEDDING = "tied-embedding"  # a change of the embedding: for an adapter file, not for merging
CASES = tuple(sorted({path.parent.name for path in FOLDER.glob("*/answers.npz")} - {EMBEDDING}))
STEP = 5  # of the rows that answers.npz keeps
F32 = find_file_type("F32")

# What PEFT's merging changes though the adapter itself does not: the other end of tied weights.
TIED = {
    "tied-head": "model.embed_tokens.weight",
}
IN_FILES = ("conv1d", "patterns", "regrouped")  # those a GGUF adapter can hold


def base_of(case: str) -> Path:
    with np.load(FOLDER / case / "answers.npz") as answers:
        return BASES / str(answers["base"])


def merge(case: str, *scales: float, base: Path | None = None) -> Checkpoint:
    checkpoint = open_checkpoint(base or base_of(case))
    architecture = archs.find(HFConfig(checkpoint.config, "config.json"))
    adapters = [Scaled(open_adapter(FOLDER / case), scale) for scale in scales]
    return with_adapters(checkpoint, architecture, adapters)[0]


def weights(checkpoint: Checkpoint) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors, under the names that the rules use."""
    architecture = archs.find(HFConfig(checkpoint.config, "config.json"))
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(architecture.ignored):
            yield architecture.rename(name), tensor.load(0, tensor.n_rows).reshape(tensor.shape)


def written(plan: Plan, path: Path) -> dict[str, np.ndarray]:
    for _ in convert(plan, path, threads=2):
        pass
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_peft(case: str) -> None:
    before, after = dict(weights(open_checkpoint(base_of(case)))), dict(weights(merge(case, 1.0)))
    architecture = archs.find(HFConfig(merge(case).config, "config.json"))
    with np.load(FOLDER / case / "answers.npz") as answers:
        rows = {
            architecture.rename(key.removeprefix("rows:")): answers[key]
            for key in answers
            if key.startswith("rows:")
        }
    rows.pop(TIED.get(case, ""), None)
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    changed |= after.keys() - before.keys() - {TIED.get(case)}
    assert changed == set(rows)
    for name, expected in rows.items():
        assert np.abs(after[name][::STEP] - expected).max() <= 1e-6, name


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_adapter_beside_the_model(case: str, tmp_path: Path) -> None:
    plan = plan_conversion(base_of(case), F32, [read_scaled(str(FOLDER / case))])
    path = tmp_path / "merged.gguf"
    written(plan, path)
    with np.load(FOLDER / case / "answers.npz") as answers:
        ids, logits = answers["ids"], answers["logits"]
    prompt = Prompt(tuple(ids.tolist()), np.arange(len(ids)), logits, 128)
    assert disagreement(path, prompt, "reference") <= 2e-5


@pytest.mark.parametrize("case", ["patterns", "conv1d", "renamed"])
def test_bands_are_those_of_the_whole(case: str) -> None:
    for tensor in merge(case, 1.0).tensors.values():
        if tensor.name.endswith("bias"):
            continue
        whole = tensor.load(0, tensor.n_rows)
        bands = [tensor.load(i, min(i + 7, tensor.n_rows)) for i in range(0, tensor.n_rows, 7)]
        assert np.abs(np.concatenate(bands) - whole).max() <= 1e-6, tensor.name


def test_changes_of_several_adapters_add_up() -> None:
    base, once = dict(weights(merge("patterns"))), dict(weights(merge("patterns", 1.0)))
    several = dict(weights(merge("patterns", 0.5, -2.0, 1.0)))
    for name, before in base.items():
        expected = before - 0.5 * (once[name] - before)
        assert np.abs(several[name] - expected).max() <= 2e-6, name


def test_adapter_files_count_among_the_inputs() -> None:
    assert FOLDER / "patterns" / ADAPTER_WEIGHTS in merge("patterns", 1.0).files


def test_scale_is_read_from_the_end(tmp_path: Path) -> None:
    folder = FOLDER / "patterns"
    assert [read_scaled(f"{folder}{end}").scale for end in ("", ":0.5", ":-1e1")] == [1, 0.5, -10]
    odd = tmp_path / "adapter:2"
    shutil.copytree(folder, odd)
    assert read_scaled(str(odd)).scale == 1
    assert read_scaled(f"{odd}:3").scale == 3
    for end in ("nan", "inf", "1e99"):
        with pytest.raises(CheckpointError, match="expected a scale"):
            read_scaled(f"{folder}:{end}")


def test_notes_say_what_was_merged_and_for_whom() -> None:
    adapter = [Scaled(open_adapter(FOLDER / "patterns"), 0.5)]
    notes = plan_conversion(BASES / "llama", F32, adapter).notes
    assert notes[0] == "patterns is merged at scale 0.5: 14 matrices of rank 2, 3, 4"
    notes = plan_conversion(BASES / "llama-llama3", F32, [*changed_names(adapter)]).notes
    assert any("trained on tiny/llama" in note for note in notes)


def changed_names(adapters: list[Scaled]) -> Iterator[Scaled]:
    """The adapters without the matrices, which another base would refuse."""
    for scaled in adapters:
        yield Scaled(type(scaled.adapter)(**{**vars(scaled.adapter), "pairs": ()}), scaled.scale)


# --- GGUF adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", IN_FILES)
def test_adapter_file_is_what_merging_adds(case: str, tmp_path: Path) -> None:
    base = base_of(case)
    adapter = open_adapter(FOLDER / case)
    thin = written(plan_adapter(adapter, F32, base), tmp_path / "adapter.gguf")
    before = written(plan_conversion(base, F32), tmp_path / "base.gguf")
    after = written(plan_conversion(base, F32, [Scaled(adapter)]), tmp_path / "merged.gguf")
    with GGUFFile(tmp_path / "adapter.gguf") as file:
        metadata = dict(file.metadata)
    assert metadata["general.type"] == "adapter"
    assert metadata["adapter.type"] == "lora"
    with GGUFFile(tmp_path / "base.gguf") as file:
        assert metadata["general.architecture"] == file.metadata["general.architecture"]
    names = {name.rpartition(".")[0] for name in thin}
    assert names == {n for n in before if not np.array_equal(before[n], after[n])}
    for name in names:
        a, b = thin[f"{name}.lora_a"], thin[f"{name}.lora_b"]
        change = b @ a * (metadata["adapter.lora.alpha"] / b.shape[1])
        assert np.abs(before[name] + change - after[name]).max() <= 2e-6, name


def test_a_changed_embedding_goes_to_a_file_and_is_not_merged(tmp_path: Path) -> None:
    base, adapter = base_of(EMBEDDING), open_adapter(FOLDER / EMBEDDING)
    with pytest.raises(CheckpointError, match=r"changes the embedding .* --lora-only"):
        plan_conversion(base, F32, [Scaled(adapter)])
    thin = written(plan_adapter(adapter, F32, base), tmp_path / "adapter.gguf")
    before = written(plan_conversion(base, F32), tmp_path / "base.gguf")
    with GGUFFile(tmp_path / "adapter.gguf") as file:
        alpha = file.metadata["adapter.lora.alpha"]
    a, b = thin["token_embd.weight.lora_a"], thin["token_embd.weight.lora_b"]
    changed = before["token_embd.weight"] + a @ b.T * (alpha / b.shape[1])
    with np.load(FOLDER / EMBEDDING / "answers.npz") as answers:
        expected = answers["rows:model.embed_tokens.weight"]
    assert np.abs(changed[::STEP] - expected).max() <= 2e-6


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("biases", "has tensors whole"),
        ("fused-saved", "merge it with --lora"),
        ("tied-head", "tied to the embedding"),
        ("pieces", "kv_b_proj has another form in GGUF"),
    ],
)
def test_adapter_file_refuses_what_it_cannot_hold(case: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_adapter(open_adapter(FOLDER / case), F32, base_of(case))


def test_adapter_file_needs_a_base_and_a_float_type() -> None:
    adapter = open_adapter(FOLDER / "patterns")
    with pytest.raises(CheckpointError, match=r"expected --base MODEL_DIR.*tiny/llama"):
        plan_adapter(adapter, F32)
    with pytest.raises(CheckpointError, match=r"--base .* has no config\.json"):
        plan_adapter(adapter, F32, FOLDER)
    with pytest.raises(CheckpointError, match=r"down_proj is \(32, 48\).*change \(64, 96\)"):
        plan_adapter(adapter, F32, BASES / "llama-tied")
    with pytest.raises(UnsupportedQuantError, match="too thin"):
        plan_adapter(adapter, find_file_type("Q4_K_M"), BASES / "llama")


def test_activated_lora_is_a_file_and_not_merged(tmp_path: Path) -> None:
    folder = altered(
        tmp_path, lambda config, tensors: config.update(alora_invocation_tokens=[5, 7])
    )
    metadata = plan_adapter(open_adapter(folder), F32, BASES / "llama").metadata
    assert "adapter.alora.invocation_tokens" in metadata
    with pytest.raises(CheckpointError, match="activated LoRA"):
        plan_conversion(BASES / "llama", F32, [Scaled(open_adapter(folder))])


# --- what is refused ----------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]
Change = Callable[[dict[str, Any], Tensors], object]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
NAN = np.full((2, 64), np.nan, np.float32)


def altered(folder: Path, change: Change) -> Path:
    """The adapter `patterns` as float32, with a change."""
    config = json.loads((FOLDER / "patterns" / ADAPTER_CONFIG).read_text())
    tensors = {
        tensor.name: tensor.load(0, tensor.n_rows)
        for pair in open_adapter(FOLDER / "patterns").pairs
        for tensor in (pair.a, pair.b)
    }
    change(config, tensors)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / ADAPTER_WEIGHTS
    )
    return folder


def setting(**values: object) -> Change:
    return lambda config, tensors: config.update(values)


def tensor(name: str, values: np.ndarray) -> Change:
    return lambda config, tensors: tensors.update({name: values})


def without(name: str) -> Change:
    return lambda config, tensors: tensors.pop(name)


ONES = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(use_dora=True), "use_dora: .*DoRA"),
        (setting(peft_type="LOHA"), "peft_type: expected LORA, found .?LOHA"),
        (setting(target_parameters=["experts.down_proj"]), "no modules"),
        (setting(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (setting(lora_alpha=0), "lora_alpha: expected a number above 0"),
        (setting(lora_alpha="8"), "lora_alpha: expected a number"),
        (setting(r=5), "gives rank 5, A is"),
        (setting(rank_pattern={}), r"q_proj: adapter_config\.json gives rank 4, A is \(2, 64\)"),
        (setting(alpha_pattern={"(a+)+b": 1}), "simple regular expressions"),
        (setting(alpha_pattern={"a" * 400: 1}), "simple regular expressions"),
        (setting(alpha_pattern={"(a": 1}), "expected a regular expression"),
        (setting(alpha_pattern=[1]), "alpha_pattern: expected an object"),
        (setting(modules_to_save="lm_head"), "expected a list of names"),
        (without(f"{Q}.lora_A.weight"), "q_proj has lora_B but no lora_A"),
        (without(f"{Q}.lora_B.weight"), "q_proj has lora_A but no lora_B"),
        (tensor(f"{Q}.lora_magnitude_vector", ONES[0]), "DoRA"),
        (tensor(f"{Q}.lora_B.bias", ONES[0]), "expected lora_A and lora_B"),
        (tensor(f"{Q}.lora_A.other.weight", ONES), "is there twice"),
        (tensor(f"{Q}.lora_A.weight", ONES[0]), "do not fit"),
        (tensor(f"{Q}.lora_A.weight", np.ones((2, 64), np.int32)), "is I32: expected one of"),
        (tensor(f"{Q}.lora_A.weight", np.ones((2, 60), np.float32)), r"change \(64, 60\)"),
        (tensor(f"{Q}.bias", ONES[0]), r"the base has no .*q_proj\.bias"),
        (tensor("base_model.model.lm_head.weight", ONES), r"lm_head\.weight is \(288, 64\)"),
        (lambda config, tensors: tensors.clear(), "it holds no tensor"),
    ],
)  # fmt: skip
def test_refused(change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(BASES / "llama", F32, [Scaled(open_adapter(altered(tmp_path, change)))])


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = altered(tmp_path, tensor(f"{Q}.lora_A.weight", NAN))
    plan = plan_conversion(BASES / "llama", F32, [Scaled(open_adapter(folder))])
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight of the adapter holds"):
        written(plan, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_whole_tensors_are_taken_whole_once(tmp_path: Path) -> None:
    norm = np.full(64, 3, np.float32)
    folder = altered(tmp_path, tensor("base_model.model.model.norm.weight", norm))
    adapter = open_adapter(folder)
    merged = written(plan_conversion(BASES / "llama", F32, [Scaled(adapter)]), tmp_path / "o.gguf")
    assert np.array_equal(merged["output_norm.weight"], norm)
    with pytest.raises(CheckpointError, match="expected scale 1"):
        plan_conversion(BASES / "llama", F32, [Scaled(adapter, 0.5)])
    with pytest.raises(CheckpointError, match="another adapter changes it"):
        plan_conversion(BASES / "llama", F32, [Scaled(adapter), Scaled(adapter)])


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "none", "expected the folder"), (BASES / "llama", "PEFT")):
        with pytest.raises(CheckpointError, match=message):
            open_adapter(folder)
    shutil.copy(FOLDER / "patterns" / ADAPTER_CONFIG, tmp_path)
    with pytest.raises(CheckpointError, match="found none"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="a pickle"):
        open_adapter(tmp_path)


# --- the command --------------------------------------------------------------------------------


def run(folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "gguf_tools", "convert", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_command(tmp_path: Path) -> None:
    adapter = FOLDER / "patterns"
    done = run(tmp_path, BASES / "llama", "--type", "F32", "--lora", f"{adapter}:0.5")
    assert done.returncode == 0, done.stderr
    assert "patterns is merged at scale 0.5" in done.stderr
    rows = {t.name: t.data for t in GGUFReader(tmp_path / "llama-patterns-F32.gguf").tensors}
    expected = plan_conversion(BASES / "llama", F32, [read_scaled(f"{adapter}:0.5")])
    for name, values in written(expected, tmp_path / "expected.gguf").items():
        assert np.array_equal(rows[name], values), name
    done = run(tmp_path, adapter, "--lora-only", "--base", BASES / "llama", "--type", "F16")
    assert done.returncode == 0, done.stderr
    with GGUFFile(tmp_path / "patterns-F16.gguf") as file:
        assert len(file.tensors) == 28
    for wrong in (("--base", tmp_path), ("--lora-only", "--lora", adapter)):
        assert run(tmp_path, BASES / "llama", *wrong).returncode != 0
