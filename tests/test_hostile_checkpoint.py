"""Broken and hostile folders: each is one line of error, soon, and no output file.

The table changes one thing in a checkpoint that is fine. Nothing outside the folder may be read,
nothing in it may be run, and no count in it may make us allocate or loop.
"""

import json
import os
import pickle
import shutil
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from gguf_tools.conversion import convert, plan_conversion
from gguf_tools.errors import GGUFError
from gguf_tools.recipes import find_file_type
from tests.checkpoints import llama_config, make_llama, pack, safetensors

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seed") / "model"
    make_llama(folder)
    return folder


@pytest.fixture(scope="module")
def sharded_seed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    make_llama(folder, n_shards=2)
    return folder


def refused(folder: Path, output: Path) -> str:
    """The message of the refusal; quick, one line, nothing left behind."""
    start = time.monotonic()
    with pytest.raises(GGUFError) as caught:
        plan = plan_conversion(folder, find_file_type("F32"))
        for _ in convert(plan, output, threads=1):
            pass
    message = str(caught.value)
    assert time.monotonic() - start < 10
    assert message
    assert message.isprintable(), "one line, and nothing a terminal would obey"
    assert len(message) < 5000
    assert list(output.parent.iterdir()) == []
    return message


def empty_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def replace(name: str, data: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return change


# --- the header of a safetensors file -----------------------------------------------------------

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def header(text: bytes | dict[str, Any], data: bytes = bytes(8)) -> bytes:
    return safetensors(text, data)


def entry(**changes: Any) -> bytes:
    fields = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return header({"x": fields})


def raw(text: str) -> bytes:
    return header(text.encode())


def nested(depth: int) -> bytes:
    return b'{"x":' + b"[" * depth + b"]" * depth + b"}"


FILES = {
    "empty": b"",
    "short": b"\x10\0\0",
    "length 0": struct.pack("<Q", 0) + bytes(8),
    "length 1": struct.pack("<Q", 1) + b"{",
    "length -1": struct.pack("<q", -1) + b"{}",
    "length past the end": struct.pack("<Q", 3) + b"{}",
    "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length over the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "length one short": struct.pack("<Q", 1) + b"{}",
    "not JSON": raw("{nonsense}"),
    "not UTF-8": header(b'{"\xff":1}'),
    "UTF-16": header('{"x":1}'.encode("utf-16")),
    "a list": raw("[]"),
    "a number": raw("12"),
    "leading space": raw(' {"x":1}'),
    "garbage after": raw("{} x"),
    "deep": header(nested(100_000)),
    "deep objects": header(b'{"x":' * 50_000 + b"1" + b"}" * 50_000),
    "long number": raw('{"x":' + "1" * 5000 + "}"),
    "duplicate": raw('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},' * 2 + '"y":1}'),
    "duplicate in an entry": raw(
        '{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "no tensors": header({}, b""),
    "garbage data": header({"x": GOOD}, bytes(9)),
    "data cut": header({"x": GOOD}, bytes(7)),
    "metadata list": header({"__metadata__": [], "x": GOOD}),
    "metadata number": header({"__metadata__": {"format": 1}, "x": GOOD}),
    "entry null": raw('{"x":null}'),
    "entry list": raw('{"x":[]}'),
    "entry text": raw('{"x":"F32"}'),
    "escapes in the name": header({"\x1b[31m\n": {**GOOD, "dtype": "F33"}}),
    "zip": struct.pack("<4sI", b"PK\x03\x04", 0) + bytes(100),
    "pickle": pickle.dumps({"x": 1}),
    "gguf": b"GGUF" + bytes(100),
    "html": b"<!DOCTYPE html><html></html>",
    "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "overlap": header({"x": GOOD, "y": GOOD}),
    "partial overlap": header(
        {"x": GOOD, "y": {**GOOD, "data_offsets": [4, 12]}}, bytes(12)
    ),
    "hole": header({"x": {**GOOD, "data_offsets": [8, 16]}}, bytes(16)),
    "many items": raw('{"x":[' + "0," * 5_000_000 + "0]}"),
}  # fmt: skip

ENTRIES: dict[str, dict[str, Any]] = {
    "offsets past the end": {"data_offsets": [8, 16]},
    "offsets reversed": {"data_offsets": [8, 0]},
    "offsets negative": {"data_offsets": [-8, 0]},
    "offsets floats": {"data_offsets": [0.0, 8.0]},
    "offsets texts": {"data_offsets": ["0", "8"]},
    "offsets bools": {"data_offsets": [False, True]},
    "one offset": {"data_offsets": [8]},
    "three offsets": {"data_offsets": [0, 8, 8]},
    "offsets over u64": {"data_offsets": [0, 2**64 + 8]},
    "offsets huge": {"data_offsets": [0, 10**4000]},
    "offsets missing": {"data_offsets": ...},
    "offsets null": {"data_offsets": None},
    "shape too large": {"shape": [3]},
    "shape too small": {"shape": [1]},
    "shape negative": {"shape": [-2]},
    "shape overflow": {"shape": [2**32, 2**32]},
    "shape wraps to fit": {"shape": [2**62 + 2]},
    "shape huge": {"shape": [10**4000] * 8},
    "shape many": {"shape": [1] * 10_002},
    "shape text": {"shape": ["2"]},
    "shape number": {"shape": 2},
    "shape nested": {"shape": [[2]]},
    "shape missing": {"shape": ...},
    "dtype unknown": {"dtype": "F33"},
    "dtype lower case": {"dtype": "f32"},
    "dtype number": {"dtype": 7},
    "dtype list": {"dtype": ["F32"]},
    "dtype missing": {"dtype": ...},
    "dtype of another size": {"dtype": "F64"},
}
FILES.update({name: entry(**changes) for name, changes in ENTRIES.items()})


@pytest.mark.parametrize("data", FILES.values(), ids=FILES)
def test_safetensors_file(seed: Path, tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "model"
    shutil.copytree(seed, folder)
    replace(WEIGHTS, data)(folder)
    message = refused(folder, empty_folder(tmp_path) / "out.gguf")
    assert WEIGHTS in message or "no tensor" in message


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 2000, 0.3, 0.5, 0.9, -257, -32, -1])
def test_safetensors_file_cut(seed: Path, tmp_path: Path, keep: float) -> None:
    folder = tmp_path / "model"
    shutil.copytree(seed, folder)
    data = (folder / WEIGHTS).read_bytes()
    end = int(keep * len(data)) if isinstance(keep, float) else keep
    replace(WEIGHTS, data[:end])(folder)
    assert WEIGHTS in refused(folder, empty_folder(tmp_path) / "out.gguf")


def test_a_padded_header_is_fine(seed: Path, tmp_path: Path) -> None:
    """The control: safetensors pads with spaces."""
    folder = tmp_path / "model"
    shutil.copytree(seed, folder)
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    text = data[8 : 8 + length] + b" " * 5000
    replace(WEIGHTS, safetensors(text, data[8 + length :]))(folder)
    plan_conversion(folder, find_file_type("F32"))


# --- config.json --------------------------------------------------------------------------------

CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "spaces": b"  \n",
    "cut": json.dumps(llama_config()).encode()[:100],
    "UTF-16": json.dumps(llama_config()).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(llama_config()).encode(),
    "list": b"[]",
    "null": b"null",
    "text": b'"llama"',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "long number": b'{"hidden_size":' + b"9" * 5000 + b"}",
    "binary": bytes(range(256)),
    "large": b'{"a":"' + b"x" * 17_000_000 + b'"}',
    "many items": b'{"a":[' + b"0," * 5_000_000 + b"0]}",
}


@pytest.mark.parametrize("data", CONFIGS.values(), ids=CONFIGS)
def test_config_file(seed: Path, tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "model"
    shutil.copytree(seed, folder)
    replace(CONFIG, data)(folder)
    assert CONFIG in refused(folder, empty_folder(tmp_path) / "out.gguf")


SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize(
    "value", [0, -1, 3, "64", 1.5, 10**9, 10**18, 2**31, 2**63, [64], {"a": 1}, True]
)
def test_config_size(seed: Path, tmp_path: Path, key: str, value: object) -> None:
    """Out of bounds, of another type, or at odds with the tensors."""
    folder = tmp_path / "model"
    shutil.copytree(seed, folder)
    replace(CONFIG, json.dumps(llama_config(**{key: value})).encode())(folder)
    tracemalloc.start()
    try:
        refused(folder, empty_folder(tmp_path) / "out.gguf")
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# --- the index ----------------------------------------------------------------------------------


def index_with(shard: object) -> Change:
    def change(folder: Path) -> None:
        path = folder / INDEX
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = shard
        path.write_text(json.dumps(index))

    return change


SHARDS: dict[str, object] = {
    "absent": "absent.safetensors",
    "parent": "../outside.safetensors",
    "inside and out": "x/../../outside.safetensors",
    "absolute": "/etc/passwd",
    "absolute safetensors": "/tmp/x.safetensors",
    "backslash": "..\\outside.safetensors",
    "NUL": "a\0.safetensors",
    "memory": "/proc/self/mem",
    "zeros": "/dev/zero",
    "dot": ".",
    "dots": "..",
    "nothing": "",
    "only the ending": ".safetensors",
    "a pickle": "pytorch_model.bin",
    "escape": "\x1b[2J.safetensors",
    "number": 7,
    "list": ["model-00001-of-00002.safetensors"],
    "null": None,
    "object": {},
    "long": "x" * 100_000 + ".safetensors",
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=SHARDS)
def test_index_names_a_shard(sharded_seed: Path, tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded_seed, folder)
    (tmp_path / "outside.safetensors").write_bytes(pack({}))
    index_with(shard)(folder)
    refused(folder, empty_folder(tmp_path) / "out.gguf")


INDEXES: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "list": b"[]",
    "no map": b"{}",
    "map is null": b'{"weight_map":null}',
    "map is a list": b'{"weight_map":["a"]}',
    "map is empty": b'{"weight_map":{}}',
    "deep": b'{"weight_map":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "many shards": json.dumps(
        {"weight_map": {f"t{i}": f"s{i}.safetensors" for i in range(20_000)}}
    ).encode(),
}


@pytest.mark.parametrize("data", INDEXES.values(), ids=INDEXES)
def test_index_file(sharded_seed: Path, tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded_seed, folder)
    replace(INDEX, data)(folder)
    assert INDEX in refused(folder, empty_folder(tmp_path) / "out.gguf")


# --- paths --------------------------------------------------------------------------------------


def as_folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def as_link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def as_pipe(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


PATHS = {
    f"{name}: {kind}": change
    for name in (CONFIG, WEIGHTS)
    for kind, change in (
        ("folder", as_folder(name)),
        ("loop", as_link(name, name)),
        ("nowhere", as_link(name, "nowhere")),
        ("zeros", as_link(name, "/dev/zero")),
        ("tty", as_link(name, "/dev/tty")),
        ("folder link", as_link(name, "..")),
        ("pipe", as_pipe(name)),
    )
}
PATHS[f"{INDEX}: pipe"] = lambda folder: os.mkfifo(folder / INDEX)
PATHS[f"{INDEX}: folder"] = lambda folder: (folder / INDEX).mkdir()


@pytest.mark.skipif(sys.platform == "win32", reason="needs links, pipes and devices")
@pytest.mark.parametrize("change", PATHS.values(), ids=PATHS)
def test_path(seed: Path, tmp_path: Path, change: Change) -> None:
    folder = tmp_path / "model"
    shutil.copytree(seed, folder)
    change(folder)
    refused(folder, empty_folder(tmp_path) / "out.gguf")


def test_folder_itself(tmp_path: Path) -> None:
    out = empty_folder(tmp_path) / "out.gguf"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for folder in (loop, Path("/dev/null"), tmp_path / "absent", tmp_path / ("x" * 300)):
        refused(folder, out)
    refused(Path("a\0b"), out)


# --- code ---------------------------------------------------------------------------------------


class Runs:
    """A pickle of this touches a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def torch_zip(payload: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", WEIGHTS])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_are_not_run(seed: Path, tmp_path: Path, name: str, zipped: bool) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(seed, folder)
    (folder / WEIGHTS).unlink()
    payload = pickle.dumps(Runs(mark))
    (folder / name).write_bytes(torch_zip(payload) if zipped else payload)
    refused(folder, empty_folder(tmp_path) / "out.gguf")
    assert not mark.exists()


def test_python_files_in_the_folder_are_not_run(
    seed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(seed, folder)
    code = f"open({str(mark)!r}, 'w')"
    for name in ("modeling_llama.py", "json.py", "numpy.py", "tokenizers.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    replace(CONFIG, json.dumps(llama_config(auto_map=auto_map)).encode())(folder)
    monkeypatch.chdir(folder)
    plan = plan_conversion(folder, find_file_type("F32"))
    list(convert(plan, tmp_path / "out.gguf", threads=1))
    assert not mark.exists()
