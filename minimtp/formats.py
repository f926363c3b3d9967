"""How a checkpoint stores weights: the tensors that are there, and config.json's word on them, become weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import mobile
from .checkpoint import FLOATS, CheckpointError, show
from .config import name_patterns
from .ggml import TYPES
from .mobile import WIDTHS, is_embedding, parse_mobile
from .quant import Plain, Quantized, find_tensor

# Storage layouts. A reader takes (tensors, base name, what parse_quantization returned) and returns the weight and the
# names of the tensors it consists of; a writer takes (base name, weight) and returns what write_safetensors takes.


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
    """compressed-tensors' X.weight_packed int32 [out, in·bits/32], X.weight_scale [out, in/group], X.weight_shape int64
    [2] and, of asymmetric weights, X.weight_zero_point int32 [out·bits/32 rounded up, in/group].

    Element i of a row is bits b·i mod 32 … of word b·i/32, as code + 2^(b-1); so the bytes of the little-endian words
    are already `Quantized.packed`, and nothing is copied. Zero points are codes, packed the same way down a column.
    """
    if f"{name}.weight_g_idx" in tensors:
        raise CheckpointError(f"{show(f'{name}.weight_g_idx')}: activation order by group is not supported")
    packed, scheme, said = tensors[f"{name}.weight_packed"], quantization.scheme_of(name), quantization.describe(name)
    size = find_tensor(tensors, f"{name}.weight_shape", ("I64",), (2,))
    rows, columns = (int(n) for n in size.stored())
    group = scheme.group or columns
    if rows < 1 or columns < 1 or columns % group or columns * scheme.bits % 32:
        raise CheckpointError(f"{size.file}: {show(size.name)} [{rows}, {columns}]: not groups of {group}{said}")
    find_tensor(tensors, packed.name, ("I32",), (rows, columns * scheme.bits // 32), said)
    scale = find_tensor(tensors, f"{name}.weight_scale", ("BF16", "F16", "F32"), (rows, columns // group), said)
    zeros, names = None, (packed.name, scale.name, size.name)
    if not scheme.symmetric:
        shape = (-(-rows * scheme.bits // 32), columns // group)
        zero_point = find_tensor(tensors, f"{name}.weight_zero_point", ("I32",), shape, said)
        zeros, names = _unpack_columns(zero_point.stored(), rows, scheme.bits), (*names, zero_point.name)
    elif f"{name}.weight_zero_point" in tensors:
        found = f"{packed.file}: {show(f'{name}.weight_zero_point')} is there"
        raise CheckpointError(f"{found}, but quantization_config.{scheme.field} says symmetric")
    codes = packed.data.reshape(rows, columns * scheme.bits // 8)
    scales = Plain(scale.stored(), scale.dtype, scale.name)
    return Quantized(codes, scales, group, scheme.bits, name, zeros), names


def _unpack_columns(words_WG, rows, bits):
    """Codes packed in int32 down the columns -> int8 [rows, G]."""
    packed_GB = np.ascontiguousarray(words_WG.T).view(np.uint8)
    biased_GBC = packed_GB[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
    biased_GR = biased_GBC.reshape(len(packed_GB), -1)[:, :rows]
    return np.ascontiguousarray(biased_GR.T.astype(np.int16) - (1 << bits - 1)).astype(np.int8)


def write_pack_quantized(name, weight):
    if weight.bits != 4 or weight.shape[1] % 8 or weight.zeros is not None:
        raise CheckpointError(f"{show(name)}: {weight.bits}-bit weights {weight.shape} cannot be stored pack-quantized")
    return {
        f"{name}.weight_packed": weight.packed.view("<i4"),
        f"{name}.weight_scale": (weight.scales.dtype, weight.scales.stored),
        f"{name}.weight_shape": np.array(weight.shape, np.int64),
    }


class Format(NamedTuple):
    suffix: str  # the tensor that shows a weight is stored this way,
    dtypes: tuple[str, ...]  # and the dtypes it then has
    read: Callable
    write: Callable | None = None
    quant_method: str | None = None  # what config.json must then say


FORMATS = {
    "plain": Format("weight", FLOATS, read_plain, write_plain),
    "ggml": Format("weight", tuple(TYPES), read_ggml),
    "pack-quantized": Format(
        "weight_packed", ("I32",), read_pack_quantized, write_pack_quantized, "compressed-tensors"
    ),
    "mobile": Format("weight", ("U8", "I8"), mobile.read_linear, None, "gemma"),
    "mobile-embedding": Format("embedding_quantized", ("U8", "I8"), mobile.read_embedding, None, "gemma"),
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
            _check_config(raw, name, format, quantization)
            return format.read(tensors, name, quantization)
    expected = " or ".join(dtype for format in formats for dtype in format.dtypes)
    raise CheckpointError(f"{raw.file}: {show(raw.name)} is {raw.dtype}, expected {expected}")


def _check_config(raw, name, format, quantization):
    """CheckpointError unless config.json says the same of the tensor."""
    found = f"{raw.file}: {show(raw.name)} is there, but"
    if format.quant_method and quantization is None:
        raise CheckpointError(f"{found} config.json has no quantization_config")
    if format.quant_method not in (None, getattr(quantization, "quant_method", None)):
        raise CheckpointError(f"{found} quantization_config.quant_method is {quantization.quant_method!r}")
    if quantization is not None:
        quantization.check(name, raw)


# What config.json says.


class Scheme(NamedTuple):
    """How the weights of a group in compressed-tensors' configuration are quantized."""

    bits: int
    group: int | None  # None: a whole row
    symmetric: bool
    field: str  # where it is said


@dataclass(frozen=True)
class CompressedConfig:
    """How quantized weights are stored; which weights are quantized, the tensors present say."""

    targets: dict  # target -> Scheme: a module's name, "re:" and a pattern, or a module's class
    patterns: dict  # text of a "re:" target -> its pattern
    quant_method = "compressed-tensors"

    def scheme_of(self, name):
        """-> Scheme of a module: by its name, else by the first pattern in the alphabet, else by its class."""
        patterns = (f"re:{text}" for text in sorted(self.patterns) if self.patterns[text].match(name))
        for target in (name, *patterns, "Embedding" if is_embedding(name) else "Linear"):
            if target in self.targets:
                return self.targets[target]
        raise CheckpointError(f"{show(name)}: packed, but no target of quantization_config.config_groups is it")

    def describe(self, name):
        bits, group, _, field = self.scheme_of(name)
        return f" ({bits} bits in {f'groups of {group}' if group else 'rows'}, quantization_config.{field} says)"

    def check(self, name, raw):
        """Weights that are not packed are as they are, whatever the targets; packed ones have a scheme."""


# Field -> values that mean nothing is done but what is done here; None is for an absent field whose default in
# compressed-tensors is the same. The "any" fields change no number, or are looked at by themselves.
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
    "num_bits": WIDTHS,
    "group_size": "any",
    "type": ("int", None),
    "symmetric": (True, False, None),
    "strategy": ("group", "channel", None),
    "dynamic": (False, None),
    "actorder": (None, False, "weight", "static"),  # these choose the codes, not how they are stored
    "block_structure": (None,),
    **dict.fromkeys(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"), "any"),
}
WHERE = "config: quantization_config"


def parse_quantization(config):
    """config.json -> CompressedConfig, MobileConfig, or None where it has no quantization_config (nor its text_config).

    CheckpointError names the field that asks for anything else: a guess here would give wrong weights without a word.
    https://github.com/vllm-project/compressed-tensors (quantization/quant_config.py, quant_scheme.py, quant_args.py)
    """
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    found = config.get("quantization_config") or text.get("quantization_config")
    if not found:
        return None
    if isinstance(found, dict) and found.get("quant_method") == "gemma":
        return parse_mobile(found, tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings")) is not False)
    _check_fields(WHERE, found, CONFIG_FIELDS, others=True)
    groups = found.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{WHERE}.config_groups is {show(groups)}, expected a table of groups")
    targets = {}
    for key, group in groups.items():
        at = f"config_groups.{show(key)}"
        _check_fields(f"{WHERE}.{at}", group, GROUP_FIELDS)
        names = group.get("targets")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{WHERE}.{at}.targets is {show(names)}, expected a list of names")
        targets |= dict.fromkeys(names, _parse_scheme(at, group.get("weights")))
    texts = [target[3:] for target in targets if target.startswith("re:")]
    return CompressedConfig(targets, name_patterns(texts, f"{WHERE}.config_groups"))


def _parse_scheme(where, weights):
    _check_fields(f"{WHERE}.{where}.weights", weights, WEIGHTS_FIELDS)
    group, strategy = weights.get("group_size"), weights.get("strategy")
    strategy = strategy or ("channel" if group == -1 else "group")
    if strategy == "channel" and group in (None, -1):
        group = None
    elif strategy == "channel" or type(group) is not int or not 1 <= group < 2**31:
        raise CheckpointError(f"{WHERE}.{where}.weights.group_size is {show(group)} with strategy {show(strategy)}")
    return Scheme(weights["num_bits"], group, weights.get("symmetric") is not False, where)


def _check_fields(where, table, fields, others=False):
    if not isinstance(table, dict):
        raise CheckpointError(f"{where} is {show(table)}, expected a table")
    for field, values in fields.items():
        found = table.get(field)
        if values != "any" and (found not in values or type(found) not in map(type, values)):  # True is not 1
            raise CheckpointError(f"{where}.{field} is {show(found)}, supported: {', '.join(map(repr, values))}")
    for field in () if others else table.keys() - fields.keys():
        raise CheckpointError(f"{where}.{show(field)} is not a known field")
