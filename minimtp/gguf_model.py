"""A GGUF file becomes what a published folder is: its configuration, and its tensors by their published names.

What each architecture writes, and what it does to the numbers on the way: https://github.com/ggml-org/llama.cpp
(conversion/gemma.py, conversion/qwen.py, src/models).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import gguf_text
from .checkpoint import Checkpoint, CheckpointError, bf16_to_float, bytes_by_type, float_to_bf16, show
from .config import MAX_LAYERS, config_size, config_value, layer_count
from .gguf_file import MAX_TENSORS, GgufTensor, Numbers, Texts, named, read_parts

ACCEPTED = {  # what these keys have to say where they are there: anything else would change what is read
    "general.quantization_version": 2, "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_sep_token": False, "tokenizer.ggml.add_space_prefix": False,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class GgufCheckpoint(Checkpoint):
    """A Checkpoint whose folder is the file itself, and what else a published folder holds, made when asked for."""

    metadata: dict = field(repr=False)  # every key of the header
    stored: dict = field(repr=False)  # {type: bytes} of all tensors in the file, before anything is undone
    drafter: Checkpoint | None = field(default=None, repr=False)  # that of a file with two heads, with its own names

    def tokenizer(self):
        """-> tokenizers.Tokenizer that encodes as the model's tokenizer.json does, or None where there is none."""
        return named(self.folder, gguf_text.build_tokenizer, self.metadata)

    def settings(self, name):
        """As a folder's; tokens that end a text are known by their spelling too."""
        if name == "tokenizer_config":
            return named(self.folder, gguf_text.tokenizer_config, self.metadata)
        stops = _architecture(self.metadata).stops
        return named(self.folder, gguf_text.generation_config, self.metadata, stops)

    def stored_bytes(self):
        """-> {type: bytes}, as they are in the file."""
        return self.stored


def open_gguf(path):
    """Open a .gguf file, or the first of its parts (`-00001-of-00003.gguf`) -> GgufCheckpoint.

    Raises CheckpointError, in one line: for an unsound file, an architecture or a key of it that is not known here, and
    tensors that are unknown, there twice, or not what has to be undone. What is missing, or of a wrong shape, is found
    as in a folder: when the parameters are read.
    """
    path = Path(path)
    metadata, tensors = read_parts(path)
    return named(path, _checkpoint, path, metadata, tensors)


def _checkpoint(path, metadata, tensors):
    architecture = _architecture(metadata)
    for key, value in ACCEPTED.items():
        if metadata.get(key, value) != value:
            raise CheckpointError(f"{key} is {show(metadata[key])}, supported: {value!r}")
    fields, drafter, stored = _own_fields(metadata), None, bytes_by_type(tensors)
    if architecture.drafter:
        _drop_towers(fields, tensors)
        draft = _take_draft(fields, tensors)
        drafter = draft and GgufCheckpoint(path, *_publish(metadata, architecture.drafter, *draft), metadata, stored)
    return GgufCheckpoint(path, *_publish(metadata, architecture, fields, tensors), metadata, stored, drafter)


def _architecture(metadata):
    if metadata.get("general.type", "model") != "model":
        raise CheckpointError(f"not a language model: its general.type is {show(metadata['general.type'])}")
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"unknown architecture {show(name)}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def _own_fields(metadata):
    """The keys of the file's architecture, without its name. CheckpointError for another's."""
    name, fields = metadata["general.architecture"], {}
    for key, value in metadata.items():
        owner, _, rest = key.partition(".")
        if owner in ARCHITECTURES:
            is_list = isinstance(value, Numbers)
            if owner != name or isinstance(value, Texts) or (is_list and len(value.data) > MAX_LAYERS):
                raise CheckpointError(f"key {show(key)} is not known in a file of {name}")
            fields[rest] = value.list() if is_list else value
    return fields


def _publish(metadata, architecture, fields, tensors):
    """What the header says and the file's tensors -> (config.json, tensors by published name)."""
    name = metadata["general.architecture"]
    config = architecture.config(fields, tensors)
    if fields:
        raise CheckpointError(f"key {show(f'{name}.{min(fields)}')} is not known")
    config |= dict(zip(architecture.media, gguf_text.spelled(metadata, architecture.media.values())))
    return config, _published(tensors, architecture, config.get("text_config", config), name)


# Configuration: "key field" pairs, in GGUF and in config.json; where there is a question mark the key may be absent.

COMMON = """block_count num_hidden_layers, context_length max_position_embeddings, embedding_length hidden_size,
    attention.head_count num_attention_heads, attention.layer_norm_rms_epsilon rms_norm_eps,
    expert_count? num_experts, expert_feed_forward_length? moe_intermediate_size"""
GEMMA = f"""{COMMON}, expert_used_count? top_k_experts, attention.sliding_window sliding_window,
    attention.shared_kv_layers? num_kv_shared_layers, final_logit_softcapping? final_logit_softcapping,
    embedding_length_per_layer_input hidden_size_per_layer_input"""
SHARED = (  # keys that a drafter in its target's file may leave out
    "context_length", "attention.sliding_window", "attention.sliding_window_pattern", "attention.key_length",
    "attention.key_length_swa", "attention.value_length", "attention.value_length_swa",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa",
)  # fmt: skip
QWEN = f"""{COMMON}, expert_used_count? num_experts_per_tok, feed_forward_length? intermediate_size,
    expert_shared_feed_forward_length? shared_expert_intermediate_size, attention.key_length head_dim,
    attention.head_count_kv num_key_value_heads, full_attention_interval? full_attention_interval,
    ssm.conv_kernel linear_conv_kernel_dim, ssm.state_size linear_key_head_dim, ssm.group_count linear_num_key_heads,
    ssm.time_step_rank linear_num_value_heads, nextn_predict_layers? mtp_num_hidden_layers"""


def _take(fields, key, *default):
    """What a key says; who reads it takes it out, and what is left is not known."""
    if key not in fields and not default:
        raise CheckpointError(f"key {key!r} is missing")
    return fields.pop(key, *default)


def _take_pairs(fields, pairs):
    """{field: value}; a list of the same value for every layer is that value."""
    found = {}
    for key, field_ in map(str.split, pairs.split(",")):
        value = _take(fields, key.removesuffix("?"), *[None] * key.endswith("?"))
        found[field_] = value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value
    return found


def _take_each(fields, key, count):
    """A value for every layer."""
    value = _take(fields, key)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise CheckpointError(f"{key} has {len(values)} values for {count} layers")
    return values


def _take_same(fields, key, expected, *default):
    if (found := _take(fields, key, *default)) != expected:
        raise CheckpointError(f"{key} is {show(found)}, supported: {show(expected)}")


def _take_vocabulary(fields, tensors):
    size = _vocabulary(tensors)
    _take_same(fields, "vocab_size", size, size)
    return size


def _vocabulary(tensors, name="token_embd.weight"):
    if name not in tensors:
        raise CheckpointError(f"tensor {name!r} is missing")
    return tensors[name].shape[0]


def _fraction(part, whole):
    """The float which makes `part` of `whole` when the product is cut to an integer."""
    part, whole = (config_value({"rope.dimension_count": n}, "rope.dimension_count", int) for n in (part, whole))
    fraction = part / whole
    return fraction if int(fraction * whole) >= part else math.nextafter(fraction, math.inf)


def _rotating(tensors, width):
    """The share of a full layer's pairs that rotate: the others' frequencies are divided by 1e30."""
    raw = tensors.pop("rope_freqs.weight", None)
    if raw is None or raw.dtype != "F32" or len(raw.shape) != 1 or 2 * raw.shape[0] != width:
        raise CheckpointError(f"tensor 'rope_freqs.weight' is missing, or not half of F32 [{show(width)}]")
    factors = raw.stored()
    count = int(np.count_nonzero(factors == 1))
    if not np.array_equal(factors, np.repeat(np.float32([1, 1e30]), [count, len(factors) - count])):
        raise CheckpointError("'rope_freqs.weight' is not 1 up to some pair and 1e30 from there")
    return _fraction(2 * count, width)


def _gemma(fields, tensors):
    text = {"model_type": "gemma4_text", **_take_pairs(fields, GEMMA)}
    count, shared = layer_count(text), config_size(text, "num_kv_shared_layers")
    sliding = _take_each(fields, "attention.sliding_window_pattern", count)
    kv_heads = _take_each(fields, "attention.head_count_kv", count)
    widths = _take_each(fields, "feed_forward_length", count)
    full_dim, sliding_dim = _take_head_dim(fields, ""), _take_head_dim(fields, "_swa")
    is_wide = widths != widths[:1] * count
    if is_wide and widths != [widths[0] * (2 if i >= count - shared else 1) for i in range(count)]:
        raise CheckpointError(f"feed_forward_length {show(widths)} is not doubled where keys and values are shared")
    rope = {"rope_type": "default", "rope_theta": _take(fields, "rope.freq_base_swa")}
    full_rope = {"rope_type": "proportional", "rope_theta": _take(fields, "rope.freq_base")}
    full_rope["partial_rotary_factor"] = _rotating(tensors, full_dim)
    tables = "per_layer_token_embd.weight" if "per_layer_token_embd.weight" in tensors else "token_embd.weight"
    return text | {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "num_key_value_heads": kv_heads[0],
        "per_layer_config": {
            str(i): {"head_dim": sliding_dim if s else full_dim, "num_key_value_heads": heads}
            for i, (s, heads) in enumerate(zip(sliding, kv_heads))
        },
        "attention_k_eq_v": _keys_are_values(tensors, [i for i in range(count - shared) if not sliding[i]], kv_heads),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": is_wide,
        "enable_moe_block": bool(text["num_experts"]),
        "rope_parameters": {"sliding_attention": rope, "full_attention": full_rope},
        "vocab_size": _take_vocabulary(fields, tensors),
        "vocab_size_per_layer_input": _vocabulary(tensors, tables),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


def _take_head_dim(fields, suffix):
    """A head's width, which values and their positions have too: how much of it rotates, rope_freqs say."""
    dim = _take(fields, f"attention.key_length{suffix}")
    _take_same(fields, f"attention.value_length{suffix}", dim)
    _take_same(fields, f"rope.dimension_count{suffix}", dim)
    return dim


def _keys_are_values(tensors, full, kv_heads):
    """Whether the full layers have no values of their own. Drafters have neither; in those released, where it is so,
    full layers borrow another number of heads than sliding ones."""
    if not full:
        return kv_heads != kv_heads[:1] * len(kv_heads)
    valued = [i for i in full if f"blk.{i}.attn_v.weight" in tensors]
    if valued not in ([], full):
        raise CheckpointError(f"of full layers {show(full)} only {show(valued)} have attn_v")
    return not valued


def _assistant(fields, tensors):
    """Both dialects: llama.cpp's, and of the fork that came before it (`gemma4_assistant`), which Ollama writes too."""
    backbone = _take(fields, "n_embd_backbone" if "n_embd_backbone" in fields else "embedding_length_out")
    _take_same(fields, "nextn_predict_layers", fields.get("block_count"), fields.get("block_count"))
    _take_same(fields, "requires_target_arch", "gemma4", "gemma4")
    names = ("n_centroids", "centroid_top_k", "use_ordered_embeddings", "attention.k_eq_v")
    count, top_k, ordered, k_eq_v = (_take(fields, name, None) for name in names)
    centroids = next((raw.shape[0] for name, raw in tensors.items() if name in CENTROIDS), None)
    if (centroids is None and ordered) or (centroids is not None and count not in (None, centroids)):
        raise CheckpointError(f"n_centroids is {show(count)}, and there are {show(centroids)}")
    text = _gemma(fields, tensors)
    return {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": backbone,
        "use_ordered_embeddings": centroids is not None,
        "num_centroids": centroids,
        "centroid_intermediate_top_k": top_k,
        "text_config": text if k_eq_v is None else text | {"attention_k_eq_v": k_eq_v},
    }


def _drop_towers(fields, tensors):
    """Take out what sees and hears, which Ollama's files have: only text is read."""
    for prefix in ("vision.", "audio."):
        _take_prefixed(fields, prefix)
    for prefix in ("v.", "a.", "mm."):
        _take_prefixed(tensors, prefix)


def _take_prefixed(table, prefix):
    return {key.removeprefix(prefix): table.pop(key) for key in list(table) if key.startswith(prefix)}


def _take_draft(fields, tensors):
    """The drafter of a file with two heads -> (fields, tensors) as a file of its own would have them, or None.

    A branch of Ollama writes and reads such files of Gemma (convert/convert.go, ConvertModelWithDraft; model_draft.go):
    the assistant's tensors, and those of its keys in which it differs, with `draft.` before them.
    """
    draft, own = _take_prefixed(fields, "draft."), _take_prefixed(tensors, "draft.")
    if not own:
        return None
    own = {f"mtp.{name}" if f"mtp.{name}" in ASSISTANT_TOP else name: raw for name, raw in own.items()}
    draft = {key: fields[key] for key in SHARED if key in fields} | {"embedding_length_per_layer_input": 0} | draft
    names, width = ("attention.sliding_window_pattern", "attention.head_count_kv"), draft.get("attention.key_length")
    theirs, ours = (layer_count({"num_hidden_layers": table.get("block_count")}) for table in (fields, draft))
    lent = dict(zip(*(_take_each(dict(fields), name, theirs) for name in names)))
    rotating = int(width * _rotating(dict(tensors), width))  # one table for both
    _take_same(draft, "rope.dimension_count", rotating, rotating)
    draft |= {
        "n_embd_backbone": fields.get("embedding_length"),
        "attention.head_count_kv": [lent.get(is_sliding) for is_sliding in _take_each(dict(draft), names[0], ours)],
        "rope.dimension_count": width,
        "rope.dimension_count_swa": draft.get("attention.key_length_swa"),
        "n_centroids": draft.pop("num_centroids", None),
        "centroid_top_k": draft.pop("centroid_intermediate_top_k", None),
    }
    return draft, own | {"rope_freqs.weight": tensors["rope_freqs.weight"]}


def _qwen(model_type, fields, tensors):
    text = {"model_type": model_type, **_take_pairs(fields, QWEN)}
    blocks, mtp = layer_count(text), config_size(text, "mtp_num_hidden_layers")
    count, interval = blocks - mtp, config_value(text, "full_attention_interval", int, 4)
    recurrent = _take(fields, "attention.recurrent_layers", [i < count and (i + 1) % interval for i in range(blocks)])
    if count < 1 or not isinstance(recurrent, list) or len(recurrent) != blocks or any(recurrent[count:]):
        raise CheckpointError(f"attention.recurrent_layers {show(recurrent)}: of {blocks} layers {mtp} are for MTP")
    inner, heads = _take(fields, "ssm.inner_size"), config_value(text, "linear_num_value_heads", int)
    if config_value({"ssm.inner_size": inner}, "ssm.inner_size", int) % heads:
        raise CheckpointError(f"ssm.inner_size {inner} for {heads} heads")
    _take_same(fields, "attention.value_length", text["head_dim"])
    rope = {"rope_type": "default", "rope_theta": _take(fields, "rope.freq_base"), "mrope_interleaved": True}
    rope["partial_rotary_factor"] = _fraction(_take(fields, "rope.dimension_count"), text["head_dim"])
    sections = _take(fields, "rope.dimension_sections", None)
    rope["mrope_section"] = sections[:3] if isinstance(sections, list) else sections  # GGUF: and a fourth, 0
    return text | {
        "num_hidden_layers": count,
        "layer_types": ["linear_attention" if r else "full_attention" for r in recurrent[:count]],
        "linear_value_head_dim": inner // heads,
        "rope_parameters": rope,
        "vocab_size": _take_vocabulary(fields, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
    }


# Tensors: name in the file -> (rule, published name). A rule takes the tensor, that name and the text's configuration,
# and yields the tensor, or several, as published. Gemma's numbers are as published. Of Qwen's, files hold:
#
#   tensors                                         hold                                              undone by
#   all norms but ssm_norm                          1 + w, as the forward uses it                     _norm
#   ssm_a                                           -exp(A_log)                                       _decay
#   rows of attn_gate, ssm_alpha, ssm_beta, ssm_dt  value heads in turn, one of each key head         _value_rows
#   attn_qkv                                        likewise, after the rows of queries and keys      _value_rows
#   ssm_conv1d                                      likewise, and the axis of length 1 left out       _conv
#   columns of ssm_out                              value heads in turn                               _value_columns
#   ffn_*_exps (Gemma's too)                        the matrices of all experts in one tensor         _experts
#   ffn_gate_inp_shexp                              its single row, or that as a vector               _one_row


def _plain(raw, name, text):
    yield replace(raw, name=name)


def _norm(raw, name, text):
    yield replace(raw, name=name, plus_one=True)


def _one_row(raw, name, text):
    yield replace(raw, name=name, shape=(math.prod(raw.shape[:-1]), raw.shape[-1]))  # llama-quantize drops the 1


def _ordering(raw, name, text):
    if raw.dtype not in ("I32", "I64"):  # published as I64
        raise CheckpointError(f"{show(raw.name)} is {raw.dtype}, expected I32")
    yield replace(raw, name=name, dtype="I64", data=raw.stored().astype("<i8").reshape(-1).view(np.uint8))


def _experts(raw, name, text, parts=("",)):
    """Where a tensor holds both gate and up, the rows of an expert's gate are before those of its up."""
    count = config_value(text, "num_experts", int)
    if len(raw.shape) != 3 or raw.shape[0] != count or raw.shape[1] % len(parts):
        raise CheckpointError(f"{show(raw.name)} is {list(raw.shape)}: not {count} experts")
    shape, size = (raw.shape[1] // len(parts), raw.shape[2]), raw.data.size // (count * len(parts))
    for i in range(count * len(parts)):
        expert = name.format(i // len(parts), parts[i % len(parts)])
        yield GgufTensor(expert, raw.dtype, shape, raw.data[i * size : (i + 1) * size], raw.file)


def _value_rows(raw, name, text, keys=False, wide=True):
    """keys: before the values come the rows of queries and keys. wide: False if a head is a single row."""
    key_heads, key_dim = (config_value(text, f"linear_{size}", int) for size in ("num_key_heads", "key_head_dim"))
    start = 2 * key_heads * key_dim if keys else 0
    order, width = _value_heads(raw, raw.shape[0] - start, text, wide)
    if order is not None:
        rows = start + (order[:, None] * width + np.arange(width)).ravel()
        raw = replace(raw, row_order=np.append(np.arange(start), rows))
    yield replace(raw, name=name)


def _conv(raw, name, text):
    for tensor in _value_rows(raw, name, text, keys=True):
        yield replace(tensor, shape=(raw.shape[0], 1, *raw.shape[1:]))


def _value_columns(raw, name, text):
    yield replace(raw, name=name, head_order=_value_heads(raw, raw.shape[-1], text)[0])


def _value_heads(raw, size, text, wide=True):
    """Where in the file the published value heads are -> (int [heads], or None where they are as published; width).

    Published, heads of the same key head are neighbours, as 0 0 0 1 1 1; in a file key heads take turns: 0 1 0 1 0 1.
    """
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim")
    groups, heads, width = (config_value(text, name, int) for name in names)
    width = width if wide else 1
    if size != heads * width or heads % groups:
        raise CheckpointError(f"{show(raw.name)} is {list(raw.shape)}: not {heads} heads in {groups} groups of {width}")
    order = None if heads == groups else np.arange(heads).reshape(-1, groups).T.ravel()
    return order, width


def _decay(raw, name, text):
    """The shortest float with that exponential: the published one, if that had 16 bits."""
    tensor = next(_value_rows(raw, name, text, wide=False))
    decay_H = tensor.stored().astype(np.float64)
    if raw.dtype != "F32" or not (np.isfinite(decay_H) & (decay_H < 0)).all():
        raise CheckpointError(f"{show(raw.name)}, {raw.dtype}, is not the -exp of anything")
    log_H = np.log(-decay_H)
    shorter = (bf16_to_float(float_to_bf16(log_H), np.float64), log_H.astype(np.float16).astype(np.float64), log_H)
    log_H = next(x_H for x_H in shorter if np.allclose(-np.exp(x_H), decay_H, rtol=2**-22, atol=0))
    yield GgufTensor(name, "F64", raw.shape, log_H.reshape(-1).view(np.uint8), raw.file)


def _weights(rule, pairs):
    """Pairs of names -> {"name.weight": (rule, "published.weight")}"""
    return {f"{name}.weight": (rule, f"{published}.weight") for name, published in map(str.split, pairs.split(","))}


CENTROIDS = ("masked_embd_centroids.weight", "mtp.centroids.weight")
LAYER = _weights(_plain, """ffn_gate mlp.gate_proj, ffn_up mlp.up_proj, ffn_down mlp.down_proj""")
ATTENTION = _weights(_plain, """attn_q self_attn.q_proj, attn_k self_attn.k_proj, attn_v self_attn.v_proj,
    attn_output self_attn.o_proj""")  # fmt: skip
EXPERTS = _weights(_experts, """ffn_gate_exps experts.{}.gate_proj, ffn_up_exps experts.{}.up_proj,
    ffn_down_exps experts.{}.down_proj""") | _weights(partial(_experts, parts=("gate", "up")),
    """ffn_gate_up_exps experts.{}.{}_proj""")  # fmt: skip
GEMMA_TOP = _weights(_plain, """token_embd model.embed_tokens, output_norm model.norm, output lm_head,
    per_layer_token_embd model.embed_tokens_per_layer, per_layer_model_proj model.per_layer_model_projection,
    per_layer_proj_norm model.per_layer_projection_norm""")  # fmt: skip
GEMMA_LAYER = LAYER | ATTENTION | EXPERTS | _weights(_plain, """attn_norm input_layernorm,
    attn_q_norm self_attn.q_norm, attn_k_norm self_attn.k_norm, post_attention_norm post_attention_layernorm,
    ffn_norm pre_feedforward_layernorm, post_ffw_norm post_feedforward_layernorm,
    post_ffw_norm_1 post_feedforward_layernorm_1, pre_ffw_norm_2 pre_feedforward_layernorm_2,
    post_ffw_norm_2 post_feedforward_layernorm_2, ffn_gate_inp router.proj, inp_gate per_layer_input_gate,
    proj per_layer_projection, post_norm post_per_layer_input_norm""") | {
    "ffn_gate_inp.scale": (_plain, "router.scale"), "ffn_down_exps.scale": (_plain, "router.per_expert_scale"),
    "layer_output_scale.weight": (_plain, "layer_scalar"),
}  # fmt: skip
ASSISTANT_TOP = GEMMA_TOP | _weights(_plain, """nextn.pre_projection pre_projection, mtp.pre_projection pre_projection,
    nextn.post_projection post_projection, mtp.post_projection post_projection,
    masked_embd_centroids masked_embedding.centroids, mtp.centroids masked_embedding.centroids""") | dict.fromkeys(
    ("masked_embd_ordering", "mtp.token_ordering", "mtp.token_ordering.weight"),
    (_ordering, "masked_embedding.token_ordering"),
)  # fmt: skip
QWEN_TOP = _weights(_plain, "token_embd model.embed_tokens, output lm_head") | _weights(_norm, "output_norm model.norm")
QWEN_LAYER = LAYER | {name: (rule, f"mlp.{published}") for name, (rule, published) in EXPERTS.items()} | _weights(
    _plain, """ffn_gate_inp mlp.gate, ffn_gate_shexp mlp.shared_expert.gate_proj,
    ffn_up_shexp mlp.shared_expert.up_proj, ffn_down_shexp mlp.shared_expert.down_proj""") | _weights(
    _one_row, "ffn_gate_inp_shexp mlp.shared_expert_gate") | _weights(
    _norm, "attn_norm input_layernorm, post_attention_norm post_attention_layernorm")  # fmt: skip
QWEN_FULL = QWEN_LAYER | ATTENTION | _weights(_norm, "attn_q_norm self_attn.q_norm, attn_k_norm self_attn.k_norm")
QWEN_DELTA = QWEN_LAYER | {
    "attn_qkv.weight": (partial(_value_rows, keys=True), "linear_attn.in_proj_qkv.weight"),
    "attn_gate.weight": (_value_rows, "linear_attn.in_proj_z.weight"),
    "ssm_alpha.weight": (partial(_value_rows, wide=False), "linear_attn.in_proj_a.weight"),
    "ssm_beta.weight": (partial(_value_rows, wide=False), "linear_attn.in_proj_b.weight"),
    "ssm_conv1d.weight": (_conv, "linear_attn.conv1d.weight"),
    "ssm_dt.bias": (partial(_value_rows, wide=False), "linear_attn.dt_bias"),
    "ssm_a": (_decay, "linear_attn.A_log"),
    "ssm_norm.weight": (_plain, "linear_attn.norm.weight"),
    "ssm_out.weight": (_value_columns, "linear_attn.out_proj.weight"),
}
QWEN_MTP = QWEN_FULL | _weights(_plain, "nextn.eh_proj mtp.fc") | _weights(_norm, """nextn.shared_head_norm mtp.norm,
    nextn.enorm mtp.pre_fc_norm_embedding, nextn.hnorm mtp.pre_fc_norm_hidden""")  # fmt: skip


class Architecture(NamedTuple):
    """How a file of one `general.architecture` is read. Tokens are known by how they are spelled."""

    config: Callable  # (its keys, the file's tensors) -> config.json; takes out what it has understood
    top: dict  # tables of the tensors outside blocks
    blocks: dict  # and in them, by kind of layer
    media: dict  # of config.json's fields that are ids of tokens
    stops: tuple  # of tokens that end a text
    drafter: tuple | None = None  # the Architecture of another head that a file may have


GEMMA_REST = (
    dict.fromkeys(("sliding_attention", "full_attention"), GEMMA_LAYER),
    {"image_token_id": "<|image|>", "audio_token_id": "<|audio|>", "video_token_id": "<|video|>"},
    ("<eos>", "<turn|>", "<|tool_response>"),
)
QWEN_REST = (
    {"linear_attention": QWEN_DELTA, "full_attention": QWEN_FULL, "mtp": QWEN_MTP},
    {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    ("<|im_end|>", "<|endoftext|>"),
)
ASSISTANT = Architecture(_assistant, ASSISTANT_TOP, *GEMMA_REST)
ARCHITECTURES = {
    "gemma4": Architecture(_gemma, GEMMA_TOP, *GEMMA_REST, drafter=ASSISTANT),
    "gemma4-assistant": ASSISTANT,
    "gemma4_assistant": ASSISTANT,
    "qwen35": Architecture(partial(_qwen, "qwen3_5_text"), QWEN_TOP, *QWEN_REST),
    "qwen35moe": Architecture(partial(_qwen, "qwen3_5_moe_text"), QWEN_TOP, *QWEN_REST),
}


def _published(stored, architecture, text, file):
    """{published name: GgufTensor}; blocks beyond the model's layers are MTP layers."""
    count, tensors = len(text["layer_types"]), {}
    kinds = text["layer_types"] + ["mtp"] * config_size(text, "mtp_num_hidden_layers")
    for key, raw in stored.items():
        block = re.fullmatch(r"blk\.(0|[1-9]\d{0,3})\.(.+)", key)
        i, suffix = (int(block[1]), block[2]) if block else (None, key)
        known = architecture.top if i is None else architecture.blocks[kinds[i]] if i < len(kinds) else {}
        if suffix not in known:
            raise CheckpointError(f"unknown tensor {show(key)} in a file of {file}")
        rule, name = known[suffix]
        if i is not None and not name.startswith("mtp."):
            name = f"model.layers.{i}.{name}" if i < count else f"mtp.layers.{i - count}.{name}"
        for tensor in rule(raw, name, text):
            if tensor.name in tensors or len(tensors) == MAX_TENSORS:
                raise CheckpointError(f"{show(key)}: {show(tensor.name)} is there twice, or one of too many")
            tensors[tensor.name] = tensor
    return tensors
