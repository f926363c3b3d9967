"""Qwen 3.5 and 3.6's text models, dense and mixture of experts: configuration, layer plan, tensor names, forward.

Three layers of four keep a recurrent state (Gated DeltaNet) instead of keys and values; the fourth attends in full.
"""

from dataclasses import dataclass

from .backend import gather, matmul
from .cache import Cache
from .checkpoint import CheckpointError, show
from .config import config_size, config_value, layer_count, layer_kinds, placeholders, refuse_unsupported
from .delta_state import DeltaState
from .device_cache import DeviceCache
from .device_kv import DeviceKV
from .device_state import DeviceState
from .drafter_kv import DrafterKV
from .kv import FullKV
from .kv_storage import VALUES_ONLY, parse
from .layers import (
    Rope,
    attend_over,
    best_experts,
    delta_rule,
    gated_mlp,
    gated_norm,
    halves,
    mixture,
    rms_norm,
    rope_frequencies,
    rope_table,
    seen,
    sigmoid,
    silu,
    turn_and_keep,
)

MODEL_TYPES = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
FORMATS = ("bf16",)  # of memory.FORMATS, those its checkpoints are published in
OTHERS = ("model.visual.", "visual.", "mtp.")  # this project reads text only; the MTP layer is a drafter of its own

KINDS = {"linear_attention": "linear", "full_attention": "full"}
SUPPORTED = {  # what the forward below knows of fields that change the numbers
    "attention_bias": (False, None),
    "attn_output_gate": (True, None),
    "hidden_act": ("silu", None),
    "mamba_ssm_dtype": ("float32", None),  # the state is in the run's dtype, which is never narrower
    "mlp_only_layers": ([], None),
    "output_gate_type": ("swish", None),  # of DeltaNet's gated norm
    "rope_scaling": (None,),
}
ROPE_FIELDS = {"rope_type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}


@dataclass(frozen=True)
class FullAttention:
    """A layer that attends over everything read, its output gated."""

    heads: int
    kv_heads: int
    head_dim: int
    kind: str = "full"


@dataclass(frozen=True)
class DeltaNet:
    """A Gated DeltaNet layer; `kernel` is the width of its convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    kind: str = "linear"

    @property
    def channels(self):
        """Of the convolution: queries, keys and values of all heads."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Experts:
    """The mixture of experts of every layer, and the width of the expert that all tokens share."""

    count: int
    top_k: int
    intermediate_size: int
    shared_size: int


@dataclass(frozen=True)
class Config:
    """A Qwen 3.5 text model, in the published field names where there are any.

    rotary_dim is how much of each head rotates; attention is the plan of a full layer, and so of the MTP layer;
    mtp_layers is how many of those the configuration speaks of: whether one is there, the checkpoint's tensors say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int | None
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    rotary_dim: int
    experts: Experts | None
    attention: FullAttention
    layers: tuple
    mtp_layers: int
    placeholders: dict
    tied: bool


# Configuration


def parse_config(raw):
    """Config from a published config.json: outer `qwen3_5` or `qwen3_5_moe` with text_config, or the bare text one.

    Raises CheckpointError naming a field that is missing, malformed or asks for what is not supported.
    """
    model_type = str(raw.get("model_type"))
    text = raw if model_type.endswith("_text") else config_value(raw, "text_config", dict)
    refuse_unsupported(text, SUPPORTED)
    vocab_size, attention = config_value(text, "vocab_size", int), _full_attention(text)
    experts = _parse_experts(text) if "moe" in model_type else None
    rope, rotary_dim = _parse_rope(text, attention.head_dim)
    return Config(
        vocab_size=vocab_size,
        hidden_size=config_value(text, "hidden_size", int),
        intermediate_size=None if experts else config_value(text, "intermediate_size", int),
        max_position_embeddings=config_value(text, "max_position_embeddings", int),
        rms_norm_eps=config_value(text, "rms_norm_eps", float, 1e-6),
        rope=rope,
        rotary_dim=rotary_dim,
        experts=experts,
        attention=attention,
        layers=tuple(_plan(text, attention)),
        mtp_layers=config_size(text, "mtp_num_hidden_layers"),
        placeholders=placeholders(raw, vocab_size),
        tied=config_value(text, "tie_word_embeddings", bool, config_value(raw, "tie_word_embeddings", bool, False)),
    )


def _full_attention(text):
    heads, kv_heads = (config_value(text, f"num_{name}_heads", int) for name in ("attention", "key_value"))
    if heads % kv_heads:
        raise CheckpointError(f"config: {heads} heads for {kv_heads} kv heads")
    return FullAttention(heads, kv_heads, config_value(text, "head_dim", int, 256))


def _plan(text, attention):
    """Each layer's plan: as layer_types says, or every full_attention_interval-th in full."""
    count = layer_count(text)
    types = config_value(text, "layer_types", list, None)
    if types is None:
        interval = config_value(text, "full_attention_interval", int, 4)
        types = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)]
    names = {
        "num_key_heads": 16,
        "num_value_heads": 32,
        "key_head_dim": 128,
        "value_head_dim": 128,
        "conv_kernel_dim": 4,
    }
    delta = DeltaNet(*(config_value(text, f"linear_{name}", int, default) for name, default in names.items()))
    if delta.value_heads % delta.key_heads:
        raise CheckpointError(f"config: {delta.value_heads} linear value heads for {delta.key_heads} key heads")
    return [attention if kind == "full" else delta for kind in layer_kinds(types, count, KINDS)]


def _parse_experts(text):
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    experts = Experts(*(config_value(text, name, int) for name in names))
    if experts.top_k > experts.count:
        raise CheckpointError(f"config: num_experts_per_tok {experts.top_k} of {experts.count} experts")
    return experts


def _parse_rope(text, head_dim):
    """(Rope, how much of a head rotates). For text the three positions of interleaved M-RoPE are one: plain RoPE."""
    rope = config_value(text, "rope_parameters", dict)
    if unknown := set(rope) - ROPE_FIELDS:
        raise CheckpointError(f"config: rope field {show(min(unknown))} is not supported")
    section = config_value(rope, "mrope_section", list, [0, 0, 0])
    if len(section) != 3 or any(type(angles) is not int or angles < 0 for angles in section):
        raise CheckpointError(f"config: mrope_section is {show(section)}, expected three numbers of angles")
    config_value(rope, "mrope_interleaved", bool, True)
    if rope.get("rope_type") not in ("default", None):
        raise CheckpointError(f"config: rope_type {show(rope['rope_type'])} is not supported (default is)")
    fraction = config_value(
        rope, "partial_rotary_factor", float, config_value(text, "partial_rotary_factor", float, 0.25)
    )
    theta, rotary_dim = config_value(rope, "rope_theta", float), int(head_dim * fraction)
    if theta < 1 or fraction > 1 or rotary_dim % 2 or not rotary_dim:
        raise CheckpointError(f"config: rope_theta {theta} and partial_rotary_factor {fraction} of width {head_dim}")
    return Rope("default", theta), rotary_dim


# Tensors


def owns(name):
    """Whether a checkpoint's tensor is the text model's."""
    return not name.startswith(OTHERS)


def tensors(config):
    """Every tensor of the model: its place in the parameters -> (published name, shape, kind); see gemma4.tensors.

    A "zero_centred" vector is stored less 1.
    """
    table = {"embed_tokens": ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size), "embedding")}
    for i, layer in enumerate(config.layers):
        table |= layer_tensors(layer, config, f"layers.{i}", f"model.layers.{i}")
    table["norm"] = ("model.norm.weight", (config.hidden_size,), "zero_centred")
    if not config.tied:
        table["lm_head"] = ("lm_head.weight", (config.vocab_size, config.hidden_size), "embedding")
    return table


def layer_tensors(layer, config, at, prefix):
    """The tensors of one layer, as `tensors` has them."""
    mixer = _attention_tensors if layer.kind == "full" else _delta_tensors
    rows = [*_norm_tensors(config), *mixer(layer, config.hidden_size), *_feed_forward_tensors(config)]
    return {f"{at}.{place}": (f"{prefix}.{name}", shape, kind) for place, name, shape, kind in rows}


def _norm_tensors(config):
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield name, f"{name}.weight", (config.hidden_size,), "zero_centred"


def _attention_tensors(layer, D):
    H, G, K = layer.heads, layer.kv_heads, layer.head_dim
    shapes = {"q_proj": (2 * H * K, D), "k_proj": (G * K, D), "v_proj": (G * K, D), "o_proj": (D, H * K)}
    for name, shape in shapes.items():
        yield name, f"self_attn.{name}.weight", shape, "linear"
    for name in ("q_norm", "k_norm"):
        yield name, f"self_attn.{name}.weight", (K,), "zero_centred"


def _delta_tensors(layer, D):
    C, H, V = layer.channels, layer.value_heads, layer.value_heads * layer.value_dim
    shapes = {"qkv": (C, D), "z": (V, D), "b": (H, D), "a": (H, D)}
    for name, shape in shapes.items():
        yield f"in_proj_{name}", f"linear_attn.in_proj_{name}.weight", shape, "linear"
    yield "conv1d", "linear_attn.conv1d.weight", (C, 1, layer.kernel), "vector"
    yield "A_log", "linear_attn.A_log", (H,), "vector"
    yield "dt_bias", "linear_attn.dt_bias", (H,), "vector"
    yield "gated_norm", "linear_attn.norm.weight", (layer.value_dim,), "vector"
    yield "out_proj", "linear_attn.out_proj.weight", (D, V), "linear"


def _feed_forward_tensors(config):
    D, experts = config.hidden_size, config.experts
    if experts is None:
        yield from _mlp_tensors("", "mlp.", config.intermediate_size, D)
        return
    E, F = experts.count, experts.intermediate_size
    yield "router", "mlp.gate.weight", (E, D), "linear"
    yield "experts_gate_up_proj", "mlp.experts.gate_up_proj", (E, 2 * F, D), "experts"
    yield "experts_down_proj", "mlp.experts.down_proj", (E, D, F), "experts"
    yield from _mlp_tensors("shared_expert_", "mlp.shared_expert.", experts.shared_size, D)
    yield "shared_expert_gate", "mlp.shared_expert_gate.weight", (1, D), "linear"


def _mlp_tensors(place, prefix, F, D):
    for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
        yield place + name, f"{prefix}{name}.weight", shape, "linear"


# Forward


def attention(x_TD, w, layer, eps, rope, kv, span):
    """Gated full attention -> [T, D]: query t sees the positions span[0][t] .. span[1][t] - 1 that kv holds."""
    T, H, G, K = len(x_TD), layer.heads, layer.kv_heads, layer.head_dim
    q_THK, gate_THK = halves(matmul(x_TD, w.q_proj).reshape(T, H, 2 * K))
    k_TGK, v_TGK = matmul(x_TD, w.k_proj).reshape(T, G, K), matmul(x_TD, w.v_proj).reshape(T, G, K)
    q_THK = turn_and_keep(q_THK, k_TGK, v_TGK, w.q_norm, w.k_norm, eps, rope, kv)
    o_THK = attend_over(q_THK, kv, span, x_TD.dtype.type(K**-0.5))
    return matmul((o_THK * sigmoid(gate_THK)).reshape(T, H * K), w.o_proj)


def delta_net(x_TD, w, layer, eps, memory):
    """Gated DeltaNet -> [T, D]: queries, keys and values through a short convolution, then the gated delta rule."""
    inputs = (matmul(x_TD, projection) for projection in (w.in_proj_qkv, w.in_proj_a, w.in_proj_b))
    out_THV = delta_rule(*inputs, w, layer, memory)
    gate_THV = matmul(x_TD, w.in_proj_z).reshape(out_THV.shape)
    return matmul(gated_norm(out_THV, w.gated_norm, gate_THV, eps).reshape(len(x_TD), -1), w.out_proj)


def feed_forward(x_TD, w, config, tap):
    """The layer's gated MLP, or its mixture of experts and the gated expert that all tokens share -> [T, D]."""
    if config.experts is None:
        return gated_mlp(x_TD, w.gate_proj, w.up_proj, w.down_proj, silu)
    chosen_TX, weights_TX = best_experts(matmul(x_TD, w.router), config.experts.top_k)
    tap("experts", chosen_TX)
    shared = w.shared_expert_gate_proj, w.shared_expert_up_proj, w.shared_expert_down_proj
    shared_TD = gated_mlp(x_TD, *shared, silu) * sigmoid(matmul(x_TD, w.shared_expert_gate))
    return mixture(x_TD, chosen_TX, weights_TX, w, silu) + shared_TD


def decoder_layer(x_TD, w, layer, config, rope, memory, span, tap):
    """One layer -> [T, D]: attention or DeltaNet, then feed-forward, each normed before."""
    eps = config.rms_norm_eps
    normed_TD = rms_norm(tap("in", x_TD), w.input_layernorm, eps)
    if layer.kind == "full":
        mixed_TD = attention(normed_TD, w, layer, eps, rope, memory, span)
    else:
        mixed_TD = delta_net(normed_TD, w, layer, eps, memory)
    x_TD = x_TD + tap("attn", mixed_TD)
    m_TD = feed_forward(rms_norm(x_TD, w.post_attention_layernorm, eps), w, config, tap)
    return tap("out", x_TD + tap("mlp", m_TD))


def embed(params, config, ids_T, dtype):
    """Embeddings of the tokens -> [T, D]."""
    return gather(params.embed_tokens, ids_T, dtype)


def rope_at(config, positions_T, dtype):
    """(cos, sin) at these positions."""
    return rope_table(positions_T, rope_frequencies(config.rope, config.rotary_dim), dtype)


def final_norm(params, config, x_TD):
    """What the last layer left, normed: `hidden_TD` of an Output."""
    return rms_norm(x_TD, params.norm, config.rms_norm_eps)


def head(params, config, hidden_TD):
    """Logits [T, V] of hidden states after their final norm."""
    return matmul(hidden_TD, params.lm_head)


def forward(params, config, cache, dtype, tap, last, ids_T, positions_T):
    """As gemma4.forward, and third the hidden states before the final norm, which the cache notes for the MTP layer."""
    rope, span = rope_at(config, positions_T, dtype), seen(positions_T)
    x_TD = tap("embed", embed(params, config, ids_T, dtype))
    for i, (layer, w, memory) in enumerate(zip(config.layers, params.layers, cache.layers)):
        x_TD = decoder_layer(x_TD, w, layer, config, rope, memory, span, tap.within(f"layer.{i}"))
    hidden_TD = tap("final_norm", final_norm(params, config, x_TD))
    rows = hidden_TD if last is None else hidden_TD[max(0, len(ids_T) - last) :]
    return tap("logits", head(params, config, rows)), hidden_TD, x_TD


def new_cache(config, dtype, capacity, fingerprint, device=None, kv=None, params=None):
    """An empty cache for `capacity` tokens (None: the model's context, grown as needed); kv: see kv_storage.parse.

    No key can be made of its value here. A state is kept in the run's dtype whatever kv is: it sums up the whole text.
    """
    storage, attention = parse(kv, dtype)[0], config.attention
    if device is not None:
        return _device_cache(config, dtype, capacity, fingerprint, device, (kv or dtype.name).removesuffix(VALUES_ONLY))
    layers = [
        FullKV(layer.kv_heads, layer.head_dim, dtype, capacity or 0, storage)
        if layer.kind == "full"
        else DeltaState(layer.key_heads, layer.value_heads, layer.key_dim, layer.value_dim, layer.kernel, dtype)
        for layer in config.layers
    ]
    drafter = DrafterKV(
        FullKV(attention.kv_heads, attention.head_dim, dtype, storage=storage), config.hidden_size, dtype
    )
    return Cache(layers, capacity or config.max_position_embeddings, fingerprint, drafter)


def _device_cache(config, dtype, capacity, fingerprint, device, storage):
    """The same on a device."""
    layers = [
        DeviceKV(device, layer.kv_heads, layer.head_dim, storage, capacity or 0)
        if layer.kind == "full"
        else DeviceState(device, layer.key_heads, layer.value_heads, layer.key_dim, layer.value_dim, layer.kernel)
        for layer in config.layers
    ]
    kv = DeviceKV(device, config.attention.kv_heads, config.attention.head_dim, storage, capacity or 0)
    drafter = DrafterKV(kv, config.hidden_size, dtype)
    return DeviceCache(device, layers, capacity or config.max_position_embeddings, fingerprint, drafter)
