"""Gemma 4's text model: configuration, layer plan, tensor names, forward."""

import math
from dataclasses import dataclass

import numpy as np

from .backend import array_module, gather, matmul, one_blas_thread
from .cache import Cache, FullKV, SlidingKV
from .checkpoint import CheckpointError, config_value
from .layers import (
    Output,
    Taps,
    attend,
    gelu,
    rms_norm,
    rope_frequencies,
    rope_table,
    rotate,
    softcap,
    token_ids,
)

MODEL_TYPES = ("gemma4", "gemma4_text")
TOWERS = ("vision_tower.", "embed_vision.", "audio_tower.", "embed_audio.")
SKIPPED = tuple(prefix + tower for prefix in ("model.", "") for tower in TOWERS)  # this project reads text only

KINDS = {"sliding_attention": "sliding", "full_attention": "full"}
ROPES = {  # what transformers assumes where a config is silent
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
MAX_LAYERS = 1000  # a config that claims more is not believed: a plan and a table are made before any weight is read


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer kind; see layers.rope_frequencies."""

    kind: str
    theta: float
    fraction: float
    factor: float


@dataclass(frozen=True)
class Layer:
    """The plan of one layer: its kind ("sliding" or "full") and sizes, and which entry of the cache it uses."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    k_eq_v: bool
    kv: int
    owns_kv: bool = True


@dataclass(frozen=True)
class Config:
    """A Gemma 4 text model, in the published field names where there are any."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    sliding_window: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    embed_scale: float
    ropes: dict
    layers: tuple


# Configuration


def parse_config(raw):
    """Config from a published config.json: the outer `gemma4` with its `text_config`, or a bare `gemma4_text`.

    Raises CheckpointError naming a field that is missing, malformed or asks for what is not supported.
    """
    text = raw.get("text_config", raw)
    if not isinstance(text, dict):
        raise CheckpointError("config: text_config is not an object")
    count = config_value(text, "num_hidden_layers", int)
    if count > MAX_LAYERS:
        raise CheckpointError(f"config: num_hidden_layers {count} is more than {MAX_LAYERS}")
    types = _layer_types(text, count)
    heads = config_value(text, "num_attention_heads", int)
    k_eq_v = config_value(text, "attention_k_eq_v", bool, False)
    intermediate = config_value(text, "intermediate_size", int)
    layers = []
    for i, kind in enumerate(types):
        kv_heads, head_dim = _attention_sizes(text, i, kind, k_eq_v)
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config: layer {i} cannot have {heads} heads, {kv_heads} kv heads of width {head_dim}"
            )
        layers.append(Layer(kind, heads, kv_heads, head_dim, intermediate, k_eq_v and kind == "full", kv=i))
    _refuse_unsupported(text)
    hidden_size = config_value(text, "hidden_size", int)
    return Config(
        vocab_size=config_value(text, "vocab_size", int),
        hidden_size=hidden_size,
        max_position_embeddings=config_value(text, "max_position_embeddings", int, 131_072),
        sliding_window=config_value(text, "sliding_window", int, 512),
        rms_norm_eps=config_value(text, "rms_norm_eps", float, 1e-6),
        final_logit_softcapping=config_value(text, "final_logit_softcapping", float, None),
        embed_scale=math.sqrt(hidden_size),
        ropes=_parse_ropes(text),
        layers=tuple(layers),
    )


def _layer_types(text, count):
    types = config_value(text, "layer_types", list, None)
    if types is None:  # transformers' default pattern
        types = ["full_attention" if (i + 1) % 6 == 0 or i == count - 1 else "sliding_attention" for i in range(count)]
    if len(types) != count or any(kind not in KINDS for kind in types):
        raise CheckpointError(f"config: layer_types must name {count} layers, each one of {', '.join(KINDS)}")
    if types[-1] != "full_attention":
        raise CheckpointError("config: the last of layer_types must be full_attention")
    return [KINDS[kind] for kind in types]


def _attention_sizes(text, index, kind, k_eq_v):
    """(kv heads, head width) of a layer, from the published fields or from transformers' newer per_layer_config."""
    kv_heads = config_value(text, "num_key_value_heads", int)
    head_dim = config_value(text, "head_dim", int, 256)
    overrides = config_value(text, "per_layer_config", dict, None)
    if overrides is not None:
        layer = overrides.get(str(index), {})
        if not isinstance(layer, dict) or set(layer) - {"head_dim", "num_key_value_heads"}:
            raise CheckpointError(f"config: per_layer_config of layer {index} has unsupported content: {layer}")
        return config_value(layer, "num_key_value_heads", int, kv_heads), config_value(layer, "head_dim", int, head_dim)
    if kind == "sliding":
        return kv_heads, head_dim
    global_kv_heads = config_value(text, "num_global_key_value_heads", int, None) if k_eq_v else None
    return global_kv_heads or kv_heads, config_value(text, "global_head_dim", int, 512)


def _parse_ropes(text):
    ropes = config_value(text, "rope_parameters", dict, ROPES)
    return {short: _parse_rope(config_value(ropes, kind, dict), kind) for kind, short in KINDS.items() if kind in ropes}


def _parse_rope(rope, kind):
    name = rope.get("rope_type", "default")
    if name not in ("default", "proportional"):
        raise CheckpointError(f"config: rope_type {name!r} of {kind} is not supported (default and proportional are)")
    known = {"rope_type", "rope_theta"} | ({"partial_rotary_factor", "factor"} if name == "proportional" else set())
    if unknown := set(rope) - known:
        raise CheckpointError(f"config: rope field {min(unknown)!r} of {kind} is not supported with rope_type {name!r}")
    fraction = config_value(rope, "partial_rotary_factor", float, 1.0)
    if not 0 <= fraction <= 1:
        raise CheckpointError(f"config: partial_rotary_factor of {kind} must lie in 0..1, got {fraction}")
    return Rope(name, config_value(rope, "rope_theta", float), fraction, config_value(rope, "factor", float, 1.0))


def _refuse_unsupported(text):
    """One sentence for every field that would change the numbers and that this forward does not know."""
    only = {
        "hidden_size_per_layer_input": (0, None),
        "num_kv_shared_layers": (0, None),
        "enable_moe_block": (False,),
        "use_double_wide_mlp": (False,),
        "attention_bias": (False,),
        "use_bidirectional_attention": ("vision", None),  # concerns image tokens only
        "hidden_activation": ("gelu_pytorch_tanh",),
        "tie_word_embeddings": (True,),
    }
    assumed = {"hidden_size_per_layer_input": 256}  # transformers' default where a config is silent
    for name, values in only.items():
        value = text.get(name, assumed.get(name, values[0]))
        if value not in values:
            raise CheckpointError(f"config: {name} {value!r} is not supported")


# Tensors


def tensors(config):
    """Every tensor of the model: its place in the parameters -> (published name, shape, kind).

    A "linear" or "embedding" may be stored quantized; a "vector" is small and always unpacked.
    """
    D = config.hidden_size
    table = {"embed_tokens": ("model.embed_tokens.weight", (config.vocab_size, D), "embedding")}
    for i, layer in enumerate(config.layers):
        for name, shape, kind in _layer_tensors(layer, D):
            table[f"layers.{i}.{name.split('.')[-1]}"] = (
                f"model.layers.{i}.{name}" + ("" if name == "layer_scalar" else ".weight"),
                shape,
                kind,
            )
    table["norm"] = ("model.norm.weight", (D,), "vector")
    return table


def _layer_tensors(layer, D):
    H, G, K, F = layer.heads, layer.kv_heads, layer.head_dim, layer.intermediate_size
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{norm}_layernorm", (D,), "vector"
    yield "self_attn.q_proj", (H * K, D), "linear"
    yield "self_attn.q_norm", (K,), "vector"
    if layer.owns_kv:
        yield "self_attn.k_proj", (G * K, D), "linear"
        yield "self_attn.k_norm", (K,), "vector"
        if not layer.k_eq_v:
            yield "self_attn.v_proj", (G * K, D), "linear"
    yield "self_attn.o_proj", (D, H * K), "linear"
    yield "mlp.gate_proj", (F, D), "linear"
    yield "mlp.up_proj", (F, D), "linear"
    yield "mlp.down_proj", (D, F), "linear"
    yield "layer_scalar", (1,), "vector"


# Forward


def attention(x_TD, w, layer, eps, rope, kv, span):
    """Gemma 4 self-attention -> [T, D]: query t sees the positions span[0][t] .. span[1][t] - 1 that kv holds."""
    q_THK = matmul(x_TD, w.q_proj).reshape(len(x_TD), layer.heads, layer.head_dim)
    q_THK = rotate(rms_norm(q_THK, w.q_norm, eps), rope)
    if layer.owns_kv:
        k_TGK = matmul(x_TD, w.k_proj).reshape(len(x_TD), layer.kv_heads, layer.head_dim)
        v_TGK = k_TGK if layer.k_eq_v else matmul(x_TD, w.v_proj).reshape(k_TGK.shape)
        kv.append(rotate(rms_norm(k_TGK, w.k_norm, eps), rope), rms_norm(v_TGK, eps=eps))  # v: normed, no weight
    low_T, high_T = span
    o_THK = attend(q_THK, *kv.read(), low_T - kv.start, high_T - kv.start)  # q and k are normed: no 1/sqrt(K)
    return matmul(o_THK.reshape(len(x_TD), -1), w.o_proj)


def mlp(x_TD, w):
    """Gated GELU feed-forward -> [T, D]."""
    return matmul(gelu(matmul(x_TD, w.gate_proj)) * matmul(x_TD, w.up_proj), w.down_proj)


def decoder_layer(x_TD, w, layer, eps, rope, kv, span, tap):
    """One layer -> [T, D]: attention and feed-forward, each normed before and after, and the whole scaled."""
    tap("in", x_TD)
    a_TD = tap("attn", attention(rms_norm(x_TD, w.input_layernorm, eps), w, layer, eps, rope, kv, span))
    x_TD = x_TD + rms_norm(a_TD, w.post_attention_layernorm, eps)
    m_TD = tap("mlp", mlp(rms_norm(x_TD, w.pre_feedforward_layernorm, eps), w))
    x_TD = x_TD + rms_norm(m_TD, w.post_feedforward_layernorm, eps)
    return tap("out", x_TD * w.layer_scalar)


def embed(params, config, ids_T, dtype):
    """Scaled embeddings of the tokens -> [T, D]."""
    return gather(params.embed_tokens, ids_T, dtype) * dtype.type(config.embed_scale)


def rope_tables(config, positions_T, dtype):
    """Each layer kind's (cos, sin) at these positions."""
    dims = {layer.kind: layer.head_dim for layer in config.layers}
    return {kind: rope_table(rope_frequencies(config.ropes[kind], dims[kind]), positions_T, dtype) for kind in dims}


def forward(params, config, ids_T, cache, dtype, taps=(), last=None):
    """Read ids_T after what the cache holds -> Output, with the logits of the last `last` of them (None: all).

    Depends on its arguments alone; the cache afterwards holds the tokens, or is as before where this raises.
    """
    ids_T = token_ids(ids_T, config.vocab_size)
    tap = Taps(taps, len(config.layers))
    with one_blas_thread(), cache.reading(ids_T) as start:
        positions_T = np.arange(start, start + len(ids_T))
        ropes = rope_tables(config, positions_T, dtype)
        spans = {
            "sliding": (np.maximum(positions_T + 1 - config.sliding_window, 0), positions_T + 1),
            "full": (np.zeros_like(positions_T), positions_T + 1),
        }
        x_TD = tap("embed", embed(params, config, ids_T, dtype))
        for i, (layer, w) in enumerate(zip(config.layers, params.layers)):
            kv, rope, span = cache.layers[layer.kv], ropes[layer.kind], spans[layer.kind]
            x_TD = decoder_layer(x_TD, w, layer, config.rms_norm_eps, rope, kv, span, tap.within(f"layer.{i}"))
        hidden_TD = tap("final_norm", rms_norm(x_TD, params.norm, config.rms_norm_eps))
        rows = hidden_TD if last is None else hidden_TD[max(0, len(ids_T) - last) :]
        logits_TV = tap("logits", softcap(matmul(rows, params.embed_tokens), config.final_logit_softcapping))
    return Output(logits_TV, hidden_TD, dict(tap))


def new_cache(config, dtype, capacity, fingerprint, backend):
    """An empty cache for `capacity` tokens (None: the model's context, grown as needed)."""
    xp = array_module(backend)
    layers = [
        SlidingKV(layer.kv_heads, layer.head_dim, config.sliding_window, dtype, xp)
        if layer.kind == "sliding"
        else FullKV(layer.kv_heads, layer.head_dim, dtype, capacity or 0, xp)
        for layer in config.layers
        if layer.owns_kv
    ]
    return Cache(layers, capacity or config.max_position_embeddings, fingerprint)


def lendable_kv(config, cache):
    """The memories that a drafter borrows: those of the last sliding and the last full layer with KV of its own."""
    return {layer.kind: cache.layers[layer.kv] for layer in config.layers if layer.owns_kv}
