"""Peak memory and time of `convert` on a large checkpoint that is made for the purpose.

    python benchmarks/convert_memory.py [--gigabytes 8] [--threads N] [--folder DIR]
        [--imatrix] [TYPE...]

Makes a sharded BF16 checkpoint of random weights with the embedding and the layers of an 8 B model
(152,000 rows of 4096), converts it to each type in a process of its own, and removes all files.
With --imatrix the same again with an importance matrix. Memory and disk are as convert_race.py
measures them. The folder needs room for the checkpoint and the largest file.
"""

import argparse
import json
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from convert_race import measure

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models" / "stories260k" / "tokenizer.model"
SHARD = 1 << 30  # bytes
DIM, FFN, HEADS, KV_HEADS, VOCAB = 4096, 12_288, 32, 8, 152_000
COLUMNS = {"ffn_down": FFN}  # of the matrices of a layer; DIM of the others
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


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
    """Write the checkpoint; how many layers it has."""
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
    return n_layers


def make_importance(path: Path, n_layers: int) -> None:
    """An importance matrix of all matrices, in llama-imatrix's older form."""
    rng = np.random.default_rng(1)
    names = [f"blk.{layer}.{name}.weight" for layer in range(n_layers) for name in MATRICES]
    with open(path, "wb") as file:
        file.write(struct.pack("<i", len(names)))
        for name in names:
            values = rng.random(COLUMNS.get(name.split(".")[2], DIM), np.float32)
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<ii", 1, values.size) + values.tobytes())


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
    parser.add_argument("--gigabytes", type=float, default=8.0, help="of the checkpoint")
    parser.add_argument("--threads", type=int, help="by default the physical cores")
    parser.add_argument("--imatrix", action="store_true", help="also with an importance matrix")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one by default")
    parser.add_argument("types", nargs="*", default=["Q4_K_M", "Q8_0", "F16"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model, made = Path(folder) / "model", Path(folder) / "made"
        model.mkdir()
        made.mkdir()
        n_layers = make_checkpoint(model, int(options.gigabytes * 1e9))
        matrix = Path(folder) / "imatrix.dat"
        make_importance(matrix, n_layers)
        size = sum(path.stat().st_size for path in model.iterdir())
        print(f"checkpoint of {size / 1e9:.2f} GB BF16 in shards, {n_layers} layers", flush=True)
        print("| | time | of the checkpoint | memory | private | disk |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        for file_type in options.types:
            for with_matrix in (False, True) if options.imatrix else (False,):
                output = made / "model.gguf"
                command = [sys.executable, "-m", "gguf_tools", "convert", model, "-o", output]
                command += ["--type", file_type]
                command += ["--threads", options.threads] if options.threads else []
                command += ["--imatrix", matrix] if with_matrix else []
                cost = measure(command, made)
                name = file_type + (", importance matrix" if with_matrix else "")
                print(
                    f"| {name} | {cost.seconds:.1f} s | {size / 1e6 / cost.seconds:,.0f} MB/s "
                    f"| {cost.memory / 1e6:,.0f} MB | {cost.private / 1e6:,.0f} MB "
                    f"| {cost.disk / 1e6:,.0f} MB |",
                    flush=True,
                )
                output.unlink()


if __name__ == "__main__":
    main()
