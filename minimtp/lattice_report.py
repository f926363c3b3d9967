"""Whether a checkpoint holds int4 QAT weights, and which one of two does: what `minimtp lattice` prints.

Letters as in lattice.py.
"""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from . import lattice
from .checkpoint import CheckpointError, bf16_to_float
from .ggml import Blocks
from .gguf_file import Reordered
from .lattice import GROUP, OFF, ON, STEPS, UNDETERMINED, examine_weight
from .loading import open_model
from .parameters import read_weights
from .quant import Plain, Quantized

# What int4 formats quantize, if it is linear: not routers and gates
QUANTIZED = re.compile(r"layers\.\d+\.(?!(router|router_proj|shared_expert_gate|in_proj_[ab])$)")
RATIOS = {"1": 1, "16/15": 16 / 15, "14/15": 14 / 15, "7/8": 7 / 8}  # of scales; told apart within 1 %


def _read_matrices(checkpoint, family, config):
    """The weights of a model that could be int4 -> yields (place, list of matrices [out, in], how they are stored)."""
    for _, kind, found in read_weights(checkpoint, family, config):
        for place, value in found if kind in ("linear", "embedding", "experts") else ():
            matrices = [_unified(matrix) for matrix in (value if isinstance(value, list) else [value])]
            yield place, matrices, " and ".join(sorted({*map(storage_of, matrices)}))


def _unified(matrix):
    if isinstance(matrix, Reordered) and not matrix.cuts_blocks:
        matrix = matrix.part(0, matrix.shape[0])
    return matrix.as_quantized() if isinstance(matrix, Blocks) and matrix.type == "Q4_0" else matrix


def storage_of(matrix):
    """What a matrix is stored as: "BF16" or "int4" if it can be looked at, else another name."""
    if isinstance(matrix, Plain):
        return matrix.dtype if matrix.shape[1] % GROUP == 0 else "in no groups of 32"
    if isinstance(matrix, Quantized):
        is_lattice = matrix.bits == 4 and matrix.group == GROUP and matrix.zeros is None
        return "int4" if is_lattice else f"int{matrix.bits} of another kind"
    return getattr(matrix, "type", type(matrix).__name__)


def _shape(matrices):
    return [len(matrices)] * (len(matrices) > 1) + [*matrices[0].shape]


def _listed(left_out):
    counts = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
    return f" ({counts})" if counts else ""


# One checkpoint


def examine(path, progress=lambda row: None):
    """Whether a checkpoint (folder, GGUF file, bundled one by name) holds int4 QAT weights in bf16 -> JSON-able dict.

    "qat" says so: of what int4 formats quantize, every bf16 weight is on a lattice in all groups that can be told; the
    others are examined and not judged. tensors: of each its name, shape, and what `examine_weight` found; left_out: how
    many are stored as something else. progress is called with every row. CheckpointError where none can be judged.
    """
    checkpoint, *model = open_model(path)
    rows, left_out = [], Counter()
    for place, matrices, kind in _read_matrices(checkpoint, *model):
        if kind != "BF16":
            left_out[kind] += 1
            continue
        judged = bool(QUANTIZED.match(place))
        rows.append({"name": place, "judged": judged, "shape": _shape(matrices), **examine_weight(matrices)})
        progress(rows[-1])
    groups = [row["groups"] for row in rows if row["judged"]]
    if not groups:
        hint = "; --against its bf16 checkpoint compares them" if left_out["int4"] else ""
        raise CheckpointError(f"{checkpoint.folder}: no bf16 weights of layers to examine{_listed(left_out)}{hint}")
    return {
        "checkpoint": str(checkpoint.folder),
        "qat": any(count["on"] for count in groups) and not any(count["off"] for count in groups),
        "tensors": rows,
        "left_out": dict(left_out),
    }


# Two checkpoints


class _Side(NamedTuple):
    """A block of groups in one of two checkpoints; steps are positive, and levels without a common factor."""

    w_KN: np.ndarray  # float32
    levels_KN: np.ndarray
    low_N: np.ndarray  # what the step may be: makes the bf16 weights, or rounds to the scale that is stored
    high_N: np.ndarray
    status_N: np.ndarray


def _side(matrix, rows):
    if isinstance(matrix, Plain):
        bits_KN = lattice.by_group(matrix.stored[rows])
        levels_KN, low_N, high_N, status_N = lattice.find_groups(bits_KN, matrix.name)
        w_KN = bf16_to_float(bits_KN)
    else:
        scales = Plain(matrix.scales.stored[rows], matrix.scales.dtype, matrix.name)
        scales.check_finite()
        levels_KN = lattice.by_group(Quantized(matrix.packed[rows], scales).codes())
        step_N, half_N = scales.dequantize("float32").reshape(-1), _half_unit(scales).reshape(-1)
        low_N, high_N, w_KN = step_N - half_N, step_N + half_N, levels_KN * step_N
        on_N = lattice.has_magnitudes(np.abs(levels_KN).view(np.uint8)) & (step_N != 0)
        status_N = np.where(on_N, ON, UNDETERMINED)
    sign_N = np.where(low_N < 0, np.int8(-1), np.int8(1))
    low_N, high_N = np.where(sign_N < 0, (-high_N, -low_N), (low_N, high_N))
    return _Side(w_KN, *lattice.reduced(levels_KN * sign_N, low_N, high_N), status_N)


def _half_unit(scales):
    """How far a step may be from the scale that it was rounded to -> float32."""
    size_RG = np.abs(scales.dequantize("float32"))
    if scales.dtype == "F16":
        return np.spacing(size_RG.astype(np.float16)).astype(np.float32) / 2
    return np.spacing(size_RG) * (2**15 if scales.dtype == "BF16" else 16)  # float32: what intervals may be short of


def compare_weights(a, b):
    """Compare two weights group by group, each a list of Plain bf16 or Quantized int4, [out, in] -> JSON-able dict.

    groups: off_a and off_b, those off every lattice; compared, those on one in both, and of these same_integers (up to
    sign and a common factor) and same_scales (besides, up to what rounding leaves open). integers: the share of equal
    ones. ratio: of the int4's scale to the bf16's step (else of b's to a's), its mean, and groups within 1 % of each of
    RATIOS. difference: relative Frobenius norm of b - a. nearer: how many groups speak for a side: it is on a lattice
    and the other is not, or it is the bf16 of two that differ, since integers times any scale are on some lattice.
    same: no weight differs, or all scales are the same.
    """
    stored = [storage_of(a[0]), storage_of(b[0])]

    def compare_rows(i, rows):
        x, y = _side(a[i], rows), _side(b[i], rows)
        both_N = (x.status_N == ON) & (y.status_N == ON)
        equal_KN = both_N & (x.levels_KN == y.levels_KN)
        same_N = equal_KN.all(0)
        agree_N = same_N & (x.low_N <= y.high_N) & (y.low_N <= x.high_N)
        ratio_n = lattice.middle(y.low_N, y.high_N)[both_N] / lattice.middle(x.low_N, x.high_N)[both_N]
        ratio_n = 1 / ratio_n if stored == ["int4", "BF16"] else ratio_n
        groups = x.status_N == OFF, y.status_N == OFF, both_N, same_N, agree_N
        near = (np.abs(ratio_n / ratio - 1) < 0.01 for ratio in RATIOS.values())
        return (
            np.array([np.count_nonzero(at) for at in (*groups, *near, equal_KN)]),
            np.array([ratio_n.sum(), lattice.square(y.w_KN - x.w_KN), lattice.square(x.w_KN)]),
        )

    counts, sums = (sum(parts).tolist() for parts in zip(*lattice.over_blocks(compare_rows, a)))
    (off_a, off_b, compared, same, agree), (*near, equal), (ratios, *squares) = counts[:5], counts[5:], sums
    differ = compared - agree if stored[0] != stored[1] else 0
    difference, mean = lattice.relative(*squares), ratios / compared if compared else None
    return {
        "stored": stored,
        "groups": {"off_a": off_a, "off_b": off_b, "compared": compared, "same_integers": same, "same_scales": agree},
        "integers": equal / (GROUP * compared) if compared else None,
        "ratio": {"mean": mean, **dict(zip(RATIOS, near)), "other": compared - sum(near)},
        "difference": difference,
        "nearer": {"a": off_b + differ * (stored[0] == "BF16"), "b": off_a + differ * (stored[1] == "BF16")},
        "same": difference == 0 or not off_a + off_b and 0 < compared == agree,
    }


def compare(path, against, progress=lambda row: None):
    """Compare the weights of two checkpoints that int4 formats quantize -> JSON-able dict.

    tensors: of every weight that is bf16 or int4 in both, what `compare_weights` found; "same" of all of them, and
    "nearer", the side for which more groups speak. CheckpointError where there is nothing to compare.
    """
    models = open_model(path), open_model(against)
    a, b = (str(checkpoint.folder) for checkpoint, *_ in models)
    shapes = [
        {place: shape for place, (_, shape, _) in family.tensors(config).items() if QUANTIZED.match(place)}
        for _, family, config in models
    ]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{a} and {b} are not of the same model: their layers differ in shape")
    rows, left_out = [], Counter()
    sides = (filter(lambda found: QUANTIZED.match(found[0]), _read_matrices(*model)) for model in models)
    for (place, x, *kinds), (_, y, kind) in zip(*sides):
        if odd := {*kinds, kind} - {"BF16", "int4"}:
            left_out[min(odd)] += 1
            continue
        rows.append({"name": place, "shape": _shape(x), **compare_weights(x, y)})
        progress(rows[-1])
    if not rows:
        raise CheckpointError(f"{a} and {b}: no weights of layers in bf16 or int4 in both{_listed(left_out)}")
    for_a, for_b = (sum(row["nearer"][side] for row in rows) for side in "ab")
    return {
        "a": a,
        "b": b,
        "same": all(row["same"] for row in rows),
        "nearer": "a" if for_a > for_b else "b" if for_b > for_a else None,
        "tensors": rows,
        "left_out": dict(left_out),
    }


# For people to read


def report_text(report):
    """What `examine` or `compare` found: a line for every weight, then the verdict."""
    heads, cells, verdict = (COMPARED, _compared_cells, _compared) if "b" in report else (FOUND, _cells, _verdict)
    table = [["", *heads], *([row["name"], *cells(row)] for row in report["tensors"])]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in table]
    left_out = [f"left out{_listed(report['left_out'])}"] * bool(report["left_out"])
    return "\n".join([*lines, "", *left_out, *verdict(report)])


FOUND = ("judged", "on", "off", "undetermined", *(f"{step} step" for step in STEPS), "Q4_0 error", "minmax error")
COMPARED = ("stored", "compared", "same integers", "same scales", "integers", "scale ratio", "difference", "off")


def _cells(row):
    on = row["groups"]["on"]
    counts = (f"{count:,}" for count in row["groups"].values())
    shares = (_percent(count, on) for count in row["steps"].values())
    return ["yes" if row["judged"] else "-", *counts, *shares, *map(_number, row["error"].values())]


def _verdict(report):
    judged = [row for row in report["tensors"] if row["judged"]]
    on, off, undetermined = (sum(row["groups"][status] for row in judged) for status in judged[0]["groups"])
    for row in judged:
        if row["groups"]["on"] and row["off_at"]:
            more = " …" if row["groups"]["off"] > len(row["off_at"]) else ""
            yield f"{row['name']}: off at [matrix, row, group] {', '.join(map(str, row['off_at']))}{more}"
    if report["qat"]:
        held = [step for step in STEPS if all(row["steps"][step] == row["groups"]["on"] for row in judged)]
        yield f"QAT weights: all {len(judged)} lie on an int4 lattice, in all {on:,} groups that tell"
        yield f"every group admits a step in {', '.join(held)}"
    elif off:
        tensors = sum(row["groups"]["off"] > 0 for row in judged)
        yield f"not QAT weights: {tensors} of {len(judged)} are off every lattice, in {off:,} of {on + off:,} groups"
    else:
        yield f"not shown to be QAT weights: none of {undetermined:,} groups tells"


def _compared_cells(row):
    groups, off = row["groups"], row["groups"]["off_a"] + row["groups"]["off_b"]
    shares = (_percent(groups[name], groups["compared"]) for name in ("same_integers", "same_scales"))
    numbers = _number(row["integers"]), _number(row["ratio"]["mean"]), _number(row["difference"])
    return [" ".join(row["stored"]), f"{groups['compared']:,}", *shares, *numbers, f"{off:,}"]


def _compared(report):
    groups, ratios, nearer = Counter(), Counter(), Counter()
    for row in report["tensors"]:
        for counter, name in ((groups, "groups"), (ratios, "ratio"), (nearer, "nearer")):
            counter.update({key: count for key, count in row[name].items() if key != "mean"})
    yield f"a: {report['a']}\nb: {report['b']}"
    yield "groups off every lattice: {off_a:,} of a, {off_b:,} of b; on one in both: {compared:,}".format(**groups)
    yield "of these with the same integers: {same_integers:,}, the same scales too: {same_scales:,}".format(**groups)
    yield f"ratio of scales: {', '.join(f'{name} in {count:,}' for name, count in ratios.items() if count) or '-'}"
    yield f"groups that speak for a: {nearer['a']:,}, for b: {nearer['b']:,}"
    yield f"nearer to the lattice: {report['nearer'] or 'neither'}"
    yield "the same weights" if report["same"] else "not the same weights"


def _percent(part, whole):
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _number(x):
    return "-" if x is None else f"{x:.4f}"
