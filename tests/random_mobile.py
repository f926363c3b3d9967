"""Random tiny Gemma 4 checkpoints in Google's mobile layout, written with NumPy alone.

As in random_models, no code of the package is used, and a seed gives the same bytes on every machine.
"""

import re
from math import sqrt

import numpy as np
from random_models import norm, rope, text_config, uniform, write
from random_sizes import E2B, LARGE, target_tensors, whole_config, without_unused

# name -> seed, tokens of the prompt, layout, sizes, what config.json says, blocks of the two embeddings' scales, the
# share of activation scales that are 0.
CASES = {
    "e2b": dict(  # widths as published: int4 attention, int2 head and wide layers, int8 around the per-layer inputs
        seed=1, tokens=21, layout="nested", blocks=(1, 7), off=0.0,
        sizes=E2B | dict(hidden_size_per_layer_input=16, tie_word_embeddings=False),
        config=dict(
            num_bits=4, quantize_embeddings=True, modules_to_not_convert=["model.vision_tower", "model.embed_vision"],
            module_quant_configs={
                r"embed_tokens$": {"num_bits": 2}, "lm_head": {"num_bits": 2},
                r"layers\.[4-6]\.mlp": {"num_bits": 2}, r"per_layer_(input_gate|projection)": {"num_bits": 8},
                r"per_layer_model_projection|embed_tokens_per_layer": {},
            },
        ),
    ),
    "blocks": dict(  # blocks in both embeddings, other widths, one projection for keys and values, some layers plain
        seed=2, tokens=19, layout="bare", blocks=(4, 12), off=0.3,
        sizes=LARGE | dict(
            layer_types=LARGE["layer_types"][1:], hidden_size_per_layer_input=12, tie_word_embeddings=False,
            vocab_size=64,
        ),
        config=dict(
            num_bits=8, quantize_embeddings=True,
            modules_to_not_convert=["model.layers.1.mlp", r"layers\.3\..*o_proj", "model.layers.2.self_attn.q_proj"],
            module_quant_configs={
                "embed_tokens_per_layer": {"num_bits": 2}, "q_proj|o_proj": {"num_bits": 2},
                "layers.4": {"num_bits": 4}, "mlp.up_proj": {"num_bits": 4},  # layers.4 comes first in its names
            },
        ),
    ),
    "tied": dict(  # plain embeddings, tied, and what transformers leaves alone by itself
        seed=3, tokens=17, layout="bare", blocks=(1, 1), off=0.1,
        sizes=E2B | dict(hidden_size_per_layer_input=0, rope_parameters=rope(1e3, 1e5, 0.5)),
        config=dict(module_quant_configs={"v_proj": {"num_bits": 2}, "k_proj$": {"num_bits": 8}}),
    ),
}  # fmt: skip


def prompt(name, seed=None):
    """The prompt of a case: random token ids."""
    case = CASES[name]
    random = np.random.RandomState(3000 + (case["seed"] if seed is None else seed))
    return (random.random_sample(case["tokens"]) * case["sizes"]["vocab_size"]).astype(int).tolist()


def write_mobile(name, folder, seed=None):
    """Write the target of CASES[name]; -> {base name: (codes int8 [out, in], scales [out, blocks])}."""
    case = CASES[name]
    random, text = np.random.RandomState(case["seed"] if seed is None else seed), text_config(**case["sizes"])
    tensors = without_unused(target_tensors(random, text, echo=0.3), text)
    prefix = "model.language_model." if case["layout"] == "nested" else "model."
    tensors = {prefix + key: value for key, value in tensors.items()}
    if not text["tie_word_embeddings"]:
        hidden = text["hidden_size"]
        tensors["lm_head.weight"] = uniform(random, (text["vocab_size"], hidden), 5 / sqrt(hidden))
    encoded, codes = {}, {}
    for key, value in tensors.items():
        base = key.removesuffix(".weight")
        bits = width(base, case["config"], text) if value.ndim == 2 and not key.endswith("norm.weight") else None
        if bits is None:
            encoded[key] = ("F32", value)
            continue
        blocks = case["blocks"]["per_layer" in base] if is_embedding(base) else 1
        codes[base] = quantize(value, bits, blocks)
        if is_embedding(base):
            encoded[f"{base}.embedding_quantized"] = packed(codes[base][0], bits)
            encoded[f"{base}.embedding_scale"] = ("F32", codes[base][1])
        else:
            encoded[key], encoded[f"{base}.weight_scale"] = packed(codes[base][0], bits), ("F32", codes[base][1])
            for put in ("input", "output"):
                scale = 0.02 + 0.03 * random.random_sample() if random.random_sample() >= case["off"] else 0
                encoded[f"{base}.{put}_activation_scale"] = ("F32", np.array(scale, np.float32))
    for put in "kv":
        encoded[f"{prefix}layers.0.self_attn.{put}_cache_scale"] = ("F32", norm(random, ()))
    config = whole_config(text, case["layout"], unified=False)
    config["tie_word_embeddings"] = text["tie_word_embeddings"]
    config["quantization_config"] = {"quant_method": "gemma"} | case["config"]
    write(folder, config | {"dtype": "float32"}, encoded, shards=1)
    return codes


def is_embedding(base):
    return "embed_tokens" in base


def width(base, config, text):
    """Bits of a module by config.json, None where it stays plain: slowly, as transformers' documentation has it."""
    kept = config.get("modules_to_not_convert", ["lm_head", "model.embed_tokens"])
    if any(re.match(rf"(?:{key})(\.|$)", base) or base.endswith(key) for key in kept):
        return None
    if is_embedding(base) and not config.get("quantize_embeddings"):
        return None
    joined = "|".join(f"({key})" for key in config["module_quant_configs"]).replace("(input_gate|", "(?:input_gate|")
    match = re.search(joined, base)
    options = list(config["module_quant_configs"].values())[match.lastindex - 1] if match else {}
    return options.get("num_bits", config.get("num_bits", 4))


def quantize(weight_OI, bits, blocks):
    """Round to so many bits, by blocks of a row; -> (codes int8 [O, I], scales float32 [O, blocks])."""
    half = 1 << (bits - 1)
    blocks_OBK = weight_OI.reshape(len(weight_OI), blocks, -1)
    scales_OB = np.abs(blocks_OBK).max(-1) / np.float32(half - 0.5)
    codes = np.clip(np.rint(blocks_OBK / scales_OB[..., None]), -half, half - 1)
    return codes.reshape(weight_OI.shape).astype(np.int8), scales_OB


def packed(codes_OI, bits):
    """(safetensors dtype, array) of codes, the first of a byte in its lowest bits."""
    if bits == 8:
        return "I8", codes_OI
    unsigned = (codes_OI.astype(np.int16) + (1 << (bits - 1))).reshape(len(codes_OI), -1, 8 // bits)
    return "U8", (unsigned << np.arange(0, 8, bits)).sum(-1).astype(np.uint8)
