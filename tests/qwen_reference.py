"""Qwen 3.5 as transformers runs it, and the MTP layer that transformers leaves out, put together from its parts.

The MTP layer works from scratch, without a cache: all entries made from true hidden states, then those of the draft so
far, in one causal pass for every token drafted. Nothing of an earlier round can survive.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from double import load_reference
from safetensors.torch import load_file


class Reading(NamedTuple):
    """logits [T, V], hidden after and before the final norm [T, D], taps [T, D], (conv window [W-1, C], state
    [H, K, V]) of each linear layer by its index, after the last token."""

    logits_TV: np.ndarray
    hidden_TD: np.ndarray
    before_norm_TD: np.ndarray
    taps: dict
    states: dict


def load_qwen(folder, twin=None):
    """The text model of a checkpoint folder, with its MTP layer as `.mtp` (None where there is none).

    twin: a folder of the same numbers in a layout that transformers reads.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    kind = "Qwen3_5MoeForCausalLM" if "moe" in config["model_type"] else "Qwen3_5ForCausalLM"
    model = load_reference(twin or folder, getattr(transformers, kind))
    if "Moe" in kind:
        model.set_experts_implementation("eager")  # the others do not work in double
    model.mtp = load_mtp(model, twin or folder)
    return model.eval()


# The target ----------------------------------------------------------------------------------------------------------


def numpy(tensor):
    return tensor.detach().double().numpy()


@torch.no_grad()
def read(model, ids_T, chunks=None, taps=()):
    """Read ids_T in chunks through the cache, or in one piece without one -> Reading."""
    kept, hooks, logits, start = {}, [], [], 0
    for name, module, getter in [
        ("hidden", model.model.norm, output_of),
        ("before", model.model.norm, lambda inputs, output: inputs[0]),
        *((tap, tap_module(model.model, tap), output_of) for tap in taps),
    ]:
        kept[name] = []
        hooks.append(module.register_forward_hook(keeper(kept[name], getter)))
    cache = transformers.DynamicCache(config=model.config) if chunks else None
    for size in filter(None, chunks or [len(ids_T)]):
        piece = torch.tensor([ids_T[start : start + size]])
        logits.append(model(piece, past_key_values=cache, use_cache=bool(chunks)).logits[0])
        start += size
    for hook in hooks:
        hook.remove()
    joined = {name: numpy(torch.cat(parts)) for name, parts in kept.items()}
    states = linear_states(cache) if chunks else {}
    return Reading(numpy(torch.cat(logits)), joined.pop("hidden"), joined.pop("before"), joined, states)


def output_of(inputs, output):
    return output[0] if isinstance(output, tuple) else output


def keeper(parts, getter):
    def hook(module, inputs, output):
        parts.append(getter(inputs, output)[0].clone())

    return hook


def tap_module(text, name):
    """The module whose output a tap is."""
    if name == "embed":
        return text.embed_tokens
    _, index, part = name.split(".")
    layer = text.layers[int(index)]
    mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
    return {"attn": mixer, "mlp": layer.mlp, "out": layer}[part]


def linear_states(cache):
    """What a DynamicCache remembers of linear layers: the inputs the next convolution needs, and the state."""
    states = {}
    for i, layer in enumerate(cache.layers):
        if hasattr(layer, "recurrent_states"):
            window_CW, state_HKV = layer.conv_states[0][0], layer.recurrent_states[0][0]
            states[i] = numpy(window_CW[:, 1:]).T, numpy(state_HKV)  # one more input is kept than needed
    return states


# The MTP layer -------------------------------------------------------------------------------------------------------


class Mtp(torch.nn.Module):
    """Its modules, named as in the checkpoint; the classes are those of the model's own layers."""

    def __init__(self, model):
        super().__init__()
        config, module = model.config, sys.modules[type(model).__module__]
        prefix, size, eps = type(model).__name__.removesuffix("ForCausalLM"), config.hidden_size, config.rms_norm_eps
        norm, decoder_layer = getattr(module, f"{prefix}RMSNorm"), getattr(module, f"{prefix}DecoderLayer")
        full = config.layer_types.index("full_attention")  # the index only says which kind of layer it is
        self.fc = torch.nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(size, eps), norm(size, eps)
        self.layers = torch.nn.ModuleList([decoder_layer(config, full)])
        self.norm = norm(size, eps)


def load_mtp(model, folder):
    """The folder's MTP layer, or None."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        stored = load_file(file)
        tensors |= {name[4:]: stored[name].float() for name in stored if name.startswith("mtp.")}
    if not tensors:
        return None
    mtp = Mtp(model)
    mtp.load_state_dict(stack_experts(tensors))
    return mtp


def stack_experts(tensors):
    """One tensor for each expert -> one for all, where they come that way."""
    stem = "layers.0.mlp.experts."
    single = {name: tensor for name, tensor in tensors.items() if name.startswith(stem) and name.endswith(".weight")}
    if not single:
        return tensors

    def all_of(part):
        return torch.stack([single[f"{stem}{e}.{part}_proj.weight"] for e in range(len(single) // 3)])

    stacked = {name: tensor for name, tensor in tensors.items() if name not in single}
    stacked[f"{stem}gate_up_proj"] = torch.cat([all_of("gate"), all_of("up")], dim=1)
    stacked[f"{stem}down_proj"] = all_of("down")
    return stacked


def mtp_entries(model, tokens_N, hidden_ND):
    """The MTP layer over N entries, each from a token and the hidden state before it -> after its norm [N, D]."""
    mtp, count = model.mtp, len(tokens_N)
    embedded_ND = model.model.embed_tokens(torch.tensor(tokens_N))
    fused_ND = mtp.fc(torch.cat([mtp.pre_fc_norm_embedding(embedded_ND), mtp.pre_fc_norm_hidden(hidden_ND)], dim=-1))
    rope = model.model.rotary_emb(fused_ND, torch.arange(count)[None])
    hides_the_future = torch.full((count, count), -torch.inf, dtype=fused_ND.dtype).triu(1)[None, None]
    return mtp.norm(mtp.layers[0](fused_ND[None], position_embeddings=rope, attention_mask=hides_the_future)[0])


@torch.no_grad()
def mtp_draft(model, hidden_TD, ids_T, length, steps, tokens=None):
    """What the MTP layer drafts by argmax after `length` read tokens and the unread ids_T[length].

    -> (tokens [K], logits [K, V]). hidden_TD: the target's, after its final norm (or before it, as some engines do);
    what is fed back is the layer's own output after its norm. tokens: fed instead of the drafted ones.
    """
    drafted, logits = [], []
    fed, hidden_ND = ids_T[1 : length + 1], torch.as_tensor(hidden_TD[:length]).to(model.dtype)
    for step in range(steps):
        hidden_ND = torch.cat([hidden_ND, mtp_entries(model, fed, hidden_ND)[-1:]])
        logits.append(numpy(model.lm_head(hidden_ND[-1])))
        drafted.append(int(logits[-1].argmax()))
        fed = [*fed, drafted[-1] if tokens is None else tokens[step]]
    return drafted, np.stack(logits)
