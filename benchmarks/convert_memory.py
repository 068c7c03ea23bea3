"""Peak memory and time of `convert` on a large checkpoint that is made for the purpose.

    python benchmarks/convert_memory.py [--gigabytes 4] [--type Q4_K_M] [--threads N] [--folder DIR]

Makes a sharded BF16 checkpoint of random weights with an embedding of 128,000 rows, converts it in
a process of its own, prints what the operating system says about that process (ru_maxrss), and
removes both. The folder needs room for the checkpoint and the file.
"""

import argparse
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models" / "stories260k" / "tokenizer.model"
SHARD = 1 << 30  # bytes
DIM, FFN, HEADS, KV_HEADS, VOCAB = 2560, 6912, 20, 5, 128_000
UNIT = 1024 if sys.platform.startswith("linux") else 1  # of ru_maxrss


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    kv = DIM // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (DIM, DIM),
        "self_attn.k_proj": (kv, DIM),
        "self_attn.v_proj": (kv, DIM),
        "self_attn.o_proj": (DIM, DIM),
        "mlp.gate_proj": (FFN, DIM),
        "mlp.up_proj": (FFN, DIM),
        "mlp.down_proj": (DIM, FFN),
        "input_layernorm": (DIM,),
        "post_attention_layernorm": (DIM,),
    }
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def make_checkpoint(folder: Path, n_bytes: int) -> int:
    """Write the checkpoint; its size in bytes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
    }
    n_layers = 0
    while 2 * sum(int(np.prod(shape)) for shape in shapes.values()) < n_bytes:
        shapes.update(layer_shapes(n_layers))
        n_layers += 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": DIM,
        "intermediate_size": FFN,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(TOKENIZER, folder / TOKENIZER.name)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * int(np.prod(shape))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, {name: shapes[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, 1 << 22).astype(np.float32)
    block = (weights.view(np.uint32) >> 16).astype("<u2").tobytes()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while position > 0:
            file.write(block[:position])
            position -= len(block)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the checkpoint")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = Path(folder) / "model"
        model.mkdir()
        size = make_checkpoint(model, int(options.gigabytes * 1e9))
        output = Path(folder) / "model.gguf"
        command = [sys.executable, "-m", "gguf_tools", "convert", str(model)]
        command += ["--type", options.type, "-o", str(output)]
        command += ["--threads", str(options.threads)] if options.threads else []
        start = time.monotonic()
        subprocess.run(command, check=True, cwd=ROOT)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * UNIT
        print()
        print(f"checkpoint   {size / 1e9:.2f} GB BF16 -> {output.stat().st_size / 1e9:.2f} GB")
        print(f"time         {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s of the checkpoint)")
        print(f"peak memory  {peak / 1e6:.0f} MB (ru_maxrss of the process)")


if __name__ == "__main__":
    main()
