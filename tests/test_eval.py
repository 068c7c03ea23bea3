"""`eval`: perplexity, distance from a reference, and questions; against llama.cpp's own figures."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import FormatError, GGUFError
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from runtime.model import Model
from runtime.quality.choices import Accuracy, Question, answer, n_common, read_questions
from runtime.quality.evaluation import (
    Evaluation,
    ModelScorer,
    Window,
    cut_windows,
    evaluate,
)
from runtime.quality.measures import (
    BandwiseDifferences,
    Differences,
    Estimate,
    differ,
    distance,
    log_probabilities,
    mean_of,
    perplexity,
    predict,
)
from runtime.quality.subjects import distinct_names, open_checkpoint, open_file
from runtime.quality.table import Result, chart, cliffs, draw, header, rows, to_json
from runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT / "models" / "stories260k"
N_CTX = 128

TALE = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big dog. The dog was sad because it had lost its red ball. Lily said, "
    '"Do not be sad. I will help you find it." They looked under the tree and behind the house. '
    "At last they saw the ball in the green grass. The dog was very happy and ran to get it. "
    '"Thank you, Lily," it barked. They played together until the sun went down, and then Lily '
    "went home to her mom and told her all about her new friend. "
) * 3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("eval")
    made = {}
    for name in ("F32", "Q4_0", "Q8_0"):
        made[name] = folder / f"stories-{name}.gguf"
        for _ in convert(plan_conversion(STORIES, find_file_type(name)), made[name], threads=1):
            pass
    return made


def run_eval(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from runtime.umbrella import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "eval", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


def tale(folder: Path) -> Path:
    path = folder / "tale.txt"
    path.write_text(TALE)
    return path


# --- figures ---------------------------------------------------------------------------------


def test_log_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(5, 40)) * 20).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= wide.max(1, keepdims=True)
    assert np.allclose(log_probabilities(logits.copy()), expected, atol=1e-5)
    for damage in (np.nan, np.inf, -np.inf):
        logits[2, 7] = damage
        with pytest.raises(FormatError, match="no number"):
            log_probabilities(logits.copy())


def test_differences_of_known_distributions() -> None:
    p, q = (
        np.array([[0.5, 0.5, 1e-30], [0.2, 0.7, 0.1]]),
        np.array([[0.75, 0.25, 1e-30], [0.2, 0.2, 0.6]]),
    )
    log_p, log_q = np.log(p).astype(np.float32), np.log(q).astype(np.float32)
    found = differ(log_q, log_p, np.array([0, 2]))
    kl = [
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25),
        0.7 * math.log(0.7 / 0.2) + 0.1 * math.log(0.1 / 0.6),
    ]
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.same_top.tolist() == [True, False]
    assert found.nll == pytest.approx([-math.log(0.75), -math.log(0.6)], rel=1e-5)
    assert found.reference_nll == pytest.approx([-math.log(0.5), -math.log(0.1)], rel=1e-5)
    assert predict(log_q, np.array([0, 2])).nll == pytest.approx(found.nll)
    together = distance([found, found])
    assert together.kl.value == pytest.approx(np.mean(kl), rel=1e-5)
    assert together.same_top == Estimate(0.5, pytest.approx(0.5 / math.sqrt(3)))
    change = [0.25, 0.5]
    assert together.probability_change.value == pytest.approx(np.mean(change), rel=1e-4)
    assert together.probability_rms.value == pytest.approx(math.hypot(*change) / math.sqrt(2), 1e-4)
    assert together.perplexity_ratio.value == pytest.approx(math.sqrt(0.5 / 0.75 * 0.1 / 0.6), 1e-4)


def test_differences_band_by_band() -> None:
    """The largest logits come first, last and between; the token that came in any band."""
    rng = np.random.default_rng(1)
    p = (rng.normal(size=(6, 50)) * 8).astype(np.float32)
    q = p + rng.normal(size=p.shape).astype(np.float32)
    p[0, 3], p[1, 48], q[2, 20] = 90, 90, -90
    tokens = np.array([0, 11, 12, 30, 48, 49])
    expected = differ(log_probabilities(q.copy()), log_probabilities(p.copy()), tokens)
    bandwise = BandwiseDifferences(tokens)
    for first, last in ((0, 12), (12, 31), (31, 50)):
        bandwise.add(q[:, first:last], p[:, first:last])
    found = bandwise.result()
    assert np.allclose(found.kl, expected.kl, rtol=1e-5, atol=1e-6)
    assert np.allclose(found.nll, expected.nll, rtol=1e-5, atol=1e-5)
    assert np.allclose(found.reference_nll, expected.reference_nll, rtol=1e-5, atol=1e-5)
    assert np.array_equal(found.same_top, expected.same_top)
    for damage in (np.nan, np.inf, -np.inf):
        damaged = p.copy()
        damaged[4, 7] = damage
        bandwise = BandwiseDifferences(tokens)
        bandwise.add(q, damaged)
        with pytest.raises(FormatError, match="no number"):
            bandwise.result()


def test_errors_are_of_the_mean() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    assert mean_of(values) == Estimate(3.0, pytest.approx(values.std(ddof=1) / 2))
    assert mean_of(values[:1]) == Estimate(1.0, 0.0)
    found = perplexity(np.log(values))
    assert found.value == pytest.approx(36 ** (1 / 4))
    assert found.error == pytest.approx(found.value * mean_of(np.log(values)).error)
    with pytest.raises(FormatError, match=r"e\^-1000 in the mean: its weights are damaged"):
        perplexity(np.full(3, 1000.0))


def test_the_figures_of_llama_perplexity(files: dict[str, Path]) -> None:
    """Of llama-perplexity -c 128 on the same files and text (llama.cpp of llama-cpp-python 0.3.36).

    Q4_0 products differ in how they round activations: within a fifth of the stated errors.
    """
    with GGUFFile(files["F32"]) as a, GGUFFile(files["Q4_0"]) as b:
        tokenizer = Tokenizer(a.metadata)
        windows = cut_windows(tokenizer, TALE, N_CTX)
        with Model.load(a, n_ctx=N_CTX, threads=1) as base, Model.load(b, n_ctx=N_CTX) as other:
            events = list(
                evaluate(
                    [ModelScorer(other)],
                    windows,
                    reference=ModelScorer(base),
                    bos=tokenizer.bos_id,
                )
            )
    assert events[: len(windows)] == [Window(i + 1, len(windows)) for i in range(len(windows))]
    reference, candidate = events[len(windows) :]
    assert isinstance(reference, Evaluation) and isinstance(candidate, Evaluation)
    assert reference.tokens == candidate.tokens == 63 * len(windows)
    assert reference.perplexity == Estimate(
        pytest.approx(3.333256, abs=2e-3), pytest.approx(0.335935, abs=1e-3)
    )
    assert candidate.perplexity.value == pytest.approx(3.519906, abs=0.07)
    assert reference.distance is None and candidate.distance is not None
    found = candidate.distance
    assert found.kl == Estimate(
        pytest.approx(0.056447, abs=1e-3), pytest.approx(0.004643, abs=5e-4)
    )
    assert found.kl_99 == pytest.approx(0.3102, abs=0.03)
    assert found.kl_median == pytest.approx(0.0311, abs=3e-3)
    assert found.probability_rms.value == pytest.approx(0.08032, abs=2e-3)
    assert found.same_top == Estimate(
        pytest.approx(0.893, abs=0.01), pytest.approx(0.0195, abs=2e-3)
    )
    assert found.perplexity_ratio.value == pytest.approx(1.056, abs=5e-3)


def test_a_model_is_as_its_reference(files: dict[str, Path]) -> None:
    with GGUFFile(files["F32"]) as file:
        tokenizer = Tokenizer(file.metadata)
        windows = cut_windows(tokenizer, TALE, 64, limit=2)
        assert windows.shape == (2, 64)
        with Model.load(file, n_ctx=64, threads=1) as a, Model.load(file, n_ctx=64) as b:
            *_, found = evaluate([ModelScorer(b)], windows, reference=ModelScorer(a))
    assert isinstance(found, Evaluation) and found.distance is not None
    assert found.distance.kl.value < 1e-9 and found.distance.same_top.value == 1
    assert found.distance.perplexity_ratio.value == pytest.approx(1)


def test_a_checkpoint_is_a_reference(files: dict[str, Path]) -> None:
    """Layer by layer it is what the F32 file of it is, but for 16 bits of keys and values."""
    with (
        open_checkpoint(STORIES, n_ctx=64, threads=1) as base,
        open_file(files["F32"], n_ctx=64, threads=1) as other,
    ):
        windows = cut_windows(base.tokenizer, TALE, 64, limit=3)
        bos = base.tokenizer.bos_id
        reference = base.scorer(windows, bos)
        *_, first, second = evaluate(
            [other.scorer(windows, bos)], windows, reference=reference, bos=bos
        )
    assert isinstance(first, Evaluation) and isinstance(second, Evaluation)
    assert second.distance is not None and second.distance.kl.value < 1e-6
    assert first.perplexity.value == pytest.approx(second.perplexity.value, rel=1e-3)
    assert (base.name, base.bits_per_weight) == ("stories260k", 32)


def test_texts_and_windows_that_do_not_fit(files: dict[str, Path]) -> None:
    with GGUFFile(files["F32"]) as file:
        tokenizer = Tokenizer(file.metadata)
    with pytest.raises(GGUFError, match="the text has 2 tokens and a window holds 64"):
        cut_windows(tokenizer, "Once", 64)
    with pytest.raises(GGUFError, match="the least is 8"):
        cut_windows(tokenizer, TALE, 4)


# --- questions -------------------------------------------------------------------------------


def test_questions(files: dict[str, Path]) -> None:
    """What the model was trained on it finds likelier than what it never saw."""
    questions = [
        Question("Once upon a", ("time", "zebra quantum"), 0),
        Question("Lily was very happy. She said,", (' "Thank you', " xq zj vk"), 0),
        Question("They went to the park to", ("9 7 5 3", "play"), 1),
        Question("One day, a little", ("girl named Lily", "%% ## @@"), 1),  # the gold is wrong
    ]
    with GGUFFile(files["F32"]) as file, Model.load(file, n_ctx=64, threads=1) as model:
        events = list(answer(model, Tokenizer(file.metadata), questions))
    assert [event.done for event in events[:-1]] == [1, 2, 3, 4]
    found = events[-1]
    assert isinstance(found, Accuracy) and found.questions == 4
    assert found.accuracy == Estimate(0.75, pytest.approx(0.25))


def test_a_score_is_that_of_the_ending_alone(files: dict[str, Path]) -> None:
    """By a fresh model, token by token."""
    with GGUFFile(files["F32"]) as file:
        tokenizer = Tokenizer(file.metadata)
        context, endings = "Once upon a time", (" there was a cat", " there was a dog")
        before = tokenizer.encode(context)
        expected = []
        for ending in endings:
            ids = tokenizer.encode(context + ending)
            start = n_common(before, ids)
            with Model.load(file, n_ctx=64, threads=1) as model:
                log_p = log_probabilities(model.forward(ids, all_logits=True))
            expected.append(sum(log_p[i - 1, ids[i]] for i in range(start, len(ids))))
        likelier = int(np.argmax(expected))
        with Model.load(file, n_ctx=64, threads=1) as model:
            *_, found = answer(model, tokenizer, [Question(context, endings, likelier)])
    assert isinstance(found, Accuracy) and found.accuracy.value == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[]", "expected a JSON object"),
        ("{", "expected a JSON object"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"endings": ["a", "b"], "gold": 0}', "`context` must be a text"),
        ('{"context": "a", "endings": "b", "gold": 0}', "`endings` must be a list"),
        ('{"context": "a", "endings": ["b"], "gold": 0}', "at least two"),
        ('{"context": "a", "endings": ["b", ""], "gold": 0}', "none may be empty"),
        ('{"context": "a", "endings": ["b", "c"], "gold": 2}', "from 0 to 1"),
        ('{"context": "a", "endings": ["b", "c"], "gold": true}', "from 0 to 1"),
    ],
)
def test_lines_that_are_no_question(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"context": "a", "endings": ["b", "c"], "gold": 1}\n\n' + line + "\n")
    with pytest.raises(GGUFError, match=f"task.jsonl, line 3: .*{says}"):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(GGUFError, match="found none"):
        read_questions(path)


def test_names_tell_files_apart() -> None:
    assert distinct_names([Path("a/m.gguf"), Path("b/n.gguf")]) == ["m.gguf", "n.gguf"]
    three = [Path("/x/a/m.gguf"), Path("/x/b/m.gguf"), Path("n.gguf")]
    assert distinct_names(three) == ["a/m.gguf", "b/m.gguf", "n.gguf"]
    assert distinct_names([Path("m.gguf"), Path("m.gguf")]) == ["m.gguf", "m.gguf"]
    assert distinct_names([]) == []


# --- how it is shown -------------------------------------------------------------------------


def result(name: str, bits: float, kl: float) -> Result:
    nll = np.ones(50)
    apart = Differences(nll, nll, np.full(50, kl), np.ones(50, bool))
    return Result(name, 1000, bits, Evaluation(50, Estimate(20.0, 0.5), distance([apart])))


FAMILY = [
    Result("F16", 4000, 16.0, Evaluation(50, Estimate(19.0, 0.5), None)),
    result("Q8_0", 8.5, 0.005),
    result("Q4", 4.5, 0.06),  # 2 times for each bit less
    result("Q3", 3.5, 0.24),  # 4 times
    result("Q2", 2.5, 2.4),  # 10 times
]


def test_cliffs() -> None:
    assert cliffs(FAMILY) == {"Q2"}
    assert cliffs(FAMILY[:-1]) == set()
    alike = result("Q4_0", 4.4, 0.11)  # nearly the size of Q4 and twice as far off: no cliff
    assert cliffs([*FAMILY, alike]) == {"Q2"}
    further = result("Q1", 1.8, 5.0)  # only 2 times as far off as Q2
    assert cliffs([*FAMILY, further]) == {"Q2", "Q1"}
    small = [result("a", 8, 0.0001), result("b", 7, 0.01)]  # steep, but nothing is lost
    assert cliffs(small) == set()


def test_tables_and_charts() -> None:
    assert header(FAMILY)[:5] == ("file", "size", "bits/weight", "perplexity", "mean KL")
    table = list(rows(FAMILY))
    assert table[0][:5] == ("F16", "3.91 KiB", "16.00", "19.000 ± 0.500", "")
    assert table[-1][4] == "2.40000 ± 0.00000"
    lines = list(chart(FAMILY))
    assert len(lines) == 5 and "cliff" in lines[-1] and "cliff" not in "".join(lines[:-1])
    assert list(chart(FAMILY[:2])) == []
    made = to_json(FAMILY[1], FAMILY[0])
    assert made["reference_perplexity"] == 19
    assert made["mean_kl"] == pytest.approx(0.005) and made["mean_kl_error"] == pytest.approx(0)
    assert "mean_kl" not in to_json(FAMILY[0], None)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(FAMILY, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(GGUFError, match=r"plot\.nonsense"):
        draw(FAMILY, tmp_path / "plot.nonsense")
    with pytest.raises(GGUFError, match="nothing to draw"):
        draw(FAMILY[:1], tmp_path / "plot.png")


# --- the command -----------------------------------------------------------------------------


def test_command(files: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"context": "Once upon a", "endings": ["time", "zebra"], "gold": 0}\n')
    asked = (files["Q8_0"], files["Q4_0"], "--reference", files["F32"], "--text", tale(tmp_path))
    ended = run_eval(*asked, "--ctx", "64", "--windows", "2", "--task", task, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    objects = json.loads(ended.stdout)
    assert [each["file"] for each in objects] == [files[n].name for n in ("Q8_0", "Q4_0")]
    keys = {"tokens", "perplexity", "perplexity_error", "file_size", "bits_per_weight"}
    assert all(keys <= set(each) and each["tokens"] == 62 for each in objects)
    keys = {"mean_kl", "mean_kl_error", "kl_99", "kl_999", "same_top"}
    assert all(keys <= set(each) for each in objects)
    assert objects[0]["mean_kl"] < objects[1]["mean_kl"]
    ratio = objects[1]["perplexity"] / objects[1]["reference_perplexity"]
    assert objects[1]["perplexity_ratio"] == pytest.approx(ratio)
    assert all(each["accuracy"] == 1 and each["questions"] == 1 for each in objects)
    ended = run_eval(*asked, "--ctx", "64", "--windows", "2")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[0].split()[:2] == ["file", "size"]
    assert "mean KL divergence by bits per weight" in ended.stdout
    folder = (files["Q4_0"], "--reference", STORIES, "--text", tale(tmp_path), "--ctx", "64")
    from_folder = json.loads(run_eval(*folder, "--windows", "2", "--json").stdout)
    assert from_folder[0]["mean_kl"] == pytest.approx(objects[1]["mean_kl"], rel=1e-2)
    ended = run_eval(*asked, "--ctx", "64", "--windows", "2", "--markdown")
    first, second, *lines = ended.stdout.splitlines()
    assert first.startswith("| file | size | bits/weight |") and second.startswith("|---|---:|")
    assert [line.split(" | ")[0] for line in lines] == [
        f"| {files[name].name}" for name in ("F32", "Q8_0", "Q4_0")
    ]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ((), 2, "give --text, --task or both"),
        (("--reference", "{file}", "--task", "{tale}"), 2, "--reference needs --text"),
        (("--text", "{tale}", "--plot", "x.png"), 2, "--plot needs --reference"),
        (("--text", "{tale}", "--markdown", "--json"), 2, "exclude each other"),
        (("--text", "{absent}"), 1, "absent.txt: No such file"),
        (("--text", "{file}"), 1, "expected UTF-8 text"),
        (("--task", "{tale}"), 1, "expected a JSON object"),
        (("--text", "{tale}", "--ctx", "100000"), 1, "give a longer text"),
    ],
)
def test_refusals(
    files: dict[str, Path], tmp_path: Path, options: tuple[str, ...], code: int, says: str
) -> None:
    names = {"file": files["F32"], "tale": tale(tmp_path), "absent": tmp_path / "absent.txt"}
    ended = run_eval(files["F32"], *(option.format(**names) for option in options))
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    assert says in " ".join(ended.stderr.split()) and "Traceback" not in ended.stderr


def test_files_of_other_models_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    from tests.tiny import llama_file

    other = llama_file(tmp_path / "other.gguf")
    ended = run_eval(other, "--reference", files["F32"], "--text", tale(tmp_path))
    assert ended.returncode == 1 and ended.stderr.startswith("error: ")
