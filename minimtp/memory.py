"""Arithmetic from a configuration alone: parameters by component, stored bytes, what the cache takes."""

import math
from dataclasses import asdict, replace

COMPONENTS = {  # the last part of a tensor's place -> what it counts as
    **dict.fromkeys(("embed_tokens", "lm_head", "centroids"), "embedding"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
    **dict.fromkeys(("experts_gate_up_proj", "experts_down_proj", "router_proj"), "experts"),
    **dict.fromkeys(("embed_tokens_per_layer", "per_layer_model_projection"), "per-layer input"),
    **dict.fromkeys(("per_layer_input_gate", "per_layer_projection"), "per-layer input"),
    **dict.fromkeys(("pre_projection", "post_projection"), "projections"),
}


def parameters(table):
    """Parameters by component and in total, from a family's tensors(config), as base checkpoints store them."""
    counts = {}
    for place, (_, shape, kind) in table.items():
        if kind != "permutation":
            component = COMPONENTS.get(place.split(".")[-1], "norms")
            counts[component] = counts.get(component, 0) + math.prod(shape)
    return {**counts, "total": sum(counts.values())}


# Storage formats as Google publishes them: kind or place of a tensor -> (bytes of a block, its weights).
FORMATS = {
    "bf16": {"linear": (2, 1), "embedding": (2, 1), "vector": (2, 1)},
    "q4_0": {  # GGUF: Q4_0 linears, Q6_K embeddings, what is small in F32, and one table of 256 rotary factors
        "linear": (18, 32),
        "embedding": (210, 256),
        "vector": (4, 1),
        "router_proj": (4, 1),
        "per_layer_model_projection": (2, 1),
        "extra": 1024,
    },
    "w4a16-ct": {  # compressed-tensors, bf16 scales; the published files also repeat the embedding as an untied head
        "linear": (18, 32),
        "embedding": (2, 1),
        "vector": (2, 1),
        "router_proj": (2, 1),
    },
}


def stored_bytes(table, format):
    """Bytes of a family's tensors(config) in one of FORMATS, without those that no layer uses."""
    costs, total = FORMATS[format], FORMATS[format].get("extra", 0)
    for place, (_, shape, kind) in table.items():
        if kind == "permutation":
            total += 8 * math.prod(shape)
        elif kind != "unused":
            kind = "linear" if kind == "experts" else kind
            size, weights = costs.get(place.split(".")[-1], costs[kind])
            total += math.prod(shape) * size // weights
    return total


def describe(config, table, context, itemsize=4):
    """Layer plan (layers alike in one row), parameters, bytes by storage format, bytes of KV, as a JSON-able dict."""
    plans = {}
    for index, layer in enumerate(config.layers):
        plans.setdefault(replace(layer, kv=0), []).append(index)
    context = context or config.max_position_embeddings
    held, per_token = kv_bytes(config, context, itemsize), kv_bytes(config, 1, itemsize)
    return {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": config.sliding_window,
        "per_layer_input": config.per_layer_input,
        "experts": asdict(config.experts) if config.experts else None,
        "layers": [{**asdict(layer), "at": at} for layer, at in plans.items()],
        "parameters": parameters(table),
        "bytes": {format: stored_bytes(table, format) for format in FORMATS},
        "kv": {"context": context, "itemsize": itemsize, "bytes_per_token": per_token, "bytes": held},
    }


def kv_bytes(config, context, itemsize):
    """Bytes of the keys and values needed by layer kind for a context of that many tokens.

    A sliding layer needs at most window + 1 committed tokens. What a pass has not yet committed comes on top, and the
    buffers' free slots: 16 in a sliding layer, up to as many again in a full one whose cache was given no capacity.
    """
    total = {layer.kind: 0 for layer in config.layers if layer.owns_kv}
    for layer in config.layers:
        if layer.owns_kv:
            held = context if layer.kind == "full" else min(context, config.sliding_window + 1)
            total[layer.kind] += 2 * layer.kv_heads * layer.head_dim * itemsize * held
    return total


def report_text(report):
    """What `describe` found (with "model", "family" and perhaps "stored_bytes"), for people to read."""
    experts, kv = report["experts"], report["kv"]
    lines = [
        f"{report['model']} ({report['family']})",
        f"hidden size {report['hidden_size']}, vocabulary {report['vocab_size']}, "
        f"context {report['max_position_embeddings']}, sliding window {report['sliding_window']}",
    ]
    if report["per_layer_input"]:
        lines.append(f"per-layer input of width {report['per_layer_input']}")
    if experts:
        lines.append(f"{experts['count']} experts of width {experts['intermediate_size']}, {experts['top_k']} a token")
    lines += ["", "layers"]
    for plan in report["layers"]:
        own = (
            f"{plan['kv_heads']} kv heads" + (" (k = v)" if plan["k_eq_v"] else "")
            if plan["owns_kv"]
            else "borrowed kv"
        )
        sizes = f"{plan['heads']} heads, {own}, of {plan['head_dim']}; feed-forward {plan['intermediate_size']}"
        lines.append(f"  {len(plan['at']):3} {plan['kind']:8} {sizes}; at {_ranges(plan['at'])}")
    lines += _table("parameters", report["parameters"])
    lines += _table("bytes in a published format", report["bytes"])
    if "stored_bytes" in report:
        lines += _table("bytes stored here, by type", report["stored_bytes"])
    if kv["bytes"]:
        lines += _table(f"bytes of KV a token, {kv['itemsize']} bytes a number", kv["bytes_per_token"])
        lines += _table(f"bytes of KV at {kv['context']} tokens", kv["bytes"])
    return "\n".join(lines)


def _table(title, rows):
    return ["", title, *(f"  {name:16} {count:>18,}" for name, count in rows.items())]


def _ranges(numbers):
    """[0, 1, 2, 5] -> '0-2 5'"""
    runs = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
