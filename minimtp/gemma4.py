"""Gemma 4's text model: configuration, layer plan, tensor names, forward."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from .backend import gather, matmul
from .cache import Cache
from .checkpoint import CheckpointError, show
from .config import config_size, config_value, layer_count, layer_kinds, placeholders, refuse_unsupported
from .device_cache import DeviceCache
from .device_kv import DeviceKV
from .kv import FullKV, SlidingKV
from .kv_storage import VALUES_ONLY, parse
from .layers import (
    KV_BLOCK,
    Rope,
    add_normed,
    attend_over,
    best_experts,
    gated_mlp,
    gelu,
    mixture,
    rms_norm,
    rope_frequencies,
    rope_table,
    seen,
    softcap,
    turn_and_keep,
)

MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
FORMATS = ("bf16", "q4_0", "w4a16-ct")  # of memory.FORMATS, those its checkpoints are published in
TOWERS = ("vision_tower.", "embed_vision.", "vision_embedder.", "audio_tower.", "embed_audio.")

KINDS = {"sliding_attention": "sliding", "full_attention": "full"}
ROPES = {  # what transformers assumes where a config is silent, like the next two
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}
DEFAULTS = {"sliding_window": 512, "max_position_embeddings": 131_072, "hidden_size_per_layer_input": 256}
UNIFIED_DEFAULTS = {"sliding_window": 1024, "max_position_embeddings": 262_144, "hidden_size_per_layer_input": 0}
SUPPORTED = {  # what the forward below knows of fields that change the numbers
    "attention_bias": (False, None),
    "use_bidirectional_attention": ("vision", None),  # concerns image tokens only
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "rope_scaling": (None,),  # how older models wrote rope_parameters
}


@dataclass(frozen=True)
class Layer:
    """The plan of one layer: its kind ("sliding" or "full"), its sizes, and which entry of the cache it uses."""

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    k_eq_v: bool
    kv: int
    owns_kv: bool


@dataclass(frozen=True)
class Experts:
    """The mixture of experts beside every layer's dense branch: how many, how many a token uses, how wide each is."""

    count: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True)
class Config:
    """A Gemma 4 text model, in the published field names where there are any.

    per_layer_input is the width of per-layer embeddings (0: none); placeholders are the ids that stand for an image
    or a sound.
    """

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    sliding_window: int
    rms_norm_eps: float
    final_logit_softcapping: float | None
    embed_scale: float
    per_layer_input: int
    per_layer_scale: float
    experts: Experts | None
    ropes: dict
    layers: tuple
    placeholders: dict
    tied: bool


# Configuration


def parse_config(raw):
    """Config from a published config.json: outer `gemma4` or `gemma4_unified` with text_config, or the bare text one.

    Raises CheckpointError naming a field that is missing, malformed or asks for what is not supported.
    """
    outer = raw.get("model_type") in ("gemma4", "gemma4_unified")
    text = config_value(raw, "text_config", dict) if outer else raw
    unified = "unified" in str(raw.get("model_type"))
    text = {**(UNIFIED_DEFAULTS if unified else DEFAULTS), **{k: v for k, v in text.items() if v is not None}}
    refuse_unsupported(text, SUPPORTED)
    hidden_size = config_value(text, "hidden_size", int)
    vocab_size = config_value(text, "vocab_size", int)
    per_layer_input = config_size(text, "hidden_size_per_layer_input")
    layers = tuple(_plan(text))
    if per_layer_input and config_size(text, "vocab_size_per_layer_input", 262_144) != vocab_size:
        raise CheckpointError("config: vocab_size_per_layer_input is not vocab_size")
    return Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_position_embeddings=config_value(text, "max_position_embeddings", int),
        sliding_window=config_value(text, "sliding_window", int),
        rms_norm_eps=config_value(text, "rms_norm_eps", float, 1e-6),
        final_logit_softcapping=config_value(text, "final_logit_softcapping", float, None),
        embed_scale=math.sqrt(hidden_size),
        per_layer_input=per_layer_input,
        per_layer_scale=math.sqrt(per_layer_input),
        experts=_parse_experts(text),
        ropes=_parse_ropes(text, {layer.kind for layer in layers}),
        layers=layers,
        placeholders=placeholders(raw, vocab_size),
        tied=config_value(text, "tie_word_embeddings", bool, config_value(raw, "tie_word_embeddings", bool, True)),
    )


def _plan(text):
    """Each layer's plan. The last num_kv_shared_layers use the KV of the last layer of their kind before them."""
    count = layer_count(text)
    types = _layer_types(text, count)
    first_shared = count - config_size(text, "num_kv_shared_layers")
    if first_shared < 1:
        raise CheckpointError(f"config: num_kv_shared_layers {count - first_shared} of {count} layers")
    heads = config_value(text, "num_attention_heads", int)
    k_eq_v = config_value(text, "attention_k_eq_v", bool, False)
    intermediate = config_value(text, "intermediate_size", int)
    wide = config_value(text, "use_double_wide_mlp", bool, False)
    lenders = {}
    for i, kind in enumerate(types):
        kv_heads, head_dim = _attention_sizes(text, i, kind, k_eq_v)
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                f"config: layer {i} cannot have {heads} heads, {kv_heads} kv heads of width {head_dim}"
            )
        owns_kv = i < first_shared
        if owns_kv:
            lenders[kind] = i, (kv_heads, head_dim)
        elif lenders.get(kind, (0, None))[1] != (kv_heads, head_dim):
            raise CheckpointError(f"config: layer {i} shares KV, and no {kind} layer before it has its shape")
        width = intermediate * (2 if wide and not owns_kv else 1)
        kv = lenders[kind][0] if kind in lenders else i
        yield Layer(kind, heads, kv_heads, head_dim, width, k_eq_v and kind == "full", kv, owns_kv)


def _layer_types(text, count):
    types = config_value(text, "layer_types", list, None)
    if types is None:  # transformers' default pattern
        types = ["full_attention" if (i + 1) % 6 == 0 or i == count - 1 else "sliding_attention" for i in range(count)]
    kinds = layer_kinds(types, count, KINDS)
    if kinds[-1] != "full":
        raise CheckpointError("config: the last of layer_types must be full_attention")
    return kinds


def _attention_sizes(text, index, kind, k_eq_v):
    """(kv heads, head width) of a layer, from the published fields or from transformers' newer per_layer_config."""
    kv_heads = config_value(text, "num_key_value_heads", int)
    head_dim = config_value(text, "head_dim", int, 256)
    overrides = config_value(text, "per_layer_config", dict, None)
    if overrides is not None:
        layer = overrides.get(str(index), {})
        if not isinstance(layer, dict) or set(layer) - {"head_dim", "num_key_value_heads"}:
            raise CheckpointError(f"config: per_layer_config of layer {index} has unsupported content: {show(layer)}")
        return config_value(layer, "num_key_value_heads", int, kv_heads), config_value(layer, "head_dim", int, head_dim)
    if kind == "sliding":
        return kv_heads, head_dim
    global_kv_heads = config_value(text, "num_global_key_value_heads", int, None) if k_eq_v else None
    return global_kv_heads or kv_heads, config_value(text, "global_head_dim", int, 512)


def _parse_experts(text):
    if not config_value(text, "enable_moe_block", bool, False):
        return None
    names = ("num_experts", "top_k_experts", "moe_intermediate_size")
    experts = Experts(*(config_value(text, name, int) for name in names))
    if experts.top_k > experts.count:
        raise CheckpointError(f"config: top_k_experts {experts.top_k} of {experts.count} experts")
    return experts


def _parse_ropes(text, kinds):
    ropes = config_value(text, "rope_parameters", dict, ROPES)
    names = {kind: name for name, kind in KINDS.items()}
    return {
        kind: _parse_rope(config_value(ropes, names[kind], dict), names[kind]) for kind in sorted(kinds, reverse=True)
    }


def _parse_rope(rope, kind):
    def field(name, type, default):
        return config_value({f"{name} of {kind}": rope.get(name)}, f"{name} of {kind}", type, *default)

    name = field("rope_type", str, ["default"])
    if name not in ("default", "proportional"):
        raise CheckpointError(
            f"config: rope_type {show(name)} of {kind} is not supported (default and proportional are)"
        )
    known = {"rope_type", "rope_theta"} | ({"partial_rotary_factor", "factor"} if name == "proportional" else set())
    if unknown := set(rope) - known:
        raise CheckpointError(f"config: rope field {min(unknown)!r} of {kind} is not supported with rope_type {name!r}")
    theta, fraction = field("rope_theta", float, []), field("partial_rotary_factor", float, [1.0])
    if theta < 1 or fraction > 1:
        raise CheckpointError(f"config: {kind} has rope_theta {theta} and partial_rotary_factor {fraction}")
    return Rope(name, theta, fraction, field("factor", float, [1.0]))


# Tensors


def owns(name):
    """Whether a checkpoint's tensor is this model's: towers for images and sound are skipped, only text is read."""
    return not name.removeprefix("model.").startswith(TOWERS)


def tensors(config):
    """Every tensor of the model: its place in the parameters -> (published name, shape, kind).

    A "linear" or "embedding" may be stored quantized, "experts" in one tensor or one for each; a "vector" is small
    and always unpacked; an "unused" one may be absent.
    """
    D, L, P = config.hidden_size, len(config.layers), config.per_layer_input
    table = {"embed_tokens": ("model.embed_tokens.weight", (config.vocab_size, D), "embedding")}
    if P:
        table["embed_tokens_per_layer"] = (
            "model.embed_tokens_per_layer.weight",
            (config.vocab_size, L * P),
            "embedding",
        )
        table["per_layer_model_projection"] = ("model.per_layer_model_projection.weight", (L * P, D), "linear")
        table["per_layer_projection_norm"] = ("model.per_layer_projection_norm.weight", (P,), "vector")
    for i, layer in enumerate(config.layers):
        for name, shape, kind in _layer_tensors(layer, config):
            place = name.removesuffix(".weight").removeprefix("self_attn.").removeprefix("mlp.").replace(".", "_")
            table[f"layers.{i}.{place}"] = f"model.layers.{i}.{name}", shape, kind
    table["norm"] = ("model.norm.weight", (D,), "vector")
    if not config.tied:
        table["lm_head"] = ("lm_head.weight", (config.vocab_size, D), "embedding")
    return table


def _layer_tensors(layer, config):
    D, H, G, K, F = config.hidden_size, layer.heads, layer.kv_heads, layer.head_dim, layer.intermediate_size
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield f"{norm}_layernorm.weight", (D,), "vector"
    yield "self_attn.q_proj.weight", (H * K, D), "linear"
    yield "self_attn.q_norm.weight", (K,), "vector"
    used = layer.owns_kv  # base checkpoints carry these where KV is shared, too; QAT exports do not
    yield "self_attn.k_proj.weight", (G * K, D), "linear" if used else "unused"
    yield "self_attn.k_norm.weight", (K,), "vector" if used else "unused"
    if not layer.k_eq_v:
        yield "self_attn.v_proj.weight", (G * K, D), "linear" if used else "unused"
    yield "self_attn.o_proj.weight", (D, H * K), "linear"
    yield "mlp.gate_proj.weight", (F, D), "linear"
    yield "mlp.up_proj.weight", (F, D), "linear"
    yield "mlp.down_proj.weight", (D, F), "linear"
    if config.per_layer_input:
        yield "per_layer_input_gate.weight", (config.per_layer_input, D), "linear"
        yield "per_layer_projection.weight", (D, config.per_layer_input), "linear"
        yield "post_per_layer_input_norm.weight", (D,), "vector"
    if config.experts:
        E, I = config.experts.count, config.experts.intermediate_size
        yield "router.proj.weight", (E, D), "linear"
        yield "router.scale", (D,), "vector"
        yield "router.per_expert_scale", (E,), "vector"
        yield "experts.gate_up_proj", (E, 2 * I, D), "experts"
        yield "experts.down_proj", (E, D, I), "experts"
        for norm in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
            yield f"{norm}.weight", (D,), "vector"
    yield "layer_scalar", (1,), "vector"


# Forward


def attention(x_TD, w, layer, eps, rope, kv, span):
    """Gemma 4 self-attention -> [T, D]: query t sees the positions span[0][t] .. span[1][t] - 1 that kv holds."""
    q_THK = matmul(x_TD, w.q_proj).reshape(len(x_TD), layer.heads, layer.head_dim)
    k_TGK = v_TGK = k_norm = None
    if layer.owns_kv:
        k_TGK = matmul(x_TD, w.k_proj).reshape(len(x_TD), layer.kv_heads, layer.head_dim)
        v_TGK = k_TGK if layer.k_eq_v else matmul(x_TD, w.v_proj).reshape(k_TGK.shape)
        k_norm = w.k_norm
    q_THK = turn_and_keep(q_THK, k_TGK, v_TGK, w.q_norm, k_norm, eps, rope, kv, norm_values=True)
    o_THK = attend_over(q_THK, kv, span)  # q and k are normed: no 1/sqrt(K)
    return matmul(o_THK.reshape(len(x_TD), -1), w.o_proj)


def route(x_TD, w, top_k, eps):
    """Which experts each token uses, best first, and with what weight -> (chosen [T, k], weights [T, k])."""
    scaled_TD = rms_norm(x_TD, eps=eps) * w.router_scale * x_TD.dtype.type(x_TD.shape[1] ** -0.5)
    return best_experts(matmul(scaled_TD, w.router_proj), top_k, w.router_per_expert_scale)


def feed_forward(x_TD, w, config, tap):
    """The layer's dense branch and, where there are experts, their mixture beside it -> [T, D]; x is the residual."""
    eps = config.rms_norm_eps
    dense_TD = gated_mlp(rms_norm(x_TD, w.pre_feedforward_layernorm, eps), w.gate_proj, w.up_proj, w.down_proj, gelu)
    if config.experts is None:
        return dense_TD
    chosen_TX, weights_TX = route(x_TD, w, config.experts.top_k, eps)
    tap("experts", chosen_TX)
    mixed_TD = mixture(rms_norm(x_TD, w.pre_feedforward_layernorm_2, eps), chosen_TX, weights_TX, w, gelu)
    return rms_norm(dense_TD, w.post_feedforward_layernorm_1, eps) + rms_norm(
        mixed_TD, w.post_feedforward_layernorm_2, eps
    )


def decoder_layer(x_TD, w, layer, config, rope, kv, span, tap, per_layer_TP=None):
    """One layer -> [T, D]: attention and feed-forward, each normed before and after; per-layer input; a scale."""
    eps = config.rms_norm_eps
    tap("in", x_TD)
    a_TD = tap("attn", attention(rms_norm(x_TD, w.input_layernorm, eps), w, layer, eps, rope, kv, span))
    x_TD = add_normed(x_TD, a_TD, w.post_attention_layernorm, eps)
    m_TD = tap("mlp", feed_forward(x_TD, w, config, tap))
    x_TD = add_normed(x_TD, m_TD, w.post_feedforward_layernorm, eps)
    if per_layer_TP is not None:
        gated_TP = gelu(matmul(x_TD, w.per_layer_input_gate)) * per_layer_TP
        p_TD = matmul(gated_TP, w.per_layer_projection)
        x_TD = add_normed(x_TD, p_TD, w.post_per_layer_input_norm, eps)
    return tap("out", x_TD * w.layer_scalar)


def embed(params, config, ids_T, dtype):
    """Scaled embeddings of the tokens -> [T, D]."""
    return gather(params.embed_tokens, ids_T, dtype) * dtype.type(config.embed_scale)


def per_layer_inputs(params, config, ids_T, x_TD):
    """What every layer gets besides the residual, from a table of its own and from the embedding -> [T, L, P]."""
    shape, dtype = (len(ids_T), len(config.layers), config.per_layer_input), x_TD.dtype
    table_TLP = gather(params.embed_tokens_per_layer, ids_T, dtype).reshape(shape) * dtype.type(config.per_layer_scale)
    projected_TD = matmul(x_TD, params.per_layer_model_projection) * dtype.type(config.hidden_size**-0.5)
    context_TLP = rms_norm(projected_TD.reshape(shape), params.per_layer_projection_norm, config.rms_norm_eps)
    return (context_TLP + table_TLP) * dtype.type(2**-0.5)


def rope_tables(config, positions_T, dtype):
    """Each layer kind's (cos, sin) at these positions."""
    dims = {layer.kind: layer.head_dim for layer in config.layers}
    return {kind: rope_table(positions_T, rope_frequencies(config.ropes[kind], dims[kind]), dtype) for kind in dims}


def forward(params, config, cache, dtype, tap, last, ids_T, positions_T):
    """Read tokens at these positions, the cache's next -> (logits, hidden states after the final norm).

    Logits of the last `last` tokens (None: all). Depends on its arguments alone, and looks at no number: so it can be
    captured on a device. Target.forward calls it.
    """
    ropes = rope_tables(config, positions_T, dtype)
    spans = {"sliding": seen(positions_T, config.sliding_window), "full": seen(positions_T)}
    x_TD = tap("embed", embed(params, config, ids_T, dtype))
    per_layer_TLP = per_layer_inputs(params, config, ids_T, x_TD) if config.per_layer_input else None
    for i, (layer, w) in enumerate(zip(config.layers, params.layers)):
        kv, rope, span = cache.layers[layer.kv], ropes[layer.kind], spans[layer.kind]
        per_layer_TP = None if per_layer_TLP is None else per_layer_TLP[:, i]
        x_TD = decoder_layer(x_TD, w, layer, config, rope, kv, span, tap.within(f"layer.{i}"), per_layer_TP)
    hidden_TD = tap("final_norm", rms_norm(x_TD, params.norm, config.rms_norm_eps))
    rows = hidden_TD if last is None else hidden_TD[max(0, len(ids_T) - last) :]
    return tap("logits", softcap(matmul(rows, params.lm_head), config.final_logit_softcapping)), hidden_TD


def new_cache(config, dtype, capacity, fingerprint, device=None, kv=None, params=None):
    """An empty cache for `capacity` tokens (None: the model's context, grown as needed).

    kv: see kv_storage.parse; where only values are kept, keys are made of them with norms that params has.
    """
    if device is not None:
        return _device_cache(config, dtype, capacity, fingerprint, device, kv, params)
    storage, values_only = parse(kv, dtype)
    keys_of = _key_makers(params, config, dtype) if values_only else {}
    layers = [
        SlidingKV(layer.kv_heads, layer.head_dim, config.sliding_window, dtype, storage)
        if layer.kind == "sliding"
        else FullKV(layer.kv_heads, layer.head_dim, dtype, capacity or 0, storage, keys_of.get(i))
        for i, layer in enumerate(config.layers)
        if layer.owns_kv
    ]
    return Cache(layers, capacity or config.max_position_embeddings, fingerprint)


def _device_cache(config, dtype, capacity, fingerprint, device, kv, params):
    """The same on a device."""
    name, values_only = (kv or dtype.name).removesuffix(VALUES_ONLY), parse(kv, dtype)[1]
    head_dim = next(layer.head_dim for layer in config.layers if layer.kind == "full")
    frequencies_C = rope_frequencies(config.ropes["full"], head_dim)
    turning = device.constant(frequencies_C), int(np.count_nonzero(frequencies_C))
    layers = [
        DeviceKV(device, layer.kv_heads, layer.head_dim, name, window=config.sliding_window)
        if layer.kind == "sliding"
        else DeviceKV(
            device,
            layer.kv_heads,
            layer.head_dim,
            name,
            capacity or 0,
            keys_of=(w.k_norm, *turning) if values_only and layer.k_eq_v else None,
        )
        for layer, w in zip(config.layers, params.layers)
        if layer.owns_kv
    ]
    return DeviceCache(device, layers, capacity or config.max_position_embeddings, fingerprint)


def _key_makers(params, config, dtype):
    """{layer: what makes its keys of its values}, with one table of angles for all, made as far as it is needed."""
    table = lru_cache(None)(partial(turning_table, config, dtype))
    layers = enumerate(zip(config.layers, params.layers))
    return {i: partial(keys_of_values, w.k_norm, table) for i, (layer, w) in layers if layer.k_eq_v and layer.owns_kv}


def keys_of_values(weight_K, table, v_GBK, position):
    """Keys of an attention_k_eq_v layer at `position` and on, of one block, made of their values -> [G, B, K].

    Both are one projection, normed: the value without a weight, the key with one and then rotated. So the same
    operations on what is held give the same numbers.
    """
    k_GBK, half = v_GBK * weight_K, len(weight_K) // 2
    block, first = divmod(position, KV_BLOCK)
    cos_BC, sin_BC = (rows_BC[first : first + k_GBK.shape[1]] for rows_BC in table(block))
    turning = cos_BC.shape[1]
    a_GBC, b_GBC = k_GBK[..., :turning].copy(), k_GBK[..., half : half + turning]
    k_GBK[..., :turning] = a_GBC * cos_BC - b_GBC * sin_BC
    k_GBK[..., half : half + turning] = b_GBC * cos_BC + a_GBC * sin_BC
    return k_GBK


def turning_table(config, dtype, block):
    """(cos, sin) of a block's positions in full layers, for the angles that turn at all -> two [B, C] arrays."""
    head_dim = next(layer.head_dim for layer in config.layers if layer.kind == "full")
    frequencies_C = rope_frequencies(config.ropes["full"], head_dim)
    positions_B = np.arange(block * KV_BLOCK, (block + 1) * KV_BLOCK)
    return [table_B1C[:, 0] for table_B1C in rope_table(positions_B, frequencies_C[frequencies_C > 0], dtype)]


def lendable_kv(config, cache):
    """The memories that a drafter borrows: those of the last sliding and the last full layer with KV of its own."""
    return {layer.kind: cache.layers[layer.kv] for layer in config.layers if layer.owns_kv}
