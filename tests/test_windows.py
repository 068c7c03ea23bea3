"""Which layers have a window, as a GGUF file says it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gguf_tools.errors import FormatError
from gguf_tools.reader import GGUFFile
from runtime.config import Metadata, ModelConfig, read_config
from runtime.decoders.windows import PATTERN, layer_windows
from tests.tiny import llama_file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = llama_file(tmp_path_factory.mktemp("windows") / "m.gguf", n_layers=5)
    with GGUFFile(path) as file:
        return replace(read_config(file), sliding_window=16)


def saying(config: ModelConfig, pattern: Any) -> ModelConfig:
    own = config.own
    values = {**own.values, own.prefix + PATTERN: pattern}
    return replace(config, own=Metadata(own.path, values, own.prefix))


def test_the_period_of_the_architecture(config: ModelConfig) -> None:
    assert layer_windows(config, period=2) == (16, 0, 16, 0, 16)
    assert layer_windows(config, period=1) == (0,) * 5
    assert layer_windows(config, period=6, window=8) == (8,) * 5


@pytest.mark.parametrize("kind", [np.bool_, np.uint8, np.int32])
def test_a_file_that_names_the_layers(config: ModelConfig, kind: type) -> None:
    pattern = np.array([0, 1, 1, 0, 1], kind)
    assert layer_windows(saying(config, pattern), period=2) == (0, 16, 16, 0, 16)


def test_a_file_that_gives_a_period(config: ModelConfig) -> None:
    assert layer_windows(saying(config, 3), period=2) == (16, 16, 0, 16, 16)
    assert layer_windows(saying(config, 0), period=2) == (16,) * 5


@pytest.mark.parametrize(
    "pattern",
    [np.ones(4, bool), np.ones(6, bool), np.ones(5, np.float32), -1, 1 << 40, True, "every other"],
    ids=str,
)
def test_patterns_that_say_nothing(config: ModelConfig, pattern: Any) -> None:
    with pytest.raises(FormatError, match="sliding_window_pattern"):
        layer_windows(saying(config, pattern), period=2)
