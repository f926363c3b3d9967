"""Random tiny checkpoints in the shape of every Gemma 4 size, and of combinations that no release has.

What random_models leaves out: per-layer embeddings, shared KV, double-wide feed-forwards, experts, the unified
layout, centroid heads. As there, no code of the package is used, and a seed gives the same bytes on every machine.
"""

from functools import reduce
from math import sqrt
from pathlib import Path

import numpy as np
from random_models import (
    DTYPES,
    GROUP,
    QUANTIZATION,
    SHARED_WITH_TARGET,
    bfloat16_bits,
    bfloat16_value,
    encode,
    global_sizes,
    layer,
    layer_stack,
    layers,
    linear,
    norm,
    outer_config,
    pack_int4,
    rope,
    text_config,
    uniform,
    write,
)

NO_UNIFIED = (  # fields that the unified text config does not have
    "hidden_size_per_layer_input", "vocab_size_per_layer_input", "enable_moe_block", "num_experts", "top_k_experts",
    "moe_intermediate_size",
)  # fmt: skip
MATRICES = ("_proj.", "per_layer_input_gate.", "per_layer_projection.", "per_layer_model_projection.")
COMMON = dict(hidden_size=64, intermediate_size=48, final_logit_softcapping=30.0, rope_parameters=rope())
EXPERTS = dict(enable_moe_block=True, num_experts=12, top_k_experts=3, moe_intermediate_size=24)

# The attention of each size: heads, window, and what is shared.
E2B = COMMON | dict(
    layer_types=layers("sfsfssf"), num_attention_heads=8, num_key_value_heads=1, num_global_key_value_heads=None,
    head_dim=16, global_head_dim=32, sliding_window=7, attention_k_eq_v=False, vocab_size=96, num_kv_shared_layers=3,
    hidden_size_per_layer_input=12, use_double_wide_mlp=True,
)  # fmt: skip
E4B = COMMON | dict(
    layer_types=layers("ssfsfssf"), num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=None,
    head_dim=8, global_head_dim=20, sliding_window=9, attention_k_eq_v=False, vocab_size=90, num_kv_shared_layers=4,
    hidden_size_per_layer_input=20,
)  # fmt: skip
LARGE = COMMON | dict(
    layer_types=layers("ssfssf"), num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=1,
    head_dim=16, global_head_dim=32, sliding_window=12, attention_k_eq_v=True, vocab_size=85,
)  # fmt: skip
CENTROIDS = dict(centroids=(24, 5), num_attention_heads=4, hidden_size=32)

# name -> what write_target is called with, the assistant's own overrides, the length of the prompt, a seed.
SIZES = {
    "e2b": dict(seed=1, tokens=31, target=E2B, assistant=CENTROIDS),
    "e2b_int4": dict(
        seed=2, tokens=26, assistant=CENTROIDS,
        target=E2B | dict(hidden_size_per_layer_input=32, intermediate_size=64, int4=True, store="BF16", unused=False),
    ),
    "e4b": dict(seed=3, tokens=38, target=E4B, assistant=CENTROIDS | dict(centroids=(9, 2))),
    "e4b_qat": dict(
        seed=4, tokens=29, assistant=CENTROIDS | dict(centroids=(45, 45)),
        target=E4B | dict(unused=False, store="BF16", layout="bare"),
    ),
    "26b": dict(seed=5, tokens=40, target=LARGE | EXPERTS, assistant=dict(num_attention_heads=4)),
    "26b_single": dict(seed=6, tokens=27, target=LARGE | EXPERTS | dict(single=True), assistant={}),
    "26b_int4": dict(
        seed=7, tokens=33, assistant={},
        target=LARGE | EXPERTS | dict(
            intermediate_size=64, moe_intermediate_size=32, int4=True, single=True, store="BF16",
        ),
    ),
    "12b": dict(
        seed=8, tokens=42, assistant=dict(unified=True),
        target=LARGE | dict(layer_types=layers("sssfsf"), unified=True),
    ),
    "12b_int4": dict(
        seed=9, tokens=30, assistant=dict(unified=True, centroids=(17, 3)),
        target=LARGE | dict(intermediate_size=64, unified=True, int4=True, store="BF16"),
    ),
    "sharing_alone": dict(
        seed=10, tokens=30, assistant=dict(layer_types=layers("sf")),
        target=LARGE | dict(layer_types=layers("fssfssff"), num_kv_shared_layers=5, use_double_wide_mlp=True),
    ),
    "full_shared": dict(
        seed=11, tokens=25, assistant=dict(layer_types=layers("ssf")),
        target=E4B | dict(layer_types=layers("sfsff"), num_kv_shared_layers=1, hidden_size_per_layer_input=0),
    ),
    "inputs_alone": dict(
        seed=12, tokens=30, assistant={},
        target=LARGE | dict(layer_types=layers("ssfsf"), hidden_size_per_layer_input=7),
    ),
    "everything": dict(
        seed=13, tokens=36, assistant=CENTROIDS | dict(centroids=(17, 4)),
        target=LARGE | EXPERTS | dict(
            layer_types=layers("ssfsfssf"), num_kv_shared_layers=4, hidden_size_per_layer_input=10,
            use_double_wide_mlp=True, num_experts=5, top_k_experts=5,
        ),
    ),
    "everything_int4": dict(
        seed=14, tokens=36, assistant=CENTROIDS | dict(centroids=(5, 1)),
        target=LARGE | EXPERTS | dict(
            layer_types=layers("sfsssf"), num_kv_shared_layers=3, hidden_size_per_layer_input=32, intermediate_size=96,
            use_double_wide_mlp=True, top_k_experts=1, moe_intermediate_size=32, int4=True, single=True, store="BF16",
            unused=False, shards=2,
        ),
    ),
}  # fmt: skip


def prompt(name, seed=None):
    """The prompt of a size: random token ids."""
    size = SIZES[name]
    random = np.random.RandomState(2000 + (size["seed"] if seed is None else seed))
    return (random.random_sample(size["tokens"]) * size["target"]["vocab_size"]).astype(int).tolist()


def write_pair(name, folder, seed=None, **overrides):
    """Write the target and the assistant of SIZES[name]; -> (target folder, assistant folder)."""
    size, folder = SIZES[name], Path(folder)
    seed = size["seed"] if seed is None else seed
    config = write_target(folder / "target", seed, **size["target"] | overrides)
    write_assistant(folder / "assistant", config, seed + 7000, **size["assistant"])
    return folder / "target", folder / "assistant"


def write_target(folder, seed, *, layout="nested", unified=False, unused=True, single=False, int4=False, store="F32",
                 shards=1, echo=0.15, twin=False, **overrides):  # fmt: skip
    """Write a random target; -> its config.

    unused: carry the keys and values of layers that share, as base checkpoints do. single: one tensor for each expert.
    int4: every matrix but the embeddings and the router packed, as compressed-tensors exports are. twin: the same
    numbers, but all in plain float32 and the experts in one tensor, for readers that know no other layout.
    """
    text = text_config(**overrides)
    tensors = target_tensors(np.random.RandomState(seed), text, echo)
    if not unused:
        tensors = without_unused(tensors, text)
    if twin:
        tensors = {name: as_stored(name, value, int4, store) for name, value in tensors.items()}
        single, int4, store = False, False, "F32"
    if single:
        tensors = split_experts(tensors)
    prefix = "model.language_model." if layout == "nested" else "model."
    tensors = {prefix + name: value for name, value in tensors.items()}
    config = whole_config(text, layout, unified)
    if int4:
        config["quantization_config"] = QUANTIZATION
    config["dtype"] = DTYPES[store]
    write(folder, config, encode_matrices(tensors, store) if int4 else encode(tensors, store, False), shards)
    return config


def whole_config(text, layout, unified):
    if unified:
        text = {key: value for key, value in text.items() if key not in NO_UNIFIED} | {
            "model_type": "gemma4_unified_text"
        }
        return outer_config(text) | {
            "model_type": "gemma4_unified", "architectures": ["Gemma4UnifiedForConditionalGeneration"],
        }  # fmt: skip
    return outer_config(text) if layout == "nested" else text | {"architectures": ["Gemma4ForCausalLM"]}


def write_assistant(folder, target_config, seed, *, centroids=None, unified=False, repeat=0.0, **overrides):
    """Write a random assistant that fits the target of `target_config`; -> its config.

    centroids: (how many, how many are chosen) of a centroid head. repeat: as in random_models.write_assistant.
    """
    target = target_config.get("text_config", target_config)
    types = overrides.pop("layer_types", layers("sssf"))
    text = text_config(**{key: target[key] for key in SHARED_WITH_TARGET} | global_sizes(target) | {
        "layer_types": types, "hidden_size": 48, "intermediate_size": 40, "final_logit_softcapping": None,
        "vocab_size_per_layer_input": 0, "num_kv_shared_layers": len(types),
        "num_attention_heads": target["num_attention_heads"],
    } | overrides)  # fmt: skip
    backbone, hidden, random = target["hidden_size"], text["hidden_size"], np.random.RandomState(seed)
    stack = layer_stack(random, text, kv_heads=None, echo=0.7)
    tensors = {f"model.{name}": value for name, value in stack.items()}
    again = np.eye(hidden, 2 * backbone, dtype=np.float32) * np.float32(repeat)
    tensors["pre_projection.weight"] = linear(random, hidden, 2 * backbone) + again
    tensors["post_projection.weight"] = linear(random, backbone, hidden)
    encoded = encode(tensors, "F32", False)
    if centroids:
        encoded |= centroid_head(random, centroids[0], stack["embed_tokens.weight"])
    count, top_k = centroids or (2048, 32)
    if unified:
        text = whole_config(text, "nested", unified)["text_config"]
    kind = "Gemma4UnifiedAssistant" if unified else "Gemma4Assistant"
    config = {
        "architectures": [f"{kind}ForCausalLM"], "model_type": "gemma4_unified_assistant" if unified else
        "gemma4_assistant", "backbone_hidden_size": backbone, "use_ordered_embeddings": centroids is not None,
        "num_centroids": count, "centroid_intermediate_top_k": top_k, "tie_word_embeddings": True, "dtype": "float32",
        "text_config": text,
    }  # fmt: skip
    write(folder, config, encoded, shards=1)
    return config


# Weights -------------------------------------------------------------------------------------------------------------


def first_shared(text):
    return len(text["layer_types"]) - text["num_kv_shared_layers"]


def target_tensors(random, text, echo):
    """Everything a base checkpoint carries, under names that start at "layers." and the like."""
    hidden, inner, width = text["hidden_size"], text["intermediate_size"], text["hidden_size_per_layer_input"]
    tensors = {"embed_tokens.weight": uniform(random, (text["vocab_size"], hidden), 5 / sqrt(hidden))}
    for i, kind in enumerate(text["layer_types"]):
        wide = 2 if text["use_double_wide_mlp"] and i >= first_shared(text) else 1
        part = layer(random, text | {"intermediate_size": wide * inner}, kind, text["num_key_value_heads"])
        if width:
            part |= input_tensors(random, hidden, width)
        if text["enable_moe_block"]:
            part |= expert_tensors(random, text)
        part["layer_scalar"] = uniform(random, 1, 0.15, 0.85) * np.float32(echo if i == 0 else 1)
        tensors |= {f"layers.{i}.{name}": value for name, value in part.items()}
    if width:
        columns = len(text["layer_types"]) * width
        tensors["embed_tokens_per_layer.weight"] = uniform(random, (text["vocab_size"], columns), 1 / sqrt(width))
        tensors["per_layer_model_projection.weight"] = linear(random, columns, hidden)
        tensors["per_layer_projection_norm.weight"] = norm(random, width)
    return tensors | {"norm.weight": norm(random, hidden)}


def input_tensors(random, hidden, width):
    """A layer's own part of the per-layer embeddings."""
    return {
        "per_layer_input_gate.weight": linear(random, width, hidden),
        "per_layer_projection.weight": linear(random, hidden, width),
        "post_per_layer_input_norm.weight": norm(random, hidden),
    }


def expert_tensors(random, text):
    """Router and experts of a layer. Scores have a spread of about 2, so that tokens differ in what they choose."""
    hidden, count, inner = text["hidden_size"], text["num_experts"], text["moe_intermediate_size"]
    tensors = {
        "router.proj.weight": linear(random, count, hidden),
        "router.scale": norm(random, hidden, 2 * sqrt(hidden)),
        "router.per_expert_scale": norm(random, count),
        "experts.gate_up_proj": uniform(random, (count, 2 * inner, hidden), 1 / sqrt(hidden)),
        "experts.down_proj": uniform(random, (count, hidden, inner), 1 / sqrt(inner)),
    }
    for name in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
        tensors[f"{name}.weight"] = norm(random, hidden)
    return tensors


def centroid_head(random, count, embedding_VD):
    """A random partition of the vocabulary, each cluster's centroid near the mean of its embeddings."""
    ordering_V = np.argsort(random.random_sample(len(embedding_VD)), kind="stable")
    clusters_CND = embedding_VD[ordering_V].reshape(count, -1, embedding_VD.shape[1])
    centroids_CD = reduce(np.add, clusters_CND.swapaxes(0, 1), uniform(random, (count, embedding_VD.shape[1]), 0.1))
    return {
        "masked_embedding.centroids.weight": ("F32", centroids_CD),
        "masked_embedding.token_ordering": ("I64", ordering_V.astype(np.int64)),
    }


# Layouts -------------------------------------------------------------------------------------------------------------


def is_unused(name, text):
    """Whether a tensor holds keys or values of a layer that borrows them."""
    parts = name.split(".")
    return parts[0] == "layers" and int(parts[1]) >= first_shared(text) and parts[-2] in ("k_proj", "v_proj", "k_norm")


def without_unused(tensors, text):
    return {name: value for name, value in tensors.items() if not is_unused(name, text)}


def split_experts(tensors):
    """`experts.gate_up_proj` and `experts.down_proj` -> one tensor for each expert and matrix."""
    split = {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".")
        if not stem.endswith("experts"):
            split[name] = value
            continue
        parts = {"down_proj": value}
        if last == "gate_up_proj":
            half = value.shape[1] // 2
            parts = {"gate_proj": value[:, :half], "up_proj": value[:, half:]}
        for part, stacked in parts.items():
            split |= {f"{stem}.{e}.{part}.weight": np.ascontiguousarray(one) for e, one in enumerate(stacked)}
    return split


def encode_matrices(tensors, store):
    """As random_models.encode, with every matrix packed that compressed-tensors packs."""
    encoded = {}
    for name, value in tensors.items():
        if any(matrix in name for matrix in MATRICES):
            words, scale_bits = pack_int4(value)
            encoded[f"{name}_packed"], encoded[f"{name}_scale"] = ("I32", words), ("BF16", scale_bits)
            encoded[f"{name}_shape"] = ("I64", np.array(value.shape, np.int64))
        else:
            encoded |= encode({name: value}, store, False)
    return encoded


def as_stored(name, value, int4, store):
    """The float32 numbers that a tensor comes out as, after it was stored."""
    if int4 and (any(matrix in name for matrix in MATRICES) or ".experts." in name):
        return unpack_int4(*pack_int4(value.reshape(-1, value.shape[-1]))).reshape(value.shape)
    return bfloat16_value(bfloat16_bits(value)) if store == "BF16" else value


def unpack_int4(words, scale_bits):
    """What pack_int4 packed -> float32 [R, C]."""
    codes = (words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).astype(np.float32) - 8
    groups = codes.reshape(*scale_bits.shape, GROUP) * bfloat16_value(scale_bits)[..., None]
    return groups.reshape(len(words), -1)
