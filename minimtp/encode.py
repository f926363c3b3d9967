"""A few rows of a weight become what another format stores: int4 as it is, a lattice found again, the rest rounded.

What was done is counted. Letters: O output and I input features, R some of the rows O; G groups along I; N groups of
any rows, K weights in each.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from . import ggml, lattice
from .checkpoint import DTYPES, CheckpointError, bf16_to_float, float_to_bf16, show
from .ggml import TYPES, Blocks
from .quant import Plain, Quantized, pack, pack_codes

GROUP, BLOCK = 32, 1 << 18  # weights converted at a time
CORES = os.cpu_count()
TYPES_OF_STEPS = {np.float16: "F16", np.float32: "F32"}
EMPTY = {np.float16: 0.0, np.float32: float(np.finfo(np.float32).eps)}  # the step of a group of zeros, as others do


@dataclass(kw_only=True)
class Counts:
    """Of groups of 32 weights with one step; where the format has none, `rounded` counts weights."""

    kept: int = 0  # with the integers and the step that they had
    found: int = 0  # of floats on an int4 lattice, integers and step recovered
    rounded: int = 0
    steps: int = 0  # of those kept and found, that had to be rounded

    def add(self, other):
        for name in ("kept", "found", "rounded", "steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def on_all_cores(function, items):
    """The function of every item, in order, a few items ahead of where they are taken."""
    waiting = deque()
    with ThreadPoolExecutor(CORES) as pool:
        for item in items:
            waiting.append(pool.submit(function, *item))
            if len(waiting) > CORES:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def some_rows(weight, start, stop):
    """Some rows of a weight, as a weight of its kind where that keeps what it holds."""
    rows = slice(start, stop)
    if isinstance(weight, Plain):
        return replace(weight, stored=weight.stored[rows])
    if isinstance(weight, Quantized):
        scales = replace(weight.scales, stored=weight.scales.stored[rows])
        zeros = None if weight.zeros is None else weight.zeros[rows]
        return replace(weight, packed=weight.packed[rows], scales=scales, zeros=zeros)
    if isinstance(weight, Blocks):
        return replace(weight, data=weight.data[rows], shape=(stop - start, weight.shape[1]))
    if hasattr(weight, "part"):
        return weight.part(start, stop)
    return Plain(weight.rows(start, stop, np.float32), "F32", weight.name)


def in_order(weight, head_order):
    """The columns of a few rows in another order, heads as they are where they are whole groups."""
    if head_order is None:
        return weight
    count, width = len(head_order), weight.shape[1] // len(head_order)

    def move(array):
        return np.ascontiguousarray(array.reshape(len(array), count, -1)[:, head_order].reshape(array.shape))

    if isinstance(weight, Plain):
        return replace(weight, stored=move(weight.stored))
    if isinstance(weight, Quantized) and width % weight.group == 0 and weight.zeros is None:
        scales = replace(weight.scales, stored=move(weight.scales.stored))
        return replace(weight, packed=move(weight.packed), scales=scales)
    if isinstance(weight, Blocks) and width % TYPES[weight.type].block == 0:
        return replace(weight, data=move(weight.data))
    return Plain(move(weight.dequantize(np.float32)), "F32", weight.name)


def runs(weight, row_order=None):
    """Ranges of rows that cover a weight in that order, of about BLOCK weights at most."""
    height = max(1, BLOCK // weight.shape[1])
    order = np.arange(weight.shape[0]) if row_order is None else row_order
    starts = [0, *(np.flatnonzero(np.diff(order) != 1) + 1), len(order)]
    for a, b in zip(starts, starts[1:]):
        for at in range(a, b, height):
            yield int(order[at]), int(order[at]) + min(height, b - at)


def encode(weight, stored, counts):
    """A few rows in a type of gguf_file.STORED -> their bytes, in an array of any shape."""
    if isinstance(weight, Blocks) and weight.type == stored:
        counts.kept += prod(weight.shape) // GROUP if stored == "Q4_0" else 0
        return weight.data
    if stored == "Q4_0":
        data, rounded_OG = ggml.encode_q4_0(as_int4(weight, counts, np.float16))
        counts.steps += int(rounded_OG.sum())
        return data
    if stored == "Q8_0":
        counts.rounded += prod(weight.shape)
        return ggml.quantize(weight.dequantize(np.float32), stored, weight.name)
    if isinstance(weight, Plain) and weight.dtype == stored:
        return weight.stored
    w_RI = weight.dequantize(np.float64)
    with np.errstate(over="ignore"):
        array = float_to_bf16(w_RI) if stored == "BF16" else w_RI.astype(DTYPES[stored])
    back = bf16_to_float(array, np.float64) if stored == "BF16" else array
    if not np.isfinite(back).all():
        raise CheckpointError(f"{show(weight.name)}: values beyond {stored}")
    counts.rounded += int((back != w_RI).sum())
    return array


# int4


def is_int4(weight):
    if isinstance(weight, Quantized):
        return weight.bits <= 4 and weight.group % GROUP == 0 and weight.zeros is None
    return isinstance(weight, Blocks) and weight.type == "Q4_0"


def as_int4(weight, counts, step):
    """A few rows -> Quantized of 4 bits in groups of 32.

    step: float16 or float32, what a recovered step is stored in; the first also says that ggml's rule rounds what is on
    no lattice, the second minmax.
    """
    if is_int4(weight):
        counts.kept += prod(weight.shape) // GROUP
        return weight.as_quantized() if isinstance(weight, Blocks) else _regrouped(weight)
    if not isinstance(weight, Plain):
        weight = Plain(weight.dequantize(np.float32), "F32", weight.name)
    return _recovered(weight, counts, step)


def _regrouped(weight):
    """int2 or int4 in groups of any multiple of 32, the same numbers in 4 bits and groups of 32."""
    scales = replace(weight.scales, stored=np.repeat(weight.scales.stored, weight.group // GROUP, axis=1))
    packed = weight.packed if weight.bits == 4 else pack_codes(weight.codes())
    return Quantized(packed, scales, GROUP, 4, weight.name)


def _rounded(w_OI, step, name):
    if step is np.float16:
        return Blocks(ggml.quantize(w_OI, "Q4_0", name), "Q4_0", w_OI.shape, name).as_quantized()
    return pack(w_OI, GROUP, name)


def _recovered(weight, counts, step):
    """Float weights -> the integers of their lattice and a step that makes the same weights, group by group.

    Where there is no lattice they are rounded; where `step` cannot hold the step, that is.
    """
    w_OGK = weight.dequantize(np.float64).reshape(weight.shape[0], -1, GROUP)
    codes_OGK, steps_OG = np.zeros(w_OGK.shape, np.int8), np.full(w_OGK.shape[:2], EMPTY[step])
    done_OG = ~w_OGK.any(-1)
    off_OG = np.zeros_like(done_OG)
    if weight.dtype == "BF16":
        found = lattice.find(np.ascontiguousarray(weight.stored), weight.name)
        on_OG, off_OG = found.status_OG == lattice.ON, found.status_OG == lattice.OFF
        codes_OGK[on_OG] = found.levels_OI.reshape(w_OGK.shape)[on_OG]
        found_OG = found.steps() if step is np.float16 else _short_steps(found)
        steps_OG[on_OG], done_OG = found_OG[on_OG], done_OG | on_OG
    left = np.nonzero(~done_OG & ~off_OG)
    codes_OGK[left], steps_OG[left], done_OG[left] = _few_levels(w_OGK[left], weight.dtype)
    dtype = TYPES_OF_STEPS[step]
    scales = Plain(narrow(steps_OG, dtype), dtype, weight.name)
    made_OGK = narrow(codes_OGK * scales.dequantize(np.float64)[..., None], weight.dtype)
    counts.found += int(done_OG.sum())
    counts.steps += int(((made_OGK != w_OGK).any(-1) & done_OG).sum())
    left = np.nonzero(~done_OG)
    if left[0].size:
        rounded = _rounded(w_OGK[left].astype(np.float32), step, weight.name)
        codes_OGK[left] = rounded.codes()
        scales.stored[left] = rounded.scales.dequantize(step)[:, 0]
        counts.rounded += left[0].size
    return Quantized(pack_codes(codes_OGK.reshape(weight.shape)), scales, GROUP, 4, weight.name)


def narrow(x, dtype):
    """float64 -> the nearest values of a type in FLOATS."""
    with np.errstate(over="ignore"):
        return bf16_to_float(float_to_bf16(x), np.float64) if dtype == "BF16" else x.astype(DTYPES[dtype])


def _short_steps(found):
    """A step in every interval: of bf16 where there is one, for those who load all of a folder as that; else float16;
    else in the middle."""
    steps_OG = found.steps()
    for dtype in ("f16", "bf16"):
        held_OG = lattice.admits(found.low_OG, found.high_OG, dtype)
        with np.errstate(over="ignore"):
            steps_OG = np.where(held_OG, lattice.STEPS[dtype](found.steps()), steps_OG)
    return steps_OG


def _few_levels(w_NK, dtype):
    """Groups that are too plain to tell a lattice by, or of exact products: some integers and a step that make them.

    -> (codes [N, K], steps [N], whether there are any [N])
    """
    at_N = np.abs(w_NK).argmax(1)[:, None] if w_NK.size else np.zeros((0, 1), int)
    peak_N = np.take_along_axis(w_NK, at_N, 1)
    codes_NK, steps_N, fits_N = np.zeros(w_NK.shape, np.int8), np.ones(len(w_NK)), np.zeros(len(w_NK), bool)
    for level in (1, 2, 3, 4, 5, 6, 7, -8):
        step_N1 = (peak_N / level).astype(np.float32).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            tried_NK = np.nan_to_num(np.rint(w_NK / step_N1)).clip(-8, 7)
        good_N = ~fits_N & (narrow(tried_NK * step_N1, dtype) == w_NK).all(1)
        codes_NK[good_N], steps_N[good_N], fits_N = tried_NK[good_N], step_N1[good_N, 0], fits_N | good_N
    return codes_NK, steps_N, fits_N
