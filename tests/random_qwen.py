"""Random tiny Qwen 3.5 checkpoints in the published layout, dense and with experts, most with their MTP layer.

As in random_models, no code of the package is used, and a seed gives the same bytes on every machine.
"""

import re
from math import sqrt
from pathlib import Path

import numpy as np
from random_models import (
    DTYPES,
    QUANTIZATION,
    bfloat16_bits,
    bfloat16_value,
    encode,
    linear,
    norm,
    pack_int4,
    uniform,
    write,
)
from random_sizes import split_experts, unpack_int4

LINEAR, FULL = "linear_attention", "full_attention"


def layers(pattern):
    """'llf' -> the list of layer types."""
    return [LINEAR if letter == "l" else FULL for letter in pattern]


def rope(theta=1e4, partial=0.25, section=(1, 1, 0)):
    """partial None: left to the default, a quarter."""
    parameters = {"rope_type": "default", "rope_theta": theta, "mrope_interleaved": True}
    parameters |= {"mrope_section": list(section)}
    return parameters if partial is None else parameters | {"partial_rotary_factor": partial}


# name -> what write_model is called with, the length of the prompt, a seed.
# Prompts end before, at and after the chunks of 64 that transformers reads a linear layer in.
CONFIGS = {
    "dense": dict(
        seed=1, tokens=150,
        model=dict(
            layer_types=layers("lllflllf"), full_attention_interval=4, hidden_size=48, intermediate_size=72,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
            linear_key_head_dim=8, linear_value_head_dim=8, vocab_size=101, rope_parameters=rope(), store="BF16",
            exact=("A_log", "linear_attn.norm.weight"), shards=2, visual=True,
        ),
    ),
    "interval": dict(
        seed=2, tokens=65,
        model=dict(
            num_hidden_layers=6, full_attention_interval=3, hidden_size=40, intermediate_size=60,
            num_attention_heads=6, num_key_value_heads=3, head_dim=12, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=12, linear_value_head_dim=20, vocab_size=90, tie_word_embeddings=True, gain=0.8,
            rope_parameters=rope(1e3, 0.5, (1, 1, 1)), layout="bare",
        ),
    ),
    "three_to_one": dict(
        seed=3, tokens=64,
        model=dict(
            num_hidden_layers=4, hidden_size=56, intermediate_size=50, num_attention_heads=6, num_key_value_heads=1,
            head_dim=24, linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16,
            linear_value_head_dim=10, vocab_size=83, rope_parameters=rope(1e5, None, (1, 1, 1)), shards=3,
        ),
    ),
    "published_heads": dict(
        seed=4, tokens=63,
        model=dict(
            layer_types=layers("llf"), hidden_size=40, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=1, head_dim=256, linear_num_key_heads=1, linear_num_value_heads=3,
            linear_key_head_dim=128, linear_value_head_dim=128, vocab_size=70,
            rope_parameters=rope(1e7, 0.25, (11, 11, 10)), store="F16",
        ),
    ),
    "kernel_3": dict(
        seed=5, tokens=130,
        model=dict(
            layer_types=layers("flfll"), hidden_size=64, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=4, head_dim=8, linear_num_key_heads=3, linear_num_value_heads=6, linear_key_head_dim=10,
            linear_value_head_dim=14, linear_conv_kernel_dim=3, vocab_size=97, tie_word_embeddings=True, gain=0.8,
            rope_parameters=rope(500.0, 1.0, (2, 1, 1)), rms_norm_eps=1e-5, store="BF16", layout="bare",
        ),
    ),
    "int4": dict(
        seed=6, tokens=100,
        model=dict(
            layer_types=layers("lllfllf"), hidden_size=64, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=6,
            linear_key_head_dim=16, linear_value_head_dim=16, vocab_size=88, rope_parameters=rope(1e4, 0.5, (2, 1, 1)),
            store="BF16", int4=True,
        ),
    ),
    "moe": dict(
        seed=7, tokens=129,
        model=dict(
            layer_types=layers("lllflf"), hidden_size=48, moe_intermediate_size=20,
            shared_expert_intermediate_size=28, num_experts=12, num_experts_per_tok=3, num_attention_heads=4,
            num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
            linear_value_head_dim=12, vocab_size=93, rope_parameters=rope(), store="BF16",
        ),
    ),
    "moe_single": dict(
        seed=8, tokens=65,
        model=dict(
            layer_types=layers("lflfl"), hidden_size=44, moe_intermediate_size=16, shared_expert_intermediate_size=16,
            num_experts=7, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=20,
            linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=14, linear_value_head_dim=6,
            linear_conv_kernel_dim=2, vocab_size=75, tie_word_embeddings=True, gain=0.8,
            rope_parameters=rope(2e3, 0.5, (2, 2, 1)), layout="bare", single=True,
        ),
    ),
    "moe_all_experts": dict(
        seed=9, tokens=90,
        model=dict(
            num_hidden_layers=4, hidden_size=52, moe_intermediate_size=24, shared_expert_intermediate_size=10,
            num_experts=5, num_experts_per_tok=5, num_attention_heads=8, num_key_value_heads=2, head_dim=10,
            linear_num_key_heads=1, linear_num_value_heads=3, linear_key_head_dim=16, linear_value_head_dim=16,
            vocab_size=81, rope_parameters=rope(1e4, 1.0, (2, 2, 1)), store="F16", shards=3,
        ),
    ),
    "moe_one_expert": dict(
        seed=10, tokens=64,
        model=dict(
            num_hidden_layers=4, full_attention_interval=2, hidden_size=48, moe_intermediate_size=30,
            shared_expert_intermediate_size=22, num_experts=6, num_experts_per_tok=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=14, linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=6,
            linear_value_head_dim=9, linear_conv_kernel_dim=5, vocab_size=67, tie_word_embeddings=True, gain=0.8,
            rope_parameters=rope(300.0, 1.0, (3, 2, 2)), visual=True, single=True, store="BF16",
        ),
    ),
    "moe_int4": dict(
        seed=11, tokens=66,
        model=dict(
            layer_types=layers("llflf"), hidden_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=64,
            num_experts=8, num_experts_per_tok=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=24,
            vocab_size=95, rope_parameters=rope(1e4, 0.25, (1, 1, 1)), store="BF16", int4=True, single=True, shards=2,
        ),
    ),
    "moe_no_mtp": dict(
        seed=12, tokens=40,
        model=dict(
            layer_types=layers("lff"), hidden_size=36, moe_intermediate_size=18, shared_expert_intermediate_size=26,
            num_experts=9, num_experts_per_tok=4, num_attention_heads=3, num_key_value_heads=3, head_dim=8,
            linear_num_key_heads=1, linear_num_value_heads=1, linear_key_head_dim=18, linear_value_head_dim=22,
            vocab_size=78, rope_parameters=rope(1e4, 0.5, (1, 1, 0)), layout="bare", mtp=False,
        ),
    ),
}  # fmt: skip
WITH_MTP = [name for name in CONFIGS if CONFIGS[name]["model"].get("mtp", True)]


def prompt(name, seed=None):
    """The prompt of a configuration: random token ids."""
    config = CONFIGS[name]
    random = np.random.RandomState(3000 + (config["seed"] if seed is None else seed))
    return (random.random_sample(config["tokens"]) * config["model"]["vocab_size"]).astype(int).tolist()


def write_qwen(name, folder, seed=None, **overrides):
    """Write the checkpoint of CONFIGS[name]; -> its folder."""
    config = CONFIGS[name]
    write_model(folder, config["seed"] if seed is None else seed, **config["model"] | overrides)
    return Path(folder)


def write_model(folder, seed, *, layout="nested", mtp=True, visual=False, single=False, int4=False, store="F32",
                shards=1, exact=(), gain=0.5, repeat=0.8, twin=False, **overrides):  # fmt: skip
    """Write a random checkpoint; -> its config.

    layout: "nested" (with a text_config) or "bare" (the text model alone). single: one tensor for each expert. int4:
    matrices packed, but those that releases keep. exact: endings of names stored in float32 all the same. gain: scale
    of what each layer adds, hence how little the input shows in the output; repeat: of the last token's embedding in
    the MTP layer's input. With both in balance the model likes to go from one token to a certain next one, and the MTP
    layer bets on that. twin: the same numbers, but all in plain float32, for readers that know no other layout.
    """
    text = text_config(**overrides)
    random, prefix = np.random.RandomState(seed), "model.language_model." if layout == "nested" else "model."
    tensors = {prefix + name: value for name, value in body(random, text, gain).items()}
    if not text["tie_word_embeddings"]:
        tensors["lm_head.weight"] = np.roll(tensors[prefix + "embed_tokens.weight"], 1, axis=0)  # t is followed by t+1
    if mtp:
        tensors |= {f"mtp.{name}": value for name, value in mtp_layer(random, text, gain, repeat).items()}
    if visual:
        tensors["model.visual.patch_embed.proj.weight"] = np.ones((6, 3, 2, 4, 4), np.float32)
        tensors["model.visual.merger.norm.weight"] = np.ones(6, np.float32)
    if single:
        tensors = split_experts(tensors)
    if twin:
        tensors = {name: as_stored(name, value, int4, store, exact) for name, value in tensors.items()}
        int4, store = False, "F32"
    config = (outer_config if layout == "nested" else bare_config)(text)
    if int4:
        config["quantization_config"] = QUANTIZATION | {"ignore": IGNORE}
    config["dtype"] = DTYPES[store]
    encoded = {}
    for name, value in tensors.items():
        encoded |= encode_one(name, value, int4, store, exact)
    write(folder, config, encoded, shards)
    return config


# Configuration files -------------------------------------------------------------------------------------------------

IGNORE = [
    "lm_head", "re:.*embed_tokens.*", "re:.*visual.*", "re:.*conv1d.*", "re:.*in_proj_a.*", "re:.*in_proj_b.*",
    "re:.*mlp.gate$", "re:.*shared_expert_gate.*", "re:^mtp.*",
]  # fmt: skip


def text_config(**overrides):
    kind = "qwen3_5_moe_text" if "num_experts" in overrides else "qwen3_5_text"
    text = {
        "model_type": kind, "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "hidden_act": "silu", "initializer_range": 0.02, "linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096, "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True, "eos_token_id": 2, **overrides,
    }  # fmt: skip
    if "layer_types" in text:
        text["num_hidden_layers"] = len(text["layer_types"])
    return text


def layer_types(text):
    """The kind of each layer; unless listed, every fourth (or `full_attention_interval`-th) has full attention."""
    if "layer_types" in text:
        return text["layer_types"]
    interval = text.get("full_attention_interval", 4)
    return layers("f" if i % interval == 0 else "l" for i in range(1, text["num_hidden_layers"] + 1))


def bare_config(text):
    return text | {"architectures": ["Qwen3_5MoeForCausalLM" if "num_experts" in text else "Qwen3_5ForCausalLM"]}


def outer_config(text):
    kind = "Qwen3_5Moe" if "num_experts" in text else "Qwen3_5"
    model_type = text["model_type"].removesuffix("_text")
    vision = {
        "model_type": model_type, "depth": 1, "hidden_size": 6, "intermediate_size": 8, "num_heads": 1, "patch_size": 4,
        "out_hidden_size": text["hidden_size"], "num_position_embeddings": 4,
    }  # fmt: skip
    return {
        "architectures": [f"{kind}ForConditionalGeneration"], "model_type": model_type, "text_config": text,
        "vision_config": vision, "tie_word_embeddings": text["tie_word_embeddings"], "image_token_id": 248056,
        "video_token_id": 248057, "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    }  # fmt: skip


# Weights -------------------------------------------------------------------------------------------------------------


def centred(random, size, mean=1.0):
    """Weights of a norm that multiplies by 1 + weight."""
    return norm(random, size, mean) - np.float32(1)


def body(random, text, gain):
    """Embedding, layers and final norm, under names that start at "layers." and the like."""
    hidden = text["hidden_size"]
    tensors = {"embed_tokens.weight": uniform(random, (text["vocab_size"], hidden), 5 / sqrt(hidden))}
    for i, kind in enumerate(layer_types(text)):
        tensors |= {f"layers.{i}.{name}": value for name, value in layer(random, text, kind, gain).items()}
    return tensors | {"norm.weight": centred(random, hidden)}


def mtp_layer(random, text, gain, repeat):
    """The MTP layer, which shares embedding and head with the body."""
    hidden = text["hidden_size"]
    again = np.eye(hidden, 2 * hidden, dtype=np.float32) * np.float32(repeat)  # the embedding comes first
    tensors = {"fc.weight": linear(random, hidden, 2 * hidden) + again}
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        tensors[f"{name}.weight"] = centred(random, hidden)
    return tensors | {f"layers.0.{name}": value for name, value in layer(random, text, FULL, gain).items()}


def layer(random, text, kind, gain):
    mixer, name = (delta_net, "linear_attn") if kind == LINEAR else (attention, "self_attn")
    tensors = {f"{name}.{part}": value for part, value in mixer(random, text, gain).items()}
    feed_forward = experts if "num_experts" in text else mlp
    tensors |= {f"mlp.{part}": value for part, value in feed_forward(random, text, gain).items()}
    for part in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{part}.weight"] = centred(random, text["hidden_size"])
    return tensors


def attention(random, text, gain):
    """Gated attention; scores have a spread of about 3."""
    hidden, width = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * width, text["num_key_value_heads"] * width
    return {
        "q_proj.weight": linear(random, 2 * queries, hidden),  # of each head: query, then gate
        "k_proj.weight": linear(random, keys, hidden),
        "v_proj.weight": linear(random, keys, hidden),
        "o_proj.weight": 2 * gain * linear(random, hidden, queries),
        "q_norm.weight": centred(random, width, sqrt(3)),
        "k_norm.weight": centred(random, width, sqrt(3)),
    }


def delta_net(random, text, gain):
    """Gated delta rule; of its heads some forget at once and others within hundreds of tokens."""
    hidden, heads, width = text["hidden_size"], text["linear_num_value_heads"], text["linear_value_head_dim"]
    keys, values, kernel = (
        text["linear_num_key_heads"] * text["linear_key_head_dim"],
        heads * width,
        "linear_conv_kernel_dim",
    )
    mixed = 2 * keys + values
    pace = (np.arange(heads) + random.random_sample(heads)) / heads
    return {
        "in_proj_qkv.weight": linear(random, mixed, hidden),
        "in_proj_z.weight": linear(random, values, hidden),
        "in_proj_b.weight": 2 * linear(random, heads, hidden),
        "in_proj_a.weight": linear(random, heads, hidden),
        "conv1d.weight": uniform(random, (mixed, 1, text[kernel]), 1 / sqrt(text[kernel])),
        "A_log": (6 * pace - 4).astype(np.float32),
        "dt_bias": uniform(random, heads, 1.0, -1.0),
        "norm.weight": norm(random, width),
        "out_proj.weight": gain * linear(random, hidden, values),
    }


def mlp(random, text, gain, inner=None):
    hidden, inner = text["hidden_size"], inner or text["intermediate_size"]
    return {
        "gate_proj.weight": linear(random, inner, hidden),
        "up_proj.weight": linear(random, inner, hidden),
        "down_proj.weight": 2 * gain * linear(random, hidden, inner),
    }


def experts(random, text, gain):
    """Router, experts and the shared one. Scores have a spread of about 2, so that tokens differ in their choice."""
    hidden, count, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    shared = mlp(random, text, gain, text["shared_expert_intermediate_size"])
    return {
        "gate.weight": 2 * linear(random, count, hidden),
        "experts.gate_up_proj": uniform(random, (count, 2 * inner, hidden), 1 / sqrt(hidden)),
        "experts.down_proj": uniform(random, (count, hidden, inner), 3 * gain / sqrt(inner)),
        "shared_expert_gate.weight": 2 * linear(random, 1, hidden),
        **{f"shared_expert.{name}": value for name, value in shared.items()},
    }


# Storage -------------------------------------------------------------------------------------------------------------

MATRIX = re.compile(
    r"\.(q_proj|k_proj|v_proj|o_proj|in_proj_qkv|in_proj_z|out_proj|gate_proj|up_proj|down_proj)\.weight$"
)


def is_packed(name):
    return MATRIX.search(name) and not name.startswith("mtp.")


def encode_one(name, value, int4, store, exact):
    if int4 and is_packed(name):
        words, scale_bits = pack_int4(value)
        shape = np.array(value.shape, np.int64)
        return {
            f"{name}_packed": ("I32", words),
            f"{name}_scale": ("BF16", scale_bits),
            f"{name}_shape": ("I64", shape),
        }
    return encode({name: value}, "F32" if name.endswith(tuple(exact)) else store, False)


def as_stored(name, value, int4, store, exact):
    """The float32 numbers that a tensor comes out as, after it was stored."""
    if int4 and is_packed(name):
        return unpack_int4(*pack_int4(value))
    if name.endswith(tuple(exact)) or store == "F32":
        return value
    return value.astype(np.float16).astype(np.float32) if store == "F16" else bfloat16_value(bfloat16_bits(value))
