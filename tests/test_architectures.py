"""Every architecture against transformers: the same checkpoint, the same logits."""

from pathlib import Path

import pytest

from tests.architectures import FOLDER, NAMES, converted, disagreement, prompts

# Of the largest logit. The CPU backend keeps keys and values as f16.
TOLERANCES = {"reference": 2e-5, "cpu": 2e-3}
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


def test_every_case_has_its_answers(name: str) -> None:
    for prompt in prompts(name):
        assert prompt.logits.shape[0] == len(prompt.positions)
        assert prompt.logits.shape[1] >= MIN_VOCAB
        assert prompt.positions[-1] == len(prompt.ids) - 1


def test_no_folder_is_left_out() -> None:
    folders = {entry.name for entry in FOLDER.iterdir() if entry.is_dir()}
    assert folders - {"__pycache__"} == set(NAMES)
