"""Which layers go where: plans for a dozen machines that are not there, and their words."""

from dataclasses import replace

import numpy as np
import pytest

from gguf_tools.errors import DeviceError, GGUFError
from runtime.backends.cuda_formats import way_of_tiles
from runtime.backends.fake import FakeBackend
from runtime.devices import FAKES_VARIABLE, choose_devices, find_devices, parse_size
from runtime.offload import parse_gpu_layers, read_offload
from runtime.plan_text import brief, describe, to_json
from runtime.program import ExpertMatMul, Gate, Program, StoreKV
from runtime.split import (
    LayerSize,
    Sizes,
    Wish,
    budget,
    measure_sizes,
    plan_split,
    stage_bytes,
)
from runtime.stages import cut_program
from tests.programs import attention_program, mixture

MIB, GIB = 1 << 20, 1 << 30


def model(n_layers, layer, head, kv, *, experts=0, scratch=200) -> Sizes:
    """Sizes in MiB."""
    each = LayerSize(layer * MIB, experts * MIB, kv * MIB)
    return Sizes((each,) * n_layers, head * MIB, scratch * MIB, 20 * MIB)


# As Q4_K_M has them, at 8192 tokens of context: 8B, a tied 1B with a vocabulary of 262k, a 30B of
# 128 experts; and the first with 128k tokens.
DENSE = model(32, 130, 410, 32)
TIED = model(26, 23, 250, 26)
MIXTURE = model(48, 360, 250, 16, experts=340)
LONG = model(32, 130, 410, 512)
MODELS = {"dense": DENSE, "tied": TIED, "mixture": MIXTURE, "long": LONG}

# machine, model, options -> layers of each device, with the head + 1; what one more lacks, MiB
PLANS = [
    ("24GiB/23GiB@8.9", "dense", {}, [33], None),
    ("8GiB/7GiB@8.6", "dense", {}, [33], None),
    ("6GiB/5GiB@7.5", "dense", {}, [26], 29),
    ("4GiB/3GiB@7.5", "dense", {}, [14], 82),
    ("2GiB/1GiB@7.5", "dense", {}, [1], 24),
    ("1GiB/700MiB@7.5", "dense", {}, [0], 186),
    ("2GiB/1800MiB@7.5", "tied", {}, [22], 4),
    ("24GiB/23GiB@8.9", "mixture", {}, [49], None),
    ("8GiB/7GiB@8.9", "mixture", {}, [17], 103),
    ("8GiB/7GiB@8.9", "mixture", {"cpu_moe": 48}, [49], None),
    ("8GiB/7GiB@8.9", "mixture", {"cpu_moe": 40}, [49], None),
    ("8GiB/7GiB@8.9", "mixture", {"cpu_moe": 20}, [17], 103),
    ("24GiB/23GiB@8.9", "long", {}, [33], None),
    ("12GiB/11GiB@8.9", "long", {}, [16], 252),
    ("12GiB/11GiB@8.9", "long", {"kv_offload": False}, [33], None),
    ("8GiB/6GiB,8GiB/7GiB", "dense", {}, [32, 1], None),
    ("4GiB/3GiB@8.9,2GiB/1800MiB@8.6", "dense", {}, [14, 8], 114),
    ("4GiB/3GiB@8.9,2GiB/1800MiB@8.6", "mixture", {"vram_limit": 1 * GIB}, [2, 2], 304),
    ("24GiB/23GiB@8.9", "dense", {"vram_limit": 2 * GIB}, [9], 40),
    ("24GiB/23GiB@8.9", "dense", {"gpu_layers": 10}, [10], 0),
    ("4GiB/3GiB@7.5", "dense", {"gpu_layers": 99}, [33], None),  # tried, whatever is free
    ("4GiB/3GiB@8.9,4GiB/3GiB@8.9", "dense", {"gpu_layers": 33}, [14, 19], None),
    ("24GiB/23GiB@8.9", "dense", {"at_most": 5}, [5], 0),
    ("24GiB/23GiB@8.9", "dense", {"gpu_layers": 0}, [0], 0),
]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch):
    def set_fakes(text: str):
        monkeypatch.setenv(FAKES_VARIABLE, text)
        return find_devices()

    return set_fakes


@pytest.mark.parametrize(("machine", "name", "wishes", "counts", "lacking"), PLANS)
def test_plans(machine, name, wishes, counts, lacking, fakes) -> None:
    sizes, wish = MODELS[name], Wish(**wishes)
    plan = plan_split(sizes, fakes(machine), wish)
    assert [share.n_units for share in plan.shares] == counts
    assert plan.gpu_layers == sum(counts)
    last = plan.shares[-1].one_more
    assert lacking == (None if last is None else last // MIB)
    covered = [i for share in reversed(plan.shares) for i in share.layers]
    n_layers = len(sizes.layers)
    assert covered == list(range(n_layers - len(covered), n_layers))  # the last ones, in order
    assert [share.head for share in plan.shares] == [i == 0 < n for i, n in enumerate(counts)]
    for share in plan.shares:
        assert wish.gpu_layers or share.used <= share.budget or not share.n_units
    weights = sizes.head + sum(layer.weights for layer in sizes.layers)
    assert plan.host_weights + sum(share.weights for share in plan.shares) == weights
    assert plan.host_kv + sum(share.kv for share in plan.shares) == n_layers * sizes.layers[0].kv


def test_what_fits_is_the_most_that_fits(fakes) -> None:
    """One layer more would break the budget, whatever is free; more memory never gives fewer."""
    before = 0
    for free in range(300, 9000, 50):
        (device,) = fakes(f"10GiB/{free}MiB")
        (share,) = plan_split(DENSE, [device], Wish()).shares
        assert share.used <= max(budget(device, Wish()), 0)
        assert share.n_units >= before
        before = share.n_units
        if share.one_more is not None:
            assert share.one_more > 0
            roomier = replace(device, free=device.free + share.one_more)
            assert plan_split(DENSE, [roomier], Wish()).gpu_layers == before + 1


def test_the_reserve(fakes) -> None:
    small, large = fakes("2GiB,80GiB")
    assert budget(small, Wish()) == 2 * GIB - 256 * MIB
    assert budget(large, Wish()) == 76 * GIB
    assert budget(large, Wish(vram_limit=6 * GIB)) == 6 * GIB
    assert budget(replace(small, free=0), Wish()) < 0


def test_a_device_that_held_less_gets_less(fakes) -> None:
    devices = fakes("24GiB,24GiB")
    assert [s.n_units for s in plan_split(DENSE, devices, Wish(), most={0: 7}).shares] == [7, 26]
    rooms = {1: 1 * GIB}
    plan = plan_split(DENSE, devices, Wish(gpu_layers=33), most={0: 7}, rooms=rooms)
    assert [share.n_units for share in plan.shares] == [7, 5]


def test_words(fakes) -> None:
    devices = fakes("6GiB/5GiB@7.5,1GiB/400MiB")
    plan = plan_split(MIXTURE, devices, Wish(cpu_moe=46, kv_offload=False))
    lines = "\n".join(describe(plan, n_ctx=8192, kv_type="f16"))
    assert "--gpu-layers 49 of 49, context 8192 tokens" in lines
    assert "fake:0: fake GPU, compute 7.5, 5.00 GiB free of 6.00 GiB, 4.70 GiB to use" in lines
    assert "layers 0-47 of 48 (experts up to layer 45 and KV cache on the CPU) and the out" in lines
    assert "CPU: no layer; weights 15.27 GiB, KV cache 768.00 MiB" in lines
    plan = plan_split(DENSE, devices, Wish())
    assert "one more layer would need" in "\n".join(describe(plan, n_ctx=8192, kv_type="f16"))
    (line,) = brief(plan)
    assert line.startswith("fake:0 (fake GPU): layers 7-31 of 32 and the output head; ")
    (line,) = brief(plan_split(DENSE, fakes("1GiB/500MiB"), Wish()))
    assert "no layer on a GPU: the output head comes first, and lacks" in line
    (line,) = brief(plan_split(DENSE, devices, Wish(at_most=0)))
    assert "`gguf tune` found the CPU alone to be faster" in line
    assert list(brief(plan_split(DENSE, (), Wish()))) == []
    assert "no GPU is used" in "\n".join(
        describe(plan_split(DENSE, (), Wish()), n_ctx=1, kv_type="f16")
    )


def test_json(fakes) -> None:
    plan = plan_split(DENSE, fakes("6GiB/5GiB@7.5"), Wish())
    found = to_json(plan, n_ctx=8192, kv_type="f16")
    assert found["gpu_layers"] == 26 and found["n_layers"] == 32
    (device,) = found["devices"]
    assert device["layers"] == list(range(7, 32)) and device["head"] and device["fake"]
    used = device["weights"] + device["kv"] + device["scratch"]
    assert device["left"] == device["usable"] - used >= 0
    assert found["cpu"] == {"weights": 7 * 130 * MIB, "kv": 7 * 32 * MIB}


# --- sizes and places of a real program


def test_sizes_are_what_stages_take() -> None:
    """The plan's sum and a stage's own are the same but for scratch that the stage can spare."""
    program = attention_program((6, 2, 64, 64), np.random.default_rng(1))
    options = {"n_ctx": 100, "n_batch": 16, "kv_type": "f16"}
    sizes = measure_sizes(program, **options)
    cut = cut_program(program, [1] * len(program.steps))
    whole = sizes.head + sizes.layers[0].weights + sizes.layers[0].kv + sizes.scratch + sizes.logits
    assert stage_bytes(cut.stages[1], **options) == whole
    assert sizes.layers[0].kv == 100 * 2 * (64 + 64) * 2
    quantised = measure_sizes(program, n_ctx=100, n_batch=16, kv_type="q8_0")
    assert quantised.layers[0].kv == 2 * (100 * 2 * 64 + 1024)  # 800 bytes of scales
    assert measure_sizes(program, n_ctx=100, n_batch=32, kv_type="f16").scratch > sizes.scratch


def test_places_of_experts_and_caches(fakes) -> None:
    rng = np.random.default_rng(2)
    program = mixture(rng)
    sizes = measure_sizes(program, n_ctx=8, n_batch=8, kv_type="f16")
    steps = program.layers[0]
    experts = [step for step in steps if isinstance(step, ExpertMatMul)]
    stacked = [sum(e.data.nbytes for e in step.experts) for step in experts]
    assert 0 <= sizes.layers[0].experts - sum(stacked) <= 256 * len(experts)
    devices = fakes("1GiB")
    places = plan_split(sizes, devices, Wish(cpu_moe=1)).places(program)
    for step, place in zip(program.steps, places, strict=True):
        assert place == (0 if isinstance(step, (ExpertMatMul, Gate)) or step in steps[-2:-1] else 1)
    assert set(plan_split(sizes, devices, Wish()).places(program)) == {1}
    program = attention_program((6, 2, 64, 64), rng)
    sizes = measure_sizes(program, n_ctx=8, n_batch=8, kv_type="f16")
    places = plan_split(sizes, devices, Wish(kv_offload=False)).places(program)
    stored = [i for i, step in enumerate(program.steps) if isinstance(step, StoreKV)]
    assert [i for i, place in enumerate(places) if place == 0] == [stored[0], stored[0] + 1]


def test_a_fake_counts_bytes(fakes) -> None:
    program: Program = mixture(np.random.default_rng(2))
    stage = cut_program(program, [1] * len(program.steps)).stages[1]
    options = {"n_ctx": 8, "n_batch": 8, "kv_type": "f16"}
    needed = stage_bytes(stage, **options)
    (enough, too_small) = fakes(f"1GiB;holds={needed},1GiB/{needed - 1}")
    FakeBackend(stage, enough, **options).close()
    with pytest.raises(DeviceError, match="fake:1 has room for") as raised:
        FakeBackend(stage, too_small, **options)
    assert raised.value.room == needed - 1


# --- devices and options


def test_fakes(fakes) -> None:
    first, second = fakes("8GiB/6.5GiB@8.9;holds=5GiB;lost=40, 512M")
    assert (first.name, first.total, first.free) == ("fake:0", 8 * GIB, 13 * GIB // 2)
    assert (first.capability, first.holds, first.lost_after) == ((8, 9), 5 * GIB, 40)
    assert (second.index, second.total, second.free) == (1, 512 * MIB, 512 * MIB)
    assert second.capability is None and second.is_fake
    for wrong in ("GiB", "8GiB/", "8GiB@9", "8GiB;sold=1", "8GiB;lost=x", "8GiB,,1GiB"):
        with pytest.raises(GGUFError, match=FAKES_VARIABLE):
            fakes(wrong)


@pytest.mark.parametrize(
    ("capability", "kept", "n_columns", "way"),
    [((6, 1), "Q4_K", 256, "plain"), ((7, 0), "Q4_K", 256, "plain"),
     ((7, 5), "Q4_K", 256, "turing"), ((8, 0), "Q6_K", 256, "ampere"),
     ((8, 9), "IQ4_XS", 256, "ampere"), ((12, 0), "MXFP4", 32, "ampere"),
     ((7, 5), "F16", 64, "plain"), ((8, 6), "F16", 64, "ampere"), ((9, 0), "BF16", 8, "ampere"),
     ((9, 0), "F16", 12, "plain"), ((12, 0), "F32", 64, "plain")],
)  # fmt: skip
def test_how_prompts_are_multiplied(capability, kept, n_columns, way) -> None:
    assert way_of_tiles(capability, kept, n_columns) == way


def test_sizes_as_typed() -> None:
    assert [parse_size(t) for t in ("6GiB", "6g", "1.5 MB", "10", "2T")] == [
        6 * GIB, 6 * GIB, 3 * MIB // 2, 10, 2 << 40,
    ]  # fmt: skip
    for wrong in ("", "-1", "six", "6XB", "1e3", "9" * 16, "6GiB\x1b"):
        with pytest.raises(ValueError, match="a size is a number"):
            parse_size(wrong)


def test_choosing_devices(fakes) -> None:
    devices = fakes("1GiB,2GiB")
    assert choose_devices(devices, None) == devices
    assert choose_devices(devices, "fake:1,fake:0") == devices[::-1]
    assert choose_devices(devices, "none") == ()
    with pytest.raises(DeviceError, match=r"no such GPU; those here: fake:0, fake:1"):
        choose_devices(devices, "cuda:0")


def test_options(fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [parse_gpu_layers(t) for t in ("auto", "0", "12")] == [None, 0, 12]
    assert parse_gpu_layers("all") == parse_gpu_layers("-1") > 10**6
    for wrong in ("some", "-2", "1.5", "", "9" * 20):
        with pytest.raises(ValueError, match="a number, all or auto"):
            parse_gpu_layers(wrong)
    devices = fakes("1GiB,2GiB")
    assert read_offload("auto").devices == devices
    assert read_offload("0").devices == ()
    assert read_offload("auto", backend="reference").devices == ()
    offload = read_offload("3", device="fake:1", vram_limit="1GiB", kv_offload=False, cpu_moe=2)
    assert offload.devices == devices[1:]
    assert offload.wish == Wish(3, kv_offload=False, cpu_moe=2, vram_limit=GIB)
    assert offload.at_most(1) == offload
    assert read_offload("auto").at_most(1).wish.at_most == 1
    with pytest.raises(DeviceError, match="--device none leaves no GPU"):
        read_offload("3", device="none")
    monkeypatch.delenv(FAKES_VARIABLE)
    monkeypatch.setattr("runtime.devices.LIBRARIES", {"linux": "no-such-driver.so"})
    assert read_offload("auto").devices == ()
    with pytest.raises(
        DeviceError, match=r"no NVIDIA driver is visible.*give 0, to run on the CPU"
    ):
        read_offload("all")
