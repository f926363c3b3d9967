"""Quantized weights as the kernels read them: arrays of one kind each, made from what a file stores, once, at load.

A record of ggml's has its scales between its codes, so that no load of 16 bytes would fall on a boundary. Nothing is
rounded here: each layout's `float`s are the weight's own, bit for bit (tests/test_kernels_matvec.py reads them back).
Letters as in quant: O output and I input features, G groups, B bytes; N blocks of 256.
"""

from typing import NamedTuple

import numpy as np

from .checkpoint import CheckpointError, show
from .ggml import TYPES, Blocks
from .quant import BLOCK, row_blocks

KINDS = {"F16": "f16", "BF16": "bf16", "F32": "f32"}  # of a float in a file, and in a kernel


class Int4(NamedTuple):
    """For matvec_int4 and gather: a weight is (code - 8) · scale."""

    packed: np.ndarray  # uint8 [O, I/2], the even column in the low half
    scales: np.ndarray  # [O, I/group], as `kind` stores them
    kind: str  # the kernels' constant SCALE
    group: int

    @property
    def span(self):
        """The kernels' constant SPAN: columns of a run of 32 that certainly share a scale."""
        return 32 if self.group % 32 == 0 else 8


class Int8(NamedTuple):
    """For matvec_int8 and gather: a weight is code · scale, of 32 columns each."""

    codes: np.ndarray  # int8 [O, I]
    scales: np.ndarray  # float16 [O, I/32]


class Q6K(NamedTuple):
    """For matvec_q6k and gather: a weight is (code - 32) · scale · step. matvec_q6k.cu says which code is where."""

    low: np.ndarray  # uint8 [O, I/2], the low four bits of the codes
    high: np.ndarray  # uint8 [O, I/4], the high two
    scales: np.ndarray  # int8 [O, I/16]
    steps: np.ndarray  # float16 [O, I/256]


def int4(weight):
    """A Quantized of 4 bits, as it is, or Q4_0 Blocks, as a copy -> Int4. CheckpointError where it is neither.

    The kernels read 16 bytes at a time: rows must be of 32 columns' multiples, and groups of 8's.
    """
    if isinstance(weight, Blocks):
        weight = weight.as_quantized()
    fits = weight.shape[1] % 32 == 0 and weight.group % 8 == 0
    if weight.bits != 4 or weight.zeros is not None or not fits or weight.scales.dtype not in KINDS:
        said = f"{weight.bits} bits in groups of {weight.group} of {weight.shape[1]}"
        raise CheckpointError(f"{show(weight.name)}: no kernel for {said}{'' if weight.zeros is None else ', zeros'}")
    return Int4(weight.packed, weight.scales.stored, KINDS[weight.scales.dtype], weight.group)


def int8(blocks):
    """Q8_0 Blocks -> Int8, a copy."""
    b_OG = _records(blocks, "Q8_0")
    codes_OI = np.ascontiguousarray(b_OG["q"]).reshape(blocks.shape)
    return Int8(codes_OI, np.ascontiguousarray(b_OG["d"]))


def q6k(blocks):
    """Q6_K Blocks -> Q6K, a copy."""
    b_ON, (O, I) = _records(blocks, "Q6_K"), blocks.shape
    layout = Q6K(*(np.empty((O, I // part), kind) for part, kind in ((2, "u1"), (4, "u1"), (16, "i1"), (256, "<f2"))))
    for rows in row_blocks(O, I, BLOCK):
        b_N = b_ON[rows].reshape(-1)
        for array, part in zip(layout, (*_low_and_high(_codes_q6k(b_N)), _scales_q6k(b_N), b_N["d"])):
            array[rows] = part.reshape(len(b_ON[rows]), -1)
    return layout


def _records(blocks, type):
    """-> records [O, blocks of a row]"""
    if not isinstance(blocks, Blocks) or blocks.type != type:
        found, name = getattr(blocks, "type", "not blocks"), getattr(blocks, "name", "")
        raise CheckpointError(f"{show(name)}: {found}, expected {type}")
    return blocks.data.view(TYPES[type].record)


def _codes_q6k(b_N):
    """The codes 0 … 63 in the columns' order -> uint8 [N, 256]. Of 128 columns ggml packs 64 with the next 64."""
    low_N2B = np.ascontiguousarray(b_N["q"]).view(np.uint8).reshape(-1, 2, 64)
    high_N2B = np.ascontiguousarray(b_N["high"]).view(np.uint8).reshape(-1, 2, 32)
    codes_N256 = np.concatenate([low_N2B & 15, low_N2B >> 4], axis=2).reshape(-1, 256)
    codes_N256 |= np.concatenate([(high_N2B >> shift & 3) << 4 for shift in (0, 2, 4, 6)], axis=2).reshape(-1, 256)
    return codes_N256


def _low_and_high(codes_N256):
    """-> uint8 [N, 128], uint8 [N, 64]: for each m of 16 its bytes i, of the columns 64 q + 4 m + i"""
    q_4N16i = np.moveaxis(codes_N256.reshape(-1, 4, 16, 4), 1, 0)
    low = [q_4N16i[q] & 15 | (q_4N16i[q + 1] & 15) << 4 for q in (0, 2)]
    high = [q_4N16i[q] >> 4 << 2 * q for q in range(4)]
    return np.stack(low, axis=2).reshape(-1, 128), np.bitwise_or.reduce(high).reshape(-1, 64)


def _scales_q6k(b_N):
    """-> int8 [N, 16]: the four q together, of each m / 4"""
    return b_N["scales"].reshape(-1, 4, 4).swapaxes(1, 2)
