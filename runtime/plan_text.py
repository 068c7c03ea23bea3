"""A plan of layers and devices in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf_tools.describe import short_size
from runtime.split import Plan, Share


def brief(plan: Plan) -> Iterator[str]:
    """A line for each device that gets something, said before it is loaded."""
    for share in plan.shares:
        if share.n_units:
            yield (
                f"{share.device.name} ({share.device.model}): {_what(share, plan)}; "
                f"{short_size(share.used)} of {short_size(share.device.free)} free"
            )
    if plan.shares and plan.gpu_layers == 0:
        yield f"no layer on a GPU{_why_none(plan)}"


def describe(plan: Plan, *, n_ctx: int, kv_type: str) -> Iterator[str]:
    """The whole plan, line by line."""
    most = plan.n_layers + 1
    yield f"--gpu-layers {plan.gpu_layers} of {most}, context {n_ctx} tokens, KV cache {kv_type}"
    for share in plan.shares:
        device = share.device
        capability = (
            "" if device.capability is None else ", compute {}.{}".format(*device.capability)
        )
        yield (
            f"{device.name}: {device.model}{capability}, {short_size(device.free)} free of "
            f"{short_size(device.total)}, {short_size(max(share.budget, 0))} to use"
        )
        yield f"  {_what(share, plan)}"
        if share.n_units:
            left = share.budget - share.used
            room = f"{short_size(left)} left" if left >= 0 else f"{short_size(-left)} too much"
            yield (
                f"  weights {short_size(share.weights)}, KV cache {short_size(share.kv)}, scratch "
                f"{short_size(share.scratch)}: {short_size(share.used)}, {room}"
            )
        if share.one_more:
            yield f"  one more layer would need {short_size(share.one_more)} more"
        elif share.one_more == 0:
            yield "  one more layer would fit"
    if not plan.shares:
        yield "no GPU is used"
    yield (
        f"CPU: {_on_cpu(plan)}; weights {short_size(plan.host_weights)}, KV cache "
        f"{short_size(plan.host_kv)}, and the embedding"
    )


def to_json(plan: Plan, *, n_ctx: int, kv_type: str) -> dict[str, Any]:
    """The object that `run --plan --json` prints; sizes in bytes."""
    return {
        "gpu_layers": plan.gpu_layers,
        "n_layers": plan.n_layers,
        "n_ctx": n_ctx,
        "kv_type": kv_type,
        "kv_offload": plan.wish.kv_offload,
        "cpu_moe": plan.wish.cpu_moe,
        "devices": [
            {
                "name": share.device.name,
                "model": share.device.model,
                "fake": share.device.is_fake,
                "total": share.device.total,
                "free": share.device.free,
                "usable": max(share.budget, 0),
                "layers": list(share.layers),
                "head": share.head,
                "weights": share.weights,
                "kv": share.kv,
                "scratch": share.scratch,
                "left": share.budget - share.used,
                "one_more_needs": share.one_more,
            }
            for share in plan.shares
        ],
        "cpu": {"weights": plan.host_weights, "kv": plan.host_kv},
    }


def _what(share: Share, plan: Plan) -> str:
    parts = []
    if share.layers:
        first, last = share.layers[0], share.layers[-1]
        span = f"layer {first}" if first == last else f"layers {first}-{last}"
        parts.append(f"{span} of {plan.n_layers}")
        elsewhere = [] if plan.wish.kv_offload else ["KV cache"]
        if first < plan.wish.cpu_moe:
            elsewhere.insert(0, f"experts up to layer {min(last, plan.wish.cpu_moe - 1)}")
        if elsewhere:
            parts[-1] += f" ({' and '.join(elsewhere)} on the CPU)"
    if share.head:
        parts.append("the output head")
    return " and ".join(parts) or "nothing"


def _why_none(plan: Plan) -> str:
    if plan.wish.at_most == 0:
        return ": `gguf tune` found the CPU alone to be faster"
    lacking = min(share.one_more or 0 for share in plan.shares)
    return f": the output head comes first, and lacks {short_size(lacking)}" if lacking else ""


def _on_cpu(plan: Plan) -> str:
    n = plan.n_layers - sum(len(share.layers) for share in plan.shares)
    head = any(share.head for share in plan.shares)
    layers = f"layers 0-{n - 1} of {plan.n_layers}" if n > 1 else "layer 0" if n else "no layer"
    return layers if head else f"{layers} and the output head"
