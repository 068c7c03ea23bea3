"""`bench`: what is measured, how it is counted, and how it is shown. No speed is asserted."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_tools.errors import ContextFullError, GGUFError
from gguf_tools.reader import GGUFFile
from gguf_tools.values import Value
from runtime.bench import (
    HEADER,
    Case,
    Measurement,
    Note,
    Round,
    Step,
    bytes_read,
    make_cases,
    markdown,
    measure,
    parse_counts,
    summarise,
    table_rows,
    time_case,
    to_json,
)
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.model import Model
from tests.tiny import llama_file

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["phase", "tokens", "depth", "threads", "tokens_per_second", "spread", "bytes_per_second"]
CONTEXT = 512  # of the small files


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_file(tmp_path_factory.mktemp("bench") / "small.gguf", quant="Q8_0", ffn_dim=128)


def run_bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = "from runtime.umbrella import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )


# --- what is measured ------------------------------------------------------------------------


def test_counts() -> None:
    assert parse_counts("128,512") == (128, 512)
    assert parse_counts(" 4 , 2,4") == (4, 2)
    assert parse_counts("0", least=0) == (0,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0", "the least is 1, not 0"),
        ("-1", "found '-1'"),
        ("1,,2", "found ''"),
        ("", "found ''"),
        ("1.5", "found '1.5'"),
        ("\u0661", "whole numbers"),
        ("x\x1b[31m", r"found 'x\\x1b\[31m'"),
        ("9" * 5000, "too large"),
    ],
)
def test_what_is_no_count(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_counts(text)


def test_cases_are_all_combinations(small: Path) -> None:
    with GGUFFile(small) as file:
        config = read_config(file)
    cases = make_cases(config, prompts=(8, 16), generated=(4,), depths=(0, 32), threads=(1, 2))
    assert len(set(cases)) == len(cases) == 3 * 2 * 2
    assert cases[0] == Case("prompt", 8, 0, 1) and cases[-1] == Case("decode", 4, 32, 2)


def test_defaults_fit_the_context(small: Path) -> None:
    with GGUFFile(small) as file:
        config = read_config(file)
    sizes = {case.phase: case.tokens for case in make_cases(config)}
    assert sizes == {"prompt": 512, "decode": 64}
    sizes = {case.phase: case.tokens for case in make_cases(config, depths=(0, 500))}
    assert sizes == {"prompt": 12, "decode": 12}


@pytest.mark.parametrize(
    ("prompts", "generated", "depths"),
    [((513,), (), (0,)), ((), (513,), (0,)), ((8,), (8,), (0, 505)), (None, (), (512,))],
)
def test_cases_beyond_the_context(small: Path, prompts, generated, depths) -> None:
    with GGUFFile(small) as file:
        config = read_config(file)
    with pytest.raises(ContextFullError, match=f"trained for {CONTEXT} tokens"):
        make_cases(config, prompts=prompts, generated=generated, depths=depths)


def test_cases_that_make_no_sense(small: Path) -> None:
    with GGUFFile(small) as file:
        config = read_config(file)
    with pytest.raises(GGUFError, match="nothing to measure"):
        make_cases(config, prompts=(), generated=())
    with pytest.raises(GGUFError, match="at most"):
        make_cases(config, threads=(100_000,))


# --- how it is measured ----------------------------------------------------------------------


def test_the_cache_holds_the_same_text_whatever_was_measured_before(small: Path) -> None:
    ids = list(range(60))
    cases = [
        Case("prompt", 8, 0, 1),
        Case("decode", 3, 40, 1),
        Case("prompt", 20, 40, 1),
        Case("decode", 5, 0, 1),
        Case("prompt", 1, 59, 1),
        Case("decode", 2, 8, 1),
    ]
    with GGUFFile(small) as file, Model.load(file, n_ctx=60, threads=1) as model:
        for case in cases:
            assert time_case(model, case, ids) > 0
            assert model.tokens == ids[: case.depth + case.tokens]


def test_events(small: Path) -> None:
    cases = [
        Case("prompt", 8, 0, 2),
        Case("prompt", 8, 16, 1),
        Case("decode", 2, 0, 1),
        Case("decode", 2, 16, 2),
    ]
    with GGUFFile(small) as file:
        events = list(measure(file, cases, repeat=2))
    steps = [event for event in events if isinstance(event, Step)]
    total = 2 + 2 * len(cases)  # a warm-up for each number of threads, and two rounds
    assert [(step.done, step.total) for step in steps] == [(i, total) for i in range(total)]
    rounds = [step.text.partition(":") for step in steps[2:]]
    assert [first for first, _, _ in rounds] == ["round 1 of 2"] * 4 + ["round 2 of 2"] * 4
    assert sorted(text for _, _, text in rounds[:4]) == sorted(f" {case}" for case in cases)
    results = [event for event in events if isinstance(event, Measurement)]
    assert [result.case for result in results] == cases
    for result in results:
        assert result.tokens_per_second > 0 and result.bytes_per_second > 0
        assert result.spread >= 0
        held_against_reading = result.read_bandwidth is not None
        assert held_against_reading == (result.case.phase == "decode")
    assert not [event for event in events if isinstance(event, Note)]


def test_one_round_has_no_spread_and_one_token_is_enough(small: Path) -> None:
    with GGUFFile(small) as file:
        *_, result = measure(file, [Case("decode", 1, 0, 1)], repeat=1)
    assert isinstance(result, Measurement) and result.spread == 0
    assert result.read_bandwidth is not None and result.bandwidth_share is not None
    share = result.bytes_per_second / result.read_bandwidth
    assert result.bandwidth_share == pytest.approx(share)


def test_a_round_is_held_against_the_reading_beside_it() -> None:
    """Of three rounds the machine was busy in two: the shares say nothing of it."""
    seconds, bandwidths = (1.0, 2.0, 2.5), (100.0, 50.0, 40.0)
    rounds = [Round(*pair) for pair in zip(seconds, bandwidths, strict=True)]
    result = summarise(Case("decode", 10, 0, 1), rounds, n_bytes=80)
    assert (result.tokens_per_second, result.spread) == (5, 5)
    assert (result.bytes_per_second, result.read_bandwidth) == (40, 50)
    assert result.bandwidth_share == pytest.approx(0.8)


def test_models_tell_their_notes(tmp_path: Path) -> None:
    path = llama_file(tmp_path / "slow.gguf", quant="Q8_1", dim=256, ffn_dim=256)
    with GGUFFile(path) as file:
        events = list(measure(file, [Case("prompt", 2, 0, 1), Case("decode", 1, 0, 1)], repeat=1))
    notes = [event for event in events if isinstance(event, Note)]
    assert len(notes) == 1 and "Q8_1" in notes[0].text
    assert isinstance(events[-1], Measurement)


def test_bytes_read(tmp_path: Path, small: Path) -> None:
    """The weights for every batch, and of the cache what its tokens see."""
    per_token = 2 * 2 * (16 + 16) * 2  # layers, key-value heads, key and value, bytes

    def read(
        path: Path, phase: str, tokens: int, depth: int, kv_type: str = "f16"
    ) -> tuple[int, int]:
        with GGUFFile(path) as file:
            matrices = [t.nbytes for t in file.tensors.values() if len(t.shape) == 2]
            program = build_program(file, read_config(file))
            total = bytes_read(program, Case(phase, tokens, depth, 1), kv_type)
        return divmod(total, sum(matrices))

    assert read(small, "decode", 1, 0) == (1, per_token)
    assert read(small, "decode", 3, 10) == (3, (11 + 12 + 13) * per_token)
    assert read(small, "prompt", 512, 0)[0] >= 1
    q8_token = 2 * 2 * 2 * (32 + 2)  # heads of 16 padded to a block of 32
    assert read(small, "decode", 1, 9, "q8_0") == (1, 10 * q8_token)
    window = {"llama.attention.sliding_window": Value("u32", 4)}
    path = llama_file(tmp_path / "window.gguf", quant="F32", extra=window)
    assert read(path, "decode", 1, 2) == (1, 3 * per_token)
    assert read(path, "decode", 1, 100) == (1, 4 * per_token)
    assert read(path, "prompt", 10, 100) == (1, 13 * per_token)


# --- how it is shown -------------------------------------------------------------------------

RESULTS = [
    Measurement(Case("prompt", 512, 0, 1), 1000.04, 5.0, 2e9, None, None),
    Measurement(Case("decode", 64, 1024, 2), 123.4, 0.44, 30e9, 40e9, 0.754),
]


def test_json_objects() -> None:
    objects = to_json(RESULTS)
    assert [list(each) for each in objects] == [KEYS, KEYS]
    assert list(objects[1].values()) == ["decode", 64, 1024, 2, 123.4, 0.44, 30e9]


def test_rows_and_markdown() -> None:
    rows = list(table_rows(RESULTS))
    assert rows == [
        ("prompt", "512", "0", "1", "1000.0", "5.0", "", ""),
        ("decode", "64", "1024", "2", "123.4", "0.4", "30.0", "75%"),
    ]
    assert list(markdown(rows)) == [
        f"| {' | '.join(HEADER)} |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| prompt | 512 | 0 | 1 | 1000.0 | 5.0 |  |  |",
        "| decode | 64 | 1024 | 2 | 123.4 | 0.4 | 30.0 | 75% |",
    ]


# --- the command -----------------------------------------------------------------------------


def test_command_as_json(small: Path) -> None:
    sweep = ("--prompt", "8,16", "--gen", "2", "--depth", "0,32", "--threads", "1,2")
    ended = run_bench(small, *sweep, "--repeat", "2", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    objects = json.loads(ended.stdout)
    assert [list(each) for each in objects] == [KEYS] * 12
    assert {(o["phase"], o["tokens"]) for o in objects} == {
        ("prompt", 8),
        ("prompt", 16),
        ("decode", 2),
    }
    assert {(o["depth"], o["threads"]) for o in objects} == {(0, 1), (0, 2), (32, 1), (32, 2)}
    assert all(o["tokens_per_second"] > 0 and o["bytes_per_second"] > 0 for o in objects)


def test_command_as_tables(small: Path) -> None:
    short = (small, "--prompt", "8", "--gen", "2", "--threads", "1", "--repeat", "1")
    for option in ((), ("--markdown",)):
        ended = run_bench(*short, *option)
        assert (ended.returncode, ended.stderr) == (0, "")
        model, machine, empty, *table = ended.stdout.splitlines()
        assert model.startswith("small.gguf: ") and "Q8_0" in model
        assert "GB/s with 1 thread" in machine and empty == ""
        assert len(table) == (4 if option else 3)
        assert all(name in table[0] for name in HEADER)
        assert table[-2].lstrip("| ").startswith("prompt") and table[-1].count("%") == 1


def test_command_leaves_a_phase_out(small: Path) -> None:
    ended = run_bench(small, "--prompt", "none", "--gen", "2", "--threads", "1", "--json")
    assert [each["phase"] for each in json.loads(ended.stdout)] == ["decode"]


def test_the_module_has_the_command(small: Path) -> None:
    command = [sys.executable, "-m", "runtime", "bench", str(small), "--gen", "1", "--prompt", "1"]
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert len(json.loads(ended.stdout)) == 2


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--prompt", "0"), 2, "--prompt: the least is 1, not 0"),
        (("--gen", "many"), 2, "found 'many'"),
        (("--depth", "-5"), 2, "found '-5'"),
        (("--threads", "0"), 2, "--threads"),
        (("--repeat", "0"), 2, "--repeat"),
        (("--markdown", "--json"), 2, "exclude each other"),
        (("--depth", "500", "--prompt", "64"), 1, "needs a context of 564"),
        (("--prompt", "none", "--gen", "none"), 1, "nothing to measure"),
    ],
)
def test_refusals(small: Path, options: tuple[str, ...], code: int, says: str) -> None:
    ended = run_bench(small, *options)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert says in ended.stderr and "Traceback" not in ended.stderr


def test_files_that_cannot_be_measured(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "absent.gguf", "no such file"), (tmp_path, "found a folder")):
        ended = run_bench(path)
        assert ended.returncode == 1 and ended.stdout == ""
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        assert says in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_progress_on_a_terminal(small: Path) -> None:
    ours, theirs = os.openpty()
    code = "from runtime.umbrella import main; main()"
    options = ("--prompt", "4", "--gen", "none", "--threads", "1", "--repeat", "2", "--json")
    ended = subprocess.run(
        [sys.executable, "-c", code, "bench", str(small), *options],
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        timeout=120,
        check=True,
    )
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "round 2 of 2: prompt 4 at depth 0, 1 thread" in drawn
    assert len(json.loads(ended.stdout)) == 1


# --- side by side with a peer ----------------------------------------------------------------

PEER = """#!{python}
import json, sys
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
results = []
for depth in value("-d").split(",") if "-d" in arguments else ["0"]:
    for name, key in (("-p", "n_prompt"), ("-n", "n_gen")):
        for tokens in map(int, value(name).split(",")):
            entry = {{"n_prompt": 0, "n_gen": 0, "n_depth": int(depth), key: tokens}}
            if tokens:
                results.append({{**entry, "samples_ts": [90.0, 100.0, 5000.0]}})
print("a line of its own")
print(json.dumps(results))
"""


def compare(peer: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "benchmarks" / "compare.py"
    command = [sys.executable, str(script), str(peer), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def make_peer(folder: Path, source: str) -> Path:
    path = folder / "llama-bench"
    path.write_text(source.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_comparison(tmp_path: Path, small: Path) -> None:
    peer = make_peer(tmp_path, PEER)
    sweep = ("--prompt", "8", "--gen", "2", "--depth", "0,4", "--rounds", "2", "--repeat", "1")
    ended = compare(peer, small, *sweep)
    assert (ended.returncode, ended.stderr) == (0, "")
    head, line, *rows = ended.stdout.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:6] for row in cells] == [
        ["small.gguf", phase, tokens, depth, "1", "100.0"]
        for phase, tokens in (("prompt", "8"), ("decode", "2"))
        for depth in ("0", "4")
    ]
    assert all(row.count("|") == line.count("|") == head.count("|") for row in rows)
    for row in cells:
        low, high = map(float, row[8].split(" to "))
        assert low <= float(row[7]) <= high


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script")
def test_comparison_with_a_peer_that_fails(tmp_path: Path, small: Path) -> None:
    ended = compare(make_peer(tmp_path, "#!{python}\nraise SystemExit(3)\n"), small)
    assert ended.returncode == 1 and "ended with 3" in ended.stderr
    ended = compare(tmp_path / "absent", small)
    assert ended.returncode == 2 and "no such file" in ended.stderr
