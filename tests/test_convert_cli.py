"""`convert` as a process: what it prints, what it leaves, how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_tools.recipes import available
from tests.checkpoints import STORIES, llama_config, llama_tensors, make_llama, safetensors
from tests.test_imatrix import new_file

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def convert(
    folder: Path, *arguments: str | Path, command: tuple[str, ...] = ("-m", "gguf_tools", "convert")
) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`."""
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


def error_of(ended: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line that a refusal is."""
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.stderr


def fields(stdout: str) -> dict[str, str]:
    """The closing table."""
    pairs = (line.split("  ", 1) for line in stdout.splitlines() if "  " in line.strip())
    return {label.strip(): text.strip() for label, text in pairs if label.strip()}


def make_large(folder: Path) -> None:
    """A checkpoint with six tensors of 64 MB, zeros that take no room on the disk."""
    ffn = 1 << 18
    make_llama(folder)
    (folder / "config.json").write_text(json.dumps(llama_config(intermediate_size=ffn)))
    header, size = {}, 0
    for name, values in llama_tensors(llama_config()).items():
        shape = [ffn if n == 96 else n for n in values.shape]
        end = size + int(np.prod(shape)) * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
        size = end
    with open(folder / "model.safetensors", "wb") as file:
        file.write(safetensors(header))
        file.truncate(file.tell() + size)


def test_defaults(tmp_path: Path) -> None:
    ended = convert(tmp_path, STORIES)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["stories260k-Q8_0.gguf"]
    output = tmp_path / "stories260k-Q8_0.gguf"
    table = fields(ended.stdout)
    assert table["file"] == output.name
    assert table["size"].startswith(f"{output.stat().st_size:,} bytes")
    assert table["parameters"] == "260,032"
    assert table["tensors"] == "47: 31 Q8_0, 11 F32, 5 F16"
    assert re.split(r" {2,}", table["fallbacks"]) == ["tensors", "asked", "got", "bytes", "why"]
    assert re.search(
        r"^ +blk\.\*\.ffn_down\.weight \(5 tensors\)  Q8_0   F16  110,080  "
        r"rows of 172 are not whole blocks of 32 \(Q8_0\)$",
        ended.stdout,
        re.MULTILINE,
    )
    tensors = gguf.GGUFReader(output).tensors
    bits = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / 260_032
    assert table["bits per weight"] == f"{bits:.4f}"


@pytest.mark.parametrize(
    "command", [("-m", "gguf_tools"), ("-m", "gguf_tools", "convert"), (str(ROOT / "convert.py"),)]
)
def test_every_way_to_call_it(tmp_path: Path, command: tuple[str, ...]) -> None:
    ended = convert(tmp_path, STORIES, "--type", "f16", "-o", "x.gguf", command=command)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "x.gguf").is_file()


def test_relative_folders(tmp_path: Path) -> None:
    make_llama(tmp_path / "Some-Model")
    assert convert(tmp_path, "Some-Model/", "--type", "q4_k_m").returncode == 0
    assert (tmp_path / "Some-Model-Q4_K_M.gguf").is_file()
    assert convert(tmp_path / "Some-Model", ".", "--type", "F32").returncode == 0
    assert (tmp_path / "Some-Model" / "Some-Model-F32.gguf").is_file()


def test_help_names_every_type(tmp_path: Path) -> None:
    ended = convert(tmp_path, "--help")
    assert ended.returncode == 0
    words = set(re.findall(r"\w+", ended.stdout))
    assert {file_type.name for file_type in available()} <= words


def test_dry_run_is_exact_and_writes_nothing(tmp_path: Path) -> None:
    planned = convert(tmp_path, STORIES, "--dry-run", "--type", "Q4_K_M")
    assert planned.returncode == 0, planned.stderr
    assert list(tmp_path.iterdir()) == []
    done = convert(tmp_path, STORIES, "--type", "Q4_K_M")
    output = tmp_path / "stories260k-Q4_K_M.gguf"
    assert fields(planned.stdout)["size"] == fields(done.stdout)["size"]
    assert fields(planned.stdout)["size"].startswith(f"{output.stat().st_size:,} bytes")
    for tensor in gguf.GGUFReader(output).tensors:
        pattern = rf"^{re.escape(tensor.name)} .* {tensor.tensor_type.name} +{tensor.n_bytes:,}\b"
        assert re.search(pattern, planned.stdout, re.MULTILINE), tensor.name


def test_dry_run_where_the_output_exists(tmp_path: Path) -> None:
    (tmp_path / "stories260k-Q8_0.gguf").write_text("mine")
    assert convert(tmp_path, STORIES, "--dry-run").returncode == 0
    assert (tmp_path / "stories260k-Q8_0.gguf").read_text() == "mine"


def test_existing_output(tmp_path: Path) -> None:
    output = tmp_path / "x.gguf"
    output.write_text("mine")
    message = error_of(convert(tmp_path, STORIES, "-o", output))
    assert "exists already" in message
    assert "--force" in message
    assert output.read_text() == "mine"
    assert convert(tmp_path, STORIES, "-o", output, "--force").returncode == 0
    assert output.read_bytes()[:4] == b"GGUF"


def test_the_checkpoint_is_not_written_over(tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    before = weights.read_bytes()
    message = error_of(convert(tmp_path, "model", "-o", weights, "--force"))
    assert "is a file of the checkpoint itself" in message
    assert weights.read_bytes() == before
    (tmp_path / "model" / "a").symlink_to("nowhere")
    assert error_of(convert(tmp_path, "model", "-o", weights, "--force")) == message


def test_an_importance_matrix_is_not_written_over(tmp_path: Path) -> None:
    matrix = tmp_path / "matrix.gguf"
    name = "blk.0.attn_q.weight"
    ones = {f"{name}.in_sum2": np.ones((1, 64)), f"{name}.counts": np.ones((1, 1))}
    matrix.write_bytes(new_file(ones))
    before = matrix.read_bytes()
    message = error_of(convert(tmp_path, STORIES, "--imatrix", matrix, "-o", matrix, "--force"))
    assert "matrix.gguf is the file that is being read" in message
    assert matrix.read_bytes() == before


def test_unknown_types_list_the_known(tmp_path: Path) -> None:
    message = error_of(convert(tmp_path, STORIES, "--type", "Q4_K_XXL"))
    for file_type in available():
        assert f" {file_type.name}" in message


def test_wrong_options_are_the_command_lines(tmp_path: Path) -> None:
    for arguments in (("--threads", "0"), ("--threads", "many"), ("--no-such",)):
        ended = convert(tmp_path, STORIES, *arguments)
        assert (ended.returncode, ended.stdout) == (2, "")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "there is no such folder"),
        (lambda folder: folder.mkdir(), "is empty"),
        (lambda folder: folder.write_bytes(b"GGUF"), "expected"),
        (lambda folder: make_llama(folder, architectures=["FooLM"]), "known are LlamaForCausalLM"),
        (lambda folder: make_llama(folder, vocab_size=511), "wrong shape"),
        (lambda folder: make_llama(folder, num_hidden_layers=10**9), "num_hidden_layers"),
    ],
    ids=["absent", "empty", "gguf", "architecture", "shape", "layers"],
)
def test_refusals(tmp_path: Path, make: object, words: str) -> None:
    tensors = llama_tensors(llama_config())
    if words in ("wrong shape", "num_hidden_layers"):
        changes = {"vocab_size": 511} if words == "wrong shape" else {"num_hidden_layers": 10**9}
        make_llama(tmp_path / "model", tensors=tensors, **changes)
    else:
        make(tmp_path / "model")  # type: ignore[operator]
    assert words in error_of(convert(tmp_path, "model", "-o", "out.gguf"))
    assert not list(tmp_path.glob("out.gguf*"))


def test_no_folder_for_the_output(tmp_path: Path) -> None:
    assert "does not exist" in error_of(convert(tmp_path, STORIES, "-o", "absent/x.gguf"))
    assert "is a folder" in error_of(convert(tmp_path, STORIES, "-o", "."))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    assert "no permission" in error_of(convert(tmp_path, STORIES, "-o", "closed/x.gguf"))


def test_a_damaged_weight(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    tensors["model.layers.1.mlp.down_proj.weight"][60, 90] = np.nan
    make_llama(tmp_path / "model", tensors=tensors)
    message = error_of(convert(tmp_path, "model"))
    assert "model.layers.1.mlp.down_proj.weight[60, 90] is nan" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_notes_go_to_standard_error(tmp_path: Path) -> None:
    tensors = llama_tensors(llama_config())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    make_llama(tmp_path / "model", tensors=tensors, tie_word_embeddings=True)
    ended = convert(tmp_path, "model")
    assert ended.returncode == 0
    assert "note: lm_head.weight is left out" in ended.stderr
    assert "note" not in ended.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(tmp_path: Path, number: signal.Signals, code: int, times: int) -> None:
    """In the middle of a large tensor: no file, but what the next run goes on from.

    Who holds Ctrl-C down gets the same.
    """
    make_large(tmp_path / "model")
    command = [sys.executable, "-m", "gguf_tools", "convert", "model", "--type", "F32"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    part = tmp_path / "model-F32.gguf.part"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if part.exists() and part.stat().st_size > 20_000_000:
            break
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.01)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert re.fullmatch(
        rb"note: \d+ % of the file is kept in model-F32.gguf.part; "
        rb"the same command goes on from there\n",
        stderr,
    )
    assert stdout == b""
    left = {part.name, part.name + ".journal"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", *left}


# A process counts as its own what its parent held when it was made: these tests, much.
PEAK_OF = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ru_maxrss in kilobytes")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """What is held is bands, not tensors; the self-check holds a few tokens' activations, too."""
    make_large(tmp_path / "model")
    peaks = []
    large = str(tmp_path / "model")
    for options in ((str(STORIES), "--no-check"), (large, "--no-check"), (large,)):
        command = [sys.executable, "-m", "gguf_tools", "convert", *options, "-o", "x.gguf"]
        measured = subprocess.run(
            [sys.executable, "-c", PEAK_OF, *command, "--force"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            check=True,
        )
        peaks.append(int(measured.stdout) / 1024)
    assert peaks[1] - peaks[0] < 100 and peaks[2] < 600, peaks


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal(tmp_path: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    make_llama(tmp_path / "model", num_hidden_layers=20)
    process = subprocess.Popen(
        [sys.executable, "-m", "gguf_tools", "convert", "model"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "120"},
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # Linux: the other end has closed
            break
        if not data:
            break
        shown += data
    stdout = process.communicate(timeout=60)[0].decode()
    os.close(leader)
    assert process.returncode == 0
    assert "B/s" in shown.decode()
    assert re.search(r"blk\.\d+\.\w+\.weight Q8_0|output\.weight Q8_0|self-check", shown.decode())
    assert "100%" in shown.decode()
    assert fields(stdout)["file"] == "model-Q8_0.gguf"
