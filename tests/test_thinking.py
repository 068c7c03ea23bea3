"""Reasoning on the screen and in pipes, as a real process, and templates chosen by name.

The story model is made to reason by two words of its vocabulary: what it writes for " upon" and
" named" becomes the opening and the closing mark.
"""

import json
import re
import shutil

import pytest

from tests.conftest import converted
from tests.test_chat_terminal import ESCAPES, Terminal
from tests.test_run_cli import refused, run

STORY = "a time, there was a little girl"
ANSWER = "Lily. She loved to play outside in the park."
OPTIONS = ("--temp", "0", "-n", "30", "--threads", "1")
MARKS = {"\u2581upon": "<think>", "\u2581named": "</think>"}


@pytest.fixture(scope="module")
def thinker(stories260k_gguf, tmp_path_factory):
    data = stories260k_gguf.read_bytes()
    for word, mark in MARKS.items():
        old, new = word.encode(), mark.encode()
        size = len(old).to_bytes(8, "little")
        assert len(new) == len(old) and data.count(size + old) == 1
        data = data.replace(size + old, size + new)
    path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    path.write_bytes(data)
    run(path, "-p", "Once", *OPTIONS)  # a first run says that it compiles
    return path


TEMPLATE = "{{ messages[-1]['content'] }}"


def think(thinker, *options):
    done = run(thinker, "-p", "Once", "--chat-template", TEMPLATE, *OPTIONS, "--no-stats", *options)
    assert done.returncode == 0
    return done


def test_the_answer_alone_is_on_standard_output(thinker):
    shown = think(thinker)
    assert shown.stdout == ANSWER + "\n"
    assert re.fullmatch(
        rf"\(thinking\)\n{STORY}\n\(thought for \d+\.\d s, \d+ tokens\)\n", shown.stderr
    )
    assert think(thinker, "--think", "show").stderr.startswith(f"(thinking)\n{STORY}\n")
    folded = think(thinker, "--think", "fold")
    assert folded.stdout == ANSWER + "\n"
    assert re.fullmatch(r"\(thought for \d+\.\d s, \d+ tokens\)\n", folded.stderr)
    hidden = think(thinker, "--think", "hide")
    assert (hidden.stdout, hidden.stderr) == (ANSWER + "\n", "")


def test_an_answer_that_is_only_reasoning(thinker):
    done = think(thinker, "--think", "hide", "-n", "5")
    assert (done.stdout, done.stderr) == ("\n", "note: there is only reasoning, and no answer\n")


def test_the_last_of_several_counts(thinker):
    done = think(thinker, "--think", "show", "--think", "off", "--think", "hide")
    assert done.stderr.startswith("note: this template does not ask whether reasoning is off")
    assert STORY not in done.stderr


def test_reasoning_is_switched_off(thinker):
    template = (
        "{{ messages[0].content }}{% if enable_thinking is false %}<think></think>{% endif %}"
    )
    off = think(thinker, "--chat-template", template, "--think", "off")
    on = think(thinker, "--chat-template", template, "--think", "on")
    assert on.stdout == ANSWER + "\n" and off.stdout != on.stdout
    assert "does not ask" not in on.stderr + off.stderr


def test_raw_text_has_no_reasoning(thinker):
    done = run(thinker, "-p", "Once", "--raw", *OPTIONS, "--no-stats", "--think", "hide")
    assert done.stdout == f"<think> {STORY}</think> {ANSWER}\n"


def test_a_word_that_is_none(thinker):
    done = run(thinker, "-p", "Once", "--think", "hard")
    assert done.returncode == 2 and "--think is one of show, hide, fold" in done.stderr


@pytest.fixture
def chat(thinker, tmp_path):
    opened = []

    def start(*options):
        options = ("--chat-template", TEMPLATE, *OPTIONS, *options)
        terminal = Terminal(thinker, *options, home=tmp_path)
        opened.append(terminal.__enter__())
        return terminal, terminal.answer()

    yield start
    for terminal in opened:
        terminal.__exit__()


def test_the_way_reasoning_is_shown_is_switched_live(chat):
    terminal, _ = chat("--think", "hide")
    assert "reasoning: hide; it is left to the template" in terminal.say("/think")
    shown = terminal.say("Once")
    assert ANSWER in shown and "there was" not in shown and "(thought" not in shown
    assert STORY in terminal.say("/think last")
    assert "reasoning: fold" in terminal.say("/think fold")
    shown = terminal.say("/regen")
    assert "(thought for" in shown and ANSWER in shown and "there was" not in shown
    assert "thinking: 3 tokens" in shown  # drawn over, while it goes on
    assert "reasoning: show" in terminal.say("/think show")
    shown = terminal.say("/regen")
    assert shown.index("(thinking)") < shown.index(STORY) < shown.index(ANSWER)
    assert "does not ask whether reasoning is off" in terminal.say("/think off")
    assert "show, hide, fold, on, off, low, medium, high or last" in terminal.say("/think hard")
    terminal.say("/clear")
    assert "there was no reasoning" in terminal.say("/think last")
    assert "/think" in terminal.say("/help")


def test_reasoning_is_faint_in_colour(chat, monkeypatch):
    monkeypatch.setattr("tests.test_chat_terminal.NO_COLOR", "")
    terminal, _ = chat()
    terminal.type("Once\r")
    terminal.expect("Lily")
    shown = terminal.raw[terminal.raw.rindex("\x1b[?2004l") :]
    assert re.search(r"\x1b\[2ma\x1b\[0m", shown)
    assert f"{STORY}\n\nLily" in ESCAPES.sub("", shown)
    assert "(thinking)" not in shown


def test_plain_text_has_no_reasoning(thinker, tmp_path):
    with Terminal(thinker, "--raw", *OPTIONS, home=tmp_path) as terminal:
        terminal.answer()
        assert "only a chat template" in terminal.say("/think fold")


# Templates by name.


@pytest.fixture(scope="module")
def named(stories260k, tmp_path_factory):
    folder = tmp_path_factory.mktemp("named")
    checkpoint = folder / "stories"
    shutil.copytree(stories260k, checkpoint)
    path = checkpoint / "tokenizer_config.json"
    templates = {"default": "Once", "tool_use": "Once upon a", "broken": "{% for %}"}
    config = json.loads(path.read_text()) | {
        "chat_template": [{"name": n, "template": t} for n, t in templates.items()]
    }
    path.write_text(json.dumps(config))
    return converted(checkpoint, "Q8_0", folder)


def test_a_template_is_chosen_by_name(named):
    options = ("-p", "x", *OPTIONS, "--no-stats")
    assert run(named, *options).stdout.startswith("upon a time")
    assert run(named, *options, "--chat-template", "default").stdout.startswith("upon a time")
    assert run(named, *options, "--chat-template", "tool_use").stdout.startswith("time")
    assert "does not work" in refused(named, *options, "--chat-template", "broken")
    message = refused(named, *options, "--chat-template", "rag")
    assert "no such file" in message and "templates are default, broken, tool_use" in message


def test_the_banner_names_the_template(named, tmp_path):
    with Terminal(named, "--chat-template", "tool_use", *OPTIONS, home=tmp_path) as terminal:
        banner = terminal.answer()
        assert "'tool_use' of the file (--chat-template chooses: default, broken)" in banner
