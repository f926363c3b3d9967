"""Which int4 lattice do bf16 weights lie on: its integers and steps, group by group, or the finding that there is none.

A QAT checkpoint in bf16 holds products, each rounded to bf16: one step for every 32 weights along `in`, times integers
in -8 … 7. Every bf16 stands for the interval of numbers that round to it, so a weight and its integer leave an interval
of steps, and a group is on a lattice when the intervals of all its weights share a step. No fit, no tolerance.

Letters: O output and I input features, G groups along I; in a block of rows R, N groups of K weights, and n of those N.
"""

import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import numpy as np

from .checkpoint import CheckpointError, bf16_to_float, float_to_bf16, open_checkpoint, show
from .formats import parse_quantization, read_weight
from .loading import resolve
from .parameters import PREFIXES
from .quant import Plain, Quantized

GROUP = 32
OFF, ON, UNDETERMINED = range(3)
MAGNITUDES = 4  # different ones that a group needs: fewer meet some lattice by chance
PEAKS = range(MAGNITUDES - 1, 9)  # what the largest level may then be
SMALLEST = 7 << 7  # bf16 bits of 2^-120: an eighth of that still has all bits of a bf16
BLOCK = 1 << 17  # weights handled at a time
SHOWN = 8  # groups off the lattice that a report names


@dataclass(frozen=True, eq=False)
class Lattice:
    """What `find` found. Where a group is not ON, its levels are 0 and its steps NaN."""

    levels_OI: np.ndarray = field(repr=False)  # int8, -8 … 7, without a common factor in their group
    low_OG: np.ndarray = field(repr=False)  # float32: with any float32 step between, level · step rounds to every
    high_OG: np.ndarray = field(repr=False)  # weight of the group; both negative where a level were +8 otherwise
    status_OG: np.ndarray = field(repr=False)  # uint8: OFF, ON, UNDETERMINED

    def steps(self):
        """-> float64 [out, groups], the middle of every interval."""
        return _middle(self.low_OG, self.high_OG)


def find(bits_OI):
    """The lattice of bf16 weights, given as their bits: uint16 [out, in], in a multiple of 32 -> Lattice.

    A group is ON when for some largest level up to 8, the smallest that will do, some step makes all of its 32 weights;
    OFF when none does; UNDETERMINED when it has fewer than 4 different magnitudes, or none that reaches 2^-120.
    ValueError for another shape or dtype, CheckpointError for NaN or infinite weights.
    """
    _check_bits(bits_OI)
    O, G = bits_OI.shape[0], bits_OI.shape[1] // GROUP
    levels_OGK, status_OG = np.empty((O, G, GROUP), np.int8), np.empty((O, G), np.uint8)
    low_OG, high_OG = np.empty((2, O, G), np.float32)
    for rows in _blocks(bits_OI.shape):
        levels_KN, *found = _find(_by_group(bits_OI[rows]))
        levels_OGK[rows] = levels_KN.T.reshape(-1, G, GROUP)
        for whole_OG, part_N in zip((low_OG, high_OG, status_OG), found):
            whole_OG[rows] = part_N.reshape(-1, G)
    return Lattice(levels_OGK.reshape(bits_OI.shape), low_OG, high_OG, status_OG)


def step_interval(bits_KN, levels_KN):
    """The steps whose products with these levels round to these bf16 weights -> (low, high), float32 [N].

    bits uint16 and levels int8, [K, N], a group in every column. From low to high, both included; none where low is
    above high; all, -inf to inf, where weights and levels are 0. Ties round to even, so an interval includes its ends
    where the last bit of the weight is 0; other ends are moved inward by 2^-21 of themselves. So moved and rounded to
    float32, ends compare as the exact ones do: those are quotients of 9-bit numbers and levels, equal or 2^-12 apart.
    """
    lowest, highest = _rounding_intervals()
    size_KN, divisor_KN = bits_KN & 0x7FFF, np.abs(levels_KN).astype(np.float32)
    with np.errstate(divide="ignore"):  # zero is the interval -2^-134 … 2^-134: over level 0, all steps
        low_N = (lowest.take(size_KN) / divisor_KN).max(0)
        high_N = (highest.take(size_KN) / divisor_KN).min(0)
    used_KN, against_KN = levels_KN != 0, (bits_KN > 0x7FFF) != (levels_KN < 0)
    negative_N, positive_N = (used_KN & against_KN).any(0), (used_KN & ~against_KN).any(0)
    low_N, high_N = np.where(negative_N, -high_N, low_N), np.where(negative_N, -low_N, high_N)
    low_N[negative_N & positive_N] = np.inf
    return low_N, high_N


@cache
def _rounding_intervals():
    """The numbers that round to each bf16 magnitude: lowest and highest, float32 [2, 2^15]."""
    bits = np.arange(1 << 15, dtype=np.int32) << 16
    half = 0x8000 - (bits >> 14 & 4)  # odd: its ties are its neighbours'; 4 float32 units outlast a division by 8
    lowest, highest = (bits - half).view(np.float32), (bits + half).view(np.float32)
    lowest[0] = -highest[0]
    return np.stack([lowest, highest])


def _exists(low_N, high_N):
    return (low_N <= high_N) & np.isfinite(low_N) & np.isfinite(high_N)


def _middle(low_N, high_N):
    return (low_N.astype(np.float64) + high_N) / 2


def _find(bits_KN):
    """`find` for a block of groups -> (levels_KN, low_N, high_N, status_N)."""
    size_KN = bits_KN & 0x7FFF
    peak_N = size_KN.max(0)
    if peak_N.size and peak_N.max() > 0x7F7F:
        raise CheckpointError("NaN or infinite weights")
    levels_KN = np.zeros(bits_KN.shape, np.int8)
    low_N, high_N = np.full((2, *peak_N.shape), np.nan, np.float32)
    status_N = np.where(_is_determined(size_KN), OFF, UNDETERMINED).astype(np.uint8)
    peaks_N = _possible_peaks(size_KN, peak_N)
    for peak in PEAKS:
        at_n = np.flatnonzero((status_N == OFF) & (peaks_N >> (peak - 1) & 1))
        bits_Kn = bits_KN.take(at_n, axis=1)
        levels_Kn = _levels(bits_Kn, peak_N[at_n], peak)
        low_n, high_n = step_interval(bits_Kn, levels_Kn)
        fits_n = _exists(low_n, high_n) & (levels_Kn < 8).all(0)
        at = at_n[fits_n]
        levels_KN[:, at], low_N[at], high_N[at], status_N[at] = levels_Kn[:, fits_n], low_n[fits_n], high_n[fits_n], ON
    return levels_KN, low_N, high_N, status_N


def _levels(bits_KN, peak_N, peak):
    """The only levels that weights can have where the largest magnitude has level `peak` -> int8 [K, N].

    Rounding moves a weight by 2^-8 of itself at most, and the largest too, so their quotient by 0.8 %: times 8, far
    less than half a level. Nor can two peaks give different answers: unequal quotients of levels are 1/56 = 1.8 % apart
    or more, and rounding bridges 1.6 %. So levels are unique up to their sign and a common factor.
    """
    levels_KN = np.rint(bf16_to_float(bits_KN) * (np.float32(peak) / bf16_to_float(peak_N))).astype(np.int8)
    if peak == 8:  # there is no +8: such a group has a negative step
        levels_KN *= np.where((levels_KN == 8).any(0), -1, 1).astype(np.int8)
    return levels_KN


def _is_determined(size_KN):
    """Whether a group has MAGNITUDES different ones (zero may be one), and the largest is not too small -> bool [N]."""
    left_KN = size_KN + np.uint16(1)
    for _ in range(MAGNITUDES - 1):
        left_KN *= left_KN < left_KN.max(0)
    return left_KN.any(0) & (size_KN.max(0) >= SMALLEST)


def _possible_peaks(size_KN, peak_N):
    """The largest levels that every weight allows when looked at alone with the largest weight: bit m-1 for m, [N]."""
    behind_KN = np.minimum(peak_N - size_KN, 511)
    peaks_KN = _pairs().take((peak_N & 127).astype(np.intp) * 512 + behind_KN)
    peaks_KN |= -(size_KN == 0).view(np.uint8)  # zero allows all of them
    return np.bitwise_and.reduce(peaks_KN, axis=0)


@cache
def _pairs():
    """`_possible_peaks` for groups of two -> uint8 [128 · 512]: by the mantissa of the larger, whatever its exponent,
    and by how many bf16 numbers the smaller lies below it; 511 or more is too far for any level."""
    larger_N = np.repeat(np.arange(127 << 7, 128 << 7, dtype=np.uint16), 512)
    bits_KN = np.stack([larger_N, larger_N - np.tile(np.arange(512, dtype=np.uint16), 128)])
    pairs_N = np.zeros(larger_N.shape, np.uint8)
    for peak in PEAKS:
        pairs_N |= _exists(*step_interval(bits_KN, _levels(bits_KN, larger_N, peak))).view(np.uint8) << (peak - 1)
    return pairs_N


def _check_bits(bits_OI):
    if bits_OI.dtype != np.uint16 or bits_OI.ndim != 2 or not bits_OI.size or bits_OI.shape[1] % GROUP:
        raise ValueError(f"{bits_OI.dtype} {list(bits_OI.shape)}: expected bf16 bits, uint16 [out, in], in a k·{GROUP}")


def _blocks(shape):
    """Slices of rows, each of about BLOCK weights."""
    height = max(1, BLOCK // shape[1])
    return (slice(start, min(start + height, shape[0])) for start in range(0, shape[0], height))


def _by_group(x_RI):
    """[R, I] -> [K, N], C-contiguous: what concerns one group runs down a column, for all groups at once."""
    return np.ascontiguousarray(x_RI.reshape(-1, GROUP).T)


# What a format can hold of a lattice, and what naive conversions make of it

STEPS = {
    "f32": lambda x: x.astype(np.float32),
    "f16": lambda x: x.astype(np.float16),
    "bf16": lambda x: bf16_to_float(float_to_bf16(x)),
}


def admits(low_N, high_N, dtype):
    """Whether an interval has a step of type "f32", "f16" or "bf16" in it -> bool [N].

    If it has any, then the one nearest to its middle.
    """
    with np.errstate(over="ignore"):
        step_N = STEPS[dtype](_middle(low_N, high_N)).astype(np.float64)
    return (low_N <= step_N) & (step_N <= high_N)


def ggml_q4_0(w_KN):
    """What ggml's Q4_0 makes of float32 weights [K, N], a group in every column -> float32 [K, N].

    d = the first weight of the largest magnitude over -8; code = min(15, trunc(w / d + 8.5)) - 8; d is kept in float16.
    https://github.com/ggml-org/llama.cpp (ggml/src/ggml-quants.c, quantize_row_q4_0_ref)
    """
    first_N = np.abs(w_KN).argmax(0)
    d_N = np.take_along_axis(w_KN, first_N[None], 0)[0] / np.float32(-8)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        codes_KN = np.minimum(np.trunc(w_KN * np.where(d_N == 0, 0, 1 / d_N) + np.float32(8.5)), 15) - 8
        return codes_KN * d_N.astype(np.float16).astype(np.float32)


def minmax(w_KN):
    """What compressed-tensors' minmax makes of float32 weights [K, N], a group in every column -> float32 [K, N].

    As quant.pack, without the packing: scale = absmax / 7.5 in bf16; code = w / scale, ties to even, cut to -8 … 7.
    """
    scale_N = STEPS["bf16"](np.abs(w_KN).max(0) / np.float32(7.5))
    return np.clip(np.rint(w_KN / np.where(scale_N == 0, 1, scale_N)), -8, 7) * scale_N


def _square(x):
    return float(np.square(x, dtype=np.float64).sum())


def _relative(square, whole):
    """Relative Frobenius norm from sums of squares; None where it is no number."""
    if square == 0:
        return 0.0
    return float(np.sqrt(square / whole)) if whole and np.isfinite(square) else None


# One checkpoint


class _Part(NamedTuple):
    """What a block of rows adds to the report on its weight."""

    groups: np.ndarray  # by status
    peaks: np.ndarray  # of those on the lattice, by largest level
    steps: np.ndarray  # of their steps, those that each of STEPS can hold
    squares: np.ndarray  # of the weights, and of what ggml_q4_0 and minmax change
    off: list  # [row, group] of the first that are off


def examine_weight(bits_OI):
    """Look for the lattice of one weight, bf16 bits uint16 [out, in] -> JSON-able dict; memory for some rows only.

    groups: how many are on, off, undetermined; peaks: on, by largest level; steps: how many of the steps found f32, f16
    and bf16 can hold; error: relative Frobenius error of the naive rules, ggml_q4_0 and minmax, on the same weights;
    off_at: [row, group] of the first groups that are off. Errors as those of `find`.
    """
    _check_bits(bits_OI)

    def examine_rows(rows):
        bits_KN = _by_group(bits_OI[rows])
        levels_KN, low_N, high_N, status_N = _find(bits_KN)
        w_KN, on_N = bf16_to_float(bits_KN), status_N == ON
        off = zip(*np.divmod(np.flatnonzero(status_N == OFF)[:SHOWN], bits_OI.shape[1] // GROUP))
        return _Part(
            np.bincount(status_N, minlength=3),
            np.bincount(np.abs(levels_KN).max(0)[on_N], minlength=9),
            np.array([admits(low_N[on_N], high_N[on_N], dtype).sum() for dtype in STEPS]),
            np.array([_square(w_KN), _square(ggml_q4_0(w_KN) - w_KN), _square(minmax(w_KN) - w_KN)]),
            [[rows.start + int(row), int(group)] for row, group in off],
        )

    *sums, off = zip(*_over_blocks(examine_rows, bits_OI.shape))
    groups, peaks, steps, (whole, q4_0, cut) = (sum(parts).tolist() for parts in sums)
    return {
        "groups": {"on": groups[ON], "off": groups[OFF], "undetermined": groups[UNDETERMINED]},
        "peaks": {str(peak): peaks[peak] for peak in PEAKS if peaks[peak]},
        "steps": dict(zip(STEPS, steps)),
        "error": {"q4_0": _relative(q4_0, whole), "minmax": _relative(cut, whole)},
        "off_at": sum(off, [])[:SHOWN],
    }


def _over_blocks(function, shape):
    """function of every block of rows, on all cores -> list of its results, in order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(function, _blocks(shape)))


def lattice_of_checkpoint(checkpoint, progress=None):
    """Look for the lattice of every bf16 weight of a language model's checkpoint -> (rows, skipped).

    rows: of every weight its name, kind, shape, and what `examine_weight` found (where the weight has more dimensions,
    so has the row in off_at); skipped: how many weights are stored as something else. progress is called with every
    row. CheckpointError, by name, for NaN or infinite weights.
    """
    rows, skipped = [], Counter()
    for key, (kind, name) in _weights(checkpoint).items():
        raw = checkpoint.tensors[name]
        if raw.dtype != "BF16":
            skipped["int4" if name.endswith(PACKED) else raw.dtype] += 1
            continue
        found = examine_weight(_read(checkpoint, name).stored)
        off_at = [[*map(int, np.unravel_index(row, raw.shape[:-1])), group] for row, group in found["off_at"]]
        rows.append({"name": key, "kind": kind, "shape": list(raw.shape), **found, "off_at": off_at})
        if progress:
            progress(rows[-1])
    return rows, dict(skipped)


def examine(path, progress=None):
    """Whether a checkpoint (or a bundled one, by name) holds int4 QAT weights in bf16 -> JSON-able dict.

    "qat" says so: every weight of kind "linear" is on a lattice in all groups that can be told. Embeddings, and what
    int4 formats leave alone (routers, gates, drafters), are examined and not judged. CheckpointError where there is no
    bf16 weight to judge.
    """
    checkpoint = open_checkpoint(resolve(path))
    rows, skipped = lattice_of_checkpoint(checkpoint, progress)
    judged = [row["groups"] for row in rows if row["kind"] == "linear"]
    if not judged:
        stored = ", ".join(f"{count} in {dtype}" for dtype, count in skipped.items()) or "none of any type"
        raise CheckpointError(f"{checkpoint.folder}: no bf16 weights of linear layers to examine ({stored})")
    off = sum(groups["off"] > 0 for groups in judged)
    on = sum(groups["on"] > 0 and not groups["off"] for groups in judged)
    return {
        "checkpoint": str(checkpoint.folder),
        "qat": on > 0 and not off,
        "linear": {"on": on, "off": off, "undetermined": len(judged) - on - off},
        "tensors": rows,
        "skipped": skipped,
    }


# Which tensors

PACKED, PLAIN = ".weight_packed", ".weight"
EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")  # [expert, out, in]
KEPT = re.compile(r"(router\.proj|mlp\.gate|shared_expert_gate|in_proj_[ab])$")  # in layers, and not quantized


def _weights(checkpoint):
    """Weights that could be int4 by groups of 32 -> {name less "model." and suffix: (kind, the tensor that has it)}"""
    found = {}
    for name, raw in checkpoint.tensors.items():
        key = name.removesuffix(PACKED).removesuffix(PLAIN)
        for prefix in (*PREFIXES, "model."):
            key = key.removeprefix(prefix)
        dimensions = 3 if name.endswith(EXPERTS) else 2 if name.endswith((PACKED, PLAIN)) else 0
        whole_groups = raw.data.size and raw.shape[-1] % (GROUP // 8 if name.endswith(PACKED) else GROUP) == 0
        if len(raw.shape) == dimensions and whole_groups and (kind := _kind(key)):
            found[key] = kind, name
    return found


def _kind(key):
    """The kind of a weight: "linear", "embedding", "other", or None for what is no part of a language model."""
    if re.match(r"layers\.\d+\.", key):
        return "other" if KEPT.search(key) else "linear"
    if re.match(r"embed_tokens|lm_head$", key):
        return "embedding"
    return "other" if re.match(r"mtp\.|(pre_|post_|per_layer_model_)projection$", key) else None


def _read(checkpoint, name, quantization=None):
    """The weight that a tensor holds, its first dimensions made one -> Plain or Quantized [out, in]; finite."""
    if name.endswith(PACKED):
        return read_weight(checkpoint.tensors, name.removesuffix(PACKED), quantization)[0]
    raw = checkpoint.tensors[name]
    weight = Plain(raw.stored().reshape(-1, raw.shape[-1]), raw.dtype, name)
    weight.check_finite()
    return weight


# Two checkpoints

SAME, SAME_BUT_PEAK, DIFFERENT, UNKNOWN = range(4)
RATIOS = {"1": 1, "16/15": 16 / 15, "14/15": 14 / 15, "8/7": 8 / 7, "7/8": 7 / 8}  # of steps; told apart within 1 %


class _Side(NamedTuple):
    """A block of groups in one of two checkpoints."""

    bits_KN: np.ndarray | None  # None where it is stored as int4
    w_KN: np.ndarray  # float32
    levels_KN: np.ndarray
    low_N: np.ndarray  # what the step may be; low = high where it is stored
    high_N: np.ndarray
    known_N: np.ndarray  # whether there are levels: on the lattice; or stored, and not all zero
    scale: str | None = None  # the type of stored steps, a key of STEPS


def compare_weights(a, b):
    """Compare two weights [out, in] group by group, each a Plain of bf16 or a Quantized of int4 -> JSON-able dict.

    groups: those with the same integers up to sign and a common factor; the same but where either side has its largest,
    which minmax cuts; different; unknown, since a side is off the lattice, undetermined or zero. scales_agree: groups
    of the same integers whose scales agree too: some step that makes the bf16 weights rounds to the int4's scale; or,
    both bf16, all weights are equal; or, both int4, the scales differ by no more than rounding to bf16 can. equal:
    groups whose weights, rounded to bf16, are equal. ratio: b's step over a's for equal integers: its median, and
    groups within 1 % of each of RATIOS. difference: relative Frobenius norm of b - a. distance: of a bf16 side from its
    nearest lattice, in that norm, undetermined groups left out. nearer: the side nearer to the lattice, "a", "b",
    "both" or None (see `_nearer`). same: no weight differs; or both are on their lattices, and all groups that can be
    told have the same integers and scales. CheckpointError where the two cannot be compared.
    """
    for weight in (a, b):
        _check_side(weight, a.shape)

    def compare_rows(rows):
        side_a, side_b = _side(a, rows), _side(b, rows)
        squares = [_square(w_KN) for w_KN in (side_a.w_KN, side_b.w_KN, side_b.w_KN - side_a.w_KN)]
        return *_relate(side_a, side_b), np.array([*squares, _off_lattice(side_a), _off_lattice(side_b)])

    *found, squares = zip(*_over_blocks(compare_rows, a.shape))
    relation_N, ratio_N, agree_N, equal_N = map(np.concatenate, found)
    whole_a, whole_b, difference, off_a, off_b = sum(squares).tolist()
    count = np.bincount(relation_N, minlength=4).tolist()
    report = {
        "stored": ["int4" if isinstance(weight, Quantized) else "bf16" for weight in (a, b)],
        "groups": dict(zip(("same", "same_but_peak", "different", "unknown"), count)),
        "scales_agree": int(agree_N.sum()),
        "equal": int(equal_N.sum()),
        "ratio": _ratios(ratio_N[relation_N <= SAME_BUT_PEAK]),
        "difference": _relative(difference, whole_a),
        "distance": [
            None if isinstance(weight, Quantized) else _relative(off, whole)
            for weight, off, whole in ((a, off_a, whole_a), (b, off_b, whole_b))
        ],
    }
    return {**report, "nearer": _nearer(report), "same": _is_same(report)}


def _check_side(weight, shape):
    quantized = isinstance(weight, Quantized)
    stored = f"int{weight.bits} by {weight.group}" if quantized else weight.dtype
    if weight.shape != shape or stored not in ("BF16", f"int4 by {GROUP}"):
        found, expected = f"{stored} {list(weight.shape)}", f"BF16 or int4 by {GROUP}, {list(shape)}"
        raise CheckpointError(f"{show(weight.name)} is {found}, expected {expected}")


def _side(weight, rows):
    if isinstance(weight, Plain):
        bits_KN = _by_group(weight.stored[rows])
        levels_KN, low_N, high_N, status_N = _find(bits_KN)
        return _Side(bits_KN, bf16_to_float(bits_KN), levels_KN, low_N, high_N, status_N == ON)
    scales = replace(weight.scales, stored=weight.scales.stored[rows])
    part = replace(weight, packed=weight.packed[rows], scales=scales)
    levels_KN, step_N = _by_group(part.codes()), scales.dequantize(np.float32).reshape(-1)
    known_N = levels_KN.any(0) & (step_N != 0)
    return _Side(None, levels_KN * step_N, levels_KN, step_N, step_N, known_N, scales.dtype.lower())


def _relate(a, b):
    """-> (SAME …, b's step over a's for equal integers, whether scales agree, whether weights are equal), each [N].

    Levels found have no common factor and there are no others (see `_levels`), so the same are those in proportion.
    """
    inner_KN = np.ones(a.levels_KN.shape, bool)
    for side in (a, b):
        size_KN = np.abs(side.levels_KN)
        inner_KN &= size_KN < size_KN.max(0)
    same_N, *pair = _in_proportion(a.levels_KN, b.levels_KN)
    inner_N, *inner_pair = _in_proportion(a.levels_KN * inner_KN, b.levels_KN * inner_KN)
    relation_N = np.select([~(a.known_N & b.known_N), same_N, inner_N], [UNKNOWN, SAME, SAME_BUT_PEAK], DIFFERENT)
    a_N, b_N = np.where(same_N, pair, inner_pair)
    equal_N = (STEPS["bf16"](a.w_KN) == STEPS["bf16"](b.w_KN)).all(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # where the relation is unknown
        ratio_N = b_N * _middle(b.low_N, b.high_N) / (a_N * _middle(a.low_N, a.high_N))
        agree_N = _scales_agree(a, b, a_N / b_N, ratio_N, equal_N)
    return relation_N.astype(np.uint8), ratio_N.astype(np.float32), (relation_N == SAME) & agree_N, equal_N


def _in_proportion(a_KN, b_KN):
    """Whether integers are the same up to a factor, and the pair of them that gives it -> (bool, a, b), each [N]."""
    a_KN, b_KN = a_KN.astype(np.int16), b_KN.astype(np.int16)
    at_N = np.abs(a_KN).argmax(0)[None]
    a_N, b_N = np.take_along_axis(a_KN, at_N, 0)[0], np.take_along_axis(b_KN, at_N, 0)[0]
    return (a_KN * b_N == b_KN * a_N).all(0) & (a_N != 0) & (b_N != 0), a_N, b_N


def _scales_agree(a, b, factor_N, ratio_N, equal_N):
    """See `compare_weights`. factor: what makes a's steps b's, ratio: what is then left between them."""
    if a.scale and b.scale:
        return np.abs(ratio_N - 1) <= 2.0**-8
    if not a.scale and not b.scale:
        return equal_N
    if a.scale:
        a, b, factor_N = b, a, 1 / factor_N
    ends_2N = STEPS[b.scale](np.stack([a.low_N, a.high_N]) * factor_N)
    return equal_N | (ends_2N.min(0) <= b.low_N) & (b.low_N <= ends_2N.max(0))


def _off_lattice(side):
    """Sum of squares of how far the groups of a bf16 side that have no lattice are off the nearest one."""
    if side.bits_KN is None:
        return 0.0
    bits_Kn = side.bits_KN[:, ~side.known_N & _is_determined(side.bits_KN & 0x7FFF)]
    w_Kn, peak_n = bf16_to_float(bits_Kn, np.float64), (bits_Kn & 0x7FFF).max(0)
    error_n = np.full(peak_n.shape, np.inf)
    for peak in PEAKS:
        levels_Kn = np.clip(_levels(bits_Kn, peak_n, peak), -8, 7).astype(np.float64)
        step_n = (levels_Kn * w_Kn).sum(0) / (levels_Kn**2).sum(0)  # least squares
        error_n = np.minimum(error_n, ((w_Kn - levels_Kn * step_n) ** 2).sum(0))
    return float(error_n.sum())


def _ratios(ratio_n):
    counts = {name: int((np.abs(ratio_n / ratio - 1) < 0.01).sum()) for name, ratio in RATIOS.items()}
    near = {name: count for name, count in counts.items() if count}
    median = float(np.median(ratio_n)) if ratio_n.size else None
    return {"median": median, **near, "other": ratio_n.size - sum(near.values())}


def _told(report):
    return sum(report["groups"].values()) - report["groups"]["unknown"]


def _is_same(report):
    on_lattices = not any(report["distance"])
    return report["difference"] == 0 or on_lattices and 0 < _told(report) == report["scales_agree"]


def _nearer(report):
    """Both bf16: the one at the smaller distance. bf16 and int4: int4 if bf16 is off its lattice, else bf16, and int4
    too if all integers and scales are the same. Both int4: None, integers by themselves show nothing."""
    a, b = report["distance"]
    if a is None and b is None:
        return None
    if a is not None and b is not None:
        return "both" if a == b else "a" if a < b else "b"
    plain, quantized = ("b", "a") if a is None else ("a", "b")
    if (b if a is None else a) > 0:
        return quantized
    told = _told(report)
    return None if not told else "both" if report["scales_agree"] == told else plain


def compare(path, against, progress=None):
    """Compare the weights that two checkpoints (or bundled ones, by name) have in common -> JSON-able dict.

    Of every weight that is bf16 or int4 in both, what `compare_weights` found. "same" says whether it is so for all of
    kind "linear", and "nearer" which checkpoint is nearer to the lattice: "a" (path), "b" (against), "both", "mixed"
    where weights disagree, or None. CheckpointError where there is none to compare, or shapes differ.
    """
    a, b = open_checkpoint(resolve(path)), open_checkpoint(resolve(against))
    weights_a, weights_b = _weights(a), _weights(b)
    formats_a, formats_b = parse_quantization(a.config), parse_quantization(b.config)
    rows, skipped = [], Counter()
    for key, (kind, name_a) in weights_a.items():
        name_b = weights_b.get(key, (None, None))[1]
        stored = {a.tensors[name_a].dtype, b.tensors[name_b].dtype if name_b else "only in a"}
        if odd := stored - {"BF16", "I32"}:
            skipped[min(odd)] += 1
            continue
        weights = _read(a, name_a, formats_a), _read(b, name_b, formats_b)
        rows.append({"name": key, "kind": kind, "shape": list(weights[0].shape), **compare_weights(*weights)})
        if progress:
            progress(rows[-1])
    judged = [row for row in rows if row["kind"] == "linear"]
    if not judged:
        raise CheckpointError(f"{a.folder} and {b.folder}: no weights of linear layers, bf16 or int4, in both")
    if only_in_b := len(weights_b.keys() - weights_a.keys()):
        skipped["only in b"] = only_in_b
    return {
        "checkpoint": str(a.folder),
        "against": str(b.folder),
        "same": all(row["same"] for row in judged),
        "nearer": _nearest_of_all({row["nearer"] for row in judged}),
        "tensors": rows,
        "skipped": dict(skipped),
    }


def _nearest_of_all(found):
    sides = found & {"a", "b"}
    return "mixed" if len(sides) == 2 else sides.pop() if sides else "both" if "both" in found else None


# For people to read


def exit_status(report):
    """0 where `examine` found QAT weights, or `compare` the same ones; else 1."""
    return 0 if report.get("qat") or report.get("same") else 1


def report_text(report):
    """What `examine` or `compare` found: a line for every weight, then the verdict."""
    heads, cells, verdict = (COMPARED, _compared_cells, _compared) if "against" in report else (FOUND, _cells, _verdict)
    table = [["", "kind", *heads], *([row["name"], row["kind"], *cells(row)] for row in report["tensors"])]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in table]
    if report["skipped"]:
        counts = ", ".join(f"{count:,} {why}" for why, count in report["skipped"].items())
        lines += ["", f"weights left out: {counts}"]
    return "\n".join([*lines, "", *verdict(report)])


FOUND = ("on", "off", "undetermined", "f16 step", "bf16 step", "Q4_0 error", "minmax error")


def _cells(row):
    groups, steps = row["groups"], row["steps"]
    shares = [_percent(steps[dtype], groups["on"]) for dtype in ("f16", "bf16")]
    return [*(f"{count:,}" for count in groups.values()), *shares, *map(_number, row["error"].values())]


def _verdict(report):
    judged = [row for row in report["tensors"] if row["kind"] == "linear"]
    on, off, undetermined = (sum(row["groups"][status] for row in judged) for status in judged[0]["groups"])
    for row in report["tensors"]:
        if row["groups"]["on"] and row["off_at"]:
            more = " …" if row["groups"]["off"] > len(row["off_at"]) else ""
            yield f"{row['name']}: off at {', '.join(map(str, row['off_at']))}{more}"
    if report["qat"]:
        yield f"QAT weights: all {len(judged)} of linear layers lie on an int4 lattice, in all {on:,} groups that tell"
    elif off:
        tensors = f"{report['linear']['off']} of {len(judged)} weights of linear layers"
        yield f"not QAT weights: {tensors} are off every int4 lattice, in {off:,} of {on + off:,} groups that tell"
    else:
        yield f"not shown to be QAT weights: none of {undetermined:,} groups tells"


COMPARED = ("stored", "same", "but peak", "different", "unknown", "scales agree", "equal", "ratio", "difference",
            "nearer")  # fmt: skip


def _compared_cells(row):
    counts = (f"{count:,}" for count in (*row["groups"].values(), row["scales_agree"], row["equal"]))
    numbers = _number(row["ratio"]["median"]), _number(row["difference"])
    return [" ".join(row["stored"]), *counts, *numbers, row["nearer"] or "-"]


def _compared(report):
    judged = [row for row in report["tensors"] if row["kind"] == "linear"]
    groups, ratios = Counter(), Counter()
    for row in judged:
        groups.update(row["groups"])
        ratios.update({name: count for name, count in row["ratio"].items() if name != "median" and count})
    yield f"a: {report['checkpoint']}"
    yield f"b: {report['against']}"
    yield "groups: integers " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in groups.items())
    agree, equal = (sum(row[name] for row in judged) for name in ("scales_agree", "equal"))
    yield f"scales: agree in {agree:,} of the {groups['same']:,} same; weights, as bf16, equal in {equal:,} groups"
    if ratios:
        yield f"step of b over step of a: {', '.join(f'{name} in {count:,}' for name, count in ratios.items())}"
    yield f"nearer to the lattice: {report['nearer'] or 'cannot be told'}"
    yield "the same weights" if report["same"] else "not the same weights"


def _percent(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _number(x):
    return "-" if x is None else f"{x:.4f}"
