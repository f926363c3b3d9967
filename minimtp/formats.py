"""How a checkpoint stores weights: the tensors that are there, and config.json's word on them, become weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .checkpoint import FLOATS, CheckpointError, show
from .ggml import TYPES
from .quant import Plain, Quantized

# Storage layouts. A reader takes (tensors, base name, QuantizationConfig or None) and returns the weight and the names
# of the tensors it consists of; a writer takes (base name, weight) and returns what write_safetensors takes.


def read_plain(tensors, name, quantization):
    """X.weight in a float type."""
    raw = tensors[f"{name}.weight"]
    return Plain(raw.stored(), raw.dtype, raw.name), (raw.name,)


def write_plain(name, weight):
    return {f"{name}.weight": (weight.dtype, weight.stored)}


def read_ggml(tensors, name, quantization):
    """X.weight in one of ggml's block types, as a GGUF file has it."""
    raw = tensors[f"{name}.weight"]
    return raw.weight(), (raw.name,)


def read_pack_quantized(tensors, name, quantization):
    """compressed-tensors' X.weight_packed int32 [out, in/8], X.weight_scale [out, in/group], X.weight_shape int64 [2].

    Element i of a row is bits 4·(i mod 8) of word i/8, as code + 8; so the bytes of the little-endian words are already
    `Quantized.packed`, and nothing is copied.
    """
    for extra in ("weight_zero_point", "weight_g_idx"):
        if f"{name}.{extra}" in tensors:
            raise CheckpointError(f"{show(f'{name}.{extra}')}: zero points and activation order are not supported")
    packed = tensors[f"{name}.weight_packed"]
    if quantization is None:
        raise CheckpointError(
            f"{packed.file}: {show(packed.name)} is there, but config.json has no quantization_config"
        )
    size = _part(tensors, f"{name}.weight_shape", ("I64",), (2,))
    rows, columns = (int(n) for n in size.stored())
    if rows < 1 or columns < 1 or columns % quantization.group:
        raise CheckpointError(f"{size.file}: {show(size.name)} [{rows}, {columns}]: not groups of {quantization.group}")
    _part(tensors, packed.name, ("I32",), (rows, columns // 8))
    scale = _part(tensors, f"{name}.weight_scale", ("BF16", "F16", "F32"), (rows, columns // quantization.group))
    scales = Plain(scale.stored(), scale.dtype, scale.name)
    weight = Quantized(packed.data.reshape(rows, columns // 2), scales, quantization.group, quantization.bits, name)
    return weight, (packed.name, scale.name, size.name)


def write_pack_quantized(name, weight):
    if weight.bits != 4 or weight.shape[1] % 8:
        raise CheckpointError(f"{show(name)}: {weight.bits}-bit weights {weight.shape} cannot be stored pack-quantized")
    return {
        f"{name}.weight_packed": weight.packed.view("<i4"),
        f"{name}.weight_scale": (weight.scales.dtype, weight.scales.stored),
        f"{name}.weight_shape": np.array(weight.shape, np.int64),
    }


def _part(tensors, name, dtypes, shape):
    """The tensor of that name, which must have one of these dtypes and this shape."""
    if name not in tensors:
        raise CheckpointError(f"tensor {show(name)} is missing")
    raw = tensors[name]
    if raw.dtype not in dtypes or raw.shape != shape:
        expected = f"{' or '.join(dtypes)} {list(shape)}"
        raise CheckpointError(f"{raw.file}: {show(name)} is {raw.dtype} {list(raw.shape)}, expected {expected}")
    return raw


class Format(NamedTuple):
    suffix: str  # the tensor that shows a weight is stored this way,
    dtypes: tuple[str, ...]  # and the dtypes it then has
    read: Callable
    write: Callable | None


FORMATS = {
    "plain": Format("weight", FLOATS, read_plain, write_plain),
    "ggml": Format("weight", tuple(TYPES), read_ggml, None),
    "pack-quantized": Format("weight_packed", ("I32",), read_pack_quantized, write_pack_quantized),
}


def read_weight(tensors, name, quantization=None):
    """The weight of a base name like "model.layers.0.self_attn.q_proj" -> (weight, names of its tensors).

    The tensors present decide how it is stored. CheckpointError if none or too many are, or if they do not agree.
    """
    formats = [format for format in FORMATS.values() if f"{name}.{format.suffix}" in tensors]
    found = sorted({f"{name}.{format.suffix}" for format in formats})
    if not found:
        raise CheckpointError(f"tensor {show(f'{name}.weight')} is missing")
    if len(found) > 1:
        raise CheckpointError(f"{show(found[0])} and {show(found[1])}: the same weight twice")
    raw = tensors[found[0]]
    for format in formats:
        if raw.dtype in format.dtypes:
            return format.read(tensors, name, quantization)
    expected = " or ".join(dtype for format in formats for dtype in format.dtypes)
    raise CheckpointError(f"{raw.file}: {show(raw.name)} is {raw.dtype}, expected {expected}")


# What config.json says. Field -> values that mean int4, symmetric, one scale per 32 weights, activations left alone;
# None is for an absent field whose default in compressed-tensors is the same. The "any" fields change no number.


@dataclass(frozen=True)
class QuantizationConfig:
    """How quantized weights are stored; which weights are quantized, the tensors present say."""

    format: str
    bits: int
    group: int


CONFIG_FIELDS = {
    "quant_method": ("compressed-tensors",),
    "format": ("pack-quantized",),
    "quantization_status": ("compressed",),
    "kv_cache_scheme": (None,),
    "transform_config": (None, {}),
}
GROUP_FIELDS = {
    "targets": "any",
    "format": (None, "pack-quantized"),
    "input_activations": (None,),
    "output_activations": (None,),
    "weights": "any",
}
WEIGHTS_FIELDS = {
    "num_bits": (4,),
    "group_size": (32,),
    "type": ("int", None),
    "symmetric": (True, None),
    "strategy": ("group", None),
    "dynamic": (False, None),
    "actorder": (None, False, "weight", "static"),  # these choose the codes, not how they are stored
    "block_structure": (None,),
    **dict.fromkeys(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"), "any"),
}


def parse_quantization(config):
    """config.json -> QuantizationConfig, or None where it has no quantization_config (nor its text_config).

    CheckpointError names the field that asks for anything else: a guess here would give wrong weights without a word.
    https://github.com/vllm-project/compressed-tensors (quantization/quant_config.py, quant_scheme.py, quant_args.py)
    """
    text = config.get("text_config")
    found = config.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if not found:
        return None
    where = "config: quantization_config"
    _check_fields(where, found, CONFIG_FIELDS, others=True)
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}.config_groups is {show(groups)}, expected a table of groups")
    for key, group in groups.items():
        at = f"{where}.config_groups.{show(key)}"
        _check_fields(at, group, GROUP_FIELDS)
        _check_fields(f"{at}.weights", group.get("weights"), WEIGHTS_FIELDS)
    return QuantizationConfig("pack-quantized", bits=4, group=32)


def _check_fields(where, table, fields, others=False):
    if not isinstance(table, dict):
        raise CheckpointError(f"{where} is {show(table)}, expected a table")
    for field_, values in fields.items():
        if values != "any" and table.get(field_) not in values:
            raise CheckpointError(f"{where}.{field_} is {show(table.get(field_))}, supported: {values[0]!r}")
    for field_ in () if others else table.keys() - fields.keys():
        raise CheckpointError(f"{where}.{show(field_)} is not a known field")
