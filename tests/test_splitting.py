"""`gguf split` and `gguf merge`: the parts, their names, and what happens when it goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.errors import GGUFError, OutputError
from gguf_tools.reader import GGUFFile
from gguf_tools.tools.splitting import default_prefix, merge, parse_size, plan_split, split
from gguf_tools.values import Array
from tests.gguf_bytes import ARR, U32, Parts, array_key, key, string, text_key, u32, u64
from tests.tiny import llama_file

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    extra = {"tokenizer.ggml.tokens": Array("str", [f"t{i}" for i in range(70)])}
    return llama_file(path, quant="Q8_0", extra=extra)


def gguf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gguf_tools", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )


def split_in(path: Path, prefix: Path, **limit: int) -> list[Path]:
    with GGUFFile(path) as file:
        plans = plan_split(file, prefix, **limit)
        for _ in split(file, plans):
            pass
    assert all(plan.path.stat().st_size == plan.size for plan in plans)
    return [plan.path for plan in plans]


@pytest.mark.parametrize("limit", [{"max_tensors": 1}, {"max_tensors": 5}, {"max_size": 8000}])
def test_split_and_merged_is_the_file_it_was(
    limit: dict[str, int], whole: Path, tmp_path: Path
) -> None:
    first, *others = split_in(whole, tmp_path / "part", **limit)
    assert others
    with GGUFFile(first) as file:
        assert file.paths == (first, *others)
        for _ in merge(file, tmp_path / "merged.gguf"):
            pass
    assert (tmp_path / "merged.gguf").read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_parts_are_those_of_llama_gguf_split(whole: Path, tmp_path: Path) -> None:
    """Keys, their types and their order: compared with its files byte for byte once."""
    first, second, *_ = split_in(whole, tmp_path / "part", max_tensors=8)
    assert (first.name, second.name) == ("part-00001-of-00003.gguf", "part-00002-of-00003.gguf")
    # The second part is written out in full here.
    names = list(GGUFFile(whole).tensors)[8:16]
    with GGUFFile(whole) as file:
        head = b"GGUF" + u32(3) + u64(8) + u64(3)
        head += key("split.no", 2, b"\1\0") + key("split.tensors.count", 5, u32(len(file.tensors)))
        head += key("split.count", 2, b"\3\0")
        data = b""
        for name in names:
            info = file.tensors[name]
            dims = b"".join(u64(n) for n in reversed(info.shape))
            head += string(name) + u32(len(info.shape)) + dims
            head += u32(info.quant.type_id) + u64(len(data))
            data += file.raw(name).tobytes()
            data += bytes(-len(data) % 32)
    assert second.read_bytes() == head + bytes(-len(head) % 32) + data
    with GGUFFile(first) as file:
        keys = ["split.no", "split.tensors.count", "split.count"]
        assert list(file.metadata)[-3:] == keys
        assert [file.metadata_types[name] for name in keys] == ["u16", "i32", "u16"]


def test_a_size_limits_the_tensors_of_a_part(whole: Path, tmp_path: Path) -> None:
    for first in (split_in(whole, tmp_path / "part", max_size=12_000)[0],):
        with GGUFFile(first) as file:
            sizes = [0] * len(file.paths)
            for tensor in file.tensors.values():
                sizes[tensor.part] += tensor.nbytes + -tensor.nbytes % 32
            assert max(sizes) <= 12_000
            # Greedy: the first tensor of a part would not have fitted into the one before.
            for part in range(1, len(sizes)):
                head = next(t for t in file.tensors.values() if t.part == part)
                assert sizes[part - 1] + head.nbytes > 12_000


def test_a_tensor_larger_than_the_limit_is_named(whole: Path, tmp_path: Path) -> None:
    with (
        GGUFFile(whole) as file,
        pytest.raises(GGUFError, match=r"ffn_gate.* choose a size of 6,5|token_embd"),
    ):
        plan_split(file, tmp_path / "x", max_size=4000)


def test_other_alignment_and_arrays_of_arrays(tmp_path: Path) -> None:
    """What the writer cannot make itself is copied as it is."""
    parts = Parts(alignment=64)
    parts.keys = [
        *parts.keys,
        key("general.alignment", U32, u32(64)),
        array_key("a.nested", ARR, 1, u32(U32) + u64(2) + u32(7) + u32(8)),
        text_key("a.bytes", b"\xff\xfe"),
    ]
    parts.data += bytes(-len(parts.data) % 64)
    path = tmp_path / "odd.gguf"
    path.write_bytes(parts.build())
    first, *_ = split_in(path, tmp_path / "odd", max_tensors=1)
    with GGUFFile(first) as file:
        assert file.alignment == 64
        for _ in merge(file, tmp_path / "merged.gguf"):
            pass
    assert (tmp_path / "merged.gguf").read_bytes() == path.read_bytes()


def test_a_split_model_is_split_anew(whole: Path, tmp_path: Path) -> None:
    first, *_ = split_in(whole, tmp_path / "a", max_tensors=8)
    again = split_in(first, tmp_path / "b", max_tensors=5)
    direct = split_in(whole, tmp_path / "c", max_tensors=5)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in direct]


def test_nothing_is_replaced_unasked(whole: Path, tmp_path: Path) -> None:
    paths = split_in(whole, tmp_path / "part", max_tensors=8)
    paths[0].unlink()
    paths[1].write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        split_in(whole, tmp_path / "part", max_tensors=8)
    assert paths[1].read_bytes() == b"mine" and not paths[0].exists()
    with GGUFFile(whole) as file:
        for _ in split(file, plan_split(file, tmp_path / "part", max_tensors=8), force=True):
            pass
    with GGUFFile(paths[0]) as file:
        assert len(file.paths) == 3


def test_the_source_is_never_written_over(whole: Path, tmp_path: Path) -> None:
    first, second, *_ = split_in(whole, tmp_path / "part", max_tensors=8)
    before = first.read_bytes(), second.read_bytes()
    with GGUFFile(first) as file:
        with pytest.raises(OutputError, match="is a file of the model"):
            list(merge(file, second, force=True))
        with pytest.raises(OutputError, match="is a file of the model"):
            list(split(file, plan_split(file, tmp_path / "part", max_tensors=8), force=True))
    assert (first.read_bytes(), second.read_bytes()) == before


def test_an_error_leaves_no_part(whole: Path, tmp_path: Path) -> None:
    """A folder where the last part to be written belongs: those before it go away again."""
    (tmp_path / "part-00001-of-00003.gguf").mkdir()
    with GGUFFile(whole) as file:
        plans = plan_split(file, tmp_path / "part", max_tensors=8)
        with pytest.raises(OutputError, match="is a folder"):
            list(split(file, plans, force=True))
    assert [p.name for p in tmp_path.iterdir()] == ["part-00001-of-00003.gguf"]
    with GGUFFile(whole) as file, pytest.raises(OutputError, match="does not exist"):
        list(split(file, plan_split(file, tmp_path / "no" / "x", max_tensors=8)))


def test_interrupted_in_the_middle(whole: Path, tmp_path: Path) -> None:
    with GGUFFile(whole) as file:
        steps = split(file, plan_split(file, tmp_path / "part", max_tensors=4))
        for _ in range(9):
            next(steps)
        steps.close()
        steps = merge_of(whole, tmp_path)
        next(steps)
        steps.close()
    assert not list(tmp_path.glob("part-*")) and not list(tmp_path.glob("merged*"))


def merge_of(whole: Path, folder: Path):
    file = GGUFFile(split_in(whole, folder / "m", max_tensors=4)[0])
    return merge(file, folder / "merged.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_there_is_no_first_part(tmp_path: Path) -> None:
    """What a killed split leaves behind does not open, and the command run again is the answer."""
    rng = np.random.default_rng(0)
    path = llama_file(tmp_path / "big.gguf", dim=512, ffn_dim=2048, n_layers=8, n_vocab=2000)
    command = [sys.executable, "-m", "gguf_tools", "split", str(path), "--max-tensors", "4"]
    command += ["-o", str(tmp_path / "part"), "--force"]
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        time.sleep(float(rng.uniform(0.2, 0.5)))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        first = tmp_path / "part-00001-of-00019.gguf"
        if first.exists():  # then it is the whole model
            GGUFFile(first).close()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with GGUFFile(first) as file:
        for _ in merge(file, tmp_path / "merged.gguf"):
            pass
    assert (tmp_path / "merged.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("2g", 2 * 10**9),
        ("500M", 500 * 10**6),
        ("1.5 GiB", 3 << 29),
        ("1KiB", 1024),
        ("1T", 10**12),
        ("77", 77),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "0.1", "1X", "1e9", "nan", "2 GBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(GGUFError, match="expected a size"):
        parse_size(text)


def test_prefixes() -> None:
    assert default_prefix(Path("a/model.gguf")) == Path("model")
    assert default_prefix(Path("a/m-00001-of-00002.gguf")) == Path("m")
    assert default_prefix(Path("blob")) == Path("blob")


def test_the_commands(whole: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "part"
    planned = json.loads(
        gguf("split", whole, "--max-size", "12K", "-o", prefix, "--dry-run", "--json").stdout
    )
    assert not planned["written"] and not list(tmp_path.iterdir())
    ended = gguf("split", whole, "--max-size", "12K", "-o", prefix)
    assert ended.returncode == 0 and ended.stderr == ""
    for part in planned["parts"]:
        assert f"{part['file']}  {part['size']:,} bytes, {part['tensors']} tensor" in ended.stdout
    first = Path(planned["parts"][0]["file"])
    info = gguf("info", first).stdout
    assert f"part 1              {first.name}: " in info and "part 2" in info
    facts = json.loads(gguf("info", first, "--json").stdout)
    assert [part["file"] for part in facts["parts"]] == [
        Path(part["file"]).name for part in planned["parts"]
    ]
    assert sum(part["tensors"] for part in facts["parts"]) == len(facts["tensors"])

    merged = tmp_path / "merged.gguf"
    ended = gguf("merge", first, "-o", merged, "--json")
    assert json.loads(ended.stdout)["size"] == whole.stat().st_size
    assert merged.read_bytes() == whole.read_bytes()
    for arguments, words in (
        (("merge", first, "-o", merged), "exists already; use --force"),
        (("merge", whole, "-o", tmp_path / "x.gguf"), "whole model already"),
        (("split", whole, "--max-size", "12K", "-o", prefix), "exists already; use --force"),
        (("split", whole, "--max-size", "x", "-o", prefix), "expected a size such as"),
        (("split", tmp_path / "no.gguf", "--max-tensors", "3"), "no such file"),
    ):
        ended = gguf(*arguments)
        assert ended.returncode == 1 and ended.stdout == ""
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
        assert words in ended.stderr
    assert gguf("split", whole).returncode == 2
    assert gguf("split", whole, "--max-size", "1G", "--max-tensors", "3").returncode == 2
    Path(shutil.copy(first, tmp_path / "lost.gguf"))
    assert "rename the parts" in gguf("merge", tmp_path / "lost.gguf", "-o", "x").stderr


def test_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(Parts(tensors=[]).build())
    with GGUFFile(path) as file, pytest.raises(GGUFError, match="no tensors"):
        plan_split(file, tmp_path / "x", max_tensors=1)
