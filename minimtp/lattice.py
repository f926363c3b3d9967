"""Which int4 lattice do bf16 weights lie on: its integers and steps, group by group, or the finding that there is none.

A QAT checkpoint in bf16 holds products, each rounded to bf16: one step for every 32 weights along `in`, times integers
in -8 … 7. Every bf16 stands for the interval of numbers that round to it, so a weight and its integer leave an interval
of steps, and a group is on a lattice when the intervals of all its weights share a step. No fit, no tolerance.

Letters: O output and I input features, R some of the rows O; G groups along I; N groups of any rows, K weights in each.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from .checkpoint import CheckpointError, bf16_to_float, float_to_bf16, show
from .ggml import Blocks, quantize
from .quant import pack, row_blocks

GROUP = 32
OFF, ON, UNDETERMINED = range(3)
MAGNITUDES = 4  # different ones that a group needs: fewer meet some lattice by chance
PEAKS = (5, 6, 7, 8)  # what the largest level is then, 3 and 4 being found as 6 and 8 in a lattice of half the step
SMALLEST = 7 << 7  # bf16 bits of 2^-120: an eighth of that still has all bits of a bf16
BLOCK = 1 << 18  # weights handled at a time


@dataclass(frozen=True, eq=False)
class Lattice:
    """What `find` found. Where a group is not ON, its levels are 0 and its steps NaN."""

    levels_OI: np.ndarray = field(repr=False)  # int8, -8 … 7, some of them odd in every group
    low_OG: np.ndarray = field(repr=False)  # float32: with any float32 step between, level · step rounds to every
    high_OG: np.ndarray = field(repr=False)  # weight of the group; both negative where a level were +8 otherwise
    status_OG: np.ndarray = field(repr=False)  # uint8: OFF, ON, UNDETERMINED

    def steps(self):
        """-> float64 [out, groups], the middle of every interval."""
        return middle(self.low_OG, self.high_OG)


def find(bits_OI, name=""):
    """The lattice of bf16 weights, given as their bits: uint16 [out, in], in a multiple of 32 -> Lattice.

    A group is ON when for some largest level up to 8 some step makes all of its 32 weights, OFF when none does,
    UNDETERMINED when it has fewer than 4 different magnitudes, or none that reaches 2^-120. ValueError for another
    shape or dtype, CheckpointError for NaN or infinite weights.
    """
    if bits_OI.dtype != np.uint16 or bits_OI.ndim != 2 or not bits_OI.size or bits_OI.shape[1] % GROUP:
        raise ValueError(f"{bits_OI.dtype} {list(bits_OI.shape)}: expected bf16 bits, uint16 [out, in], in a k·{GROUP}")
    O, G = bits_OI.shape[0], bits_OI.shape[1] // GROUP
    levels_OGK, status_OG = np.empty((O, G, GROUP), np.int8), np.empty((O, G), np.uint8)
    low_OG, high_OG = np.empty((2, O, G), np.float32)
    for rows in row_blocks(*bits_OI.shape, BLOCK):
        levels_KN, *found = find_groups(by_group(bits_OI[rows]), name)
        levels_OGK[rows] = levels_KN.T.reshape(-1, G, GROUP)
        for whole_OG, part_N in zip((low_OG, high_OG, status_OG), found):
            whole_OG[rows] = part_N.reshape(-1, G)
    return Lattice(levels_OGK.reshape(bits_OI.shape), low_OG, high_OG, status_OG)


def find_groups(bits_KN, name=""):
    """`find` for groups that stand in columns -> (levels_KN, low_N, high_N, status_N).

    For a largest level there is one candidate for every other: rounding moves a quotient of two weights by 0.8 % at
    most, times 8 far less than half a level. Nor do two largest levels both fit: unequal quotients of levels are 1/56 =
    1.8 % apart or more, and rounding bridges 1.6 %. So levels are unique up to their sign and a common factor.
    """
    size_KN = bits_KN & 0x7FFF
    peak_N = size_KN.max(0)
    if peak_N.max() > 0x7F7F:
        raise CheckpointError(f"{show(name)}: NaN or infinite weights")
    lowest_KN, highest_KN = (ends.take(size_KN) for ends in _rounding_intervals())
    determined_N = has_magnitudes(size_KN) & (peak_N >= SMALLEST)
    size_KN, peak_N = bf16_to_float(size_KN), bf16_to_float(peak_N)
    inverse_N, low_N, high_N = np.zeros((3, *peak_N.shape), np.float32)
    with np.errstate(all="ignore"):  # an interval over the level 0 is everything, or nothing; so is all of a zero group
        for peak in PEAKS:
            candidate_N = peak / peak_N
            levels_KN = np.rint(size_KN * candidate_N)
            lowest_N, highest_N = (lowest_KN / levels_KN).max(0), (highest_KN / levels_KN).min(0)
            fits_N = determined_N & (lowest_N <= highest_N)
            inverse_N[fits_N], low_N[fits_N], high_N[fits_N] = candidate_N[fits_N], lowest_N[fits_N], highest_N[fits_N]
    levels_KN = np.rint(bf16_to_float(bits_KN) * inverse_N).astype(np.int8)
    levels_KN, low_N, high_N = reduced(levels_KN, low_N, high_N)
    sign_N = np.where((levels_KN == 8).any(0), np.int8(-1), np.int8(1))  # there is no +8: such a step is negative
    levels_KN *= sign_N
    on_N = (inverse_N > 0) & (levels_KN.max(0) < 8)
    levels_KN *= on_N
    low_N, high_N = np.where(on_N, np.where(sign_N < 0, (-high_N, -low_N), (low_N, high_N)), np.nan)
    return levels_KN, low_N, high_N, np.where(on_N, ON, np.where(determined_N, OFF, UNDETERMINED)).astype(np.uint8)


@cache
def _rounding_intervals():
    """The numbers that round to each bf16 magnitude: lowest and highest, float32 [2, 2^15]; for 0 all, over level 0.

    Ties round to even, so an interval includes its ends where the last bit of the weight is 0; other ends are moved
    inward by 2^-21 of themselves. So moved, divided by a level and rounded to float32, ends compare as the exact ones
    do: those are quotients of 9-bit numbers and levels, equal or 2^-12 apart.
    """
    bits = np.arange(1 << 15, dtype=np.int32) << 16
    half = 0x8000 - (bits >> 14 & 4)
    ends = np.stack([(bits - half).view(np.float32), (bits + half).view(np.float32)])
    ends[:, 0] = -np.inf, np.inf
    return ends


def reduced(levels_KN, low_N, high_N):
    """Levels of groups without a common factor, and their steps: of 4 magnitudes up to 8 it can only be 2."""
    even_N = ((levels_KN & 1) == 0).all(0)
    return levels_KN >> even_N, low_N * (1 + even_N), high_N * (1 + even_N)


def has_magnitudes(size_KN):
    """Whether a group has MAGNITUDES different ones, zero being one -> bool [N]; unsigned integers."""
    left_KN = size_KN + size_KN.dtype.type(1)
    for _ in range(MAGNITUDES - 1):
        left_KN *= left_KN < left_KN.max(0)
    return left_KN.any(0)


def middle(low_N, high_N):
    return (low_N.astype(np.float64) + high_N) / 2


def by_group(x_RI):
    """[R, I] -> [K, N], C-contiguous: what concerns one group runs down a column, for all groups at once."""
    return np.ascontiguousarray(x_RI.reshape(-1, GROUP).T)


def over_blocks(function, matrices):
    """function(index of a matrix, rows) of every block of matrices [out, in], on all cores -> its results, in order."""
    parts = [(i, rows) for i, matrix in enumerate(matrices) for rows in row_blocks(*matrix.shape, BLOCK)]
    np.empty(1 << 24, np.uint8)  # freed at once: glibc then keeps as much, and pages no block's arrays in anew
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        return list(pool.map(function, *zip(*parts)))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for all of them


# What a format can hold of a lattice, and what naive conversions make of it

STEPS = {
    "f32": lambda x: x.astype(np.float32),
    "f16": lambda x: x.astype(np.float16),
    "bf16": lambda x: bf16_to_float(float_to_bf16(x)),
}
NAIVE = {
    "q4_0": lambda w_RI, name: Blocks(quantize(w_RI, "Q4_0", name), "Q4_0", w_RI.shape),  # max / -8
    "minmax": lambda w_RI, name: pack(w_RI, GROUP, name),  # absmax / 7.5
}


def admits(low_N, high_N, dtype):
    """Whether an interval has a step of type "f32", "f16" or "bf16" in it -> bool [N].

    If it has any, then the one nearest to its middle.
    """
    with np.errstate(over="ignore"):
        step_N = STEPS[dtype](middle(low_N, high_N)).astype(np.float64)
    return (low_N <= step_N) & (step_N <= high_N)


def square(x):
    return float(np.square(x, dtype=np.float64).sum())


def relative(part, whole):
    """Relative Frobenius norm from sums of squares; None where it is no number."""
    return float(np.sqrt(part / whole)) if whole else None if part else 0.0


SHOWN = 8  # groups off the lattice that a report names


def examine_weight(matrices):
    """Look for the lattice of a weight: a list of Plain bf16 [out, in] -> JSON-able dict; memory for some rows only.

    groups: how many are on, off, undetermined; peaks: on, by largest level; steps: how many of the steps found f32, f16
    and bf16 can hold; error: relative Frobenius error of the NAIVE rules on the same weights; off_at: [matrix, row,
    group] of the first groups that are off. CheckpointError for weights that are not finite, or beyond Q4_0.
    """

    def examine_rows(i, rows):
        bits_RI, name = matrices[i].stored[rows], matrices[i].name
        levels_KN, low_N, high_N, status_N = find_groups(by_group(bits_RI), name)
        w_RI, on_N = bf16_to_float(bits_RI), status_N == ON
        off = zip(*np.divmod(np.flatnonzero(status_N == OFF)[:SHOWN], bits_RI.shape[1] // GROUP))
        return (
            np.bincount(status_N, minlength=3),
            np.bincount(np.abs(levels_KN).max(0)[on_N], minlength=9),
            np.array([np.count_nonzero(admits(low_N[on_N], high_N[on_N], dtype)) for dtype in STEPS]),
            np.array([square(w_RI), *(square(rule(w_RI, name).dequantize("f4") - w_RI) for rule in NAIVE.values())]),
            [[i, rows.start + int(row), int(group)] for row, group in off],
        )

    *sums, off_at = zip(*over_blocks(examine_rows, matrices))
    groups, peaks, steps, (whole, *errors) = (sum(parts).tolist() for parts in sums)
    return {
        "groups": {"on": groups[ON], "off": groups[OFF], "undetermined": groups[UNDETERMINED]},
        "peaks": {str(peak): count for peak, count in enumerate(peaks) if count},
        "steps": dict(zip(STEPS, steps)),
        "error": {rule: relative(error, whole) for rule, error in zip(NAIVE, errors)},
        "off_at": sum(off_at, [])[:SHOWN],
    }
