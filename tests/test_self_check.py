"""What `convert` finds in a finished file: its template, its stop set, its logits."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools import self_check
from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import OutputError
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.self_check import Finding, SelfCheck, SheetRequest, Source, run_ids
from gguf_tools.vocab.corpus import COMPARED_TEXTS
from gguf_tools.vocab.trial import Encodings
from runtime.decoders import DECODERS
from runtime.file_check import Texts, check, open_source
from runtime.layerwise import LayerwiseModel
from runtime.logits_check import Comparing, check_logits, choose_layers, compare, run_source
from runtime.sources import plain_value
from runtime.template_check import check_template
from runtime.tokenizer import Tokenizer
from tests.architectures import FOLDER
from tests.checkpoints import STORIES

ROOT = Path(__file__).resolve().parent.parent
LORA = Path(__file__).parent / "data" / "lora"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDS = [1, 403, 407, 261, 378, 432, 421, 367, 426, 261, 397, 432, 310, 427, 449, 430]

Tamper = Callable[[dict[str, np.ndarray]], None]


def converted(folder: Path, target: Path, file_type: str = "F16") -> Path:
    for _ in convert(plan_conversion(folder, find_file_type(file_type)), target, threads=2):
        pass
    return target


def tampered(path: Path, change: Tamper) -> Path:
    """The file with bytes of its tensors changed in place."""
    with GGUFFile(path) as file:
        places = {name: tensor.offset for name, tensor in file.tensors.items()}
        blocks = {name: file.raw(name).copy() for name in places}
    before = dict(blocks)
    change(blocks)
    with open(path, "r+b") as stream:
        for name, data in blocks.items():
            if data is not before[name]:
                stream.seek(places[name])
                stream.write(data.tobytes())
    return path


def swap(one: str, other: str) -> Tamper:
    def change(blocks: dict[str, np.ndarray]) -> None:
        blocks[one], blocks[other] = blocks[other], blocks[one]

    return change


def rolled(name: str) -> Tamper:
    """The tensor's rows, or its numbers if it is a vector, at the wrong place by one."""

    def change(blocks: dict[str, np.ndarray]) -> None:
        data = blocks[name]
        blocks[name] = np.roll(data, 4 if len(data) == 1 else 1, axis=1 if len(data) == 1 else 0)

    return change


def no_numbers(name: str) -> Tamper:
    """A tensor of NaN."""

    def change(blocks: dict[str, np.ndarray]) -> None:
        blocks[name] = np.full_like(blocks[name], 255)

    return change


def without_permutation(part: str, head_dim: int) -> Tamper:
    """Rows of q or k in Hugging Face's order, as a converter leaves them that forgets."""

    def change(blocks: dict[str, np.ndarray]) -> None:
        for name, data in blocks.items():
            if part in name:
                pairs = data.reshape(-1, head_dim // 2, 2, data.shape[1])
                blocks[name] = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data.shape)

    return change


def source_of(folder: Path, *adapters: str) -> Any:
    return open_source({"source": str(folder), "is_checkpoint": True, "adapters": adapters})


def logits_finding(folder: Path, path: Path, ids: list[int] = IDS) -> Finding:
    source = source_of(folder)
    expected = run_source(source, ids, threads=2, layers=choose_layers(source))
    with GGUFFile(path) as file:
        return check_logits(Comparing(expected), file, threads=2)


# --- logits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q2_K"])
def test_every_type_is_within_its_limit(file_type: str, tmp_path: Path) -> None:
    found = logits_finding(STORIES, converted(STORIES, tmp_path / "x.gguf", file_type))
    assert found.problems == ()
    assert found.text.startswith("logits agree on ") and "KL" in found.text
    assert len(found.details) == 1 + 5 + 1 + 1


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize(
    "change",
    [
        without_permutation("attn_q", 8),
        without_permutation("attn_k", 8),
        swap("blk.0.attn_q.weight", "blk.3.attn_q.weight"),
        swap("blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"),
        rolled("token_embd.weight"),
        rolled("output_norm.weight"),
    ],
)
def test_a_wrong_tensor_is_caught(change: Tamper, file_type: str, tmp_path: Path) -> None:
    path = tampered(converted(STORIES, tmp_path / "x.gguf", file_type), change)
    found = logits_finding(STORIES, path)
    assert "of the file is not that of the source's weights: what it makes is" in found.problems[0]


def test_weights_that_are_no_numbers_are_caught(tmp_path: Path) -> None:
    path = tampered(converted(STORIES, tmp_path / "x.gguf"), no_numbers("blk.2.attn_norm.weight"))
    found = logits_finding(STORIES, path)
    assert "the layer 2 of the file is not that" in found.problems[0]
    assert found.text.endswith("KL inf")


def test_smollm2(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    path = converted(smollm2_checkpoint, tmp_path / "x.gguf", "Q4_0")
    ids = list(range(1000, 1016))
    assert logits_finding(smollm2_checkpoint, path, ids).problems == ()
    tampered(path, without_permutation("attn_k", 64))
    assert logits_finding(smollm2_checkpoint, path, ids).problems


def test_the_layer_of_a_wrong_tensor_is_named(tmp_path: Path) -> None:
    path = converted(STORIES, tmp_path / "x.gguf", "F32")
    tampered(path, swap("blk.2.ffn_gate.weight", "blk.2.ffn_up.weight"))
    with GGUFFile(path) as file:
        expected = run_source(source_of(STORIES), IDS, threads=1)
        parts = compare(expected, file, threads=1).parts
    assert [part.name for part in parts if part.is_wrong] == ["layer 2"]
    assert max(part.error for part in parts if not part.is_wrong) < 1e-5


def test_adapters_are_merged_into_the_source_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gguf_tools.jit.Kernel.is_ready", False)  # the same numbers for both
    adapter = str(LORA / "patterns")
    with np.load(LORA / "patterns" / "answers.npz") as answers:
        base, ids = FOLDER / str(answers["base"]), answers["ids"].tolist()
    target = tmp_path / "x.gguf"
    done = run_convert(tmp_path, base, "--lora", adapter, "--type", "F32", "-o", target)
    assert done.returncode == 0, done.stderr
    with GGUFFile(target) as file:
        sources = source_of(base, adapter), source_of(base)
        runs = [run_source(source, ids, threads=1) for source in sources]
        found = [compare(expected, file, threads=1) for expected in runs]
    errors = [max(part.error for part in each.parts) for each in found]
    assert errors[0] < 1e-5 < 1e-3 < errors[1]


def test_architecture_without_decoder_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted(STORIES, tmp_path / "x.gguf")
    monkeypatch.delitem(DECODERS, "llama")
    request = {"file": path, "source": STORIES, "is_checkpoint": True, "adapters": []}
    found = check({**request, "threads": 1}, wait=lambda: None).findings
    assert found == [
        Finding("tokenizer carried over"),
        Finding("no chat template"),
        Finding("not run: its architecture cannot be run yet"),
    ]


def test_source_that_is_gone(tmp_path: Path) -> None:
    path = converted(STORIES, tmp_path / "x.gguf")
    request = {"file": path, "source": tmp_path / "gone", "is_checkpoint": True, "adapters": []}
    *_, found = check({**request, "threads": 1}, wait=lambda: None).findings
    assert found.text == "logits not compared" and "no such folder" in found.problems[0]


def test_large_models_are_run_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = converted(STORIES, tmp_path / "x.gguf", "Q8_0")
    with GGUFFile(path) as file:
        assert choose_layers(file) is None
        monkeypatch.setattr("runtime.logits_check.WHOLE_WEIGHTS", 1000)
        assert choose_layers(file) == [0, 1, 3, 4]
        with LayerwiseModel(file, n_tokens=4, threads=1, layers=[0, 1, 3, 4]) as model:
            assert len(model.program.layers) == 4
    found = logits_finding(STORIES, path)
    assert found.problems == () and found.text.startswith("head and 4 layers agree to")
    assert found.text.endswith(", rows of 1 more")
    tampered(path, swap("blk.0.attn_q.weight", "blk.3.attn_q.weight"))
    assert logits_finding(STORIES, path).problems


@pytest.mark.parametrize(
    "change",
    [
        without_permutation("blk.2.attn_q", 8),
        rolled("blk.2.ffn_norm.weight"),
        no_numbers("blk.2.ffn_norm.weight"),
    ],
)
def test_a_wrong_tensor_of_a_layer_that_is_not_run(
    change: Tamper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tampered(converted(STORIES, tmp_path / "x.gguf", "Q8_0"), change)
    monkeypatch.setattr("runtime.logits_check.WHOLE_WEIGHTS", 1000)
    (problem,) = logits_finding(STORIES, path).problems
    assert problem.startswith("the blk.2.") and "a sample of its rows is" in problem


def test_weights_that_were_scaled_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Channels scaled by a calibration make other weights of the same function."""
    path = tmp_path / "x.gguf"
    options = ("--calibrate", "default", "--method", "awq", "--calibrate-windows", "4")
    done = run_convert(tmp_path, STORIES, "--type", "Q4_0", "-o", path, "--no-check", *options)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("runtime.logits_check.WHOLE_WEIGHTS", 1000)
    found = logits_finding(STORIES, path)
    assert found.problems == () and "rows of" not in found.text


@pytest.mark.parametrize("file_type", ["F16", "Q4_0"])
def test_nothing_is_compiled_for_the_check(
    file_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted(STORIES, tmp_path / "x.gguf", file_type)
    monkeypatch.setattr("gguf_tools.jit.Kernel.is_ready", False)
    monkeypatch.setattr("gguf_tools.jit.Kernel._build", None)  # that would be an error
    found = logits_finding(STORIES, path)
    assert found.problems == () and found.text.startswith("logits agree on")
    monkeypatch.setattr("runtime.logits_check.NUMPY_WEIGHTS", 1000)
    found = logits_finding(STORIES, path)
    assert found.problems == () and found.text.startswith("head and 4 layers agree to")
    tampered(path, swap("blk.0.attn_q.weight", "blk.3.attn_q.weight"))
    assert logits_finding(STORIES, path).problems


# --- tokens -------------------------------------------------------------------------------------


def test_the_checkpoint_tells_the_tokens_that_are_run(smollm2_checkpoint: Path) -> None:
    """They come up when its tokenizer is tried out, long before the file's is built."""
    plan = plan_conversion(smollm2_checkpoint, find_file_type("Q8_0"))
    known = run_ids(Source(smollm2_checkpoint, is_checkpoint=True, encodings=plan.encodings))
    assert known is not None and len(known["long"]) > 600
    texts = Texts({key: plain_value(value) for key, value in plan.metadata.items()}, None)
    assert known == {"short": texts.short, "long": texts.long}
    assert run_ids(Source(STORIES, is_checkpoint=True)) is None


def test_tokens_that_the_file_has_not_are_told(tmp_path: Path) -> None:
    """What the checkpoint says is run; where the file's tokenizer differs, that is a finding."""
    path = converted(STORIES, tmp_path / "x.gguf", "Q8_0")
    with GGUFFile(path) as file:
        encoder = Tokenizer(file.metadata).encoder
    ids = [encoder.encode(text, parse_special=True) for text in COMPARED_TEXTS]
    right = Encodings("tokenizer.json", ids)
    wrong = Encodings("tokenizer.json", [*ids[:-1], ids[-1][::-1]])
    answers = [
        check(
            {
                "file": path,
                "source": STORIES,
                "is_checkpoint": True,
                "adapters": [],
                "threads": 1,
                "sheet": asdict(SheetRequest(8, compiles=False)),
                "ids": known and run_ids(Source(STORIES, is_checkpoint=True, encodings=known)),
            },
            wait=lambda told=known or right: asdict(told),
        )
        for known in (None, right, wrong)
    ]
    assert answers[0] == answers[1]
    assert answers[1].findings[0].text == "tokenizer agrees on 51 texts"
    assert answers[2].findings[0].text.startswith("tokenizer differs: 50 of 51 test texts")
    assert "'The lighthouse keeper" in answers[2].findings[0].problems[0]
    sheets = [answer.sheet for answer in answers[1:]]
    assert sheets[0] and sheets[1] and sheets[1].perplexity > 2 * sheets[0].perplexity


# --- template -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    with GGUFFile(smollm2_gguf) as file:
        return dict(file.metadata)


def template_finding(metadata: dict[str, Any], source: str, **more: Any) -> Finding:
    changes = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    metadata = {**metadata, "tokenizer.chat_template": source, **changes}
    return check_template(metadata, Tokenizer(metadata))


def test_template_that_fits(chat_metadata: dict[str, Any]) -> None:
    found = template_finding(chat_metadata, CHATML)
    assert found.text == "template ends with <|im_end|>, BOS once" and not found.problems
    assert found.details[0].startswith("end tokens of the file: <|endoftext|>, <|im_end|>")


def test_end_token_outside_of_the_stop_set(chat_metadata: dict[str, Any]) -> None:
    found = template_finding(chat_metadata, CHATML.replace("<|im_end|>", "<filename>"))
    assert found.text.startswith("template ends with <filename>, which stops nothing")
    assert "not in the file's stop set" in found.problems[0]


def test_end_token_of_answers_that_are_followed(chat_metadata: dict[str, Any]) -> None:
    """Where the last answer is left open, that of the turn before counts."""
    source = CHATML.replace("<|im_end|>\n", "{% if not loop.last %}<|im_end|>{% endif %}\n")
    found = template_finding(chat_metadata, source)
    assert found.text == "template ends with <|im_end|>, BOS once" and not found.problems


def test_template_without_end_token(chat_metadata: dict[str, Any]) -> None:
    source = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = template_finding(chat_metadata, source)
    assert found.text == "template ends answers with no token, no BOS" and not found.problems


@pytest.mark.parametrize(
    ("start", "add_bos", "reason"),
    [
        ("{{ bos_token }}{{ bos_token }}", False, "writes it twice"),
        ("\n{{ bos_token }}", True, "add_bos_token adds it, too"),
    ],
)
def test_doubled_bos(chat_metadata: dict[str, Any], start: str, add_bos: bool, reason: str) -> None:
    source = start + CHATML.replace("<|im_start|>", "- ")
    found = template_finding(chat_metadata, source, add_bos_token=add_bos, bos_token_id=1)
    assert found.text.endswith("BOS doubled") and reason in found.problems[0]


def test_bos_of_both_is_told_apart_from_two(chat_metadata: dict[str, Any]) -> None:
    source = "{{ bos_token }}" + CHATML.replace("<|im_start|>", "- ")
    found = template_finding(chat_metadata, source, add_bos_token=True)
    assert found.text.endswith("BOS once") and not found.problems
    assert "the template writes BOS and add_bos_token is set, too" in found.details[1]


def test_broken_template(chat_metadata: dict[str, Any]) -> None:
    found = template_finding(chat_metadata, "{% for %}")
    assert found.text == "the chat template fails" and "does not work" in found.problems[0]


def test_no_template(chat_metadata: dict[str, Any]) -> None:
    plain = {k: v for k, v in chat_metadata.items() if "chat_template" not in k}
    assert check_template(plain, Tokenizer(plain)) == Finding("no chat template")


# --- the command --------------------------------------------------------------------------------


def run_convert(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gguf_tools", "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("self-check "))
    return line.split(maxsplit=1)[1]


def test_one_line_and_details_on_request(tmp_path: Path) -> None:
    done = run_convert(tmp_path, STORIES, "--type", "F16", "--strict", "-o", "x.gguf")
    assert (done.returncode, done.stderr) == (0, "")
    assert line_of(done).startswith("tokenizer agrees on 51 texts, no chat template, logits agree")
    assert "layer 0: " not in done.stdout
    again = ("--type", "Q8_0", "--check-details", "-o", "y.gguf")
    done = run_convert(tmp_path, "x.gguf", *again)
    assert done.returncode == 0, done.stderr
    assert line_of(done).startswith("tokenizer carried over, no chat template, logits agree on")
    assert len(re.findall(r"^layer \d: .*% off", done.stdout, re.MULTILINE)) == 5


def test_no_check(tmp_path: Path) -> None:
    done = run_convert(tmp_path, STORIES, "--no-check")
    assert done.returncode == 0 and line_of(done) == "left out, as --no-check asks"


def test_strict_refuses_what_the_check_finds(tmp_path: Path) -> None:
    folder = tmp_path / "Odd"
    shutil.copytree(STORIES, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}"
        "{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    done = run_convert(tmp_path, folder, "-o", "x.gguf", "--type", "F16")
    assert done.returncode == 0 and (tmp_path / "x.gguf").is_file()
    assert "BOS doubled" in line_of(done)
    assert done.stderr.startswith("note: a chat begins with <s> twice")
    (tmp_path / "x.gguf").unlink()
    done = run_convert(tmp_path, folder, "-o", "x.gguf", "--type", "F16", "--strict")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "was not written, as --strict asks: a chat begins with <s> twice" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["Odd"]


def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = converted(STORIES, tmp_path / "x.gguf")
    source = Source(STORIES, is_checkpoint=True)
    monkeypatch.setattr(self_check, "RUNTIME", "runtime.nothing_of_the_kind")
    with SelfCheck(threads=1, strict=True) as checked:
        checked.begin(path, source=source, output=path)
        with pytest.raises(OutputError, match=r"as --strict asks: the model could not be run"):
            checked.end(path)
    assert checked.line == "model not run"
