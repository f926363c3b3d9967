"""GGUF files made from published folders as llama.cpp's converter makes them, with the `gguf` library and NumPy alone.

No code of the package is used: names come from the library's own map, and what happens to the numbers on the way (norms
plus 1, -exp(A_log), value heads in turn, experts stacked) is written down a second time, head by head.
"""

import json
import math
import re
from pathlib import Path

import gguf
import numpy as np
from random_models import FULL, SLIDING, bfloat16_value, full_kv_heads
from random_qwen import layer_types
from random_sizes import unpack_int4

ARCHITECTURES = {
    "gemma4": "gemma4", "gemma4_text": "gemma4", "gemma4_unified": "gemma4", "gemma4_assistant": "gemma4-assistant",
    "gemma4_unified_assistant": "gemma4-assistant", "qwen3_5": "qwen35", "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe", "qwen3_5_moe_text": "qwen35moe",
}  # fmt: skip
MAPS = {"gemma4": "GEMMA4", "gemma4-assistant": "GEMMA4", "qwen35": "QWEN35", "qwen35moe": "QWEN35MOE"}
ODD_NAMES = {  # what the library's map does not have
    r"layers\.(\d+)\.router\.scale": r"blk.\1.ffn_gate_inp.scale",
    r"layers\.(\d+)\.router\.per_expert_scale": r"blk.\1.ffn_down_exps.scale",
    r"layers\.(\d+)\.linear_attn\.dt_bias": r"blk.\1.ssm_dt.bias",
    r"layers\.(\d+)\.layer_scalar": r"blk.\1.layer_output_scale.weight",
    r"pre_projection\.weight": "nextn.pre_projection.weight",
    r"post_projection\.weight": "nextn.post_projection.weight",
    r"masked_embedding\.centroids\.weight": "masked_embd_centroids.weight",
    r"masked_embedding\.token_ordering": "masked_embd_ordering",
    r"mtp\.fc\.weight": "blk.{last}.nextn.eh_proj.weight",
    r"mtp\.pre_fc_norm_embedding\.weight": "blk.{last}.nextn.enorm.weight",
    r"mtp\.pre_fc_norm_hidden\.weight": "blk.{last}.nextn.hnorm.weight",
    r"mtp\.norm\.weight": "blk.{last}.nextn.shared_head_norm.weight",
}
FORK = {  # how the fork that came first spells what llama.cpp spells otherwise
    "nextn.pre_projection.weight": "mtp.pre_projection.weight",
    "nextn.post_projection.weight": "mtp.post_projection.weight",
    "masked_embd_centroids.weight": "mtp.centroids.weight",
    "masked_embd_ordering": "mtp.token_ordering.weight",
}
VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}


# A published folder


def read_folder(folder):
    """-> (config.json, {name: array}), names without what stands before "model.", int4 unpacked."""
    folder, tensors = Path(folder), {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + at for at in entry["data_offsets"])
                kind = {"F32": "f4", "F16": "f2", "BF16": "u2", "I32": "i4", "I64": "i8"}[entry["dtype"]]
                array = np.frombuffer(data[begin:end], "<" + kind).reshape(entry["shape"])
                is_scale = name.endswith("weight_scale")
                array = bfloat16_value(array) if entry["dtype"] == "BF16" and not is_scale else array
                tensors[name.replace("model.language_model.", "model.")] = array
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        stem = name.removesuffix("_packed")
        tensors[stem] = unpack_int4(tensors.pop(name), tensors.pop(f"{stem}_scale"))
        del tensors[f"{stem}_shape"]
    towers = ("model.vision", "model.visual", "model.embed_vision")
    tensors = {name: array for name, array in tensors.items() if not name.startswith(towers)}
    return json.loads((folder / "config.json").read_text()), tensors


def stacked(tensors):
    """One tensor for each expert -> one for all, gate rows before up rows."""
    found = {}
    for name, array in tensors.items():
        one = re.fullmatch(r"(.*experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if one is None:
            found[name] = array
        elif one[3] == "down":
            found.setdefault(f"{one[1]}.down_proj", {})[int(one[2])] = array
        else:
            found.setdefault(f"{one[1]}.gate_up_proj", {}).setdefault(int(one[2]), {})[one[3]] = array
    for name, experts in found.items():
        if isinstance(experts, dict):
            rows = [experts[i] for i in range(len(experts))]
            found[name] = np.stack([np.concatenate([r["gate"], r["up"]]) if isinstance(r, dict) else r for r in rows])
    return found


def text_of(config):
    return config.get("text_config", config)


# What the converter does to numbers


def tiled(array, text, axis, start, width):
    """Value heads, published group by group, in turn: the first of each group, then the second of each."""
    groups, heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    each = heads // groups
    order = [group * each + i for i in range(each) for group in range(groups)]
    places = [*range(start), *(start + head * width + at for head in order for at in range(width))]
    return np.take(array, places, axis)


def as_converted(name, array, text):
    """The published array -> as GGUF has it."""
    array = array.astype(np.float32) if array.dtype.kind == "f" else array
    keys = 2 * text.get("linear_num_key_heads", 0) * text.get("linear_key_head_dim", 0)
    width = text.get("linear_value_head_dim")
    part = name.partition("linear_attn.")[2]
    if part == "norm.weight" or text["model_type"].startswith("gemma"):
        return array
    if name.endswith("norm.weight") or "norm_" in name:
        return array + np.float32(1)
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        return tiled(array.reshape(len(array), -1), text, 0, keys, width)
    if part == "in_proj_z.weight":
        return tiled(array, text, 0, 0, width)
    if part == "out_proj.weight":
        return tiled(array, text, 1, 0, width)
    if part in ("in_proj_a.weight", "in_proj_b.weight", "dt_bias"):
        return tiled(array, text, 0, 0, 1)
    return tiled(-np.exp(array), text, 0, 0, 1) if part == "A_log" else array


def converted(config, tensors, dialect="llama.cpp", fused=None, mtp=True):
    """-> {GGUF name: array}. fused: gate and up of experts in one tensor (None: as converters do for the family)."""
    architecture, text = ARCHITECTURES[config["model_type"]], text_of(config)
    count = text["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[MAPS[architecture]], count + 1)
    fused = architecture == "gemma4" if fused is None else fused
    found = {}
    for name, array in stacked(tensors).items():
        if (name.startswith("mtp.") and not mtp) or (name.startswith("masked_embedding") and dialect != "fork"):
            continue  # llama.cpp scores the whole vocabulary
        array = as_converted(name, array, text)
        own = name.replace("mtp.layers.0.", f"model.layers.{count}.")
        odd = [re.sub(pattern, new, own.removeprefix("model.")) for pattern, new in ODD_NAMES.items()
               if re.fullmatch(pattern, own.removeprefix("model."))]  # fmt: skip
        new = odd[0].replace("{last}", str(count)) if odd else names.get_name(own, try_suffixes=(".weight",))
        new = new + ".weight" if "_exps" in new and new.count(".") == 2 else new
        if "gate_up_exps" in new and not fused:
            half = array.shape[1] // 2
            found[new.replace("gate_up", "gate")] = array[:, :half]
            found[new.replace("gate_up", "up")] = array[:, half:]
        else:
            found[FORK.get(new, new) if dialect == "fork" else new] = array
    if "gemma" in architecture:
        width, rope = full_head_dim(text), text["rope_parameters"][FULL]
        rotating = int(width * rope["partial_rotary_factor"] / 2)
        found["rope_freqs.weight"] = np.float32([1] * rotating + [1e30] * (width // 2 - rotating))
    if mtp == "only":
        kept = ("token_embd", "output", f"blk.{count}.")
        found = {name: array for name, array in found.items() if name.startswith(kept)}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


# Metadata


def full_head_dim(text):
    sizes = text.get("per_layer_config")
    return next(iter(sizes.values()))["head_dim"] if sizes else text["global_head_dim"]


def add_metadata(writer, config, dialect="llama.cpp", mtp=True, old=False, tensors=()):
    """The configuration's keys. old: as converters wrote them before `recurrent_layers`."""
    text, architecture = text_of(config), writer.arch
    count, w = text["num_hidden_layers"], writer
    w.add_block_count(count)
    w.add_context_length(text["max_position_embeddings"])
    w.add_embedding_length(text["hidden_size"])
    w.add_head_count(text["num_attention_heads"])
    w.add_layer_norm_rms_eps(text["rms_norm_eps"])
    if text.get("num_experts"):
        w.add_expert_count(text["num_experts"])
        w.add_expert_used_count(text.get("top_k_experts") or text["num_experts_per_tok"])
        w.add_expert_feed_forward_length(text["moe_intermediate_size"])
    (add_gemma if architecture.startswith("gemma") else add_qwen)(w, text, mtp, old)
    if "assistant" in architecture:
        add_assistant(w, config, dialect, tensors)


def add_gemma(w, text, mtp, old):
    kinds, full = text["layer_types"], full_head_dim(text)
    sizes = text.get("per_layer_config")
    full_heads = next(iter(sizes.values())).get("num_key_value_heads") if sizes else full_kv_heads(text)
    heads = [text["num_key_value_heads"] if kind == SLIDING else full_heads for kind in kinds]
    w.add_head_count_kv(heads[0] if len(set(heads)) == 1 else heads)
    shared, inner = text["num_kv_shared_layers"], text["intermediate_size"]
    widths = [inner * (2 if i >= len(kinds) - shared else 1) for i in range(len(kinds))]
    w.add_feed_forward_length(widths if text["use_double_wide_mlp"] else inner)
    w.add_shared_kv_layers(shared)
    w.add_embedding_length_per_layer_input(text.get("hidden_size_per_layer_input") or 0)
    w.add_sliding_window(text["sliding_window"])
    w.add_sliding_window_pattern([kind == SLIDING for kind in kinds])
    w.add_key_length(full)
    w.add_value_length(full)
    w.add_key_length_swa(text["head_dim"])
    w.add_value_length_swa(text["head_dim"])
    w.add_rope_freq_base(text["rope_parameters"][FULL]["rope_theta"])
    w.add_rope_freq_base_swa(text["rope_parameters"][SLIDING]["rope_theta"])
    w.add_rope_dimension_count(full)
    w.add_rope_dimension_count_swa(text["head_dim"])
    if text["final_logit_softcapping"]:
        w.add_final_logit_softcapping(text["final_logit_softcapping"])


def add_assistant(w, config, dialect, tensors):
    backbone, has_centroids = config["backbone_hidden_size"], any("centroids" in name for name in tensors)
    if dialect == "fork":
        w.add_uint32(f"{w.arch}.n_embd_backbone", backbone)
        w.add_bool(f"{w.arch}.use_ordered_embeddings", has_centroids)
        w.add_uint32(f"{w.arch}.n_centroids", config["num_centroids"])
        w.add_uint32(f"{w.arch}.centroid_top_k", config["centroid_intermediate_top_k"])
        w.add_bool(f"{w.arch}.attention.k_eq_v", text_of(config)["attention_k_eq_v"])
        w.add_string(f"{w.arch}.requires_target_arch", "gemma4")
    else:
        w.add_uint32(f"{w.arch}.embedding_length_out", backbone)
        w.add_nextn_predict_layers(text_of(config)["num_hidden_layers"])


def add_qwen(w, text, mtp, old):
    kinds, extra = layer_types(text), text["mtp_num_hidden_layers"] if mtp else 0
    width = text["head_dim"]
    rope = text["rope_parameters"]
    w.kv_data[0].pop(f"{w.arch}.block_count")
    w.add_block_count(len(kinds) + extra)
    if extra:
        w.add_nextn_predict_layers(extra)
    w.add_head_count_kv(text["num_key_value_heads"])
    w.add_key_length(width)
    w.add_value_length(width)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(int(width * rope.get("partial_rotary_factor", 0.25)))
    w.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if "intermediate_size" in text:
        w.add_feed_forward_length(text["intermediate_size"])
    if "shared_expert_intermediate_size" in text:
        w.add_expert_shared_feed_forward_length(text["shared_expert_intermediate_size"])
    w.add_ssm_conv_kernel(text["linear_conv_kernel_dim"])
    w.add_ssm_state_size(text["linear_key_head_dim"])
    w.add_ssm_group_count(text["linear_num_key_heads"])
    w.add_ssm_time_step_rank(text["linear_num_value_heads"])
    w.add_ssm_inner_size(text["linear_num_value_heads"] * text["linear_value_head_dim"])
    w.add_full_attention_interval(text.get("full_attention_interval", 4))
    if not old:
        w.add_array(
            f"{w.arch}.attention.recurrent_layers", [kind != "full_attention" for kind in kinds] + [False] * extra
        )


def add_tokenizer(w, folder, vocab_size):
    """The folder's tokenizer.json, tokenizer_config.json, chat template and generation_config.json."""
    folder = Path(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    ids = model["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    special = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, i in ids.items():
        texts[i], types[i] = text, gguf.TokenType.NORMAL
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[i] = gguf.TokenType.BYTE
        elif text in special:
            looks_special = text.startswith("<|") and text.endswith("|>")
            is_control = (special[text] or looks_special) and text not in VISIBLE
            types[i] = gguf.TokenType.CONTROL if is_control else gguf.TokenType.USER_DEFINED
    gemma = w.arch.startswith("gemma")
    w.add_tokenizer_model("gemma4" if gemma else "gpt2")
    if not gemma:
        w.add_tokenizer_pre("qwen35")
    w.add_token_list(texts)
    w.add_token_types(types)
    w.add_token_merges([" ".join(pair) for pair in model["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        if settings.get(f"{name}_token"):
            getattr(w, f"add_{name}_token_id")(ids[settings[f"{name}_token"]])
    w.add_add_bos_token(False)  # which files of Gemma have, wrongly
    w.add_add_space_prefix(False)
    w.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    w.add_int32("general.sampling.top_k", generation["top_k"])
    w.add_float32("general.sampling.top_p", generation["top_p"])
    w.add_float32("general.sampling.temp", generation["temperature"])


# Files


def write_gguf(path, folder, *, store=lambda name, array: "F32", dialect="llama.cpp", fused=None, mtp=True, old=False,
               tokenizer=None, parts=0, extra=None, edit=None):  # fmt: skip
    """Write a published folder as a GGUF file; -> its path, of the first part where it has several.

    store: the type of a tensor, for those that converters do not keep in F32, or its bytes as Q4_0. mtp: False leaves
    the MTP layer out, "only" leaves out all but it. parts: so many tensors in each file. extra: function of the
    writer. edit: of the tensors, {name: array}.
    """
    config, published = read_folder(folder)
    architecture = ARCHITECTURES[config["model_type"]]
    architecture = architecture.replace("-", "_") if dialect == "fork" else architecture
    tensors = converted(config, published, dialect, fused, mtp)
    if edit:
        edit(tensors)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    writer.add_type("model")
    add_metadata(writer, config, dialect, mtp, old, tensors)
    if tokenizer:
        add_tokenizer(writer, tokenizer, text_of(config)["vocab_size"])
    writer.add_quantization_version(2)
    if extra:
        extra(writer)
    for name, array in tensors.items():
        type = "I32" if array.dtype.kind == "i" else "F32" if is_kept(name, array) else store(name, array)
        add_tensor(writer, name, array, type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = Path(path)
    return path if not parts else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def is_kept(name, array):
    """Whether converters keep a tensor in F32."""
    return array.ndim == 1 or "ssm_conv1d" in name or "ffn_gate_inp" in name


def add_tensor(writer, name, array, type):
    if not isinstance(type, str):
        writer.add_tensor(name, type, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    elif type in ("F32", "F16", "I32"):
        writer.add_tensor(name, array.astype({"F32": np.float32, "F16": np.float16, "I32": np.int32}[type]))
    else:
        writer.add_tensor(name, as_blocks(array, type), raw_dtype=gguf.GGMLQuantizationType[type])


SCALES = {  # where float16 scales are in the blocks of the types that the library cannot round to
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip


def as_blocks(array, type):
    """-> uint8 [..., bytes of a row]: rounded, or random codes where the library does not round to the type."""
    kind = gguf.GGMLQuantizationType[type]
    if type not in SCALES:
        return gguf.quants.quantize(array, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.RandomState(array.size % 9973)
    data = random.randint(0, 256, (array.size // block, size)).astype(np.uint8)
    for at in SCALES[type]:
        data[:, at : at + 2] = np.float16(random.choice([-1, 1], (len(data), 1)) * 2.0**-12).view(np.uint8)
    return data.reshape(*array.shape[:-1], -1)


def unpacked(array, type):
    """The numbers that the tensor has, once stored as that type."""
    return gguf.quants.dequantize(as_blocks(array, type), gguf.GGMLQuantizationType[type])


def int4_blocks(folder):
    """A folder's int4 weights as Q4_0, codes and steps as they are -> {GGUF name: uint8 [rows, bytes]}. Of Gemma only.

    A word has eight codes, the first lowest; of a Q4_0 block's 16 bytes the low halves are the first 16 codes.
    """
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name in [name for name in header if name.endswith("weight_packed")]:
            packed, scale = (
                np.frombuffer(data[8 + length :][slice(*header[n]["data_offsets"])], kind).reshape(header[n]["shape"])
                for n, kind in ((name, "<u4"), (name.replace("_packed", "_scale"), "<u2"))
            )
            codes = (packed[..., None] >> 4 * np.arange(8, dtype=np.uint32) & 15).astype(np.uint8)
            codes = codes.reshape(*scale.shape, 2, 16)
            steps = bfloat16_value(scale).astype(np.float16)
            assert np.array_equal(steps, bfloat16_value(scale)), "steps that float16 does not have"
            halves = codes[..., 0, :] | codes[..., 1, :] << 4
            blocks_ = np.concatenate([steps[..., None].view(np.uint8), halves], axis=-1)
            found[name.removesuffix("_packed").replace("language_model.", "")] = blocks_.reshape(len(packed), -1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, 64)
    return {names.get_name(name, try_suffixes=(".weight",)): data for name, data in found.items()}


# Both heads in one file, as a branch of Ollama writes them


def two_heads(assistant, **changes):
    """Options of write_gguf for a target: the assistant in that folder is in its file. changes: of the draft's keys."""
    config, published = read_folder(assistant)
    text, tensors = text_of(config), converted(config, published, "fork")
    del tensors["rope_freqs.weight"]
    keys = {
        "block_count": text["num_hidden_layers"],
        "embedding_length": text["hidden_size"],
        "attention.head_count": text["num_attention_heads"],
        "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"],
        "attention.key_length": full_head_dim(text),
        "attention.value_length": full_head_dim(text),
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
        "feed_forward_length": text["intermediate_size"],
        "attention.sliding_window_pattern": [kind == SLIDING for kind in text["layer_types"]],
        "rope.freq_base": text["rope_parameters"][FULL]["rope_theta"],
        "rope.dimension_count": int(full_head_dim(text) * text["rope_parameters"][FULL]["partial_rotary_factor"]),
        "rope.freq_base_swa": text["rope_parameters"][SLIDING]["rope_theta"],
        "use_ordered_embeddings": bool(config.get("use_ordered_embeddings")),
        "num_centroids": config["num_centroids"],
        "centroid_intermediate_top_k": config["centroid_intermediate_top_k"],
    } | changes

    def add_keys(writer):
        writer.add_string("tokenizer.ggml.pre", "gemma4")
        writer.kv_data[0]["tokenizer.ggml.model"] = gguf.GGUFValue("llama", gguf.GGUFValueType.STRING)
        writer.add_uint32("gemma4.vision.block_count", 1)
        for key, value in keys.items():
            if value is not None:
                writer.add_key_value(f"gemma4.draft.{key}", value, gguf.GGUFValueType.get_type(value))

    def add_tensors(target):
        for name, array in tensors.items():
            target[f"draft.{name.removeprefix('mtp.')}"] = array
        target["v.blk.0.attn_q.weight"] = np.ones((4, 4), np.float32)

    return dict(extra=add_keys, edit=add_tensors)


def write_sparse(path, config, shapes, start=(), extra=None):
    """A file with the configuration's keys and tensors of these shapes, all zeros but how the first one starts."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config["model_type"]])
    add_metadata(writer, config, tensors=shapes)
    if extra:
        extra(writer)
    for name, shape in shapes.items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        at = -(-file.seek(0, 2) // 32) * 32
        file.truncate(at + sum(-(-4 * math.prod(shape) // 32) * 32 for shape in shapes.values()))
        file.seek(at)
        file.write(np.float32(start).tobytes())
    return path


def blocks(name, array):
    """Q8_0, Q4_0 or F16 in turn, where a row is whole blocks."""
    return ("Q8_0", "Q4_0", "F16")[len(name) % 3] if array.shape[-1] % 32 == 0 else "F16"


def same_rope(fraction, width):
    """The share of `width` that rotates, as the number of pairs says it."""
    return 2 * math.floor(fraction * width / 2) / width
