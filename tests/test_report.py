"""`eval --report`: a page that holds the figures, needs nothing else and trusts no name."""

import base64
import dataclasses
import hashlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import OutputError
from gguf_tools.reader import GGUFFile
from gguf_tools.recipes import find_file_type
from gguf_tools.values import Array, Value
from runtime.model import Model
from runtime.quality.advice import advise
from runtime.quality.choices import Accuracy
from runtime.quality.evaluation import Evaluation
from runtime.quality.facts import Facts, TypeShare, read_facts
from runtime.quality.figures import draw_figures, labels, type_bars
from runtime.quality.measures import Differences, Estimate, distance
from runtime.quality.page import Material, Report, check_target, material, render, write_page
from runtime.quality.plots import (
    Bar,
    Level,
    Plot,
    Point,
    draw_bars,
    draw_plot,
    linear_ticks,
    log_ticks,
    shorten,
)
from runtime.quality.speeds import Speed, Timed, machine, measure_speeds
from runtime.quality.table import Result
from tests.tiny import llama_file

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT / "models" / "stories260k"
HOSTILE = "<script>alert('1')</script>\"'><img src=x onerror=alert(2)>&amp;"
VOID = ("meta", "br", "img", "link", "input")


class Page(HTMLParser):
    """A page taken apart: every tag with its attributes, all text, and whether tags match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def facts(kind: str = "Q4_0", *, n_bytes: int = 900, notes: dict[str, str] | None = None) -> Facts:
    types = {kind: TypeShare(9, 1600, n_bytes), "F32": TypeShare(2, 20, 80)}
    return Facts("Tiny", "llama", 1620, kind, types, notes or {})


def result(name: str, size: int, bits: float, kl: float, *, spread: float = 0.0) -> Result:
    """A candidate whose mean KL divergence is `kl`, with an error that goes with `spread`."""
    nll, kls = np.ones(50), kl + spread * np.tile([1.0, -1.0], 25)
    apart = distance([Differences(nll + 0.1 * kls, nll, kls, np.arange(50) < 45)])
    evaluation = Evaluation(50, Estimate(20 + 20 * kl, 0.5), apart)
    return Result(f"tiny-{name}.gguf", size, bits, evaluation, facts=facts(name, n_bytes=size - 80))


REFERENCE = Result(
    "tiny-F16.gguf", 4000, 16.0, Evaluation(50, Estimate(19.0, 0.5), None), facts=facts("F16")
)
FAMILY = [
    result("Q8_0", 2000, 8.5, 0.005),
    result("Q4_K", 1200, 4.5, 0.06, spread=0.01),
    result("Q3_K", 1000, 3.5, 0.24),
    result("Q2_K", 800, 2.5, 2.4),  # beyond a cliff
]
TEXT = Material("tale.txt", 60_000, "ab" * 32)


def report(**changes) -> Report:
    made = Report(FAMILY, REFERENCE, "gguf eval a.gguf", TEXT, None, (4, 512), None)
    return dataclasses.replace(made, **changes)


def with_speeds(results: list[Result]) -> list[Result]:
    speed = Speed(Estimate(1234.5, 20.0), Estimate(56.78, 1.0), 512, 64, 2)
    return [dataclasses.replace(each, speed=speed) for each in results]


def answering(name: str, size: int, share: float) -> Result:
    accuracy = Accuracy(100, Estimate(share, 0.05), Estimate(share, 0.05))
    return Result(name, size, 8 * size / 1000, None, accuracy)


# --- the page --------------------------------------------------------------------------------


def test_a_page_holds_the_figures() -> None:
    text = render(report(candidates=with_speeds(FAMILY), machine="A Processor, 2 threads"))
    page = Page(text)
    assert 10_000 < len(text) < 60_000
    for words in (
        "Tiny: what quantising costs",
        "llama",
        "1.62K (1,620)",
        "50, in 4 windows of 512",
        "tale.txt (58.59 KiB, SHA-256 abababababab...)",
        "Take tiny-Q4_K.gguf (1.17 KiB)",
        "the one to take",
        "beyond a cliff",
        "0.06000",
        "90.00%",
        "1234.5",
        "56.8",
        "on A Processor, 2 threads",
        "gguf eval a.gguf",
    ):
        assert words in page.text, words
    assert len(page.named("figure")) == 5  # KL, perplexity, two speeds, and the bytes
    headers = page.named("th")
    assert headers and all(each.get("scope") in ("col", "row") for each in headers)
    assert {"lang": "en"} in page.named("html")
    assert any(each.get("name") == "viewport" for each in page.named("meta"))
    assert "prefers-color-scheme: dark" in page.style
    for wide in (each for each in page.named("div") if each.get("class") == "wide"):
        assert wide["tabindex"] == "0" and wide["role"] == "region"
        assert wide.get("aria-label") or wide.get("aria-labelledby")
    # Files in the order of their sizes, whatever order they were given in.
    again = render(report(candidates=with_speeds(FAMILY)[::-1], machine="A Processor, 2 threads"))
    assert again == text


def test_a_page_needs_nothing_else() -> None:
    """No script, no link, no address; its policy lets in its own style sheet alone."""
    text = render(report(candidates=with_speeds(FAMILY), machine="x"))
    page = Page(text)
    known = {tag for tag, _ in page.tags}
    assert not known & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    for tag, attributes in page.tags:
        assert not set(attributes) & {"src", "href", "style", "xlink:href", "action", "data"}, tag
        assert not [name for name in attributes if name.startswith("on")], tag
    assert not re.search(r"url\(|@import|@font-face|https?:|//", text)
    (policy,) = (
        each["content"]
        for each in page.named("meta")
        if each.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_a_page_trusts_no_name() -> None:
    own = facts(notes={f"gguf_tools.quality.{HOSTILE}": HOSTILE})
    own = dataclasses.replace(own, model=HOSTILE, architecture=HOSTILE, type=HOSTILE)
    bad = [
        dataclasses.replace(each, name=f"{HOSTILE}-{i}", facts=own)
        for i, each in enumerate(with_speeds(FAMILY))
    ]
    reference = dataclasses.replace(REFERENCE, name=HOSTILE + "\x1b[2J\u202e", facts=own)
    source = Material(HOSTILE, 1, "00")
    changes = {"reference": reference, "command": HOSTILE, "machine": HOSTILE}
    text = render(report(candidates=bad, text=source, task=source, **changes))
    page, plain = Page(text), Page(render(report(candidates=with_speeds(FAMILY))))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not [name for _, each in page.tags for name in each if name.startswith("on")]
    assert "<script" not in text and "<img" not in text and HOSTILE in page.text
    assert "\x1b" not in text and "\u202e" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_notes_of_a_file_are_shown() -> None:
    notes = {"gguf_tools.quality.mean_kl": "0.0615", "quantize.imatrix.file": "a.imatrix"}
    noted = dataclasses.replace(FAMILY[1], facts=facts(notes=notes))
    page = Page(render(report(candidates=[FAMILY[0], noted])))
    assert "What the files say of their making" in page.text
    assert all(word in page.text for pair in notes.items() for word in pair)
    assert "of their making" not in Page(render(report())).text


def test_pages_with_less() -> None:
    """One file; no reference; questions alone."""
    page = Page(render(report(candidates=FAMILY[:1])))
    assert "tiny-Q8_0.gguf is hardly told from tiny-F16.gguf" in page.text
    assert len(page.named("figure")) == 1  # the bytes: a plot of one point says nothing
    bare = [
        dataclasses.replace(each, evaluation=Evaluation(50, Estimate(20.0 + i, 1.5), None))
        for i, each in enumerate(FAMILY)
    ]
    page = Page(render(report(candidates=bare, reference=None)))
    assert "By perplexity alone: tiny-Q4_K.gguf" in page.text and "mean KL" not in page.text
    page = Page(render(report(candidates=bare[:1], reference=None)))
    assert "Perplexity 20.000" in page.text and "a --reference" in page.text
    asked = [answering("big", 4000, 0.52), answering("small", 1000, 0.5), answering("x", 500, 0.2)]
    source = Material("questions.jsonl", 10, "00")
    only = report(candidates=asked, reference=None, text=None, task=source, windows=None)
    page = Page(render(only))
    assert "By these questions: small" in page.text and "Accuracy by size" in page.text
    assert "perplexity" not in page.text and "100, of questions.jsonl" in page.text
    page = Page(render(dataclasses.replace(only, candidates=asked[:1])))
    assert "answers 52.0%" in page.text and "Take" not in page.text


# --- the advice ------------------------------------------------------------------------------


def test_advice() -> None:
    found = advise(FAMILY, REFERENCE)
    assert found.take is FAMILY[1] and found.lead == "Take tiny-Q4_K.gguf (1.17 KiB)"
    assert "Where there is room for tiny-Q8_0.gguf" in found.sentences[1]
    assert "Beyond a cliff: tiny-Q2_K.gguf" in found.sentences[2]
    assert [found.mark(each) for each in FAMILY] == ["file", "take", "file", "cliff"]


def test_advice_counts_errors() -> None:
    """Below the limit, but not with twice its error."""
    vague = result("Q4_K", 1200, 4.5, 0.09, spread=0.08)
    assert vague.distance is not None
    assert 0.005 < vague.distance.kl.error < 0.02
    assert advise([FAMILY[0], vague], REFERENCE).take is FAMILY[0]
    sure = dataclasses.replace(vague, evaluation=result("x", 1, 1, 0.09).evaluation)
    assert advise([FAMILY[0], sure], REFERENCE).take is sure


def test_advice_where_all_lose_much() -> None:
    found = advise(FAMILY[2:], REFERENCE)
    assert found.take is None and found.lead == "None of these files loses little"
    assert "Nearest is tiny-Q3_K.gguf" in found.sentences[0]
    assert "more than a little" in advise(FAMILY[2:3], REFERENCE).lead


def test_advice_on_files_that_others_beat() -> None:
    worse = result("Q4_1", 1300, 4.8, 0.08)
    said = " ".join(advise([*FAMILY, worse], REFERENCE).sentences)
    assert "Nothing speaks for tiny-Q4_1.gguf: tiny-Q4_K.gguf is no larger" in said
    alike = result("Q4_1", 1300, 4.8, 0.0601, spread=0.05)  # not clearly farther
    assert "Nothing speaks" not in " ".join(advise([*FAMILY, alike], REFERENCE).sentences)


# --- plots -----------------------------------------------------------------------------------


def plot(points: list[Point], **changes) -> Plot:
    made = Plot("key", "Title", "What it shows", "x", "y", "note", points)
    return dataclasses.replace(made, **changes)


def test_ticks() -> None:
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(85.2, 141) == [100, 120, 140]
    assert linear_ticks(1e-9, 1.1e-9)[0] >= 1e-9
    assert log_ticks(0.004, 3) == pytest.approx([0.01, 0.1, 1])
    assert log_ticks(0.02, 0.6) == pytest.approx([0.03, 0.1, 0.3])
    assert log_ticks(0.15, 0.6) == pytest.approx([0.2, 0.5])
    assert log_ticks(1.1, 1.9) == []


def test_a_plot_is_named_and_escaped() -> None:
    points = [Point(4.5, 0.06, 0.01, "<Q4>", "take"), Point(2.5, 2.0, 0.0, "Q2", "cliff")]
    drawn = draw_plot(plot(points, log_y=True, front=True, level=Level(0.5, "level <1>")))
    svg = ElementTree.fromstring(drawn)
    assert svg.get("role") == "img" and svg.get("aria-labelledby") == "key-title"
    assert [child.tag for child in svg][:2] == ["title", "desc"]
    assert (svg[0].text, svg[1].text) == ("Title", "What it shows")
    texts = [each.text for each in svg.iter("text")]
    assert "<Q4>" in texts and "level <1>" in texts
    assert len(svg.findall("polygon")) == 1  # what lies beyond a cliff has a shape of its own
    assert len([each for each in svg.iter("circle") if each.get("class") == "ring"]) == 1
    assert len([each for each in svg.iter("path") if each.get("class") == "error"]) == 3


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 1.0, 0.0)],
        [(1.0, 1.0, 0.0), (1.0, 1.0, 0.0)],
        [(0.0, 0.0, 0.0), (1.0, 0.0, 0.0)],
        [(4.5, -1e-9, 1e-10), (8.5, 0.0, 0.0)],  # as of the reference itself
        [(4.5, 0.01, 5.0), (8.5, 1e-12, 1.0)],
        [(1.0, 1e300, 1e299), (1e12, 1.0, 0.1)],
    ],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_plots_of_odd_figures_stay_inside(
    points: list[tuple[float, float, float]], log_y: bool
) -> None:
    made = [Point(*point, f"file {i}", "file") for i, point in enumerate(points)]
    drawn = draw_plot(plot(made, log_y=log_y, least_y=1e-5, front=True))
    svg = ElementTree.fromstring(drawn)
    assert "nan" not in drawn and "inf" not in drawn
    for circle in svg.iter("circle"):
        assert 0 <= float(circle.get("cx", "")) <= 360
        assert 0 <= float(circle.get("cy", "")) <= 280


def test_labels_do_not_cover_each_other() -> None:
    """Of eight points close to each other."""
    points = [Point(4 + i * 0.15, 0.1 + 0.02 * i, 0.0, f"Q4_K_{i}", "file") for i in range(8)]
    svg = ElementTree.fromstring(draw_plot(plot(points)))
    names = [each for each in svg.iter("text") if "name" in each.get("class", "")]
    places = [(float(each.get("x", "")), float(each.get("y", ""))) for each in names]
    assert len(places) == 8
    for i, (x1, y1) in enumerate(places):
        assert 0 < x1 < 320 and 0 < y1 < 280
        assert not [1 for x2, y2 in places[:i] if abs(x1 - x2) < 36 and abs(y1 - y2) < 10]


def test_bars() -> None:
    drawn = draw_bars(
        "b", "t", "d", [Bar("<a>", [("Q4_K", 300), ("F32", 1)]), Bar("b", [])], ["Q4_K", "F32"]
    )
    svg = ElementTree.fromstring(drawn)
    first, second = svg.findall("rect")
    assert (first.get("class"), second.get("class")) == ("type0", "type1")
    assert float(first.get("width", "")) == pytest.approx(360 * 300 / 301, abs=0.1)
    many = {f"T{i}": TypeShare(1, 1, 100 - i) for i in range(14)}
    own = dataclasses.replace(FAMILY[0], facts=Facts(None, None, 1, "", many, {}))
    (bar,) = type_bars([own])
    assert len(bar.segments) == 10 and bar.segments[-1] == ("others", sum(range(87, 92)))


def test_names_are_short_in_plots() -> None:
    def called(*names: str) -> list[str]:
        return labels([Result(name, 1, 1.0, None) for name in names])

    assert called("Qwen2.5-0.5B-Q4_K_M.gguf", "Qwen2.5-0.5B-Q4_0.gguf") == ["Q4_K_M", "Q4_0"]
    assert called("a/m-Q4.gguf", "b/m-Q4.gguf") == ["a/m-Q4", "b/m-Q4"]
    assert called("m.gguf", "m-x.gguf") == ["m", "m-x"]
    assert called("same.gguf", "same.gguf") == ["same", "same"]
    assert called("one-two.gguf") == ["one-two"]
    assert shorten("abcdefghij", 7) == "abc\N{HORIZONTAL ELLIPSIS}hij"
    drawn = list(draw_figures(FAMILY, REFERENCE, advise(FAMILY, REFERENCE)))
    assert [each.key for each in drawn] == ["kl", "perplexity"]
    assert [point.label for point in drawn[0].points] == ["Q8_0", "Q4_K", "Q3_K", "Q2_K"]
    assert drawn[1].level == Level(19.0, "reference: 19")


# --- what it is made of ----------------------------------------------------------------------


def test_facts_of_a_file(tmp_path: Path) -> None:
    extra = {
        "general.name": Value("str", "A \x1b[31mmodel"),
        "general.file_type": Value("u32", 15),
        "gguf_tools.quality.mean_kl": Value("f32", 0.0625),
        "gguf_tools.reserve": Array("u8", bytes(100)),
        "quantize.imatrix.file": Value("str", "x.imatrix"),
    }
    with GGUFFile(llama_file(tmp_path / "a.gguf", quant="Q4_0", extra=extra)) as file:
        found = read_facts(file)
    assert found.model == "A \\x1b[31mmodel" and found.architecture == "llama"
    assert found.type == "Q4_K_M"
    assert list(found.types) == ["Q4_0", "F32"] and found.types["F32"].tensors == 5
    assert found.parameters == sum(share.weights for share in found.types.values())
    assert dict(found.notes) == {
        "gguf_tools.quality.mean_kl": "0.0625",
        "quantize.imatrix.file": "x.imatrix",
    }
    odd = {"general.file_type": Value("str", "x"), "general.name": Value("u32", 3)}
    with GGUFFile(llama_file(tmp_path / "b.gguf", quant="Q8_0", extra=odd)) as file:
        found = read_facts(file)
    assert (found.type, found.model, dict(found.notes)) == ("Q8_0", None, {})


def test_speeds(tmp_path: Path) -> None:
    paths = [llama_file(tmp_path / f"{quant}.gguf", quant=quant) for quant in ("Q4_0", "F32")]
    with (
        GGUFFile(paths[0]) as a,
        GGUFFile(paths[1]) as b,
        Model.load(a, n_ctx=64, threads=1) as one,
        Model.load(b, n_ctx=96, threads=1) as two,
    ):
        *steps, first, second = measure_speeds([one, two])
    assert steps == [Timed(i + 1, 6) for i in range(6)]
    assert isinstance(first, Speed) and isinstance(second, Speed)
    for each in (first, second):
        assert each.prompt.value > 0 and each.decode.value > 0 and each.threads == 1
        assert (each.prompt_tokens, each.decode_tokens) == (64, 64)
    assert machine(1).endswith(", 1 thread")


def test_materials(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    assert material(path) == Material("a.txt", 3, hashlib.sha256(b"abc").hexdigest())


def test_targets_that_are_refused(tmp_path: Path) -> None:
    given = tmp_path / "given.html"
    given.write_text("a text")
    (tmp_path / "folder.html").mkdir()
    check_target(tmp_path / "new.html", [given])
    check_target(tmp_path / "new.HTM", [tmp_path / "absent"])
    for name, says in (
        ("model.gguf", "ends in .html"),
        ("folder.html", "is a folder"),
        ("absent/a.html", "no such folder"),
        ("given.html", "is an input"),
    ):
        with pytest.raises(OutputError, match=says):
            check_target(tmp_path / name, [given])
    (tmp_path / "link.html").symlink_to(given)
    (tmp_path / "hard.html").hardlink_to(given)
    for name in ("link.html", "hard.html"):
        with pytest.raises(OutputError, match="is an input"):
            check_target(tmp_path / name, [given])
    with pytest.raises(OutputError, match="is an input"):
        check_target(tmp_path / "a.html", [tmp_path / "a.html.part"])


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    write_page(path, "one\n\N{PLUS-MINUS SIGN}")
    write_page(path, "two\n")
    assert path.read_bytes() == b"two\n" and [each.name for each in tmp_path.iterdir()] == [
        path.name
    ]
    path.unlink()
    path.mkdir()
    (path / "x").touch()
    with pytest.raises(OutputError, match=r"a\.html: cannot be written"):
        write_page(path, "three")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# --- the command -----------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "stories-Q4_0.gguf"
    for _ in convert(plan_conversion(STORIES, find_file_type("Q4_0")), path, threads=1):
        pass
    return path


def test_command(q4: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "<b>\"'-Q4_0.gguf", tmp_path / "out.html"
    shutil.copy(q4, other)
    tale = tmp_path / "tale.txt"
    tale.write_text("Once upon a time, there was a little girl named Lily. She saw a dog. " * 12)
    asked = (q4, other, "--reference", STORIES, "--text", tale, "--ctx", "64", "--windows", "2")
    ended = run_eval(*asked, "--threads", "1", "--report", out)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "prompt tokens/s" in ended.stdout
    page = Page(out.read_text(encoding="utf-8"))
    assert "62, in 2 windows of 64" in page.text and "Speeds measured on" in page.text
    assert not page.named("b") and "<b>\"'-Q4_0.gguf" in page.text
    assert "gguf eval stories-Q4_0.gguf" in page.text and str(tmp_path) not in page.text
    assert [each.name for each in tmp_path.glob("out*")] == ["out.html"]
    pages = []
    for _ in range(2):
        ended = run_eval(*asked, "--no-speed", "--report", out)
        assert ended.returncode == 0 and "tokens/s" not in ended.stdout
        pages.append(out.read_bytes())
    assert pages[0] == pages[1] and b"--no-speed" in pages[0]


def test_command_refusals(q4: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.html"
    text.write_text("a text")
    ended = run_eval(q4, "--text", text, "--report", text)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: --report") and "that is an input" in ended.stderr
    assert text.read_text() == "a text"
    ended = run_eval(q4, "--text", text, "--report", tmp_path / "x.gguf")
    assert ended.returncode == 1 and "ends in .html" in ended.stderr
    text.write_text("Once upon a time, there was a little girl named Lily. " * 8)
    (tmp_path / "out.html.part").mkdir()  # cannot be written: the figures are there all the same
    asked = (q4, "--text", text, "--ctx", "64", "--no-speed", "--report", tmp_path / "out.html")
    ended = run_eval(*asked)
    assert ended.returncode == 1 and "cannot be written" in ended.stderr
    assert "perplexity" in ended.stdout and "Traceback" not in ended.stderr
