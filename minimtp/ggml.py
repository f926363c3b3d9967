"""Weights in ggml's block types, kept as a GGUF file stores them and unpacked where they are used.

A row is a sequence of blocks, each a few scales and its packed codes: a record, and TYPES says of which fields. What
comes out equals `gguf.quants` bit for bit in float32; in float64 it is exact.
Letters: O output and I input features, R some of the rows O; N blocks of K weights; S scales in a block, each for K/S;
along N or I: G groups, B bytes, W words, C codes of a byte.
https://github.com/ggml-org/llama.cpp (ggml/src/ggml-common.h: the records; ggml-quants.c: what they mean)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .backend import scratch
from .checkpoint import CheckpointError, release, show
from .display import cells, framed, histogram, pale
from .quant import BLOCK, Plain, Quantized, Unpacking, release_rows, row_blocks, weight_title

EACH_BYTE = 0x0101010101010101
LARGEST_E8M0 = 252  # of an MXFP4 block: above, its largest weight overflows float32, and 255 is the format's NaN


@dataclass(frozen=True, eq=False)
class Blocks(Unpacking):
    """A weight [out, in] in one of TYPES. Nothing is copied, and nothing read but the rows that are asked for."""

    data: np.ndarray = field(repr=False)  # uint8 [out, in / block · bytes], the rows one after the other in memory
    type: str  # a key of TYPES
    shape: tuple[int, int]
    name: str = ""

    def __post_init__(self):
        if not isinstance(self.shape, tuple) or len(self.shape) != 2 or min(self.shape) < 1:
            raise CheckpointError(f"{show(self.name)}: {show(self.shape)} is no shape of {self.type} rows")
        found = find_type(self.type, self.name)
        stored = (self.shape[0], found.row_bytes(self.shape[1], self.name))
        if self.data.dtype != np.uint8 or self.data.shape != stored or not self.data.flags.c_contiguous:
            raise CheckpointError(
                f"{show(self.name)}: {self.data.dtype} {list(self.data.shape)} for {self.type} {list(self.shape)}, "
                f"expected contiguous uint8 {list(stored)}"
            )

    def _unpack(self, rows, dtype, out=None):
        w_RI = self.unpack(self.data[rows], dtype, out)
        release_rows(self.data, rows)
        return w_RI

    def check_finite(self):
        """Read every scale; CheckpointError, by name, for a NaN or an infinity, or what would make one in float32."""
        b_N = _records(self.data, self.type)
        halves = [part for part in b_N.dtype.names if b_N.dtype[part] == np.float16]
        for some in row_blocks(len(b_N), TYPES[self.type].block, BLOCK):
            b = b_N[some]
            beyond = self.type == "MXFP4" and b["e"].max() > LARGEST_E8M0
            if beyond or not all(np.isfinite(b[part]).all() for part in halves):
                raise CheckpointError(f"{show(self.name)}: NaN or infinite scales")
            release(b)

    def _repr_html_(self):
        first_I = self.unpack(self.data[:1], "float64")[0]
        block = first_I[: min(TYPES[self.type].block, 32)].tolist()
        counts, edges = np.histogram(first_I, 16)
        return framed(
            weight_title(self.name, self.shape, f"{self.type}, blocks of {TYPES[self.type].block}", self.data.nbytes),
            pale(f"the first {len(block)} weights of the first block"),
            cells(block, max(map(abs, block)), [f"{value:.2g}" for value in block]),
            pale(f"how often weights are how large in the first row, from {edges[0]:.3g} to {edges[-1]:.3g}"),
            histogram(counts.tolist(), [""] * len(counts)),
        )

    def as_quantized(self):
        """A Q4_0 weight as what every other int4 storage gives -> Quantized with float16 scales; a copy.

        CheckpointError for another type.
        """
        if self.type != "Q4_0":
            raise CheckpointError(f"{show(self.name)}: {self.type} is not int4 with one scale for 32 weights: Q4_0 is")
        b_N, O = _records(self.data, self.type), self.shape[0]
        packed_OB = _halves_to_pairs(_bytes(b_N["q"])).reshape(O, -1)
        scales_OG = np.ascontiguousarray(b_N["d"]).reshape(O, -1)
        return Quantized(packed_OB, Plain(scales_OG, "F16", self.name), group=32, bits=4, name=self.name)

    def unpack(self, data_RB, dtype, out=None):
        """Rows as they are stored -> float [R, in], in `out` or new."""
        found, b_N = TYPES[self.type], _records(data_RB, self.type)
        w_NK = np.empty((len(b_N), found.block), dtype) if out is None else out.reshape(-1, found.block)
        for some in row_blocks(len(b_N), found.block, BLOCK):
            found.unpack(b_N[some], w_NK[some])
        return w_NK.reshape(len(data_RB), self.shape[1])


def _records(data_RB, type):
    return data_RB.reshape(-1).view(TYPES[type].record)


# From records to floats: each function fills w_NK, float32 or float64, from as many records b.


def _scaled(w_NK, codes_NK, scale_NS, offset_NS=None):
    """w = code · scale + offset. If anything rounds it is the sum: the products fit float32's 24 bits."""
    w_NSK = w_NK.reshape(*scale_NS.shape, -1)
    w_NK[...] = codes_NK
    w_NSK *= scale_NS[..., None]
    if offset_NS is not None:
        w_NSK += offset_NS[..., None]


def _scale(b, part, w_NK):
    """A float16 field -> [N, 1] in w's dtype."""
    return b[part].astype(w_NK.dtype)[:, None]


def _bytes(items_N):
    """A field of packed bytes, one item in its record since NumPy copies those faster -> contiguous uint8 [N, B]."""
    return np.ascontiguousarray(items_N).view(np.uint8).reshape(len(items_N), -1)


def _codes(items_N, bits, run, up=0):
    """Unsigned codes, of `run` bytes at a time first all the lowest bits, then all the next -> int8 [N, B·8/bits].

    up: by how much they are shifted. In this thread's scratch, one array for each number of bits.
    """
    items = scratch("packed", items_N.shape, items_N.dtype)
    items[...] = items_N  # in one piece
    packed_W, mask = items.view(np.uint64), ((1 << bits) - 1 << up) * EACH_BYTE
    word_W = scratch("word", packed_W.shape, np.uint64)
    codes_RC = scratch(f"codes {bits}", (packed_W.nbytes // run, 8 // bits), (np.void, run))
    for c in range(8 // bits):  # shifted by eight bytes: the mask takes off what strays
        down = c * bits - up
        np.right_shift(packed_W, down, out=word_W) if down > 0 else np.left_shift(packed_W, -down, out=word_W)
        word_W &= mask
        codes_RC[:, c] = word_W.view((np.void, run))
    return codes_RC.reshape(-1).view(np.int8).reshape(len(items_N), -1)


def _unpack_q4_0(b, w_NK):
    codes_NK = _codes(b["q"], 4, 16)
    codes_NK -= 8
    _scaled(w_NK, codes_NK, _scale(b, "d", w_NK))


def _unpack_q4_1(b, w_NK):
    _scaled(w_NK, _codes(b["q"], 4, 16), _scale(b, "d", w_NK), _scale(b, "m", w_NK))


def _five_bits(b):
    """The fifth bits of Q5_0 and Q5_1 are in the order of the weights, unlike the other four."""
    codes_NK = np.unpackbits(_bytes(b["high"]), axis=1, bitorder="little").view(np.int8)
    codes_NK *= 16
    codes_NK |= _codes(b["q"], 4, 16)
    return codes_NK


def _unpack_q5_0(b, w_NK):
    _scaled(w_NK, _five_bits(b) - 16, _scale(b, "d", w_NK))


def _unpack_q5_1(b, w_NK):
    _scaled(w_NK, _five_bits(b), _scale(b, "d", w_NK), _scale(b, "m", w_NK))


def _unpack_q8_0(b, w_NK):
    _scaled(w_NK, b["q"], _scale(b, "d", w_NK))


def _unpack_q2_k(b, w_NK):
    scales_NS, mins_NS = b["scales"] & 15, b["scales"] >> 4
    offset_NS = -_scale(b, "dmin", w_NK) * mins_NS
    _scaled(w_NK, _codes(b["q"], 2, 32), _scale(b, "d", w_NK) * scales_NS, offset_NS)


def _sixteen_scales(words_N3):
    """Q3_K's 16 scales of 6 bits, four to a word: the low four bits of two words of them, then the high four, are the
    low bits of these scales; the third word has their high two -> int8 [N, 16]"""
    words_3N = np.ascontiguousarray(words_N3.T)
    low_22N = words_3N[:2] >> np.uint32([[[0]], [[4]]]) & 0x0F0F0F0F
    high_22N = words_3N[2] >> np.uint32([[[0], [2]], [[4], [6]]]) & 0x03030303
    words_4N = (low_22N | high_22N << 4).reshape(4, -1)
    return np.ascontiguousarray(words_4N.T).view(np.int8)


def _unpack_q3_k(b, w_NK):
    codes_NK = _codes(b["q"], 2, 32)
    codes_NK |= _codes(b["high"], 1, 32, up=2)
    codes_NK -= 4
    _scaled(w_NK, codes_NK, _scale(b, "d", w_NK) * (_sixteen_scales(b["scales"]) - 32))


def _scales_and_mins(words_N3):
    """Q4_K's and Q5_K's 8 scales and 8 minima of 6 bits, four to a word: the first word has four scales and above them
    the high two bits of the other four, the second so the minima; the third has the low bits -> uint8 [2, N, 8]"""
    words_2N, rest_N = np.ascontiguousarray(words_N3[:, :2].T), words_N3[:, 2]
    words_2N2 = np.empty((*words_2N.shape, 2), np.uint32)
    words_2N2[..., 0] = words_2N & 0x3F3F3F3F
    words_2N2[..., 1] = rest_N >> np.uint32([[0], [4]]) & 0x0F0F0F0F | words_2N >> 2 & 0x30303030
    return words_2N2.view(np.uint8)


def _scaled_q4_k(b, w_NK, codes_NK):
    scales_NS, mins_NS = _scales_and_mins(b["scales"])
    _scaled(w_NK, codes_NK, _scale(b, "d", w_NK) * scales_NS, -_scale(b, "dmin", w_NK) * mins_NS)


def _unpack_q4_k(b, w_NK):
    _scaled_q4_k(b, w_NK, _codes(b["q"], 4, 32))


def _unpack_q5_k(b, w_NK):
    codes_NK = _codes(b["q"], 4, 32)
    codes_NK |= _codes(b["high"], 1, 32, up=4)
    _scaled_q4_k(b, w_NK, codes_NK)


def _unpack_q6_k(b, w_NK):
    codes_NK = _codes(b["q"], 4, 64)
    codes_NK |= _codes(b["high"], 2, 32, up=4)
    codes_NK -= 32
    _scaled(w_NK, codes_NK, _scale(b, "d", w_NK) * b["scales"])


def _pairs(levels):
    """The levels of a byte's two codes of 4 bits, that of the low one in the low byte -> uint16 [256]"""
    levels, codes = np.array(levels, np.int8).view(np.uint8).astype(np.uint16), np.arange(256)
    return levels[codes & 15] | levels[codes >> 4] << 8


LEVELS_IQ4 = _pairs([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
LEVELS_E2M1 = _pairs([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])  # doubled, to be whole


def _levels(pairs, items_N):
    """The levels of codes of 4 bits, ordered as `_codes` does in runs of 16 bytes -> int8 [N, B·2]"""
    pairs_RB = pairs.take(_bytes(items_N).reshape(-1, 16))
    levels_R2B = np.empty((len(pairs_RB), 2, 16), np.int8)
    levels_R2B[:, 0], levels_R2B[:, 1] = pairs_RB, pairs_RB >> 8  # cut to the low byte
    return levels_R2B.reshape(len(items_N), -1)


def _unpack_iq4_nl(b, w_NK):
    _scaled(w_NK, _levels(LEVELS_IQ4, b["q"]), _scale(b, "d", w_NK))


def _unpack_iq4_xs(b, w_NK):
    low_NS = np.stack([b["low"] & 15, b["low"] >> 4], axis=2).reshape(-1, 8)
    high_NS = b["high"][:, None] >> np.arange(0, 16, 2, np.uint16) & 3
    scale_NS = _scale(b, "d", w_NK) * ((low_NS | high_NS << 4).astype(np.int8) - 32)
    _scaled(w_NK, _levels(LEVELS_IQ4, b["q"]), scale_NS)


def _unpack_mxfp4(b, w_NK):
    scale_N = np.ldexp(w_NK.dtype.type(1), b["e"].astype(np.int32) - 127 - 1)  # the 1 for the doubled levels
    _scaled(w_NK, _levels(LEVELS_E2M1, b["q"]), scale_N[:, None])


# From float32 to records, in the steps of ggml's own functions: each fills as many records b as w_NK has rows.


def _quantize_q4_0(w_NK, b):
    peak_N1 = np.take_along_axis(w_NK, np.abs(w_NK).argmax(axis=1)[:, None], axis=1)
    d_N1 = peak_N1 / -8  # so the peak is on the level -8, and its sign in the step
    codes_NK = np.trunc(w_NK * _inverse(d_N1) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    packed_NB = codes_NK[:, :16] | codes_NK[:, 16:] << 4
    b["d"], b["q"] = d_N1[:, 0], packed_NB.view("V16")[:, 0]


def _quantize_q8_0(w_NK, b):
    d_N1 = np.abs(w_NK).max(axis=1, keepdims=True) / 127
    x_NK = w_NK * _inverse(d_N1)
    size_NK = np.abs(x_NK)
    down_NK = np.floor(size_NK)
    down_NK += np.floor(2 * (size_NK - down_NK))  # C's roundf: halves away from zero
    b["d"], b["q"] = d_N1[:, 0], np.copysign(down_NK, x_NK)


def _inverse(d_N1):
    return np.divide(1, d_N1, out=np.zeros_like(d_N1), where=d_N1 != 0)


class Type(NamedTuple):
    """How a block is stored: ggml's record, without padding. Its fields with packed codes are named q and high."""

    block: int  # weights
    record: np.dtype
    unpack: Callable  # (records [N], floats [N, block] to fill)
    quantize: Callable | None = None  # (float32 [N, block], records [N] to fill)

    @property
    def bytes(self):
        return self.record.itemsize

    def row_bytes(self, columns, name=""):
        """Bytes of a row of so many weights. CheckpointError if they are not whole blocks."""
        if columns % self.block:
            raise CheckpointError(f"{show(name)}: rows of {columns} weights are not whole blocks of {self.block}")
        return columns // self.block * self.bytes


def _record(**fields):
    return np.dtype(list(fields.items()))


TYPES = {
    "Q4_0": Type(32, _record(d="<f2", q="V16"), _unpack_q4_0, _quantize_q4_0),
    "Q4_1": Type(32, _record(d="<f2", m="<f2", q="V16"), _unpack_q4_1),
    "Q5_0": Type(32, _record(d="<f2", high="V4", q="V16"), _unpack_q5_0),
    "Q5_1": Type(32, _record(d="<f2", m="<f2", high="V4", q="V16"), _unpack_q5_1),
    "Q8_0": Type(32, _record(d="<f2", q="32i1"), _unpack_q8_0, _quantize_q8_0),
    "Q2_K": Type(256, _record(scales="16u1", q="V64", d="<f2", dmin="<f2"), _unpack_q2_k),
    "Q3_K": Type(256, _record(high="V32", q="V64", scales="3<u4", d="<f2"), _unpack_q3_k),
    "Q4_K": Type(256, _record(d="<f2", dmin="<f2", scales="3<u4", q="V128"), _unpack_q4_k),
    "Q5_K": Type(256, _record(d="<f2", dmin="<f2", scales="3<u4", high="V32", q="V128"), _unpack_q5_k),
    "Q6_K": Type(256, _record(q="V128", high="V64", scales="16i1", d="<f2"), _unpack_q6_k),
    "IQ4_NL": Type(32, _record(d="<f2", q="V16"), _unpack_iq4_nl),
    "IQ4_XS": Type(256, _record(d="<f2", high="<u2", low="4u1", q="V128"), _unpack_iq4_xs),
    "MXFP4": Type(32, _record(e="u1", q="V16"), _unpack_mxfp4),
}


def find_type(type, name=""):
    """-> Type. CheckpointError for one that is not in TYPES, saying which are."""
    if type not in TYPES:
        raise CheckpointError(f"{show(name)}: ggml type {show(type)} is not supported; these are: {', '.join(TYPES)}")
    return TYPES[type]


def quantize(w_OI, type, name=""):
    """Round float weights to Q4_0 or Q8_0 as ggml does -> uint8 [out, in/32·bytes], the data of Blocks.

    Equal to `gguf.quants.quantize` bit for bit. Q4_0's step is a block's largest weight / -8, so weights on an int4
    lattice whose largest code in a block is not -8 are moved off it; `encode_q4_0` is for those. CheckpointError for
    another type, rows that are not whole blocks, and weights that are not finite or whose step is beyond float16.
    """
    w_OI, found = np.asarray(w_OI), find_type(type, name)
    if found.quantize is None or w_OI.ndim != 2 or w_OI.size == 0:
        raise CheckpointError(f"{show(name)}: cannot round {list(w_OI.shape)} to {type}: only rows, to Q4_0 or Q8_0")
    data_OB = np.empty((len(w_OI), found.row_bytes(w_OI.shape[1], name)), np.uint8)
    for rows in row_blocks(*w_OI.shape, BLOCK):
        b_N = _records(data_OB[rows], type)
        with np.errstate(all="ignore"):  # what is not finite is found below; the inverse of a tiny step may be infinite
            found.quantize(w_OI[rows].astype(np.float32).reshape(-1, found.block), b_N)
        if not np.isfinite(b_N["d"]).all():
            raise CheckpointError(f"{show(name)}: weights that are not finite, or whose step is beyond float16")
    return data_OB


def encode_q4_0(weight):
    """A Quantized as Q4_0, codes and steps as they are -> (uint8 [out, in/32·18], bool [out, in/32]: rounded steps).

    Every float16 scale is kept, and every bfloat16 one between 2^-17 and 65504; others are rounded to the nearest.
    CheckpointError for codes of other than 4 bits, zero points, groups that are not whole blocks, and a step beyond
    float16.
    """
    if weight.bits != 4 or weight.group % 32 or weight.zeros is not None:
        kind = f"{weight.bits} bits in groups of {weight.group}" if weight.zeros is None else "weights with zero points"
        raise CheckpointError(f"{show(weight.name)}: {kind} are not Q4_0")
    steps_OG = np.repeat(weight.scales.dequantize("float64"), weight.group // 32, axis=1)
    b_OG = np.empty(steps_OG.shape, TYPES["Q4_0"].record)
    with np.errstate(over="ignore", under="ignore"):
        b_OG["d"] = steps_OG
    if not np.isfinite(b_OG["d"]).all():
        raise CheckpointError(f"{show(weight.name)}: scales that are not finite, or beyond float16")
    b_OG["q"] = _pairs_to_halves(weight.packed.reshape(-1, 16)).view("V16").reshape(b_OG.shape)
    return b_OG.view(np.uint8), b_OG["d"] != steps_OG


# Byte j of 32 nibbles holds the weights j and j + 16 in ggml, 2j and 2j + 1 in Quantized; the first one low.


def _halves_to_pairs(halves_NB):
    even_NB, odd_NB = halves_NB[:, 0::2], halves_NB[:, 1::2]
    return np.concatenate([even_NB & 15 | odd_NB << 4, even_NB >> 4 | odd_NB & 240], axis=1)


def _pairs_to_halves(pairs_NB):
    first_NB, second_NB = pairs_NB[:, :8], pairs_NB[:, 8:]
    return np.stack([first_NB & 15 | second_NB << 4, first_NB >> 4 | second_NB & 240], axis=2).reshape(-1, 16)
