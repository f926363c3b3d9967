"""Qwen 3.5 and 3.6's MTP layer: one more full-attention layer, in the target's own checkpoint, that drafts for it.

It reads every token together with the target's hidden state before it, keeps keys and values of its own, and shares
the target's embedding and head. Deeper drafts go through the same layer again, with its own output for hidden state.
"""

from dataclasses import replace

from . import qwen35
from .backend import arithmetic, matmul
from .checkpoint import CheckpointError
from .layers import concatenated, no_tap, rms_norm, seen

MODEL_TYPES = qwen35.MODEL_TYPES
TARGET = qwen35


def parse_config(raw):
    """The target's Config, with the MTP layer for its only layer. Raises CheckpointError for more than one."""
    config = qwen35.parse_config(raw)
    if config.mtp_layers > 1:
        raise CheckpointError(f"config: mtp_num_hidden_layers {config.mtp_layers} is not supported (1 is)")
    text = raw.get("text_config", raw)
    if text.get("mtp_use_dedicated_embeddings"):
        raise CheckpointError("config: mtp_use_dedicated_embeddings is not supported")
    return layer_config(config)


def layer_config(config):
    """A target's configuration -> the same with the MTP layer for its only layer."""
    return replace(config, layers=(config.attention,))


def check_fits(config, target):
    """Raise CheckpointError unless this layer can draft for a target of that configuration."""
    ours, theirs = (replace(c, mtp_layers=0, placeholders={}) for c in (config, layer_config(target)))
    if ours != theirs:
        raise CheckpointError("drafter does not fit its target: the MTP layer of another configuration")


def owns(name):
    """Whether a checkpoint's tensor is the MTP layer's."""
    return name.startswith("mtp.")


def tensors(config):
    """Every tensor of the layer, as in qwen35.tensors; a checkpoint stores all of them or none."""
    D = config.hidden_size
    table = {"fc": ("mtp.fc.weight", (D, 2 * D), "linear")}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        table[name] = f"mtp.{name}.weight", (D,), "zero_centred"
    return table | qwen35.layer_tensors(config.layers[0], config, "layers.0", "mtp.layers.0")


def read(params, config, embed, kv, ids_N, hidden_ND, positions_N):
    """Make the next N entries of kv -> [the layer's output after its norm, [N, D]].

    embed: the target's embedding of ids_N; hidden_ND: the target's hidden state before each of them, or in deeper
    drafts what this returned. The rotary position of an entry is its place in kv: the target's position of that hidden
    state (vLLM; llama.cpp counts one more: only differences of positions matter).
    """
    eps = config.rms_norm_eps
    with arithmetic():
        rope = qwen35.rope_at(config, positions_N, hidden_ND.dtype)
        embedded_ND = rms_norm(embed(ids_N), params.pre_fc_norm_embedding, eps)
        hidden_ND = rms_norm(hidden_ND, params.pre_fc_norm_hidden, eps)
        x_ND = matmul(concatenated([embedded_ND, hidden_ND]), params.fc)
        layer, w = config.layers[0], params.layers[0]
        x_ND = qwen35.decoder_layer(x_ND, w, layer, config, rope, kv, seen(positions_N), no_tap)
        return [qwen35.final_norm(params, config, x_ND)]


def logits(target_params, config, hidden_ND):
    """The target's logits of the layer's output -> [[N, V]]."""
    with arithmetic():
        return [qwen35.head(target_params, config, hidden_ND)]
