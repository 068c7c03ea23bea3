"""The writer: exact sizes, whole files or none, and one writer at a time."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import GGUFError, OutputError
from gguf_tools.quants import by_name
from gguf_tools.reader import GGUFFile
from gguf_tools.writer import Array, GGUFWriter, MetadataValue, TensorSpec, Value, file_size

METADATA: Mapping[str, MetadataValue] = {
    "general.architecture": Value("str", "llama"),
    "tokenizer.ggml.tokens": Array("str", ["a", "\u4e16"]),
}
SPECS = [
    TensorSpec("a.weight", by_name("F32"), (3, 5)),
    TensorSpec("b.weight", by_name("Q8_0"), (2, 2, 64)),
]
A = np.arange(60, dtype=np.uint8)
B = np.arange(272, dtype=np.uint16).astype(np.uint8)

RUNS_UNDER_COMMAND = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from gguf_tools.command import run_command
    from gguf_tools.quants import by_name
    from gguf_tools.writer import GGUFWriter, TensorSpec

    def main():
        spec = TensorSpec("a", by_name("F32"), (1024, 1024))
        with GGUFWriter(sys.argv[1], metadata={}, tensors=[spec], force=True) as writer:
            writer.write("a", np.zeros(1024, np.uint8))
            print("writing", flush=True)
            BODY
            writer.write("a", np.zeros(spec.nbytes - 1024, np.uint8))

    run_command(main)
"""


def write_file(path: Path, *, force: bool = False) -> int:
    with GGUFWriter(path, metadata=METADATA, tensors=SPECS, force=force) as writer:
        writer.write("a.weight", A)
        writer.write("b.weight", B)
    return writer.total_size


def start_writer(path: Path, body: str) -> subprocess.Popen[str]:
    """Another process that has begun to write `path` and then runs `body`."""
    code = textwrap.dedent(RUNS_UNDER_COMMAND).replace("BODY", body)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    size = write_file(path)
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert path.stat().st_size == size == file_size(METADATA, SPECS)
    with GGUFFile(path) as file:
        assert file.metadata == {
            "general.architecture": "llama",
            "tokenizer.ggml.tokens": ["a", "\u4e16"],
        }
        assert {name: info.shape for name, info in file.tensors.items()} == {
            "a.weight": (3, 5),
            "b.weight": (2, 2, 64),
        }
        assert file.raw("a.weight").reshape(-1).tolist() == A.tolist()
        assert file.raw("b.weight").reshape(-1).tolist() == B.tolist()


@pytest.mark.parametrize("alignment", [8, 32, 128])
def test_size_is_known_before(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    with GGUFWriter(path, metadata=METADATA, tensors=SPECS, alignment=alignment) as writer:
        writer.write("a.weight", A)
        writer.write("b.weight", B)
    assert path.stat().st_size == writer.total_size == file_size(METADATA, SPECS, alignment)
    assert GGUFFile(path).alignment == alignment


def test_bands(tmp_path: Path) -> None:
    """Bands of a tensor, also strided ones, give the file that whole tensors give."""
    write_file(tmp_path / "whole.gguf")
    with GGUFWriter(tmp_path / "bands.gguf", metadata=METADATA, tensors=SPECS) as writer:
        for row in A.reshape(3, 20):
            writer.write("a.weight", row)
        writer.write("b.weight", B[:0])
        writer.write("b.weight", np.asfortranarray(B.reshape(16, 17))[:10])
        writer.write("b.weight", B[170:])
    assert (tmp_path / "bands.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_no_tensors(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "x.gguf", metadata=METADATA, tensors=[]) as writer:
        pass
    assert (tmp_path / "x.gguf").stat().st_size == writer.total_size
    assert GGUFFile(tmp_path / "x.gguf").tensors == {}


def test_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"exists already.*--force"):
        write_file(path)
    assert path.read_text() == "precious"
    write_file(path, force=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_old_file_stays_when_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("precious")
    with (
        pytest.raises(RuntimeError),
        GGUFWriter(path, metadata=METADATA, tensors=SPECS, force=True) as writer,
    ):
        writer.write("a.weight", A)
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert path.read_text() == "precious"


@pytest.mark.parametrize("error", [ValueError, GGUFError, KeyboardInterrupt, SystemExit])
def test_nothing_left_behind(tmp_path: Path, error: type[BaseException]) -> None:
    with (
        pytest.raises(error),
        GGUFWriter(tmp_path / "x.gguf", metadata=METADATA, tensors=SPECS) as writer,
    ):
        writer.write("a.weight", A)
        assert os.listdir(tmp_path) == ["x.gguf.part"]
        raise error
    assert os.listdir(tmp_path) == []


def test_wrong_amounts(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    with (
        pytest.raises(OutputError, match=r"b\.weight: expected 272 bytes, got 17"),
        GGUFWriter(path, metadata=METADATA, tensors=SPECS) as writer,
    ):
        writer.write("a.weight", A)
        writer.write("b.weight", B[:17])
    with (
        pytest.raises(OutputError, match=r"a\.weight: expected 60 bytes, got at least 61"),
        GGUFWriter(path, metadata=METADATA, tensors=SPECS) as writer,
    ):
        writer.write("a.weight", A[:40])
        writer.write("a.weight", A[:21])
    assert os.listdir(tmp_path) == []


def test_wrong_calls(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, metadata=METADATA, tensors=SPECS)
    with pytest.raises(ValueError, match="inside the with block"):
        writer.write("a.weight", A)
    with pytest.raises(ValueError, match="out of order"), writer:
        writer.write("b.weight", B)
    with pytest.raises(ValueError, match="uint8"), writer:
        writer.write("a.weight", A.astype(np.float32))
    with pytest.raises(ValueError, match="two tensors"):
        GGUFWriter(path, metadata=METADATA, tensors=SPECS + SPECS)
    with pytest.raises(ValueError, match="alignment"):
        GGUFWriter(path, metadata=METADATA, tensors=SPECS, alignment=24)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (Value("u32", -1), "u32"),
        (Value("u8", 256), "u8"),
        (Value("i32", 1.5), "i32"),
        (Value("f32", 1e300), "f32"),
        (Value("str", "\ud800"), "str"),
        (Array("i32", [1, 2**31]), "i32"),
        (Array("u32", np.array([1, -1])), "u32"),
        (Array("str", ["a", "\ud800"]), "str"),
    ],
)
def test_values_that_do_not_fit(entry: MetadataValue, found: str) -> None:
    with pytest.raises(OutputError, match=f"metadata the.key: not a value of type {found}"):
        file_size({"the.key": entry}, [])


@pytest.mark.parametrize("spec", [("n" * 64, (4,)), ("", (4,)), ("a", ()), ("a", (0, 4))])
def test_tensors_that_no_reader_accepts(spec: tuple[str, tuple[int, ...]]) -> None:
    name, shape = spec
    with pytest.raises(OutputError, match="tensor"):
        file_size({}, [TensorSpec(name, by_name("F32"), shape)])


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_file(tmp_path / "folder", force=True)
    with pytest.raises(OutputError, match="does not exist"):
        write_file(tmp_path / "absent" / "x.gguf")
    with pytest.raises(OutputError, match="not a regular file"):
        write_file(Path("/dev/null"), force=True)
    os.mkfifo(tmp_path / "y.gguf.part")
    with pytest.raises(OutputError, match="not a regular file"):
        write_file(tmp_path / "y.gguf")
    with pytest.raises(OutputError, match="too long"):
        write_file(tmp_path / ("n" * 300))
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link to nowhere"):
        write_file(tmp_path / "link.gguf")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match="no permission"):
            write_file(tmp_path / "x.gguf")
    finally:
        tmp_path.chmod(0o755)


def test_disk_too_small(tmp_path: Path) -> None:
    spec = TensorSpec("a", by_name("F32"), (1 << 28, 1 << 26))
    with pytest.raises(OutputError, match=r"72,057,594,037,928,\d+ bytes and the disk has"):
        GGUFWriter(tmp_path / "x.gguf", metadata={}, tensors=[spec]).__enter__()
    assert os.listdir(tmp_path) == []


def test_disk_full_while_writing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))"
    process = start_writer(tmp_path / "x.gguf", limit)
    code, errors = finish(process)
    assert code == 1
    assert errors.count("\n") == 1 and errors.startswith("error: ") and "no room for" in errors
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells it once, long before the end."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("gguf_tools.flushing._flush", fail)
    monkeypatch.setattr("gguf_tools.flushing.EVERY", 16)
    with pytest.raises(OutputError, match=r"disk failed: Input/output error; .* was removed"):
        write_file(tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_process_removes_its_file(tmp_path: Path, number: signal.Signals) -> None:
    process = start_writer(tmp_path / "x.gguf", "time.sleep(60)")
    assert os.listdir(tmp_path) == ["x.gguf.part"]
    process.send_signal(number)
    code, errors = finish(process)
    assert code == 128 + number
    assert errors == ""
    assert os.listdir(tmp_path) == []


def test_a_killed_process_blocks_nobody(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "x.gguf", "time.sleep(60)")
    process.kill()
    finish(process)
    assert os.listdir(tmp_path) == ["x.gguf.part"]
    size = write_file(tmp_path / "x.gguf")
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert (tmp_path / "x.gguf").stat().st_size == size


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    process = start_writer(path, "sys.stdin.read()")
    with pytest.raises(OutputError, match="being written by another process"):
        write_file(path)
    assert os.listdir(tmp_path) == ["x.gguf.part"]
    process.terminate()
    finish(process)
    write_file(path)


def test_many_writers_one_result(tmp_path: Path) -> None:
    """Started together, exactly one at a time writes, and what remains is whole."""
    path = tmp_path / "x.gguf"
    processes = [start_writer(path, "time.sleep(0.05)") for _ in range(4)]
    ends = [finish(process) for process in processes]
    assert {code for code, _ in ends} <= {0, 1}
    assert 0 in {code for code, _ in ends}
    assert all("being written" in errors for code, errors in ends if code)
    assert os.listdir(tmp_path) == ["x.gguf"]
    assert GGUFFile(path).tensors["a"].nbytes == 1 << 22


def test_target_is_looked_at_again(tmp_path: Path) -> None:
    """A file that appeared while this one was being written is not overwritten."""
    path = tmp_path / "x.gguf"
    with (
        pytest.raises(OutputError, match=r"exists already"),
        GGUFWriter(path, metadata=METADATA, tensors=SPECS) as writer,
    ):
        writer.write("a.weight", A)
        writer.write("b.weight", B)
        path.write_text("precious")
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["x.gguf"]
