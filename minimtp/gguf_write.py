"""A published folder becomes a GGUF file, named and transformed as llama.cpp's converter does: gguf_model's inverse.

What it writes, and in which types: https://github.com/ggml-org/llama.cpp (conversion/gemma.py, conversion/qwen.py).
"""

import json
import re
import struct
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from .checkpoint import DTYPES, CheckpointError, Lazy, new_file, parse_json, show, write_chunks
from .ggml import TYPES
from .gguf_file import ARRAY, NUMBERS, STORED, STRING, Numbers, Texts
from .gguf_model import ARCHITECTURES

ALIGNMENT = 32  # bytes
KINDS = {np.dtype(kind): code for code, kind in NUMBERS.items()}
STORED_AS = {dtype: code for code, dtype in STORED.items()}
FILE_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 7}  # general.file_type
NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # tokenizer.ggml.token_type
SAMPLING = (("top_k", "top_k", np.int32), ("top_p", "top_p", np.float32), ("temperature", "temp", np.float32))
SHOWN = {  # special tokens that llama.cpp's parser of answers has to see
    "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
}  # fmt: skip


# The container


def write_gguf(path, metadata, tensors):
    """Write {key: value} and {name: Lazy, of a type in gguf_file.STORED} atomically: all or nothing.

    A value is a str, bool, int (stored in 32 bits, unsigned), float (in 32 bits), a list of str, or NumPy's array or
    number where another type is meant. OSError if the disk will not have it.
    """
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_text(key), _value(value)]
    at, sizes = 0, {}
    for name, tensor in tensors.items():
        sizes[name] = stored_bytes(name, tensor)
        dims = tensor.shape[::-1]
        header += [_text(name), struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, STORED_AS[tensor.dtype], at)]
        at += sizes[name] + -sizes[name] % ALIGNMENT
    data = b"".join(header)
    with new_file(Path(path)) as file:
        file.write(data + bytes(-len(data) % ALIGNMENT))
        for name, tensor in tensors.items():
            write_chunks(file, name, tensor, sizes[name])
            file.write(bytes(-sizes[name] % ALIGNMENT))


def stored_bytes(name, tensor):
    """Of a Lazy."""
    if tensor.dtype in TYPES:
        return prod(tensor.shape[:-1]) * TYPES[tensor.dtype].row_bytes(tensor.shape[-1], name)
    return prod(tensor.shape) * np.dtype(DTYPES[tensor.dtype]).itemsize


def _text(text):
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _value(value):
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    if type(value) in (bool, int, float):
        value = {bool: np.bool_, int: np.uint32, float: np.float32}[type(value)](value)
    code = KINDS[value.dtype]
    return struct.pack("<IIQ", ARRAY, code, value.size) * (value.ndim == 1) + (
        struct.pack("<I", code) * (value.ndim == 0) + value.tobytes()
    )


# Configuration


def architecture_of(config):
    """The `general.architecture` of a config.json."""
    kind = config["model_type"]
    if kind.startswith("gemma4"):
        return "gemma4-assistant" if kind.endswith("_assistant") else "gemma4"
    return "qwen35moe" if "moe" in kind else "qwen35"


def config_keys(raw, config, mtp=False):
    """config.json, and the same parsed by its family -> (metadata, extra tensors). mtp: the MTP layer is there, too."""
    architecture = architecture_of(raw)
    keys = {
        "block_count": len(config.layers),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    extra, tensors = _gemma(config) if architecture.startswith("gemma") else (_qwen(raw, config, mtp), {})
    if architecture == "gemma4-assistant":
        extra |= {"embedding_length_out": config.backbone_hidden_size, "nextn_predict_layers": len(config.layers)}
    if config.experts:
        extra |= {
            "expert_count": config.experts.count,
            "expert_used_count": config.experts.top_k,
            "expert_feed_forward_length": config.experts.intermediate_size,
        }
    return {f"{architecture}.{key}": value for key, value in {**keys, **extra}.items()}, tensors


def _gemma(config):
    layers, swa = config.layers, next((layer for layer in config.layers if layer.kind == "sliding"), None)
    full, rope, short = layers[-1], config.ropes["full"], config.ropes.get("sliding")
    if (rope.kind, rope.factor) != ("proportional", 1) or (short and (short.kind, short.fraction) != ("default", 1)):
        raise CheckpointError(f"rotary embeddings {rope} and {short} cannot be written to GGUF")
    narrow = (swa or full).head_dim
    keys = {
        "feed_forward_length": _one_or_all(layer.intermediate_size for layer in layers),
        "attention.head_count": full.heads,
        "attention.head_count_kv": _one_or_all(layer.kv_heads for layer in layers),
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": narrow,
        "attention.value_length_swa": narrow,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": np.array([layer.kind == "sliding" for layer in layers]),
        "attention.shared_kv_layers": sum(not layer.owns_kv for layer in layers),
        "embedding_length_per_layer_input": config.per_layer_input,
        "rope.freq_base": rope.theta,
        "rope.freq_base_swa": (short or rope).theta,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": narrow,
    }
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    factors = np.full(full.head_dim // 2, 1e30, np.float32)
    factors[: int(full.head_dim * rope.fraction / 2)] = 1  # what does not rotate turns 1e30 times slower
    return keys, {"rope_freqs.weight": Lazy("F32", factors.shape, lambda: [factors])}


def _qwen(raw, config, mtp):
    text, attention = raw.get("text_config", raw), config.attention
    delta = next((layer for layer in config.layers if layer.kind == "linear"), None)
    if delta is None:
        raise CheckpointError("a model without linear_attention layers cannot be written to GGUF")
    count, sections = len(config.layers) + mtp, text["rope_parameters"].get("mrope_section") or [11, 11, 10]
    linear = [layer.kind == "linear" for layer in config.layers]
    keys = {
        "block_count": count,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.recurrent_layers": np.array(linear + [False] * mtp),
        "full_attention_interval": text.get("full_attention_interval") or 4,
        "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.rotary_dim,
        "rope.dimension_sections": np.array([*sections, 0], np.int32),
        "ssm.conv_kernel": delta.kernel,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.key_heads,
        "ssm.time_step_rank": delta.value_heads,
        "ssm.inner_size": delta.value_heads * delta.value_dim,
    }
    if config.experts:
        keys["expert_shared_feed_forward_length"] = config.experts.shared_size
    else:
        keys["feed_forward_length"] = config.intermediate_size
    return keys | ({"nextn_predict_layers": 1} if mtp else {})


def _one_or_all(numbers):
    numbers = list(numbers)
    return numbers[0] if len(set(numbers)) == 1 else np.array(numbers, np.int32)


# Tensors


class Place(NamedTuple):
    """Where a published tensor goes: its name in the file, and the order it has there (None: the published one)."""

    name: str
    row_order: np.ndarray | None = None
    head_order: np.ndarray | None = None  # of equal runs of columns, one of a head


DROPPED = ("masked_embedding.",)  # llama.cpp scores the whole vocabulary, and refuses a file that has these


def gguf_places(raw, config, published):
    """A published name, of the family's table -> [Place], empty for a tensor that GGUF has no use for.

    Two for experts whose gate and up are apart: all gates, all ups.
    """
    if published.startswith(DROPPED):
        return []
    table, prefix, name = _table(raw, config, published)
    delta = next((layer for layer in config.layers if layer.kind == "linear"), None)
    row_order = head_order = None
    if delta and "linear_attn." in name and delta.key_heads != delta.value_heads:
        heads, keys = _tiled(delta), 2 * delta.key_heads * delta.key_dim
        stem = name.split("linear_attn.")[1].removesuffix(".weight")
        if stem in ("in_proj_qkv", "conv1d"):
            row_order = np.concatenate([np.arange(keys), keys + _widened(heads, delta.value_dim)])
        elif stem in ("in_proj_z", "in_proj_a", "in_proj_b", "A_log", "dt_bias"):
            row_order = _widened(heads, delta.value_dim if stem == "in_proj_z" else 1)
        elif stem == "out_proj":
            head_order = heads
    if re.search(r"experts\.(gate_up|down)_proj$", name):
        one = re.sub(r"experts\.(gate_up|down)_proj$", "experts.{}.{}_proj.weight", name)
        if name.endswith("down_proj"):
            names = [one.format("{}", "down")]
        elif "gemma" in architecture_of(raw):
            names = [one]
        else:
            names = [one.format("{}", "gate"), one.format("{}", "up")]
        return [Place(prefix + _inverse(table)[each]) for each in names]
    if name not in _inverse(table):
        raise CheckpointError(f"{show(published)} has no name in GGUF")
    return [Place(prefix + _inverse(table)[name], row_order, head_order)]


def _table(raw, config, published):
    """(names of the tensors there, what stands before them, the name without what says where it is)"""
    known, count = ARCHITECTURES[architecture_of(raw)], len(config.layers)
    layer = re.fullmatch(r"(model|mtp)\.layers\.(\d+)\.(.+)", published)
    if published.startswith("mtp."):
        return known.blocks["mtp"], f"blk.{count}.", layer[3] if layer else published
    if layer is None:
        return known.top, "", published
    kind = {"full": "full_attention", "linear": "linear_attention", "sliding": "sliding_attention"}
    i = int(layer[2])
    return known.blocks[kind[config.layers[i].kind]], f"blk.{i}.", layer[3]


def _inverse(table):
    """{published name: name in the file}: the first of several, which are older dialects."""
    return {published: name for name, (_, published) in reversed(table.items())}


def _tiled(delta):
    """Published, value heads of the same key head are neighbours (0 0 0 1 1 1); here they take turns (0 1 0 1 0 1)."""
    return np.arange(delta.value_heads).reshape(delta.key_heads, -1).T.ravel()


def _widened(heads, width):
    return (heads[:, None] * width + np.arange(width)).ravel()


# Tokenizer and settings


def text_keys(architecture, files, vocab_size):
    """The metadata of a folder's tokenizer.json, tokenizer_config.json, generation_config.json and chat template.

    files: {name: bytes}. CheckpointError for a tokenizer that is none, of another kind, or not of that vocabulary.
    """
    try:
        tokenizer = json.loads(Tokenizer.from_buffer(files["tokenizer.json"]).to_str())
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"tokenizer.json: {error}") from None
    names = "tokenizer_config.json", "generation_config.json"
    settings, generation = (parse_json(files.get(name, b"{}"), name) for name in names)
    model, gemma = tokenizer["model"], architecture.startswith("gemma")
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    ids = model["vocab"] | {text: token["id"] for text, token in added.items()} if model["type"] == "BPE" else {}
    if not ids or max(ids.values()) >= vocab_size:
        raise CheckpointError(
            f"tokenizer.json: {model['type']} of {len(ids)} tokens, expected BPE, {vocab_size} at most"
        )
    texts, types = [f"[PAD{i}]" for i in range(vocab_size)], np.full(vocab_size, UNUSED, np.int32)
    for text, i in ids.items():
        texts[i], types[i] = text, _token_type(text, added.get(text))
    keys = {"tokenizer.ggml.model": "gemma4" if gemma else "gpt2"}
    keys |= {} if gemma else {"tokenizer.ggml.pre": "qwen35"}
    keys |= {"tokenizer.ggml.tokens": texts}
    keys |= {"tokenizer.ggml.scores": np.full(vocab_size, -1000, np.float32)} if gemma else {}
    keys |= {"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]]}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("mask", "mask")):
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            keys[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    keys["tokenizer.ggml.add_bos_token"] = gemma or settings.get("add_bos_token") is True
    keys["tokenizer.ggml.add_space_prefix"] = False
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    )
    if isinstance(template, str):
        keys["tokenizer.chat_template"] = template
    suppressed = generation.get("suppress_tokens")
    if isinstance(suppressed, list) and suppressed:
        keys["tokenizer.ggml.suppress_tokens"] = np.array(suppressed, np.int32)
    for name, key, kind in SAMPLING:
        if type(generation.get(name)) in (int, float):
            keys[f"general.sampling.{key}"] = kind(generation[name])
    return keys


def _token_type(text, added):
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
        return BYTE
    if added is None:
        return NORMAL
    is_special = added.get("special") or (text.startswith("<|") and text.endswith("|>"))
    return CONTROL if is_special and text not in SHOWN else USER_DEFINED


def copied_keys(metadata):
    """What another GGUF file says of its text and sampling, as values for write_gguf."""
    kept = {key: value for key, value in metadata.items() if key.startswith(("tokenizer.", "general.sampling."))}
    for key, value in kept.items():
        if isinstance(value, Numbers):
            kept[key] = value.data
        elif isinstance(value, Texts):
            kept[key] = value.list()
        elif key == "general.sampling.top_k":
            kept[key] = np.int32(value)
    return kept
