"""Random tiny Gemma 4 checkpoints in the published layout, written with NumPy alone.

The writer shares no code with the package: a mistake would have to be made twice to go unseen. Every number comes
from `RandomState.random_sample` (a frozen stream) by operations that IEEE 754 rounds exactly, so a seed gives the same
bytes on every machine.
"""

import hashlib
import json
from math import sqrt
from pathlib import Path

import numpy as np

GROUP = 32
SLIDING, FULL = "sliding_attention", "full_attention"


def layers(pattern):
    """'ssf' -> the list of layer types."""
    return [SLIDING if letter == "s" else FULL for letter in pattern]


def rope(sliding_theta=1e4, full_theta=1e6, partial=0.25):
    return {
        SLIDING: {"rope_type": "default", "rope_theta": sliding_theta},
        FULL: {"rope_type": "proportional", "rope_theta": full_theta, "partial_rotary_factor": partial},
    }


# name -> what write_target is called with, the assistant's own overrides, the length of the prompt, a seed.
# Windows 4-64, 3-8 layers, groups 1-8, heads up to the published widths, sizes that leave remainders in every tiling,
# all storage layouts.
CONFIGS = {
    "two_kinds": dict(
        seed=1, tokens=32, assistant=dict(num_attention_heads=4),
        target=dict(
            layer_types=layers("sfsf"), hidden_size=64, intermediate_size=96, num_attention_heads=4,
            num_key_value_heads=2, num_global_key_value_heads=1, head_dim=16, global_head_dim=32, sliding_window=8,
            attention_k_eq_v=True, vocab_size=101, final_logit_softcapping=30.0, rope_parameters=rope(),
        ),
    ),
    "five_to_one": dict(
        seed=2, tokens=61, assistant=dict(hidden_size=40, num_attention_heads=6),
        target=dict(
            layer_types=layers("sssssf"), hidden_size=96, intermediate_size=130, num_attention_heads=6,
            num_key_value_heads=3, num_global_key_value_heads=1, head_dim=8, global_head_dim=16, sliding_window=16,
            attention_k_eq_v=True, vocab_size=129, final_logit_softcapping=30.0, rope_parameters=rope(), shards=3,
            use_bidirectional_attention="vision",
        ),
    ),
    "one_kv_head": dict(
        seed=3, tokens=16, assistant=dict(num_attention_heads=2, layer_types=layers("sf")),
        target=dict(
            layer_types=layers("ssf"), hidden_size=72, intermediate_size=65, num_attention_heads=8,
            num_key_value_heads=1, num_global_key_value_heads=2, head_dim=12, global_head_dim=20, sliding_window=4,
            attention_k_eq_v=True, vocab_size=67, final_logit_softcapping=12.0, layout="bare",
            rope_parameters=rope(500.0, 2e3, 0.35),
        ),
    ),
    "separate_v": dict(
        seed=4, tokens=160, assistant=dict(layer_types=layers("sssf")),
        target=dict(
            layer_types=layers("ssfsf"), hidden_size=48, intermediate_size=80, num_attention_heads=4,
            num_key_value_heads=4, num_global_key_value_heads=None, head_dim=16, global_head_dim=24, sliding_window=64,
            attention_k_eq_v=False, vocab_size=83, final_logit_softcapping=30.0, rope_parameters=rope(1e3, 1e5, 0.5),
        ),
    ),
    "eight_layers": dict(
        seed=5, tokens=40, assistant=dict(hidden_size=56),
        target=dict(
            layer_types=layers("sssfsssf"), hidden_size=64, intermediate_size=72, num_attention_heads=6,
            num_key_value_heads=2, num_global_key_value_heads=3, head_dim=10, global_head_dim=14, sliding_window=13,
            attention_k_eq_v=True, vocab_size=97, final_logit_softcapping=20.0, rope_parameters=rope(1e4, 1e6, 1.0),
            layout="bare", per_layer=True, store="F16",
        ),
    ),
    "no_softcap": dict(
        seed=6, tokens=28, assistant=dict(num_attention_heads=4),
        target=dict(
            layer_types=layers("fsfsf"), hidden_size=80, intermediate_size=100, num_attention_heads=4,
            num_key_value_heads=2, num_global_key_value_heads=None, head_dim=20, global_head_dim=20, sliding_window=7,
            attention_k_eq_v=True, vocab_size=70, final_logit_softcapping=None, rope_parameters=rope(1e4, 1e4, 0.25),
            per_layer=True, store="BF16", rms_norm_eps=1e-5,
        ),
    ),
    "int4": dict(
        seed=7, tokens=72, assistant=dict(hidden_size=64, num_attention_heads=4),
        target=dict(
            layer_types=layers("ssfssf"), hidden_size=64, intermediate_size=160, num_attention_heads=8,
            num_key_value_heads=4, num_global_key_value_heads=2, head_dim=16, global_head_dim=32, sliding_window=24,
            attention_k_eq_v=True, vocab_size=115, final_logit_softcapping=30.0, rope_parameters=rope(), int4=True,
            store="BF16",
        ),
    ),
    "int4_sharded": dict(
        seed=8, tokens=55, assistant=dict(hidden_size=32, num_attention_heads=8),
        target=dict(
            layer_types=layers("sfsssf"), hidden_size=96, intermediate_size=128, num_attention_heads=4,
            num_key_value_heads=1, num_global_key_value_heads=4, head_dim=24, global_head_dim=40, sliding_window=18,
            attention_k_eq_v=False, vocab_size=77, final_logit_softcapping=30.0, rope_parameters=rope(1e4, 3e5, 0.5),
            int4=True, per_layer=True, shards=2, store_lm_head=True,
        ),
    ),
    "published_heads": dict(
        seed=9, tokens=50, assistant=dict(hidden_size=32, num_attention_heads=2, layer_types=layers("sf")),
        target=dict(
            layer_types=layers("sfsf"), hidden_size=40, intermediate_size=64, num_attention_heads=2,
            num_key_value_heads=2, num_global_key_value_heads=1, head_dim=256, global_head_dim=512, sliding_window=20,
            attention_k_eq_v=True, vocab_size=90, final_logit_softcapping=30.0, rope_parameters=rope(),
        ),
    ),
}  # fmt: skip


def prompt(name, seed=None):
    """The prompt of a configuration: random token ids."""
    config = CONFIGS[name]
    random = np.random.RandomState(1000 + (config["seed"] if seed is None else seed))
    return (random.random_sample(config["tokens"]) * config["target"]["vocab_size"]).astype(int).tolist()


def write_pair(name, folder, seed=None):
    """Write the target and the assistant of CONFIGS[name]; -> (target folder, assistant folder)."""
    config, folder = CONFIGS[name], Path(folder)
    seed = config["seed"] if seed is None else seed
    outer = write_target(folder / "target", seed, **config["target"])
    write_assistant(folder / "assistant", outer, seed + 5000, **config["assistant"])
    return folder / "target", folder / "assistant"


def fingerprint(*folders):
    """SHA-256 over the checkpoints' files, so that vectors and checkpoints cannot drift apart unseen."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(Path(folder).iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def write_target(folder, seed, *, layout="nested", per_layer=False, shards=1, int4=False, store="F32",
                 store_lm_head=False, towers=False, echo=0.15, **overrides):  # fmt: skip
    """Write a random target; -> its config.

    layout: "nested" (gemma4 with a text_config) or "bare" (gemma4_text). per_layer: sizes as `per_layer_config`
    instead of `global_head_dim`. echo: scale of the first layer's output, hence of the input embedding in the output:
    near 1 the model likes to repeat its last token.
    """
    text = text_config(**overrides)
    tensors = layer_stack(np.random.RandomState(seed), text, text["num_key_value_heads"], echo)
    nested = layout == "nested"
    prefix = "model.language_model." if nested else "model."
    tensors = {prefix + name: value for name, value in tensors.items()}
    if store_lm_head:
        tensors["lm_head.weight"] = tensors[prefix + "embed_tokens.weight"]
    if towers:
        tensors["model.vision_tower.patch_embedder.input_proj.weight"] = np.ones((4, 6), np.float32)
        tensors["model.embed_vision.embedding_projection.weight"] = np.ones((4, 6), np.float32)
    if per_layer:
        text = with_per_layer_config(text)
    config = outer_config(text) if nested else text | {"architectures": ["Gemma4ForCausalLM"]}
    if int4:
        config["quantization_config"] = QUANTIZATION
    config["dtype"] = DTYPES[store]
    write(folder, config, encode(tensors, store, int4), shards)
    return config


def write_assistant(folder, target_config, seed, *, per_layer=False, store="F32", repeat=0.0, **overrides):
    """Write a random assistant that fits the target of `target_config` (as write_target returns it); -> its config.

    repeat: above 0, with the target's seed and hidden size (hence its embedding), the assistant likes to draft the
    last token again; a target with a large `echo` then accepts some drafts and rejects others.
    """
    target = target_config.get("text_config", target_config)
    backbone, types = target["hidden_size"], overrides.pop("layer_types", layers("sssf"))
    same = {key: target[key] for key in SHARED_WITH_TARGET}
    text = text_config(**same | global_sizes(target) | {
        "layer_types": types, "hidden_size": 48, "intermediate_size": 88, "final_logit_softcapping": None,
        "vocab_size_per_layer_input": 0, "num_kv_shared_layers": len(types),
        "num_attention_heads": target["num_attention_heads"],
    } | overrides)  # fmt: skip
    random, hidden = np.random.RandomState(seed), text["hidden_size"]
    tensors = {f"model.{name}": value for name, value in layer_stack(random, text, kv_heads=None, echo=0.7).items()}
    tensors["pre_projection.weight"] = linear(random, hidden, 2 * backbone) + np.eye(
        hidden, 2 * backbone, dtype=np.float32
    ) * np.float32(repeat)
    tensors["post_projection.weight"] = linear(random, backbone, hidden)
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
        "backbone_hidden_size": backbone, "use_ordered_embeddings": False, "num_centroids": 2048,
        "centroid_intermediate_top_k": 32, "tie_word_embeddings": True, "dtype": DTYPES[store],
        "text_config": with_per_layer_config(text) if per_layer else text,
    }  # fmt: skip
    write(folder, config, encode(tensors, store, int4=False), shards=1)
    generation = {"is_assistant": True, "num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
    (Path(folder) / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return config


# Configuration files -------------------------------------------------------------------------------------------------

SHARED_WITH_TARGET = (
    "vocab_size", "num_key_value_heads", "head_dim", "sliding_window", "attention_k_eq_v", "rope_parameters",
    "rms_norm_eps", "max_position_embeddings",
)  # fmt: skip

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

QUANTIZATION = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*embed.*", "re:.*vision_tower.*", "re:.*audio_tower.*", "re:.*router.*"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "input_activations": None, "output_activations": None,
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                    "dynamic": False, "observer": "memoryless_minmax"},
    }},
}  # fmt: skip


def text_config(**overrides):
    config = {
        "model_type": "gemma4_text", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
        "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 4096, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": True, "use_cache": True, "initializer_range": 0.02,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "use_double_wide_mlp": False,
        "enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None,
        "use_bidirectional_attention": None, **overrides,
    }  # fmt: skip
    config.setdefault("vocab_size_per_layer_input", config["vocab_size"])
    return config | {"num_hidden_layers": len(config["layer_types"])}


def outer_config(text):
    return {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text,
        "vision_config": None, "audio_config": None, "tie_word_embeddings": True, "initializer_range": 0.02,
        "image_token_id": 258880, "audio_token_id": 258881, "video_token_id": 258884, "boi_token_id": 255999,
        "eoi_token_id": 258882, "boa_token_id": 256000, "eoa_token_index": 258883,
    }  # fmt: skip


def global_sizes(text):
    """The sizes of the full layers, whichever way the config says them."""
    if "per_layer_config" not in text:
        return {key: text[key] for key in ("global_head_dim", "num_global_key_value_heads")}
    sizes = next(iter(text["per_layer_config"].values()))
    return {"global_head_dim": sizes["head_dim"], "num_global_key_value_heads": sizes.get("num_key_value_heads")}


def with_per_layer_config(text):
    """Full layers' sizes keyed by layer index, as transformers writes them since 5.20."""
    sizes = {"head_dim": text["global_head_dim"], "num_key_value_heads": full_kv_heads(text)}
    full = {str(i): sizes for i, kind in enumerate(text["layer_types"]) if kind == FULL}
    return {k: v for k, v in text.items() if not k.startswith(("global_", "num_global_"))} | {"per_layer_config": full}


def full_kv_heads(text):
    """num_global_key_value_heads counts only with attention_k_eq_v (transformers' rule)."""
    heads = text["num_global_key_value_heads"] if text["attention_k_eq_v"] else None
    return heads or text["num_key_value_heads"]


# Weights -------------------------------------------------------------------------------------------------------------


def uniform(random, shape, std, mean=0.0):
    value = mean + std * sqrt(3) * (2 * random.random_sample(shape) - 1)
    return value.astype(np.float32)


def linear(random, rows, columns):
    return uniform(random, (rows, columns), 1 / sqrt(columns))


def norm(random, size, mean=1.0):
    return uniform(random, size, 0.25 * mean, mean)


def layer_stack(random, text, kv_heads, echo):
    """Embedding, layers and final norm. kv_heads None: query-only layers. Logits come out with a spread of about 5."""
    hidden = text["hidden_size"]
    tensors = {"embed_tokens.weight": uniform(random, (text["vocab_size"], hidden), 5 / sqrt(hidden))}
    for i, kind in enumerate(text["layer_types"]):
        for name, value in layer(random, text, kind, kv_heads).items():
            tensors[f"layers.{i}.{name}"] = value
        tensors[f"layers.{i}.layer_scalar"] = uniform(random, 1, 0.15, 0.85) * np.float32(echo if i == 0 else 1)
    return tensors | {"norm.weight": norm(random, hidden)}


def layer(random, text, kind, kv_heads):
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    head_dim = text["head_dim"] if kind == SLIDING else text["global_head_dim"]
    queries = text["num_attention_heads"] * head_dim
    sharpness = sqrt(sqrt(16 / head_dim))  # attention scores with a spread of 4, whatever the width
    tensors = {"self_attn.q_proj.weight": linear(random, queries, hidden),
               "self_attn.q_norm.weight": norm(random, head_dim, sharpness),
               "self_attn.o_proj.weight": linear(random, hidden, queries)}  # fmt: skip
    if kv_heads:
        keys = (kv_heads if kind == SLIDING else full_kv_heads(text)) * head_dim
        tensors["self_attn.k_proj.weight"] = linear(random, keys, hidden)
        tensors["self_attn.k_norm.weight"] = norm(random, head_dim, sharpness)
        if kind == SLIDING or not text["attention_k_eq_v"]:
            tensors["self_attn.v_proj.weight"] = linear(random, keys, hidden)
    tensors["mlp.gate_proj.weight"] = linear(random, inner, hidden)
    tensors["mlp.up_proj.weight"] = linear(random, inner, hidden)
    tensors["mlp.down_proj.weight"] = linear(random, hidden, inner)
    for name, mean in (("input", 1.0), ("post_attention", 1.5), ("pre_feedforward", 1.0), ("post_feedforward", 1.5)):
        tensors[f"{name}_layernorm.weight"] = norm(random, hidden, mean)
    return tensors


# Storage -------------------------------------------------------------------------------------------------------------


def bfloat16_bits(x):
    """Round to nearest, ties to even; -> uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_value(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_int4(weight_RC):
    """Round to 4 bits in groups of 32 along a row; -> (words [R, C/8] int32, scale bits [R, C/32])."""
    rows, columns = weight_RC.shape
    groups = weight_RC.reshape(rows, columns // GROUP, GROUP)
    scale_bits = bfloat16_bits(np.abs(groups).max(-1) / np.float32(7.5))
    codes = np.clip(np.rint(groups / bfloat16_value(scale_bits)[..., None]), -8, 7)
    nibbles = (codes + 8).astype(np.uint32).reshape(rows, columns // 8, 8)
    words = np.bitwise_or.reduce(nibbles << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    return words.view(np.int32), scale_bits


def encode(tensors, store, int4):
    """Name -> float array becomes name -> (safetensors dtype, array of the bytes to store)."""
    encoded = {}
    for name, value in tensors.items():
        if int4 and "_proj." in name:
            words, scale_bits = pack_int4(value)
            encoded[name + "_packed"] = ("I32", words)
            encoded[name + "_scale"] = ("BF16", scale_bits)
            encoded[name + "_shape"] = ("I64", np.array(value.shape, np.int64))
        elif store == "BF16":
            encoded[name] = ("BF16", bfloat16_bits(value))
        else:
            encoded[name] = (store, value.astype({"F32": np.float32, "F16": np.float16}[store]))
    return encoded


def write(folder, config, encoded, shards):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", encoded)
        return
    names, where = list(encoded), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: encoded[name] for name in names[shard::shards]}
        write_safetensors(folder / file, part)
        where |= dict.fromkeys(part, file)
    total = sum(array.nbytes for _, array in encoded.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_safetensors(path, encoded):
    """8 bytes of header length, a JSON header padded to 8 bytes, the tensors one after another."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    encoded = dict(sorted(encoded.items(), key=lambda item: (-item[1][1].itemsize, item[0])))  # aligned, as published
    for name, (dtype, array) in encoded.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in encoded.values():
            file.write(array.tobytes())
