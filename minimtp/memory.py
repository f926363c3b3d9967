"""Byte arithmetic from a configuration alone: parameters by component, and what the cache takes."""

import math

COMPONENTS = {  # the last part of a tensor's place -> what it counts as
    "embed_tokens": "embedding",
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
    **dict.fromkeys(("pre_projection", "post_projection"), "projections"),
}


def parameters(table):
    """Parameters by component and in total, from a family's tensors(config)."""
    counts = {}
    for place, (_, shape, _) in table.items():
        component = COMPONENTS.get(place.split(".")[-1], "norms")
        counts[component] = counts.get(component, 0) + math.prod(shape)
    return {**counts, "total": sum(counts.values())}


def kv_bytes(config, context, itemsize):
    """Bytes of keys and values by layer kind for a context of that many tokens, as the cache holds them.

    A sliding layer holds at most window + 1 committed tokens; what a pass has not yet committed comes on top.
    """
    total = {layer.kind: 0 for layer in config.layers if layer.owns_kv}
    for layer in config.layers:
        if layer.owns_kv:
            held = context if layer.kind == "full" else min(context, config.sliding_window + 1)
            total[layer.kind] += 2 * layer.kv_heads * layer.head_dim * itemsize * held
    return total
