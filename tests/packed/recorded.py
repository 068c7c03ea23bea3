"""What tests/data/packed holds, as checkpoints: a tiny llama, two of its matrices quantised."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import encode, llama_config, llama_tensors, make_llama, safetensors

DATA = Path(__file__).parent.parent / "data" / "packed"
NAMES = sorted(path.stem for path in DATA.glob("*.safetensors"))
EXPECTED = "expected."
QUANTISED = ("model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj")

Stored = dict[str, tuple[str, list[int], bytes]]  # dtype, shape, data


@dataclass
class Recorded:
    """Parts of two weights as a library wrote them, and the weights that it reads."""

    config: dict[str, Any]  # quantization_config
    parts: Stored
    weights: dict[str, np.ndarray]

    def integers(self, name: str, change: Any) -> None:
        """Change the whole numbers of a part."""
        dtype, shape, data = self.parts[name]
        values = np.frombuffer(data, {"I32": "<i4", "U8": "u1", "I64": "<i8"}[dtype]).copy()
        change(values)
        self.parts[name] = dtype, shape, values.tobytes()


def read(name: str) -> Recorded:
    data = (DATA / f"{name}.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header.pop("__metadata__")["config"])
    parts: Stored = {}
    weights = {}
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        content = data[8 + length + begin : 8 + length + end]
        if key.startswith(EXPECTED):
            weights[key.removeprefix(EXPECTED)] = np.frombuffer(content, "<f4").reshape(
                entry["shape"]
            )
        else:
            parts[key] = entry["dtype"], entry["shape"], content
    return Recorded(config, parts, weights)


def make(folder: Path, recorded: Recorded, **changes: Any) -> dict[str, np.ndarray]:
    """A checkpoint of a layer; the weights that it means, by the name of an unquantised one."""
    changes = {"num_hidden_layers": 1, "quantization_config": recorded.config, **changes}
    floats = llama_tensors(llama_config(**changes))
    for name in recorded.weights:
        del floats[name]
    make_llama(folder, tensors={}, **changes)
    stored: Stored = {k: ("F32", list(v.shape), encode(v, "F32")) for k, v in floats.items()}
    stored |= recorded.parts
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in stored.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    (folder / "model.safetensors").write_bytes(safetensors(header, data))
    return {**floats, **recorded.weights}
