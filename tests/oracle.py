"""An independent float32 forward pass of a llama GGUF file.

It shares nothing with the project: the gguf package reads and dequantises, NumPy computes.
"""

from pathlib import Path

import gguf
import numpy as np


def _norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * weight


def _rotate(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """Adjacent pairs, (n, heads, dim)."""
    out = np.empty_like(x)
    a, b = x[..., ::2], x[..., 1::2]
    out[..., ::2] = a * cosines - b * sines
    out[..., 1::2] = a * sines + b * cosines
    return out


def llama_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits after each token, float32 (len(ids), n_vocab)."""
    reader = gguf.GGUFReader(path)

    def get(key: str, default=None):
        field = reader.fields.get(f"llama.{key}")
        return default if field is None else field.contents()

    tensors = {t.name: t for t in reader.tensors}

    def load(name: str) -> np.ndarray:
        t = tensors[name]
        shape = [int(n) for n in t.shape][::-1]
        return gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(shape)

    n, n_heads = len(ids), get("attention.head_count")
    n_kv = get("attention.head_count_kv", n_heads)
    head_dim = get("attention.key_length", get("embedding_length") // n_heads)
    epsilon = get("attention.layer_norm_rms_epsilon")
    base = get("rope.freq_base", 10000.0)
    frequencies = 1.0 / base ** (np.arange(0, head_dim, 2) / head_dim)
    angles = (np.arange(n)[:, None] * frequencies)[:, None, :]
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    causal = np.tril(np.ones((n, n), bool))
    embedding = load("token_embd.weight")
    x = embedding[ids]
    for i in range(get("block_count")):

        def weight(name: str, block: str = f"blk.{i}") -> np.ndarray:
            return load(f"{block}.{name}.weight")

        h = _norm(x, weight("attn_norm"), epsilon)
        q = _rotate((h @ weight("attn_q").T).reshape(n, n_heads, head_dim), cosines, sines)
        k = _rotate((h @ weight("attn_k").T).reshape(n, n_kv, head_dim), cosines, sines)
        v = (h @ weight("attn_v").T).reshape(n, n_kv, head_dim)
        k, v = (np.repeat(a, n_heads // n_kv, 1) for a in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.float32(np.sqrt(head_dim))
        scores = np.where(causal, scores, np.float32(-1e30))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", p, v).reshape(n, -1)
        x = x + mixed @ weight("attn_output").T
        h = _norm(x, weight("ffn_norm"), epsilon)
        gate = h @ weight("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weight("ffn_up").T)) @ weight("ffn_down").T
    x = _norm(x, load("output_norm.weight"), epsilon)
    head = load("output.weight") if "output.weight" in tensors else embedding
    return x @ head.T


def agreement(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean cosine of the rows, and the share of rows with the same largest entry."""
    products = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return float(products.mean()), float((a.argmax(-1) == b.argmax(-1)).mean())
