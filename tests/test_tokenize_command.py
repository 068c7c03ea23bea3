"""`gguf tokenize` as a process: what it reads, what it prints, how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_tools.values import Value
from gguf_tools.writer import GGUFWriter
from runtime.tokenizer import Tokenizer
from tests.tokenizer_files import add_token, as_read, byte_level, vocab_of

COMMAND = [sys.executable, "-c", "from runtime.umbrella import main; main()", "tokenize"]
TEXT = "Once <|im_end|>\n\u4f60 \U0001f680!\n"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a vocabulary and no tensors, which puts bos before every text."""
    folder = tmp_path_factory.mktemp("vocabulary")
    data = byte_level()
    add_token(data, "<|x|>", special=True)
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": True,
        "add_eos_token": True,
    }
    vocab = vocab_of(data, folder, tokenizer_config__json=config)
    path = folder / "vocabulary.gguf"
    metadata = {"general.architecture": Value("str", "llama"), **vocab.metadata}
    with GGUFWriter(path, metadata=metadata, tensors=[]):
        pass
    return path


@pytest.fixture(scope="module")
def tokenizer(vocabulary: Path) -> Tokenizer:
    from gguf_tools.reader import GGUFFile

    with GGUFFile(vocabulary) as file:
        return Tokenizer(file.metadata)


def tokenize(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=60
    )


def ids_of(done: subprocess.CompletedProcess[bytes]) -> list[int]:
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert done.stdout.endswith(b"\n") and done.stdout.count(b"\n") == 1
    return [int(number) for number in done.stdout.split()]


def error_of(done: subprocess.CompletedProcess[bytes]) -> str:
    assert done.returncode == 1
    message = done.stderr.decode()
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_text_from_everywhere(vocabulary: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """It is taken as it is: the newline at its end is part of it."""
    (tmp_path / "text").write_bytes(TEXT.encode())
    expected = tokenizer.encode(TEXT, parse_special=True)
    assert expected[0] == tokenizer.bos_id and expected[-1] == tokenizer.eos_id
    assert ids_of(tokenize(vocabulary, TEXT)) == expected
    assert ids_of(tokenize(vocabulary, stdin=TEXT.encode())) == expected
    assert ids_of(tokenize(vocabulary, "--file", tmp_path / "text")) == expected


def test_no_special(vocabulary: Path, tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenize(vocabulary, "--no-special", TEXT))
    assert ids == tokenizer.encode(TEXT, add_special=False)
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == TEXT
    assert ids_of(tokenize(vocabulary, "--no-special", "")) == []


def test_bos_of_the_text_itself_is_kept(vocabulary: Path, tokenizer: Tokenizer) -> None:
    """As llama-tokenize shows it: two of them is what a runtime would have to avoid."""
    bos = tokenizer.bos_id
    assert ids_of(tokenize(vocabulary, "<|im_start|>")) == [bos, bos, tokenizer.eos_id]


def test_pieces(vocabulary: Path, tokenizer: Tokenizer) -> None:
    done = tokenize(vocabulary, "--pieces", "a\n\u0416<|im_end|>\x1b")
    lines = done.stdout.decode().splitlines()
    ids = tokenizer.encode("a\n\u0416<|im_end|>\x1b", parse_special=True)
    assert [int(line.split("  '")[0]) for line in lines] == ids
    shown = [line.split("  ")[-1] for line in lines]
    assert shown[0] == "'<|im_start|>'" and shown[1:3] == ["'a'", "'\\n'"]
    assert "'<|im_end|>'" in shown and "'\\x1b'" in shown
    assert "".join(text.strip("'") for text in shown[3:5]) in ("\u0416", "\\xd0\\x96")


def test_json_lines(vocabulary: Path, tokenizer: Tokenizer) -> None:
    texts = ["", "a b", TEXT, "<|x|>", "\u2028 \u0085", "'\"\\", "\U0001f999"]
    lines = "".join(json.dumps(text) + "\n" for text in texts).encode()
    lines += json.dumps(texts[-1], ensure_ascii=False).encode() + b"\r\n" + b'"\\ud800"'
    texts += [texts[-1], "\ufffd"]
    for option, special in (([], True), (["--no-special"], False)):
        done = tokenize(vocabulary, "--jsonl", *option, stdin=lines)
        assert done.returncode == 0 and done.stderr == b""
        expected = [
            tokenizer.encode(text, add_special=special, parse_special=special) for text in texts
        ]
        assert done.stdout.decode() == "".join(f"{ids}\n" for ids in expected)


def test_each_line_is_answered_at_once(vocabulary: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, str(vocabulary), "--jsonl"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for text in ("a", "b"):
            process.stdin.write(json.dumps(text).encode() + b"\n")
            process.stdin.flush()
            assert isinstance(json.loads(process.stdout.readline()), list)
        process.stdin.close()
        assert process.stdout.read() == b"" and process.wait(10) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"3", "found 3"),
        (b"", "Expecting value"),
        (b'"a', "Unterminated"),
        (b"[" * 100_000, "something deep"),
        (b'["a"]', 'found ["a"]'),
        (b"9" * 5000, "JSON string"),
        (b'"\xff"', "the byte 0xff at position 1"),
    ],
)
def test_a_bad_line_is_named(vocabulary: Path, line: bytes, message: str) -> None:
    done = tokenize(vocabulary, "--jsonl", stdin=b'"a"\n' + line + b'\n"b"\n')
    assert done.stdout.count(b"\n") == 1  # what came before it has its answer
    said = error_of(done)
    assert "standard input, line 2: " in said and message in said


def test_what_is_no_text(vocabulary: Path, tmp_path: Path) -> None:
    assert "0xff at position 2" in error_of(tokenize(vocabulary, stdin=b"ab\xff"))
    (tmp_path / "text").write_bytes(b"\xe4\xbd")
    said = error_of(tokenize(vocabulary, "--file", tmp_path / "text"))
    assert str(tmp_path / "text") in said and "0xe4 at position 0" in said
    assert "absent" in error_of(tokenize(vocabulary, "--file", tmp_path / "absent"))
    assert "absent.gguf" in error_of(tokenize(tmp_path / "absent.gguf", "a"))
    assert "not valid UTF-8" in error_of(tokenize(vocabulary, "a\udcff"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that closes files")
def test_no_standard_input(vocabulary: Path) -> None:
    closing = ["sh", "-c", 'exec "$@" <&-', "sh"]
    done = subprocess.run([*closing, *COMMAND, str(vocabulary)], capture_output=True, timeout=60)
    assert "no standard input" in error_of(done)


@pytest.mark.parametrize(
    "arguments", [("a", "--file", "x"), ("--jsonl", "a"), ("--jsonl", "--pieces"), ("a", "b")]
)
def test_contradictions(vocabulary: Path, arguments: tuple[str, ...]) -> None:
    assert tokenize(vocabulary, *arguments).returncode == 2


def test_a_missing_pre_tokenizer_is_told(vocabulary: Path, tmp_path: Path) -> None:
    vocab = vocab_of(byte_level(), tmp_path / "folder")
    del vocab.metadata["tokenizer.ggml.pre"]
    with GGUFWriter(tmp_path / "old.gguf", metadata=vocab.metadata, tensors=[]):
        pass
    done = tokenize(tmp_path / "old.gguf", "ab")
    assert done.returncode == 0 and done.stderr.startswith(b"note: WARNING: ")
    expected = Tokenizer(as_read(vocab)).encode("ab")
    assert [int(number) for number in done.stdout.split()] == expected
