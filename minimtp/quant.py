"""Weights as they are stored, plain or quantized, and their float rows on demand: every storage layout, two objects.

A weight has `shape` (out, in), `rows(start, stop, dtype)` and `take(ids, dtype)`; nothing that consumes it knows more.
Letters: O output and I input features, R some of the rows O; along I: G groups of K, or B bytes of C codes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from .checkpoint import DTYPES, FLOATS, CheckpointError, bf16_to_float, float_to_bf16, show

EXPONENT = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # all ones: infinite or NaN
# Weights handled at a time. What is computed on the way stays in cache, and small enough that the allocator keeps it:
# the look-up's index for a whole tile would be returned to the system and paged in again, at a sixth of the speed.
BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Plain:
    """A float array kept as stored (bf16: its uint16 bits), widened where it is read."""

    stored: np.ndarray = field(repr=False)  # [out, in], or any shape with rows first
    dtype: str  # one of checkpoint.FLOATS
    name: str = ""

    def __post_init__(self):
        if self.dtype not in FLOATS or self.stored.dtype != DTYPES[self.dtype]:
            raise CheckpointError(f"{show(self.name)}: {self.stored.dtype} array as {self.dtype}, expected a float")

    @property
    def shape(self):
        return self.stored.shape

    def rows(self, start, stop, dtype):
        """Rows start … stop-1 -> float [stop - start, in], C-contiguous; as stored, a read-only view."""
        return self._widen(self.stored[_range(self, start, stop)], dtype)

    def take(self, ids, dtype):
        """The rows of an embedding -> float [len(ids), in]. IndexError outside it."""
        return self._widen(self.stored[_ids(self, ids)], dtype)

    def dequantize(self, dtype):
        """-> float [out, in]"""
        return self.rows(0, self.shape[0], dtype)

    def _widen(self, stored, dtype):
        if self.dtype == "BF16":
            return bf16_to_float(stored, dtype)
        return np.require(stored, dtype, "CA")  # a map need not be aligned


@dataclass(frozen=True, eq=False)
class Quantized:
    """w[o, i] = code[o, i] · scale[o, i // group], with signed codes of 2, 4 or 8 bits.

    The one form of every storage: a code is held as the unsigned code + 2^(bits-1), packed along `in`, the first in the
    lowest bits of its byte (at 4 bits: low nibble first). Scales stay as stored; group = in is one scale per channel.
    """

    packed: np.ndarray = field(repr=False)  # uint8 [out, in·bits/8]
    scales: Plain  # [out, in/group]
    group: int = 32
    bits: int = 4
    name: str = ""

    def __post_init__(self):
        packed_2d = self.packed.dtype == np.uint8 and self.packed.ndim == 2 and self.packed.size
        if not packed_2d or self.bits not in (2, 4, 8):
            raise CheckpointError(f"{show(self.name)}: not packed codes: {self.packed.dtype} {self.packed.shape}")
        rows, columns = self.shape
        if columns % self.group or self.scales.shape != (rows, columns // self.group):
            raise CheckpointError(
                f"{show(self.name)}: scales {self.scales.shape} for weights {self.shape} in groups of {self.group}"
            )

    @property
    def shape(self):
        return self.packed.shape[0], self.packed.shape[1] * 8 // self.bits

    def rows(self, start, stop, dtype):
        """Rows start … stop-1 -> new float [stop - start, in], C-contiguous; in float64 the exact products."""
        rows = _range(self, start, stop)
        return _unpack(self.packed[rows], self.scales.rows(start, stop, dtype), self.bits)

    def take(self, ids, dtype):
        """The rows of an embedding -> new float [len(ids), in]. IndexError outside it."""
        ids = _ids(self, ids)
        return _unpack(self.packed[ids], self.scales.take(ids, dtype), self.bits)

    def dequantize(self, dtype):
        """-> new float [out, in]"""
        return self.rows(0, self.shape[0], dtype)

    def codes(self):
        """-> int8 [out, in], the signed codes, for inspection."""
        return _levels(self.bits, np.dtype(np.int8))[self.packed].reshape(self.shape)


@cache
def _levels(bits, dtype):
    """The codes in every possible byte, biased back -> [256, 8/bits], lowest bits first."""
    count = 1 << bits
    levels = (np.arange(256)[:, None] >> np.arange(0, 8, bits)) % count - count // 2
    return levels.astype(dtype)


def _unpack(packed_RB, scales_RG, bits):
    """-> [R, I] in the scales' dtype. One look-up gives all codes of a byte, already floats."""
    levels = _levels(bits, scales_RG.dtype)
    (R, B), G, C = packed_RB.shape, scales_RG.shape[1], levels.shape[1]
    w_RBC = np.empty((R, B, C), scales_RG.dtype)
    w_RGK = w_RBC.reshape(R, G, B * C // G)
    height = max(1, BLOCK // (B * C))
    for block in (slice(start, start + height) for start in range(0, R, height)):
        np.take(levels, packed_RB[block], axis=0, out=w_RBC[block], mode="clip")  # mode "raise" would buffer `out`
        w_RGK[block] *= scales_RG[block, :, None]
    return w_RBC.reshape(R, B * C)


def _range(weight, start, stop):
    if not 0 <= start <= stop <= weight.shape[0]:
        raise IndexError(f"{show(weight.name)}: rows {start} to {stop} of {weight.shape[0]}")
    return slice(start, stop)


def _ids(weight, ids):
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and not (0 <= ids.min() and ids.max() < weight.shape[0]):
        raise IndexError(f"{show(weight.name)}: row {ids.min()} or {ids.max()} of {weight.shape[0]}")
    return ids


def pack(w_OI, group=32, name=""):
    """Round float weights to int4, a bf16 scale per group of absmax / 7.5 -> Quantized.

    compressed-tensors' symmetric minmax (llm-compressor's `memoryless_minmax`), which ties to even and gives a group of
    zeros the scale 2^-23. Weights that already lie on an int4 lattice come out with their scales off by 1/15: this is
    for new weights. CheckpointError for weights that are not finite or not [out, k·group].
    """
    w_OI = np.asarray(w_OI, np.float32)
    if w_OI.ndim != 2 or w_OI.size == 0 or w_OI.shape[1] % group or group % 2:
        raise CheckpointError(f"{show(name)}: weights {w_OI.shape} do not divide into groups of {group}")
    if not np.isfinite(w_OI).all():
        raise CheckpointError(f"{show(name)}: NaN or infinite weights")
    w_OGI = w_OI.reshape(len(w_OI), -1, group)
    scales_OG = np.abs(w_OGI).max(-1) / np.float32(7.5)
    scales_OG = float_to_bf16(np.where(scales_OG == 0, np.finfo(np.float32).eps, scales_OG))
    codes_OI = np.rint(w_OGI / bf16_to_float(scales_OG)[..., None]).clip(-8, 7).reshape(w_OI.shape)
    return Quantized(pack_codes(codes_OI), Plain(scales_OG, "BF16", name), group, 4, name)


def pack_codes(codes_OI, bits=4):
    """Signed codes [out, in] -> uint8 [out, in·bits/8] in the order of Quantized."""
    codes_OI, half = np.asarray(codes_OI), 1 << (bits - 1)
    if codes_OI.min() < -half or codes_OI.max() >= half:
        raise ValueError(f"codes {codes_OI.min()} to {codes_OI.max()} do not fit into {bits} bits")
    biased_OI = (codes_OI + half).astype(np.uint8)
    biased_OBC = biased_OI.reshape(len(biased_OI), -1, 8 // bits)
    return np.bitwise_or.reduce(biased_OBC << np.arange(0, 8, bits, dtype=np.uint8), axis=-1)


def check_finite(weight):
    """Read all of a weight (of a quantized one: its scales); CheckpointError, by name, for a NaN or an infinity."""
    plain = weight.scales if isinstance(weight, Quantized) else weight
    unsigned = np.dtype(f"<u{plain.stored.itemsize}")
    exponent = unsigned.type(EXPONENT[plain.dtype])
    bits_N = plain.stored.reshape(-1).view(unsigned)
    for start in range(0, len(bits_N), BLOCK):
        bits = bits_N[start : start + BLOCK]
        if ((bits & exponent) == exponent).any():
            raise CheckpointError(f"{show(plain.name)}: NaN or infinite values")


# Storage layouts. A reader takes (tensors, base name, QuantizationConfig or None) and returns the weight and the names
# of the tensors it consists of; a writer takes (base name, weight) and returns what write_safetensors takes.


def read_plain(tensors, name, quantization):
    """X.weight in a float type."""
    raw = tensors[f"{name}.weight"]
    return Plain(raw.stored(), raw.dtype, raw.name), (raw.name,)


def write_plain(name, weight):
    return {f"{name}.weight": (weight.dtype, weight.stored)}


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
    check_finite(scales)
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
    write: Callable


FORMATS = {
    "plain": Format("weight", FLOATS, read_plain, write_plain),
    "pack-quantized": Format("weight_packed", ("I32",), read_pack_quantized, write_pack_quantized),
}


def read_weight(tensors, name, quantization=None):
    """The weight of a base name like "model.layers.0.self_attn.q_proj" -> (Plain or Quantized, names of its tensors).

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
