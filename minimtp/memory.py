"""Arithmetic from a configuration alone: parameters by component, stored bytes, what the cache takes."""

import math
from dataclasses import asdict

COMPONENTS = {  # the last part of a tensor's place -> what it counts as
    **dict.fromkeys(("embed_tokens", "lm_head", "centroids"), "embedding"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
    **dict.fromkeys(("experts_gate_up_proj", "experts_down_proj", "router_proj", "router"), "experts"),
    **dict.fromkeys(("shared_expert_gate_proj", "shared_expert_up_proj", "shared_expert_down_proj"), "shared expert"),
    "shared_expert_gate": "shared expert",
    **dict.fromkeys(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"), "deltanet"),
    **dict.fromkeys(("conv1d", "A_log", "dt_bias"), "deltanet"),
    **dict.fromkeys(("embed_tokens_per_layer", "per_layer_model_projection"), "per-layer input"),
    **dict.fromkeys(("per_layer_input_gate", "per_layer_projection"), "per-layer input"),
    **dict.fromkeys(("pre_projection", "post_projection", "fc"), "projections"),
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
            kind = {"experts": "linear", "zero_centred": "vector"}.get(kind, kind)
            size, weights = costs.get(place.split(".")[-1], costs[kind])
            total += math.prod(shape) * size // weights
    return total


def describe(config, table, context, itemsize=4, formats=tuple(FORMATS), mtp_table=None):
    """Layer plan (layers alike in one row), parameters, bytes by storage format, bytes of cache, as a JSON-able dict.

    formats: those of FORMATS to count bytes in; mtp_table: the tensors of the target's own MTP layer, if it has one.
    """
    plans = {}
    for index, layer in enumerate(config.layers):
        sizes = {name: value for name, value in asdict(layer).items() if name != "kv"}
        plans.setdefault(tuple(sizes.items()), []).append(index)
    context = context or config.max_position_embeddings
    held = kv_bytes(config, context, itemsize)
    per_token = {kind: size for kind, size in kv_bytes(config, 1, itemsize).items() if kind != "linear"}
    names = ("sliding_window", "per_layer_input", "intermediate_size")
    optional = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        **optional,
        "experts": asdict(config.experts) if config.experts else None,
        "layers": [{**dict(sizes), "at": at} for sizes, at in plans.items()],
        "parameters": parameters(table) | ({"mtp": parameters(mtp_table)["total"]} if mtp_table else {}),
        "bytes": {format: stored_bytes(table, format) for format in formats},
        "kv": {"context": context, "itemsize": itemsize, "bytes_per_token": per_token, "bytes": held},
    }


def kv_bytes(config, context, itemsize):
    """Bytes of what the layers remember, by their kind, and an MTP layer, for a context of that many tokens.

    A sliding layer needs at most window + 1 committed tokens; a linear one a state, of at least 4 bytes a number, and
    the window of its convolution, whatever the context. What is not yet committed comes on top, and the buffers' free
    slots: 16 in a sliding layer, up to as many again in a full one whose cache was given no capacity.
    """
    total = {}
    for layer in config.layers:
        if getattr(layer, "owns_kv", True):
            total[layer.kind] = total.get(layer.kind, 0) + _layer_bytes(layer, config, context, itemsize)
    if getattr(config, "mtp_layers", 0):
        total["mtp"] = _layer_bytes(config.attention, config, context, itemsize)
    return total


def _layer_bytes(layer, config, context, itemsize):
    if layer.kind == "linear":
        state = layer.value_heads * layer.key_dim * layer.value_dim * max(4, itemsize)
        return state + (layer.kernel - 1) * layer.channels * itemsize
    held = min(context, config.sliding_window + 1) if layer.kind == "sliding" else context
    return 2 * layer.kv_heads * layer.head_dim * itemsize * held


def report_text(report):
    """What `describe` found (with "model", "family" and perhaps "stored_bytes", "notes"), for people to read."""
    experts, kv = report["experts"], report["kv"]
    sizes = [f"hidden size {report['hidden_size']}", f"vocabulary {report['vocab_size']}"]
    sizes.append(f"context {report['max_position_embeddings']}")
    if "sliding_window" in report:
        sizes.append(f"sliding window {report['sliding_window']}")
    if report.get("intermediate_size"):
        sizes.append(f"feed-forward {report['intermediate_size']}")
    lines = [f"{report['model']} ({report['family']})", ", ".join(sizes)]
    if report.get("per_layer_input"):
        lines.append(f"per-layer input of width {report['per_layer_input']}")
    if experts:
        shared = f", and one of width {experts['shared_size']} for all" if "shared_size" in experts else ""
        width = f"{experts['count']} experts of width {experts['intermediate_size']}"
        lines.append(f"{width}, {experts['top_k']} a token{shared}")
    lines += ["", "layers"]
    for plan in report["layers"]:
        lines.append(f"  {len(plan['at']):3} {plan['kind']:8} {_layer_text(plan)}; at {_ranges(plan['at'])}")
    counts = {"and mtp, besides" if name == "mtp" else name: count for name, count in report["parameters"].items()}
    lines += _table("parameters", counts)
    lines += _table("bytes in a published format", report["bytes"])
    if "stored_bytes" in report:
        lines += _table("bytes stored here, by type", report["stored_bytes"])
    if kv["bytes"]:
        lines += _table(f"bytes of cache a token, {kv['itemsize']} bytes a number", kv["bytes_per_token"])
        lines += _table(f"bytes of cache at {kv['context']} tokens", kv["bytes"])
    if report.get("notes"):
        lines += ["", *report["notes"]]
    return "\n".join(lines)


def _layer_text(plan):
    if plan["kind"] == "linear":
        heads = f"{plan['key_heads']} key heads of {plan['key_dim']}, {plan['value_heads']} value heads"
        return f"{heads} of {plan['value_dim']}; convolution of {plan['kernel']}"
    own = f"{plan['kv_heads']} kv heads" + (" (k = v)" if plan.get("k_eq_v") else "")
    text = f"{plan['heads']} heads, {own if plan.get('owns_kv', True) else 'borrowed kv'}, of {plan['head_dim']}"
    width = plan.get("intermediate_size")
    return f"{text}; feed-forward {width}" if width else text


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
