"""Arithmetic from a configuration alone: parameters by component, stored bytes, what the cache takes."""

import math
import textwrap
from collections import Counter
from dataclasses import asdict

COMPONENTS = {  # the last part of a tensor's place -> what it counts as
    **dict.fromkeys(("embed_tokens", "lm_head", "centroids", "token_ordering"), "embedding"),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
    **dict.fromkeys(("experts_gate_up_proj", "experts_gate_proj", "experts_up_proj", "experts_down_proj"), "experts"),
    **dict.fromkeys(("router_proj", "router"), "experts"),
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
    counts = Counter()
    for place, (_, shape, kind) in table.items():
        if kind != "permutation":
            counts[component_of(place)] += math.prod(shape)
    return {**counts, "total": sum(counts.values())}


# How a weight is stored -> bytes of a block, its weights, bytes that every row has besides
TYPES = {
    "F32": (4, 1, 0),
    "F16": (2, 1, 0),
    "BF16": (2, 1, 0),
    "Q8_0": (34, 32, 0),
    "Q6_K": (210, 256, 0),
    "Q4_0": (18, 32, 0),
    "INT4": (18, 32, 0),  # compressed-tensors, in groups of 32 with bf16 scales
    "INT8 rows": (1, 1, 4),  # one float32 scale a row
    "INT4 rows": (1, 2, 4),
}
SMALL = ("router", "router_proj", "shared_expert_gate", "in_proj_a", "in_proj_b", "centroids")  # matrices


def _format(linear, embedding, small, **others):
    return {"linear": linear, "experts": linear, "embedding": embedding, "small": small, **others}


FORMATS = {  # kind or place of a tensor -> its type
    "bf16": _format("BF16", "BF16", "BF16"),
    "q4_0": _format("Q4_0", "Q6_K", "F32", per_layer_model_projection="F16"),  # GGUF as Google publishes it
    "q4_0-all": _format("Q4_0", "Q4_0", "F32", per_layer_model_projection="F16"),
    "q8_0": _format("Q8_0", "Q8_0", "F32", in_proj_a="Q8_0", in_proj_b="Q8_0"),
    "w4a16-ct": _format("INT4", "BF16", "BF16"),  # the copy of the embedding that its files have as a head is not read
    "w4a16-ct-stored": _format("INT4", "BF16", "BF16", repeats_head=True),
    "int4-int8-embed": _format("INT4", "INT8 rows", "BF16"),
    "int4-rows": _format("INT4 rows", "BF16", "BF16"),  # these two cannot hold QAT weights in groups of 32
    "int4-rows-int8-embed": _format("INT4 rows", "INT8 rows", "BF16"),
}
FACTORS = 1024  # bytes of the rotary factors in a GGUF file of Gemma 4


def stored_parts(table, format):
    """{(component, type): bytes} of a family's tensors(config) in one of FORMATS, without those that no layer uses."""
    types, parts = FORMATS[format], Counter()
    if types.get("repeats_head"):
        table = {**table, "lm_head": table["embed_tokens"]}
    for place, (_, shape, kind) in table.items():
        name = place.split(".")[-1]
        if kind == "permutation":
            parts[component_of(place), "I64"] += 8 * shape[0]
        elif kind != "unused":
            type = types.get(name) or types[kind if kind in types and name not in SMALL else "small"]
            size, weights, row = TYPES[type]
            parts[component_of(place), type] += math.prod(shape) * size // weights + math.prod(shape[:-1]) * row
    if "F32" in types.values() and "layers.0.layer_scalar" in table:
        parts["norms", "F32"] += FACTORS
    return parts


def stored_bytes(table, format):
    """All of stored_parts."""
    return sum(stored_parts(table, format).values())


def component_of(place):
    """What a tensor counts as, from its place in the parameters."""
    return COMPONENTS.get(place.split(".")[-1], "norms")


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
    total = Counter()
    for layer in config.layers:
        if getattr(layer, "owns_kv", True):
            total[layer.kind] += _layer_bytes(layer, config, context, itemsize)
    if getattr(config, "mtp_layers", 0):
        total["mtp"] = _layer_bytes(config.attention, config, context, itemsize)
    return total


def _layer_bytes(layer, config, context, itemsize):
    if layer.kind == "linear":
        state = layer.value_heads * layer.key_dim * layer.value_dim * max(4, itemsize)
        return state + (layer.kernel - 1) * layer.channels * itemsize
    held = min(context, config.sliding_window + 1) if layer.kind == "sliding" else context
    return 2 * layer.kv_heads * layer.head_dim * itemsize * held


WIDTH = 80  # of a report, in characters


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
        line = f"  {len(plan['at']):3} {plan['kind']:8} {_layer_text(plan)}; at {_ranges(plan['at'])}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 15, break_on_hyphens=False)
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
