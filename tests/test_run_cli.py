"""`run` with a prompt, as a real process: what comes out where, and every wrong call."""

import os
import signal
import subprocess
import sys

import pytest

from gguf_tools.errors import GGUFError
from runtime.embedded import embedded_checkpoint, embedded_model

TIMEOUT = 300  # seconds; the first start compiles
GREEDY = ("--temp", "0")
STORY = "Once upon a time"


def start(*arguments, **options):
    command = [sys.executable, "-m", "runtime", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        **options,
    )  # fmt: skip


def run(*arguments, stdin="", environment=None):
    """The finished process, with its `stdout` and `stderr`."""
    process = start(*arguments, stdin=subprocess.PIPE, env={**os.environ, **(environment or {})})
    stdout, stderr = process.communicate(stdin, timeout=TIMEOUT)
    assert "Traceback" not in stderr
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def story(stories260k_gguf):
    """What the story model goes on with, greedily."""
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 24, "--no-stats")
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout


def test_the_text_alone_is_on_standard_output(stories260k_gguf, story):
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 24)
    assert done.returncode == 0
    assert done.stdout == story and story.endswith("\n")
    assert "little girl named Lily" in story and STORY not in story
    assert "wrote 24" in done.stderr and "context" in done.stderr and "CPU" in done.stderr


def test_the_prompt_comes_through_a_pipe(stories260k_gguf, story):
    done = run(stories260k_gguf, *GREEDY, "-n", 24, "--no-stats", stdin=STORY + "\n")
    assert (done.returncode, done.stdout) == (0, story)


def test_piped_text_follows_the_prompt(stories260k_gguf):
    joined = run(stories260k_gguf, "-p", "Once\nupon a time", *GREEDY, "-n", 9)
    done = run(stories260k_gguf, "-p", "Once", *GREEDY, "-n", 9, stdin="upon a time\n")
    assert done.stdout == joined.stdout


def test_an_idle_pipe_does_not_hold_a_prompt_up(stories260k_gguf, story):
    reader, writer = os.pipe()
    try:
        process = start(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 24, stdin=reader)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    finally:
        os.close(reader)
        os.close(writer)
    assert (process.returncode, stdout) == (0, story)
    assert "nothing came through standard input" in stderr


def test_closed_standard_input(stories260k_gguf, story):
    command = [sys.executable, "-m", "runtime", stories260k_gguf, "-p", STORY, *GREEDY, "-n", "24"]
    closing = "import os, sys; os.close(0); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", closing, *map(str, command)],
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, story)


@pytest.mark.parametrize("options", [("--threads", 1), ("--threads", 3), ("--gpu-layers", 0)])
def test_greedy_is_the_same_whatever_the_machine_does(stories260k_gguf, story, options):
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 24, *options)
    assert (done.returncode, done.stdout) == (0, story)


def test_the_reference_backend_tells_the_same_story(stories260k_gguf, story):
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 8, "--backend", "reference")
    assert done.returncode == 0 and story.startswith(done.stdout.rstrip("\n"))


def test_a_seed_repeats(stories260k_gguf):
    one, two, other = (
        run(stories260k_gguf, "-p", STORY, "--temp", 1, "-n", 30, "--seed", seed).stdout
        for seed in (3, 3, 4)
    )
    assert one == two != other


def test_stop_strings(stories260k_gguf, story):
    done = run(
        stories260k_gguf, "-p", STORY, *GREEDY, "-n", 24, "--stop", " Lily", "--stop", "girl",
        "--stop", "zebra",
    )  # fmt: skip
    assert done.stdout == story.split("girl")[0] + "\n"


def test_a_full_context_is_said(stories260k_gguf):
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "--ctx", 16)
    assert done.returncode == 0
    assert "the context of 16 tokens is full" in done.stderr


def test_more_context_than_trained_is_said(stories260k_gguf):
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 2, "--ctx", 1024)
    assert done.returncode == 0 and "longer than the 512" in done.stderr


def test_a_chat_template_of_ones_own(stories260k_gguf, tmp_path, story):
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }} upon a time")
    options = ("--chat-template", template, *GREEDY, "-n", 24)
    done = run(stories260k_gguf, "-p", "Once", *options)
    assert done.stdout == story.lstrip(" ")
    raw = run(stories260k_gguf, "-p", STORY, *options, "--raw")
    assert raw.stdout == story


def test_a_system_prompt_without_a_template_is_said_to_be_unused(stories260k_gguf, story):
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 24, "--system", "Be nice")
    assert done.stdout == story and "--system is not used" in done.stderr


def test_output_is_harmless_utf8_whatever_the_model_writes(stories260k_gguf):
    """At this temperature every token is as likely as any other, bytes of control codes too."""
    wild = ("--temp", 1e9, "--top-k", 0, "--top-p", 1, "--min-p", 0, "-n", 400, "--seed", 1)
    command = [sys.executable, "-m", "runtime", stories260k_gguf, "-p", STORY, *wild]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("utf-8")
    assert len(text) > 100
    assert not [c for c in text if c not in "\n\t" and (ord(c) < 32 or 127 <= ord(c) < 160)]
    assert "\\x" in text


def test_a_reader_that_goes_away(stories260k_gguf):
    process = start(stories260k_gguf, "-p", STORY, "--seed", 1, stdin=subprocess.DEVNULL)
    process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(TIMEOUT)
    assert "Traceback" not in stderr and "Exception" not in stderr
    process.stderr.close()


def test_ctrl_c(stories260k_gguf):
    process = start(
        stories260k_gguf, "-p", STORY, *GREEDY, "--backend", "reference", stdin=subprocess.DEVNULL
    )
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert first and stdout.endswith("\n") and "Traceback" not in stderr


def test_a_real_model_knows_paris(smollm2_gguf):
    done = run(smollm2_gguf, "-p", "The capital of France is", "--raw", *GREEDY, "-n", 1)
    assert done.stdout == " Paris\n"


def test_a_real_model_chats_and_ends(smollm2_gguf):
    done = run(smollm2_gguf, "-p", "Say hello.", *GREEDY, "-n", 60)
    assert done.returncode == 0
    assert done.stdout.strip() and "<|im_" not in done.stdout


def test_the_embedded_model_runs(story):
    assert run("-p", STORY, *GREEDY, "-n", 24, "--no-stats").stdout == story


def test_the_embedded_model_is_made_once(tmp_path, monkeypatch, stories260k_gguf):
    monkeypatch.setenv("GGUF_TOOLS_CACHE", str(tmp_path / "cache"))
    with embedded_model() as path:
        made = path.stat()
        assert path.read_bytes() == stories260k_gguf.read_bytes()
    with embedded_model() as again:
        assert (again, again.stat().st_ino) == (path, made.st_ino)
    assert list((tmp_path / "cache" / "models").iterdir()) == [path]


@pytest.mark.parametrize("cache", ["file/cache", "off"])
def test_the_embedded_model_where_nothing_can_be_kept(tmp_path, monkeypatch, cache):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUF_TOOLS_CACHE", cache if cache == "off" else str(tmp_path / cache))
    with embedded_model() as path:
        assert path.read_bytes().startswith(b"GGUF")
    assert not path.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_installation_without_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.setattr("gguf_tools.__file__", str(tmp_path / "gguf_tools" / "__init__.py"))
    with pytest.raises(GGUFError, match="no embedded model"):
        embedded_checkpoint()
    installed = tmp_path / "gguf_tools" / "embedded" / "stories260k"
    installed.mkdir(parents=True)
    (installed / "config.json").touch()
    assert embedded_checkpoint() == installed


# Wrong calls: one line on standard error, nothing on standard output.


def refused(*arguments, stdin=""):
    done = run(*arguments, stdin=stdin)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    return done.stderr


def test_no_such_file(tmp_path):
    assert "no such file" in refused(tmp_path / "absent.gguf", "-p", "x")


def test_a_folder_is_to_be_converted_first(stories260k, tmp_path):
    assert f"convert {stories260k}" in refused(stories260k, "-p", "x")
    assert "is a folder" in refused(tmp_path, "-p", "x")
    (tmp_path / "some.gguf").touch()
    assert "some.gguf" in refused(tmp_path, "-p", "x")


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("hello")
    assert "expected a GGUF file" in refused(path, "-p", "x")


@pytest.mark.parametrize("arguments", [(), ("-p", "")])
def test_an_empty_prompt(stories260k_gguf, arguments):
    assert "the prompt is empty" in refused(stories260k_gguf, *arguments)
    assert "the prompt is empty" in refused(stories260k_gguf, *arguments, stdin="\n")


def test_a_prompt_longer_than_the_context(stories260k_gguf):
    message = refused(stories260k_gguf, "-p", "a dog and a cat " * 50, "--ctx", 32)
    assert "the context holds 32" in message and "--ctx" in message


def test_a_prompt_that_is_no_text(stories260k_gguf):
    assert "not valid UTF-8" in refused(stories260k_gguf, "-p", os.fsdecode(b"a\xff"))


def test_piped_bytes_that_are_no_text(stories260k_gguf):
    command = [sys.executable, "-m", "runtime", str(stories260k_gguf)]
    done = subprocess.run(command, input=b"a\xff", capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 1 and b"not UTF-8 text (byte 1)" in done.stderr


@pytest.mark.parametrize("value", ["1", "all", "-1", "99"])
def test_layers_without_a_gpu(stories260k_gguf, value):
    options = ("-p", "x", "--gpu-layers", value, "--device", "none")
    message = refused(stories260k_gguf, *options)
    assert "leaves no GPU" in message and "give 0, to run on the CPU" in message


def test_templates_that_do_not_work(stories260k_gguf, tmp_path):
    template = tmp_path / "template.jinja"
    options = (stories260k_gguf, "-p", "x", "--chat-template", template)
    assert "no such file" in refused(*options)
    template.write_text("{% for %}")
    assert "template" in refused(*options)
    template.write_bytes(b"\xff")
    assert "not UTF-8" in refused(*options)
    template.write_text("{{ raise_exception('not today') }}")
    assert "not today" in refused(*options)
    template.write_text("")
    assert "renders nothing" in refused(*options)


@pytest.mark.parametrize(
    "options",
    [
        ("-n", "0"),
        ("-n", "-2"),
        ("-n", "many"),
        ("--temp", "-1"),
        ("--temp", "nan"),
        ("--top-k", "-1"),
        ("--top-p", "1.5"),
        ("--min-p", "2"),
        ("--repeat-penalty", "0"),
        ("--repeat-last-n", "-2"),
        ("--seed", "-2"),
        ("--stop", ""),
        ("--ctx", "0"),
        ("--threads", "0"),
        ("--gpu-layers", "some"),
        ("--gpu-layers", "-2"),
        ("--vram-limit", "much"),
        ("--cpu-moe", "-1"),
        ("--json",),
        ("--backend", "quantum"),
        ("--context-policy", "hope"),
        ("--no-such-option",),
    ],
)
def test_wrong_options(options):
    done = run("absent.gguf", "-p", "x", *options)
    assert done.returncode == 2 and done.stdout == ""
    assert options[0].lstrip("-") in done.stderr or "max-tokens" in done.stderr


def test_two_models(stories260k_gguf):
    assert run(stories260k_gguf, "x.gguf", "-p", "x").returncode == 2
