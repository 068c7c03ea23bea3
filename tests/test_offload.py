"""Layers on GPUs from the command line, run by fakes: every number, wrong guesses, lost devices."""

import json
import re

import numpy as np
import pytest

from gguf_tools.errors import DeviceError, DeviceLostError, DeviceMemoryError
from gguf_tools.reader import GGUFFile
from runtime.backends.reference import ReferenceBackend
from runtime.config import read_config
from runtime.decoders import build_program
from runtime.devices import FAKES_VARIABLE, find_devices
from runtime.model import Model
from runtime.offload import Offload, open_planned, read_offload
from runtime.split import Wish, measure_sizes
from tests.test_chat_terminal import Terminal, context, n_read
from tests.test_run_cli import GREEDY, STORY, run
from tests.tiny import llama_file

IDS = list(range(20))
TWO = {FAKES_VARIABLE: "8GiB/6GiB@8.9,24GiB"}


@pytest.fixture
def fakes(monkeypatch):
    return lambda text: monkeypatch.setenv(FAKES_VARIABLE, text)


def logits(path, offload=None, **options):
    notes = []
    with (
        GGUFFile(path) as file,
        Model.load(file, n_ctx=64, threads=2, offload=offload, on_note=notes.append, **options)
        as model,
    ):  # fmt: skip
        read = model.forward(IDS, all_logits=True)
        return np.concatenate([read, model.forward([3], all_logits=True)]), notes


# Every number of layers.


@pytest.mark.parametrize("options", [{}, {"kv_offload": False}])
def test_every_number_of_layers_gives_the_same_logits(tmp_path, fakes, options):
    path = llama_file(tmp_path / "m.gguf", quant="F16", n_layers=3, tied=False)
    expected, notes = logits(path)
    assert notes == []
    fakes("1GiB,1GiB;holds=33.1MiB")
    for n in range(1, 6):
        found, notes = logits(path, read_offload(str(n), **options))
        assert np.abs(found - expected).max() < 4e-3 * np.abs(expected).max()
        assert notes and "fake:0" in notes[0]


def test_experts_on_the_cpu(tmp_path, fakes, stories260k_gguf):
    """A model without experts does not mind."""
    fakes("1GiB")
    one, _ = logits(stories260k_gguf, read_offload("all"))
    two, _ = logits(stories260k_gguf, read_offload("all", cpu_moe=3))
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    "options",
    [("--gpu-layers", 1), ("--gpu-layers", 3), ("--gpu-layers", "all"), (), ("--no-kv-offload",),
     ("--vram-limit", "34.9MiB"), ("--device", "fake:1,fake:0"), ("--device", "none")],
)  # fmt: skip
def test_the_story_is_the_same(stories260k_gguf, options):
    alone = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 12, "--gpu-layers", 0)
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 12, *options, environment=TWO)
    assert (done.returncode, done.stdout) == (0, alone.stdout)
    if "none" in options:
        assert "fake" not in done.stderr and "; CPU, " in done.stderr
    else:
        assert "is a fake GPU: the reference backend computes its layers" in done.stderr
        assert re.search(r"^fake:\d \(fake GPU\): .*output head; .* of .* free$", done.stderr, re.M)


# The plan.


def test_the_plan_is_printed_and_nothing_runs(stories260k_gguf):
    done = run(stories260k_gguf, "--plan", environment=TWO)
    assert done.returncode == 0 and done.stderr == ""
    assert "--gpu-layers 6 of 6, context 512 tokens" in done.stdout
    assert "layers 0-4 of 5 and the output head" in done.stdout
    options = ("--plan", "--json", "--gpu-layers", 2, "--ctx", 100)
    found = json.loads(run(stories260k_gguf, *options, environment=TWO).stdout)
    assert (found["gpu_layers"], found["n_ctx"]) == (2, 100)
    assert [device["layers"] for device in found["devices"]] == [[4], []]
    alone = run(stories260k_gguf, "--plan", "--device", "none")
    assert "no GPU is used" in alone.stdout


# Wrong guesses.


def test_a_wrong_guess_drops_layers(stories260k_gguf):
    environment = {FAKES_VARIABLE: "8GiB;holds=34.1MiB"}
    alone = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 6, "--gpu-layers", 0)
    for layers in ("all", "auto"):
        options = ("-p", STORY, *GREEDY, "-n", 6, "--gpu-layers", layers)
        done = run(stories260k_gguf, *options, environment=environment)
        assert (done.returncode, done.stdout) == (0, alone.stdout)
        assert "fake:0 has room for 34.10 MiB, not for" in done.stderr
        assert "trying fewer layers there" in done.stderr
        assert "layers 3-4 of 5 and the output head" in done.stderr


def test_a_wrong_guess_down_to_none(stories260k_gguf):
    environment = {FAKES_VARIABLE: "8GiB;holds=1MiB"}
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 6, environment=environment)
    assert done.returncode == 0 and "no layer on a GPU" in done.stderr
    assert "; CPU, " in done.stderr


def test_a_device_that_does_not_say_how_much_it_held(tmp_path, fakes):
    """A layer less each time; what is left of one device goes to the next."""
    file = GGUFFile(llama_file(tmp_path / "m.gguf", quant="F16", n_layers=4))
    program = build_program(file, read_config(file), n_ctx=8)
    per_layer = len(program.layers[0])
    sizes = measure_sizes(program, n_ctx=8, n_batch=8, kv_type="f16")
    fakes("1GiB,1GiB")
    said, closed = [], []

    class Counted(ReferenceBackend):
        def close(self):
            closed.append(self)

    def make(device, stage):
        if device is not None and device.name == "fake:0" and len(stage.steps) > 2 * per_layer:
            raise DeviceMemoryError("fake:0 is full")
        return Counted(stage, n_ctx=8)

    offload = Offload(find_devices(), Wish())
    pipeline, plan = open_planned(program, sizes, offload, make, said.append)
    assert [share.n_units for share in plan.shares] == [2, 3]
    assert said.count("fake:0 is full: trying fewer layers there") == 3
    pipeline.close()
    assert len(closed) == 3 + 1  # fake:1's, made before each failure but the first, and the last

    def make_nothing(device, stage):
        raise DeviceMemoryError("no memory at all")

    with pytest.raises(DeviceMemoryError, match="no memory at all"):
        open_planned(program, sizes, Offload(), make_nothing, said.append)


def test_a_device_that_cannot_be_used(tmp_path, fakes):
    """It is said, and another or the CPU does its work; asked for layers, it is an error."""
    file = GGUFFile(llama_file(tmp_path / "m.gguf", quant="F16", n_layers=2))
    program = build_program(file, read_config(file), n_ctx=8)
    sizes = measure_sizes(program, n_ctx=8, n_batch=8, kv_type="f16")
    fakes("1GiB,1GiB")
    broken = {"fake:0"}

    def make(device, stage):
        if device is not None and device.name in broken:
            raise DeviceError(f"{device.name} multiplies wrongly")
        return ReferenceBackend(stage, n_ctx=8)

    said = []
    pipeline, plan = open_planned(
        program, sizes, Offload(find_devices(), Wish()), make, said.append
    )
    pipeline.close()
    assert [share.n_units for share in plan.shares] == [0, 3]
    assert "fake:0 multiplies wrongly: going on without it" in said
    broken.add("fake:1")
    pipeline, plan = open_planned(
        program, sizes, Offload(find_devices(), Wish()), make, said.append
    )
    pipeline.close()
    assert plan.gpu_layers == 0
    with pytest.raises(DeviceError, match="fake:0 multiplies wrongly"):
        open_planned(program, sizes, Offload(find_devices(), Wish(2)), make, said.append)


# Lost devices.


def test_a_lost_device_ends_an_answer_in_words(stories260k_gguf):
    environment = {FAKES_VARIABLE: "8GiB;lost=6"}
    done = run(stories260k_gguf, "-p", STORY, *GREEDY, "-n", 40, environment=environment)
    assert done.returncode == 1 and done.stdout.endswith("\n")
    assert "error: fake:0 has stopped answering; --gpu-layers 0 runs on the CPU" in done.stderr


def test_a_model_goes_on_with_the_cpu(stories260k_gguf, fakes):
    fakes("8GiB;lost=2")
    with (
        GGUFFile(stories260k_gguf) as file,
        Model.load(file, n_ctx=64, offload=read_offload("3")) as model,
        Model.load(file, n_ctx=64) as other,
    ):
        assert model.devices == ("fake:0", "CPU")
        model.forward(IDS[:4])
        model.forward(IDS[4:8])
        with pytest.raises(DeviceLostError):
            model.forward(IDS[8:])
        assert model.tokens == IDS[:8]
        model.move_to_cpu()
        assert model.devices == ("CPU",) and model.tokens == []
        assert np.array_equal(model.forward(IDS), other.forward(IDS))


def test_a_chat_keeps_the_conversation(stories260k_gguf, tmp_path, fakes):
    pytest.importorskip("termios", reason="pseudo-terminals are a thing of Unix")
    fakes("8GiB;lost=12")
    options = ("--threads", "1", *GREEDY, "-n", "12")
    with Terminal(stories260k_gguf, *options, home=tmp_path) as terminal:
        assert "device fake:0" in terminal.answer()
        first = terminal.say("Once upon a time")
        assert "wrote 12" in first and "fake:0" in first
        lost = terminal.say("The dog")
        assert "error: fake:0 has stopped answering" in lost
        assert "the conversation is kept but for this message: /cpu goes on" in lost
        lost = terminal.say("/regen")
        assert "error: fake:0 has stopped answering" in lost
        assert "the conversation is kept: /cpu goes on" in lost
        assert "1 turn in" in terminal.say("/stats")
        assert "on the CPU from now on" in terminal.say("/cpu")
        again = terminal.say("/regen")
        assert "wrote 12" in again and "; CPU, 1 thread" in again
        assert n_read(again) == context(again) - 11  # all of it
        assert "the CPU does everything already" in terminal.say("/cpu")
        terminal.type("/exit\r")
        assert terminal.wait() == 0
