"""Every architecture against transformers: the same checkpoint, the same logits."""

from pathlib import Path

import pytest

from runtime.devices import Device
from runtime.offload import Offload
from runtime.split import Wish
from tests.architectures import FOLDER, NAMES, converted, disagreement, prompts

# Of the largest logit. The CPU backend keeps keys and values as f16.
TOLERANCES = {"reference": 2e-5, "cpu": 2e-3}
SPLITS = {
    "the output": Wish(gpu_layers=1),
    "the last layer": Wish(gpu_layers=2),
    "all but experts and caches": Wish(gpu_layers=99, cpu_moe=99, kv_offload=False),
}
MIN_VOCAB = 280  # tokens of the tokenizer; the embedding has a few rows more


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(name, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("backend", TOLERANCES)
def test_logits_are_those_of_transformers(name: str, path: Path, backend: str) -> None:
    for prompt in prompts(name):
        assert disagreement(path, prompt, backend) <= TOLERANCES[backend], len(prompt.ids)


@pytest.mark.parametrize("backend", TOLERANCES)
def test_logits_do_not_depend_on_batches(name: str, path: Path, backend: str) -> None:
    prompt = list(prompts(name))[-1]  # the longest: beyond its window, if it has one
    n = len(prompt.ids)
    for batches in ((n // 2 + 1,), (1,) * (n - 1)):
        assert disagreement(path, prompt, backend, batches) <= TOLERANCES[backend], batches


@pytest.mark.parametrize("wish", SPLITS.values(), ids=SPLITS)
def test_logits_do_not_depend_on_devices(name: str, path: Path, wish: Wish) -> None:
    """The reference, which stands in for a GPU, has a part of the layers."""
    prompt = next(prompt for prompt in prompts(name) if len(prompt.ids) > 1)
    offload = Offload((Device("fake:0", "fake GPU", 1 << 30, 1 << 30),), wish)
    batches = (len(prompt.ids) // 2,)
    assert disagreement(path, prompt, "cpu", batches, offload=offload) <= TOLERANCES["cpu"]


def test_every_case_has_its_answers(name: str) -> None:
    for prompt in prompts(name):
        assert prompt.logits.shape[0] == len(prompt.positions)
        assert prompt.logits.shape[1] >= MIN_VOCAB
        assert prompt.positions[-1] == len(prompt.ids) - 1


def test_no_folder_is_left_out() -> None:
    folders = {entry.name for entry in FOLDER.iterdir() if entry.is_dir()}
    assert folders - {"__pycache__"} == set(NAMES)
