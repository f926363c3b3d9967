"""The Gemma 4 assistant: a small model that drafts from its target's last hidden state and borrowed KV.

It has queries and no keys or values of its own, so it keeps no state: one step is a function of the last token, the
hidden state that came with it, and the target's cache.
"""

from dataclasses import dataclass, replace

import numpy as np

from . import gemma4
from .backend import matmul, one_blas_thread
from .checkpoint import CheckpointError, config_value
from .layers import no_tap, rms_norm

MODEL_TYPES = ("gemma4_assistant",)
SKIPPED = ()


@dataclass(frozen=True)
class Config:
    """The assistant's own text model, all of whose layers borrow KV, and the width of the target's hidden state."""

    text: gemma4.Config
    backbone_hidden_size: int

    def __getattr__(self, name):  # hidden_size, layers and the rest are the text model's
        return getattr(self.text, name)


def parse_config(raw):
    """Config from a published assistant's config.json. Raises CheckpointError as gemma4.parse_config does."""
    text = config_value(raw, "text_config", dict)
    count = config_value(text, "num_hidden_layers", int)
    if config_value(text, "num_kv_shared_layers", int, count) != count:
        raise CheckpointError("config: an assistant's num_kv_shared_layers must be all of its layers")
    if config_value(raw, "use_ordered_embeddings", bool, False):
        raise CheckpointError("config: use_ordered_embeddings True is not supported")
    config = gemma4.parse_config({**text, "num_kv_shared_layers": 0})
    layers = tuple(replace(layer, owns_kv=False) for layer in config.layers)
    return Config(replace(config, layers=layers), config_value(raw, "backbone_hidden_size", int))


def check_fits(config, target):
    """Raise CheckpointError unless this assistant can borrow from a target of that configuration."""
    pairs = [
        ("vocabulary", config.vocab_size, target.vocab_size),
        ("backbone hidden size", config.backbone_hidden_size, target.hidden_size),
        ("sliding window", config.text.sliding_window, target.sliding_window),
    ]
    lent = {layer.kind: layer for layer in target.layers if layer.owns_kv}
    for layer in config.text.layers:
        if layer.kind not in lent:
            raise CheckpointError(f"drafter does not fit its target: no {layer.kind} layer to borrow KV from")
        donor = lent[layer.kind]
        pairs.append((f"{layer.kind} KV shape", (layer.kv_heads, layer.head_dim), (donor.kv_heads, donor.head_dim)))
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise CheckpointError(f"drafter does not fit its target: {name} {ours}, the target's is {theirs}")


def tensors(config):
    """Every tensor of the assistant, as in gemma4.tensors."""
    d, B = config.text.hidden_size, config.backbone_hidden_size
    return {
        **gemma4.tensors(config.text),
        "pre_projection": ("pre_projection.weight", (d, 2 * B), "linear"),
        "post_projection": ("post_projection.weight", (B, d), "linear"),
    }


def step(params, config, embedded_B, hidden_B, lent, length, position="bonus", window_edge="inclusive"):
    """One draft step -> (logits [V], hidden [B] to feed back).

    embedded_B: the last token in the target's scaled embedding; hidden_B: the target's hidden state after its final
    norm, or what the step before returned; lent: the target's KV by layer kind, of which the first `length` positions
    count. The query's position is the same in every step of a round, and engines disagree about it: "bonus" is the
    last token's own (transformers, llama.cpp), "committed" the one before (vLLM, SGLang, mlx-vlm). So is the edge of
    the sliding window: "inclusive" shows window + 1 keys (transformers), "exclusive" those at distance < window from
    the query (llama.cpp, mlx-vlm).
    """
    text, dtype = config.text, hidden_B.dtype
    at = length if position == "bonus" else length - 1
    first = length - 1 - text.sliding_window if window_edge == "inclusive" else at + 1 - text.sliding_window
    end_T = np.array([length])
    spans = {"sliding": (np.maximum(np.array([first]), 0), end_T), "full": (np.zeros_like(end_T), end_T)}
    with one_blas_thread():
        ropes = gemma4.rope_tables(text, np.array([at]), dtype)
        x_TD = matmul(np.concatenate([embedded_B, hidden_B])[None], params.pre_projection)
        for layer, w in zip(text.layers, params.layers):
            kv, rope, span = lent[layer.kind], ropes[layer.kind], spans[layer.kind]
            x_TD = gemma4.decoder_layer(x_TD, w, layer, text.rms_norm_eps, rope, kv, span, no_tap)
        x_TD = rms_norm(x_TD, params.norm, text.rms_norm_eps)
        return matmul(x_TD, params.embed_tokens)[0], matmul(x_TD, params.post_projection)[0]
