"""An independent float32 forward pass of GGUF files: llama, qwen2, gemma3.

It shares nothing with the project: the gguf package reads and dequantises, NumPy computes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BAND = 1 << 14  # rows of the head dequantised together


class Reader(gguf.GGUFReader):
    """Passes over arrays, vocabularies among them: element by element they take ten seconds."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        element, n = struct.unpack("<IQ", self.data[orig_offs : orig_offs + 12].tobytes())
        end = orig_offs + 12
        if element == gguf.GGUFValueType.STRING:
            for _ in range(n):
                end += 8 + int.from_bytes(self.data[end : end + 8].tobytes(), "little")
        else:
            end += n * np.dtype(self.gguf_scalar_to_np[gguf.GGUFValueType(element)]).itemsize
        return end - orig_offs, [], [], [gguf.GGUFValueType.ARRAY]


@dataclass(frozen=True)
class File:
    """Metadata of the architecture, and tensors as float32."""

    reader: Reader
    tensors: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "File":
        reader = Reader(path)
        return cls(reader, {tensor.name: tensor for tensor in reader.tensors})

    @property
    def architecture(self) -> str:
        return str(self.reader.fields["general.architecture"].contents())

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(f"{self.architecture}.{key}")
        return default if field is None else field.contents()

    def rows(self, name: str, chosen: Any = slice(None)) -> np.ndarray:
        """Rows of a matrix, or a vector."""
        tensor = self.tensors[name]
        data = np.atleast_2d(tensor.data)[chosen]
        values = gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32)
        return values if len(tensor.shape) > 1 else values.reshape(-1)

    def vector(self, name: str) -> np.ndarray | float:
        return self.rows(name) if name in self.tensors else 0.0


def logits(path: Path, ids: list[int], *, last: int | None = None) -> np.ndarray:
    """Logits after each token, or each of the `last` ones, float32 (n, n_vocab)."""
    file = File.open(path)
    gemma = file.architecture == "gemma3"
    dim, epsilon = file.get("embedding_length"), file.get("attention.layer_norm_rms_epsilon")
    x = file.rows("token_embd.weight", ids)
    if gemma:
        x = x * np.float32(np.sqrt(dim))
    for i in range(file.get("block_count")):
        block = f"blk.{i}."
        h = _norm(x, file.rows(f"{block}attn_norm.weight"), epsilon)
        h = _attention(file, block, h, local=gemma and i % 6 != 5)
        if gemma:
            h = _norm(h, file.rows(f"{block}post_attention_norm.weight"), epsilon)
        x = x + h
        h = _norm(x, file.rows(f"{block}ffn_norm.weight"), epsilon)
        gate = h @ file.rows(f"{block}ffn_gate.weight").T
        up = h @ file.rows(f"{block}ffn_up.weight").T
        activated = _gelu(gate) if gemma else gate / (1 + np.exp(-gate))
        h = (activated * up) @ file.rows(f"{block}ffn_down.weight").T
        if gemma:
            h = _norm(h, file.rows(f"{block}post_ffw_norm.weight"), epsilon)
        x = x + h
    x = _norm(x[-(last or len(ids)) :], file.rows("output_norm.weight"), epsilon)
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    n_vocab = int(file.tensors[head].shape[1])
    bands = [slice(first, first + BAND) for first in range(0, n_vocab, BAND)]
    return np.concatenate([x @ file.rows(head, band).T for band in bands], axis=1)


def agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean cosine of the rows, and the share of rows with the same largest entry."""
    products = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(products.mean()), float((a.argmax(-1) == b.argmax(-1)).mean())


def _attention(file: File, block: str, h: np.ndarray, *, local: bool) -> np.ndarray:
    """Causal attention; `local` layers (gemma3) have a window and another rotary base."""
    n, n_heads = len(h), file.get("attention.head_count")
    n_kv = file.get("attention.head_count_kv", n_heads)
    head_dim = file.get("attention.key_length", file.get("embedding_length") // n_heads)
    q, k, v = (
        (h @ file.rows(f"{block}attn_{x}.weight").T + file.vector(f"{block}attn_{x}.bias")).reshape(
            n, heads, head_dim
        )
        for x, heads in (("q", n_heads), ("k", n_kv), ("v", n_kv))
    )
    if f"{block}attn_q_norm.weight" in file.tensors:
        epsilon = file.get("attention.layer_norm_rms_epsilon")
        q = _norm(q, file.rows(f"{block}attn_q_norm.weight"), epsilon)
        k = _norm(k, file.rows(f"{block}attn_k_norm.weight"), epsilon)
    base = 10000.0 if local else file.get("rope.freq_base", 10000.0)
    adjacent = file.architecture == "llama"
    q, k = (_rotate(x, base, adjacent=adjacent) for x in (q, k))
    k, v = (np.repeat(a, n_heads // n_kv, 1).swapaxes(0, 1) for a in (k, v))
    scores = q.swapaxes(0, 1) @ k.swapaxes(1, 2) / np.float32(np.sqrt(head_dim))  # (heads, i, j)
    here, there = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = there <= here
    if local:
        seen &= here - there < file.get("attention.sliding_window")
    scores = np.where(seen, scores, np.float32(-1e30))
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mixed = (p @ v).swapaxes(0, 1).reshape(n, -1)
    projected: np.ndarray = mixed @ file.rows(f"{block}attn_output.weight").T
    return projected


def _norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * weight


def _gelu(x: np.ndarray) -> np.ndarray:
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (1 + np.tanh(inner))


def _rotate(x: np.ndarray, base: float, *, adjacent: bool) -> np.ndarray:
    """Pairs of neighbours or of halves, (n, heads, dim)."""
    n, _, dim = x.shape
    angles = np.arange(n)[:, None] / base ** (np.arange(0, dim, 2) / dim)
    cosines, sines = (f(angles).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))
    out = np.empty_like(x)
    half = dim // 2
    first, second = (
        (slice(0, None, 2), slice(1, None, 2)) if adjacent else (slice(half), slice(half, None))
    )
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cosines - b * sines
    out[..., second] = a * sines + b * cosines
    return out
