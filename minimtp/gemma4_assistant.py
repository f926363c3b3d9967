"""The Gemma 4 assistant: a small model that drafts from its target's last hidden state and borrowed KV.

It has queries and no keys or values of its own, so it keeps no state: one step is a function of the last token, the
hidden state that came with it, and the target's cache.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import gemma4
from .backend import arithmetic, gather, matmul
from .checkpoint import CheckpointError
from .config import config_value
from .layers import concatenated, no_tap, rms_norm, seen

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
FORMATS = gemma4.FORMATS
TARGET = gemma4

# What the logits of tokens outside the chosen clusters become, by the engine that does it; "none" skips the clusters.
UNCHOSEN = {
    "transformers": lambda chosen: chosen.min() - 1,  # and mlx-vlm
    "vllm": lambda chosen: np.finfo(chosen.dtype).min,
    "sglang": lambda chosen: np.finfo(chosen.dtype).min / 2,
    "none": None,  # llama.cpp: the whole vocabulary is scored
}


@dataclass(frozen=True)
class Clusters:
    """The head of E2B and E4B: `count` centroids of equal clusters of the vocabulary; the best are scored."""

    count: int
    top_k: int


@dataclass(frozen=True)
class Config(gemma4.Config):
    """The assistant's own text model, all of whose layers borrow KV, and the width of the target's hidden state."""

    backbone_hidden_size: int
    clusters: Clusters | None


def parse_config(raw):
    """Config from a published assistant's config.json. Raises CheckpointError as gemma4.parse_config does."""
    text = config_value(raw, "text_config", dict)
    count = config_value(text, "num_hidden_layers", int)
    if (text.get("num_kv_shared_layers") or count) != count:  # 0 means all, as in transformers
        raise CheckpointError("config: an assistant's num_kv_shared_layers must be all of its layers")
    vocab_size = config_value(text, "vocab_size", int)
    family = str(raw.get("model_type")).removesuffix("_assistant")
    config = gemma4.parse_config(
        {"model_type": f"{family}_text", **text, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": vocab_size}
    )
    for name, value in (
        ("hidden_size_per_layer_input", config.per_layer_input),
        ("enable_moe_block", config.experts),
        ("an untied head", not config.tied),
    ):
        if value:
            raise CheckpointError(f"config: an assistant cannot have {name}")
    layers = tuple(replace(layer, owns_kv=False) for layer in config.layers)
    clusters = None
    if config_value(raw, "use_ordered_embeddings", bool, False):
        centroids, top_k = (
            config_value(raw, name, int, default)
            for name, default in (("num_centroids", 2048), ("centroid_intermediate_top_k", 32))
        )
        if config.vocab_size % centroids or top_k > centroids:
            raise CheckpointError(f"config: {centroids} centroids, {top_k} chosen, for {config.vocab_size} tokens")
        clusters = Clusters(centroids, top_k)
    backbone_hidden_size = config_value(raw, "backbone_hidden_size", int)
    return Config(**{**vars(config), "layers": layers}, backbone_hidden_size=backbone_hidden_size, clusters=clusters)


def check_fits(config, target):
    """Raise CheckpointError unless this assistant can borrow from a target of that configuration."""
    pairs = [
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("backbone hidden size", config.backbone_hidden_size, target.hidden_size),
        ("sliding window", config.sliding_window, target.sliding_window),
    ]
    lent = {layer.kind: layer for layer in target.layers if layer.owns_kv}
    for layer in config.layers:
        if layer.kind not in lent:
            raise CheckpointError(f"drafter does not fit its target: no {layer.kind} layer to borrow KV from")
        donor = lent[layer.kind]
        pairs.append((f"{layer.kind} KV shape", (layer.kv_heads, layer.head_dim), (donor.kv_heads, donor.head_dim)))
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise CheckpointError(f"drafter does not fit its target: {name} {ours}, the target's is {theirs}")


def owns(name):
    """Whether a checkpoint's tensor is the assistant's: all of them are."""
    return True


def tensors(config):
    """Every tensor of the assistant, as in gemma4.tensors. It has no keys or values, and no place for any."""
    d, B = config.hidden_size, config.backbone_hidden_size
    table = {place: spec for place, spec in gemma4.tensors(config).items() if spec[2] != "unused"}
    table["pre_projection"] = ("pre_projection.weight", (d, 2 * B), "linear")
    table["post_projection"] = ("post_projection.weight", (B, d), "linear")
    if config.clusters:
        table["centroids"] = ("masked_embedding.centroids.weight", (config.clusters.count, d), "linear")
        table["token_ordering"] = ("masked_embedding.token_ordering", (config.vocab_size,), "permutation")
    return table


def query(config, length, position="bonus", window_edge="inclusive"):
    """Where the query of a draft step stands, and the window of its sliding layers -> (position, positions).

    length: how many of the target's positions count. Two things that engines do differently are options. position, the
    same in every step of a round: "bonus" is the last token's own (transformers, llama.cpp), "committed" the one before
    (vLLM, SGLang, mlx-vlm). window_edge: "inclusive" shows sliding layers window + 1 keys (transformers), "exclusive"
    those at distance < window from the query (llama.cpp, mlx-vlm).
    """
    at = length if position == "bonus" else length - 1
    return at, config.sliding_window + (1 if window_edge == "inclusive" else length - at - 1)


def step(params, config, embed, lent, window, by_clusters, ids_1, hidden_1B, at_1, length_1):
    """One draft step -> (logits [1, V], or scores [1, C] of clusters; what they are of [1, D]; hidden [1, B]).

    embed: the target's embedding of ids_1, the last token; hidden_1B: the target's hidden state after its final norm,
    or what the step before returned last; lent: the target's KV by layer kind; at_1 and window: see query; length_1:
    how many positions of it count.
    """
    spans = {"sliding": seen(length_1, window, appended=0), "full": seen(length_1, appended=0)}
    with arithmetic():
        ropes = gemma4.rope_tables(config, at_1, hidden_1B.dtype)
        x_TD = matmul(concatenated([embed(ids_1), hidden_1B]), params.pre_projection)
        for layer, w in zip(config.layers, params.layers):
            kv, rope, span = lent[layer.kind], ropes[layer.kind], spans[layer.kind]
            x_TD = gemma4.decoder_layer(x_TD, w, layer, config, rope, kv, span, no_tap)
        x_TD = rms_norm(x_TD, params.norm, config.rms_norm_eps)
        head = params.centroids if by_clusters else params.lm_head
        return matmul(x_TD, head), x_TD, matmul(x_TD, params.post_projection)


def ids_of_best(params, config, scores_C):
    """The tokens of the clusters that score best."""
    best = np.argsort(-scores_C, kind="stable")[: config.clusters.top_k]
    return params.token_ordering.reshape(config.clusters.count, -1)[best].ravel()


def logits_of(params, x_1D, ids):
    """Logits of some tokens -> [[1, tokens]]. There is no soft cap."""
    with arithmetic():
        return [matmul(x_1D, gather(params.lm_head, ids, x_1D.dtype))]


def filled(config, ids, chosen, unchosen):
    """Those logits in a row of all [V]; what the others have is an option: see UNCHOSEN."""
    logits_V = np.full(config.vocab_size, UNCHOSEN[unchosen](chosen), chosen.dtype)
    logits_V[ids] = chosen
    return logits_V
