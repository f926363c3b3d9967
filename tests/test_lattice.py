"""The int4 lattice under bf16 weights: found wherever there is one, nowhere else, as exact arithmetic finds it.

Weights are made by the rules that QAT weights may come from, with their integers and steps known; ordinary weights,
altered weights and other formats' versions of the same weights are what must not pass for them.
"""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from random_gguf import int4_blocks, write_gguf
from random_qwen import layers, rope, write_model

from minimtp import lattice
from minimtp.checkpoint import (
    CheckpointError,
    bf16_to_float,
    float_to_bf16,
    open_checkpoint,
    read_safetensors,
    write_safetensors,
)
from minimtp.formats import write_pack_quantized
from minimtp.lattice import NAIVE, OFF, ON, STEPS, UNDETERMINED, admits, examine_weight, find
from minimtp.lattice_report import compare, compare_weights, examine, report_text, storage_of
from minimtp.loading import bundled
from minimtp.quant import Plain, Quantized, pack, pack_codes

f32 = np.float32
rng = np.random.RandomState(11)
RULES = {
    "signed extreme / -8": lambda w_GK: np.take_along_axis(w_GK, np.abs(w_GK).argmax(1)[:, None], 1)[:, 0] / f32(-8),
    "absmax / 7.5": lambda w_GK: np.abs(w_GK).max(1) / f32(7.5),
    "absmax / 7": lambda w_GK: np.abs(w_GK).max(1) / f32(7),
    "absmax / 8, cut": lambda w_GK: np.abs(w_GK).max(1) / f32(8),
}
LAWS = {
    "gauss": lambda shape: rng.standard_normal(shape).astype(f32),
    "laplace": lambda shape: rng.laplace(size=shape).astype(f32),
    "student": lambda shape: rng.standard_t(3, shape).astype(f32),
}


def groups_of(count, law="gauss"):
    """Float32 weights [count, 32], every group of its own size."""
    return LAWS[law]((count, 32)) * np.exp2(rng.uniform(-12, 2, (count, 1)).astype(f32))


def on_lattice(w_GK, rule="absmax / 7.5", step="f32"):
    """What QAT could have made of weights -> (bf16 bits [G, 32], integers, steps float64 [G])"""
    step_G = STEPS[step](RULES[rule](w_GK)).astype(f32)
    codes_GK = np.rint(w_GK / step_G[:, None]).clip(-8, 7)
    step_G = step_G.astype(np.float64)
    return float_to_bf16(codes_GK * step_G[:, None]), codes_GK.astype(np.int8), step_G


def products(levels_OI, steps_OG):
    return float_to_bf16(levels_OI * np.repeat(steps_OG.astype(np.float64), 32, 1))


def bits_of(*values):
    """One group: these weights, then zeros."""
    return float_to_bf16(np.array([[*values, *[0.0] * (32 - len(values))]]))


def plain(bits_OI, name="w"):
    return [Plain(bits_OI, "BF16", name)]


# Exact arithmetic, one group at a time


def ends(size):
    """The numbers that round to a bf16 magnitude: lowest and highest, in 2^-135."""
    return tuple(256 + mantissa << exponent for exponent, mantissa in (divmod(2 * size + i, 256) for i in (-1, 1)))


def levels_with(size, largest, peak):
    """Levels whose steps for a weight meet those of the largest one, which has level `peak`."""
    (low, high), (low_peak, high_peak), closed = ends(size), ends(largest), size % 2 == largest % 2 == 0
    for level in range(1, peak + 1):
        below, above = high_peak * level - low * peak, high * peak - low_peak * level
        if min(below, above) > 0 or closed and min(below, above) == 0:
            yield level


def exact_find(bits_K):
    """-> (levels, low, high in 2^-135) with the smallest largest level whose intervals share a step, or None"""
    sizes = [int(bits) & 0x7FFF for bits in bits_K]
    for peak in range(1, 9):
        levels = [[*levels_with(size, max(sizes), peak)] if size else [0] for size in sizes]
        if not all(levels):
            continue
        levels = [level for (level,) in levels]  # there is only one
        steps = [(*(Fraction(end, n) for end in ends(size)), size % 2 == 0) for n, size in zip(levels, sizes) if n]
        low, high = max(step[0] for step in steps), min(step[1] for step in steps)
        touching = all(closed for a, b, closed in steps if low in (a, b) or high in (a, b))
        signed = [-level if bits > 0x7FFF else level for level, bits in zip(levels, bits_K)]
        if (low < high or low == high and touching) and {8, -8} - {*signed}:
            return (signed, low, high) if 8 not in signed else ([-level for level in signed], -high, -low)
    return None


def test_exact_arithmetic_finds_the_same():
    """On lattices of every step, and on lattices where weights were moved by a unit, which ties decide."""
    parts = [on_lattice(groups_of(12, law), rule, step)[0] for law in LAWS for rule in RULES for step in STEPS]
    bits_GK = np.concatenate(parts)
    moved = (rng.random_sample(bits_GK.shape) < 0.03) * rng.randint(-1, 2, bits_GK.shape)
    bits_GK[::2] += (moved * (bits_GK & 0x7FFF > 0)).astype(np.uint16)[::2]
    found = find(bits_GK)
    status_G, seen = found.status_OG[:, 0], {ON: 0, OFF: 0}
    for g in np.flatnonzero(status_G != UNDETERMINED):
        exact = exact_find(bits_GK[g])
        seen[status_G[g]] += 1
        assert (status_G[g] == ON) == (exact is not None), g
        if exact:
            assert found.levels_OI[g].tolist() == exact[0]
            ends = [float(end / 2**135) for end in exact[1:]]
            assert np.allclose([found.low_OG[g, 0], found.high_OG[g, 0]], ends, rtol=2.0**-20, atol=0)
    assert min(seen.values()) > 50


def test_an_interval_includes_its_ends_where_ties_go_to_the_weight():
    """1 is even, so 1 + 2^-8, half-way to the next, is one of its steps. 1 + 2^-7 is odd: its ends are not."""
    for weight, included in ((1, True), (1 + 2.0**-7, False)):
        end = weight + 2.0**-8
        found = find(bits_of(weight, *(end * np.array([3, 5, 7]))))
        assert found.status_OG[0, 0] == ON and end * (1 - 2.0**-20) < found.high_OG[0, 0] <= end
        assert (found.high_OG[0, 0] == end) == included


# Lattices


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("rule", RULES)
def test_every_group_made_by_a_rule_is_found(rule, step):
    for law in LAWS:
        bits_GK, codes_GK, step_G = on_lattice(groups_of(4096, law), rule, step)
        found = find(bits_GK.reshape(256, 512))
        on_G = found.status_OG.reshape(-1) == ON
        magnitudes = np.array([len(np.unique(codes)) for codes in np.abs(codes_GK)])
        assert np.array_equal(on_G, magnitudes >= 4) and on_G.mean() > 0.9
        levels_GK = found.levels_OI.reshape(-1, 32)[on_G]
        wide_OG = found.low_OG < found.high_OG  # where it is one step, that is exact in float32
        low_OG = np.where(wide_OG, np.nextafter(found.low_OG, found.high_OG), found.low_OG)
        high_OG = np.where(wide_OG, np.nextafter(found.high_OG, found.low_OG), found.high_OG)
        for steps_OG in (found.steps(), low_OG, high_OG):
            again_GK = products(found.levels_OI, np.nan_to_num(steps_OG)).reshape(-1, 32)[on_G]
            assert np.array_equal(bf16_to_float(again_GK), bf16_to_float(bits_GK[on_G]))  # bf16 has two zeros
        sign_G = np.sign(found.low_OG.reshape(-1)[on_G]) * np.sign(step_G[on_G])
        factor_G = np.gcd.reduce(codes_GK[on_G], axis=1) * sign_G
        assert np.array_equal(levels_GK * factor_G[:, None], codes_GK[on_G])  # equal up to sign and common factor
        own, (low, high) = step_G[on_G] * factor_G, (found.low_OG.reshape(-1)[on_G], found.high_OG.reshape(-1)[on_G])
        margin = np.abs(own) * 2.0**-20
        assert np.all((low - margin <= own) & (own <= high + margin))
        for dtype in STEPS:
            held = admits(low, high, dtype)
            assert held.all() if dtype in ("f32", step) else held.mean() > 0.2


def test_integers_are_the_smallest_and_never_plus_eight():
    found = find(np.concatenate([bits_of(0, 2, 4, -6, 8), bits_of(8, 7, -3, 1), bits_of(-8, 7, -3, 1)]))
    assert found.levels_OI[:, :5].tolist() == [[0, 1, 2, -3, 4], [-8, -7, 3, -1, 0], [-8, 7, -3, 1, 0]]
    assert found.steps()[0] == pytest.approx(2, rel=2.0**-8)
    assert found.low_OG[1] < -1 < found.high_OG[1] < 0 < found.low_OG[2] < 1 < found.high_OG[2]
    assert find(bits_of(8, -8, 7, 3, 1)).status_OG[0, 0] == OFF
    for peak in range(3, 9):
        levels = [-peak, *range(peak)]
        assert find(bits_of(*(0.3 * np.array(levels)))).levels_OI[0, : peak + 1].tolist() == levels
    assert find(bits_of(8, -8, 2, 4, 6)).status_OG[0, 0] == find(bits_of(7, -7, 3, 1)).status_OG[0, 0] == ON


def test_groups_that_cannot_tell_are_undetermined():
    for values in ((), (0.3,), (0.3, -0.3) * 16, (1, 2, 3) * 10 + (1, 2), (1, 2), (5, -5.03), (1, 1.5)):
        found = find(bits_of(*values))
        assert found.status_OG[0, 0] == UNDETERMINED, values
        assert not found.levels_OI.any() and np.isnan(found.steps()).all()
    assert find(bits_of(1, 2, 3)).levels_OI[0, :4].tolist() == [1, 2, 3, 0]  # zero is the fourth
    assert find(bits_of(1, 2, 3.1)).status_OG[0, 0] == OFF
    for scale, status in ((2.0**-119, ON), (2.0**-123, UNDETERMINED), (2.0**-130, UNDETERMINED), (2.0**124, ON)):
        assert find(bits_of(*(scale * np.array([1, 3, 5, -7, -0.0])))).status_OG[0, 0] == status


@pytest.mark.parametrize("law", LAWS)
def test_ordinary_weights_are_on_no_lattice(law):
    """200,000 groups, none of them found; and with every weight made one of a lattice's, all are."""
    w_GK = LAWS[law]((200_000, 32)) * f32(0.02)
    assert not (find(float_to_bf16(w_GK).reshape(-1, 3200)).status_OG == ON).any()
    assert (find(on_lattice(w_GK[:2000])[0]).status_OG != OFF).all()


def test_one_altered_weight_is_named_by_its_group():
    bits_GK, codes_GK, step_G = on_lattice(groups_of(64 * 8))
    whole = bits_GK.reshape(2, 32, 256)  # two matrices
    assert examine_weight([*plain(whole[0]), *plain(whole[1])])["off_at"] == []
    for _ in range(30):
        g, k = rng.randint(len(bits_GK)), rng.randint(32)
        altered_GK = bits_GK.copy()
        altered_GK[g, k] = float_to_bf16((codes_GK[g, k] + 0.5) * step_G[g])
        altered = altered_GK.reshape(2, 32, 256)
        report = examine_weight([*plain(altered[0]), *plain(altered[1])])
        assert report["off_at"] == [[g // 256, g % 256 // 8, g % 8]] and report["groups"]["off"] == 1


def test_wrong_weights_are_refused():
    right = on_lattice(groups_of(6))[0].reshape(3, 64)
    for wrong in (right.astype(np.int32), right[:, :48], right[0], right[:0], bf16_to_float(right)):
        with pytest.raises(ValueError, match=r"expected bf16 bits, uint16 \[out, in\]"):
            find(wrong)
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):
        with pytest.raises(CheckpointError, match="'w': NaN or infinite"):
            examine_weight(plain(np.where(np.arange(192).reshape(3, 64) == 100, np.uint16(bits), right)))


# Formats and naive rules


def test_a_format_admits_a_step_exactly_where_it_has_one():
    low = np.exp2(rng.uniform(-16, 3, 4000)).astype(f32)
    high = (low * (1 + 10 ** rng.uniform(-5, -2, low.shape))).astype(f32)
    grids = {
        "bf16": np.sort(bf16_to_float(np.arange(0x7F80, dtype=np.uint16))),
        "f16": np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(f32),
    }
    for dtype, grid in grids.items():
        wanted = np.searchsorted(grid, low, "left") < np.searchsorted(grid, high, "right")
        assert 0.05 < wanted.mean() < 0.95
        assert np.array_equal(admits(low, high, dtype), wanted) and np.array_equal(admits(-high, -low, dtype), wanted)
    assert admits(low, high, "f32").all()
    assert not admits(np.float32([1e6]), np.float32([1.1e6]), "f16")[0]  # beyond 65504


ERRORS = {"signed extreme / -8": (0, 0.003), "absmax / 7.5": (0.055, 0.07), "absmax / 7": (0.08, 0.09),
          "absmax / 8, cut": (0.05, 0.06)}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_what_naive_rules_cost_on_a_lattice(rule):
    """Q4_0 is right about one rule only, minmax is a fifteenth off about all."""
    w_GK = rng.standard_normal((8000, 32)).astype(f32)
    error = examine_weight(plain(on_lattice(w_GK, rule)[0].reshape(-1, 320)))["error"]
    low, high = ERRORS[rule]
    assert low <= error["q4_0"] < high and error["minmax"] == pytest.approx(1 / 15, abs=4e-4)
    ordinary = examine_weight(plain(float_to_bf16(w_GK).reshape(-1, 320)))["error"]
    assert ordinary["q4_0"] == pytest.approx(0.086, abs=2e-3) and ordinary["minmax"] == pytest.approx(0.0945, abs=2e-3)


def test_a_report_is_the_same_however_the_rows_are_cut(monkeypatch):
    bits_OI = on_lattice(groups_of(70 * 5), "absmax / 8, cut")[0].reshape(70, 160)
    bits_OI[3:40:4, 40] += 9
    bits_OI[60] = bits_OI[61, 0]
    whole, found = examine_weight(plain(bits_OI)), find(bits_OI)
    assert whole["groups"] == {"on": 335, "off": 10, "undetermined": 5}
    assert whole["off_at"] == [[0, row, 1] for row in range(3, 35, 4)]  # eight, and no more
    assert sum(whole["peaks"].values()) == whole["steps"]["f32"] == 335 and whole["steps"]["bf16"] < 250
    cut_whole = compare_weights(plain(bits_OI), [pack(bf16_to_float(bits_OI))])
    for block in (1, 700):
        monkeypatch.setattr(lattice, "BLOCK", block)
        cut, again = examine_weight(plain(bits_OI)), find(bits_OI)
        assert cut.pop("error") == pytest.approx(whole["error"], rel=1e-9)
        assert cut == {name: value for name, value in whole.items() if name != "error"}
        for name in ("levels_OI", "low_OG", "high_OG", "status_OG"):
            assert np.array_equal(getattr(again, name), getattr(found, name), equal_nan=name[0] in "lh")
        compared = compare_weights(plain(bits_OI), [pack(bf16_to_float(bits_OI))])
        assert compared["groups"] == cut_whole["groups"] and compared["ratio"] == pytest.approx(cut_whole["ratio"])


# Two weights


def quantized(levels_OI, steps_OG, dtype="bf16"):
    stored = float_to_bf16(steps_OG) if dtype == "bf16" else STEPS[dtype](steps_OG)
    return [Quantized(pack_codes(levels_OI), Plain(stored, dtype.upper(), "s"), name="w")]


def a_lattice(rows=50, rule="absmax / 7.5", step="f32"):
    """-> (bf16 weights, integers [rows, 160], steps [rows, 5])"""
    bits_GK, codes_GK, step_G = on_lattice(rng.standard_normal((rows * 5, 32)).astype(f32), rule, step)
    return plain(bits_GK.reshape(rows, 160)), codes_GK.reshape(rows, 160), step_G.reshape(rows, 5)


def groups(compared, integers, scales, off_a=0, off_b=0):
    return dict(off_a=off_a, off_b=off_b, compared=compared, same_integers=integers, same_scales=scales)


@pytest.mark.parametrize("step", STEPS)
def test_the_int4_weights_that_bf16_ones_were_made_of_are_the_same(step):
    a, codes_OI, step_OG = a_lattice(500, step=step)
    codes_OI, flips_OG = codes_OI.clip(-7), rng.choice([1, -1], step_OG.shape)
    a = plain(products(codes_OI, step_OG))
    b = quantized(codes_OI * np.repeat(flips_OG, 32, 1), step_OG * flips_OG, step)  # a factor -1 belongs to the step
    for report, stored in ((compare_weights(a, b), ["BF16", "int4"]), (compare_weights(b, a), ["int4", "BF16"])):
        assert report["groups"] == groups(2500, 2500, 2500) and report["same"] and report["stored"] == stored
        assert report["integers"] == 1 and report["ratio"]["1"] == 2500 and report["nearer"] == {"a": 0, "b": 0}
    half = codes_OI.clip(-4, 3)
    report = compare_weights(plain(products(half, step_OG)), quantized(2 * half, step_OG / 2, step))
    assert report["same"] and report["groups"]["same_scales"] == report["groups"]["compared"] > 2000  # and so does a 2


@pytest.mark.parametrize("step", ["f16", "bf16"])
def test_a_scale_is_the_same_if_rounding_explains_it(step):
    """A scale's type may not hold the step: some weights change, yet nothing better can be stored. The next can."""
    a, codes_OI, step_OG = a_lattice()
    rounded = quantized(codes_OI, step_OG, step)
    assert compare_weights(a, rounded)["same"] and 0 < compare_weights(a, rounded)["difference"] < 0.004
    found, unit = find(a[0].stored), {"f16": 2.0**-10, "bf16": 2.0**-7}[step]
    sign_OI = np.repeat(np.sign(found.low_OG * step_OG), 32, 1).astype(int)
    for end_OG, off in ((found.low_OG, -1), (found.high_OG, 1)):
        away = off * unit * np.sign(end_OG) * 2.01
        beyond_OG = STEPS[step](end_OG.astype(np.float64)).astype(np.float64) * (1 + away)
        report = compare_weights(a, quantized(codes_OI * sign_OI, beyond_OG, step))
        assert report["groups"] == groups(250, 250, 0) and report["nearer"] == {"a": 250, "b": 0}, off


def test_minmax_of_a_lattice_keeps_its_integers_and_misses_the_scale():
    """What compressed-tensors' minmax makes of QAT weights: the same but for cut peaks, 16/15 and 14/15 of the step."""
    a, codes_OI, step_OG = a_lattice(400)
    cut = [pack(bf16_to_float(a[0].stored))]
    peaks = examine_weight(a)["peaks"]
    for report, side in ((compare_weights(a, cut), "a"), (compare_weights(cut, a), "b")):
        assert report["groups"]["compared"] == 2000 and report["groups"]["same_scales"] == 0
        assert report["integers"] > 0.97 and report["groups"]["same_integers"] > 200
        assert report["ratio"]["16/15"] == peaks["8"] and report["ratio"]["14/15"] == peaks["7"]
        assert report["ratio"]["other"] == 0 and report["difference"] == pytest.approx(1 / 15, abs=5e-3)
        assert report["nearer"] == {side: 2000, "ab".replace(side, ""): 0} and not report["same"]
    right = compare_weights(a, quantized(codes_OI, step_OG))
    assert right["same"] and right["ratio"]["1"] == 2000


def test_naive_q4_0_of_a_lattice_has_seven_eighths_of_the_step():
    a, _, _ = a_lattice(400, "absmax / 7")
    report = compare_weights(a, [NAIVE["q4_0"](bf16_to_float(a[0].stored), "w").as_quantized()])
    assert report["ratio"]["7/8"] == 2000 and report["groups"]["same_integers"] == 0 and report["integers"] < 0.8
    right, _, _ = a_lattice(400, "signed extreme / -8")
    report = compare_weights(right, [NAIVE["q4_0"](bf16_to_float(right[0].stored), "w").as_quantized()])
    assert (
        report["ratio"]["1"] == report["groups"]["same_integers"] == 2000 and report["groups"]["same_scales"] > 1000
    )  # f16 of bf16(8 · step) / 8


def test_both_in_bf16():
    a, codes_OI, step_OG = a_lattice()
    report = compare_weights(a, plain(products(codes_OI, step_OG * 1.1)))
    assert report["groups"] == groups(250, 250, 0) and report["ratio"]["other"] == 250 and not report["same"]
    assert report["ratio"]["mean"] == pytest.approx(1.1, abs=2e-3)
    assert report["difference"] == pytest.approx(0.1, abs=1e-3) and report["nearer"] == {"a": 0, "b": 0}
    assert compare_weights(a, plain(a[0].stored ^ np.uint16(0x8000)))["groups"]["same_integers"] == 0
    assert compare_weights(a, a_lattice()[0])["integers"] < 0.3
    moved = plain(float_to_bf16(bf16_to_float(a[0].stored) * (1 + 1e-2 * rng.standard_normal((50, 160)))))
    for report, side in ((compare_weights(a, moved), "a"), (compare_weights(moved, a), "b")):
        assert report["nearer"][side] == 250 == report["groups"][f"off_{'ab'.replace(side, '')}"]
    assert compare_weights(moved, moved)["same"] and not compare_weights(moved, plain(moved[0].stored + 1))["same"]


def test_both_in_int4_show_no_lattice():
    _, codes_OI, step_OG = a_lattice()
    a = quantized(codes_OI, step_OG)
    for b, same in ((quantized(codes_OI, step_OG, "f16"), 250), (quantized(codes_OI, step_OG * 1.02), 0)):
        report = compare_weights(a, b)
        assert report["groups"] == groups(250, 250, same) and report["same"] == bool(same)
        assert report["nearer"] == {"a": 0, "b": 0}
    step_OG[3, 2] = 0
    assert compare_weights(quantized(codes_OI, step_OG), a)["groups"]["compared"] == 249  # a group of zeros
    zero = compare_weights(quantized(codes_OI * 0, step_OG), a)
    assert zero["groups"]["compared"] == 0 and not zero["same"] and zero["difference"] is None


def test_one_other_weight_is_seen():
    a, codes_OI, step_OG = a_lattice()
    other_OI, altered = codes_OI.copy(), a[0].stored.copy()
    other_OI[7, 65] += 1 if codes_OI[7, 65] < 3 else -1
    altered[9, 70] += 9
    report = compare_weights(a, quantized(other_OI, step_OG, "f32"))
    assert report["groups"] == groups(250, 249, 249) and not report["same"] and report["nearer"] == {"a": 1, "b": 0}
    report = compare_weights(plain(altered), quantized(codes_OI, step_OG, "f32"))
    assert report["groups"] == groups(249, 249, 249, off_a=1) and not report["same"]
    assert report["nearer"] == {"a": 0, "b": 1}


def test_other_storages_are_not_taken_for_int4():
    a, codes_OI, step_OG = a_lattice()
    (b,) = quantized(codes_OI, step_OG)
    assert [storage_of(matrix) for matrix in (*a, b)] == ["BF16", "int4"]
    wide = Quantized(b.packed, Plain(np.ones((50, 1), f32), "F32"), 160)
    eight = Quantized(pack_codes(codes_OI.astype(int), 8), b.scales, 32, 8)
    shifted = Quantized(b.packed, b.scales, zeros=np.ones(step_OG.shape, np.int8))
    odd = Plain(a[0].stored[:, :48], "BF16")
    assert not {"BF16", "int4"} & {storage_of(matrix) for matrix in (wide, eight, shifted, odd)}
    step_OG[3, 4] = np.nan
    with pytest.raises(CheckpointError, match="'w': NaN or infinite"):
        compare_weights(a, quantized(codes_OI, step_OG))


# Checkpoints


def write(folder, tensors, config="tiny-gemma4-float"):
    """A checkpoint with those tensors and a bundled model's configuration."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes((bundled(config) / "config.json").read_bytes())
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


UP = "model.language_model.layers.1.mlp.up_proj.weight"


def stored(folder):
    return {name: (raw.dtype, raw.stored()) for name, raw in read_safetensors(folder / "model.safetensors")[0].items()}


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory):
    """The bundled int4 model as a -unquantized release would have it: bf16 products, and no codes."""
    tensors, found = open_checkpoint(bundled("tiny-gemma4")).tensors, {}
    for name, raw in tensors.items():
        if name.endswith(".weight_packed"):
            packed, scales = raw.data.reshape(raw.shape[0], -1), tensors[name.replace("_packed", "_scale")]
            weight = Quantized(packed, Plain(scales.stored(), scales.dtype))
            found[name.removesuffix("_packed")] = "BF16", float_to_bf16(weight.dequantize("float64"))
        elif not name.endswith(("_scale", "_shape")):
            found[name] = raw.dtype, raw.stored()
    return write(tmp_path_factory.mktemp("lattice") / "unquantized", found)


def test_qat_weights_are_called_so_and_others_are_not(unquantized, tmp_path):
    seen = []
    report = examine(unquantized, seen.append)
    assert report["qat"] is True and seen == report["tensors"]
    judged = [row for row in report["tensors"] if row["judged"]]
    assert len(judged) == 33 and [row["name"] for row in report["tensors"] if not row["judged"]] == ["embed_tokens"]
    for row in judged:
        assert row["groups"]["off"] == 0 < row["groups"]["on"] == row["steps"]["bf16"]
        assert sum(row["groups"].values()) == np.prod(row["shape"]) // 32
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = report_text(report)
    assert "\nQAT weights: all 33 lie on an int4 lattice" in text and text.endswith("admits a step in f32, f16, bf16")
    bits = stored(unquantized)[UP][1].copy()
    bits[5, 37] ^= 64
    report = examine(write(tmp_path, stored(unquantized) | {UP: ("BF16", bits)}))
    assert report["qat"] is False
    text = report_text(report)
    assert "layers.1.up_proj: off at [matrix, row, group] [0, 5, 1]\n" in text
    assert "\nnot QAT weights: 1 of 33 are off every lattice, in 1 of" in text
    report = examine("tiny-gemma4-float")
    assert not report["qat"] and not any(row["groups"]["on"] for row in report["tensors"])
    zeros = {name: (dtype, bits * 0) for name, (dtype, bits) in stored(unquantized).items()}
    report = examine(write(tmp_path, zeros))
    assert not report["qat"] and report_text(report).endswith("none of 56,832 groups tells")


def test_what_cannot_be_examined_is_refused(unquantized, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"tiny-gemma4: no bf16 weights of layers to examine \(33 int4\); --against"
    ):
        examine("tiny-gemma4")
    tensors = stored(unquantized)
    infinite = tensors[UP][1].copy()
    infinite[7, 7] = 0x7F80
    with pytest.raises(CheckpointError, match="up_proj.weight': NaN or infinite"):
        examine(write(tmp_path / "infinite", tensors | {UP: ("BF16", infinite)}))
    wide = {key: ("F32", bf16_to_float(bits)) for key, (_, bits) in tensors.items()}
    with pytest.raises(CheckpointError, match=r"no bf16 weights of layers to examine \(34 F32\)"):
        examine(write(tmp_path / "wide", wide))
    with pytest.raises(CheckpointError, match="embed_tokens.weight' is missing"):
        examine(write(tmp_path / "none", {"x.weight": tensors[UP]}))


def versions(unquantized, folder):
    """The same model in other formats -> {name: (path, whether it is the same weights)}"""
    right = int4_blocks(bundled("tiny-gemma4"))
    naive = {}
    for name, (dtype, bits) in stored(unquantized).items():
        linear = ".layers." in name and bits.ndim == 2
        made = write_pack_quantized(name.removesuffix(".weight"), pack(bf16_to_float(bits))) if linear else {}
        naive |= made or {name: (dtype, bits)}
    return {
        "compressed-tensors": (bundled("tiny-gemma4"), True),
        "minmax": (write(folder / "minmax", naive, "tiny-gemma4"), False),
        "Q4_0": (write_gguf(folder / "right.gguf", unquantized, store=lambda name, _: right.get(name, "F32")), True),
        "naive Q4_0": (
            write_gguf(folder / "naive.gguf", unquantized, store=lambda name, _: "Q4_0" if name in right else "F32"),
            False,
        ),
    }


def test_the_same_model_in_every_format(unquantized, tmp_path):
    """bf16 against compressed-tensors and GGUF; those against one another; and what naive rules made, by name."""
    found = versions(unquantized, tmp_path)
    for name, (path, same) in found.items():
        report = compare(unquantized, path)
        assert report["same"] == same and report["nearer"] == (None if same else "a"), name
        assert len(report["tensors"]) == 33 and json.loads(json.dumps(report, allow_nan=False)) == report
        assert report_text(report).endswith("\nthe same weights" if same else "\nnot the same weights")
    assert compare(found["minmax"][0], unquantized)["nearer"] == "b"
    assert compare("tiny-gemma4", found["Q4_0"][0])["same"] and not compare("tiny-gemma4", found["minmax"][0])["same"]
    with pytest.raises(CheckpointError, match="no bf16 weights of layers"):
        examine(found["Q4_0"][0])
    mixed = write_gguf(tmp_path / "mixed.gguf", unquantized, store=lambda name, _: "BF16" if "attn" in name else "Q8_0")
    assert compare(mixed, unquantized)["left_out"] == {"Q8_0": 15} and examine(mixed)["left_out"] == {"Q8_0": 16}
    ratios = [row["ratio"] for row in compare(unquantized, found["minmax"][0])["tensors"]]
    assert sum(ratio["16/15"] for ratio in ratios) > 10_000 < sum(ratio["14/15"] for ratio in ratios)
    assert "16/15 in" in report_text(compare(unquantized, found["minmax"][0]))
    bf16 = write_gguf(tmp_path / "bf16.gguf", unquantized, store=lambda *_: "BF16")
    assert examine(bf16)["qat"] and compare(bf16, "tiny-gemma4")["same"]


MOE = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=40,
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16, linear_value_head_dim=32,
    num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64,
    rope_parameters=rope(), layer_types=layers("lf"),
)  # fmt: skip


def test_experts_are_judged_and_what_formats_leave_alone_is_not(tmp_path):
    """Experts in one tensor, or in one each, as a GGUF file has them: the same weights."""
    write_model(tmp_path, 5, store="BF16", **MOE)
    tensors = stored(tmp_path)
    for name, (_, bits) in tensors.items():
        if re.match(r"model.*\.layers\..*((q|k|v|o|out|gate|up|gate_up|down)_proj|in_proj_(qkv|z))(\.weight)?$", name):
            w_GK = bf16_to_float(bits).reshape(-1, 32)
            tensors[name] = "BF16", on_lattice(w_GK)[0].reshape(bits.shape)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    report, gguf = examine(tmp_path), write_gguf(tmp_path / "x.gguf", tmp_path, store=lambda *_: "BF16")
    assert report["qat"] and sum(row["shape"][0] == 3 for row in report["tensors"] if row["judged"]) == 6
    left = {row["name"] for row in report["tensors"] if not row["judged"]}
    kept = {"layers.0.in_proj_a", "layers.0.in_proj_b", "layers.0.router", "layers.0.shared_expert_gate"}
    assert left == {"embed_tokens", "lm_head", *kept, "layers.1.router", "layers.1.shared_expert_gate"}
    same = compare(tmp_path, gguf)
    assert same["same"] and len(same["tensors"]) == len(report["tensors"]) - len(left) and not same["left_out"]
    name = next(name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj"))
    tensors[name][1][2, 5, 3] ^= 64
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert "layers.1.experts_down_proj: off at [matrix, row, group] [2, 5, 0]\n" in report_text(examine(tmp_path))
    assert compare(tmp_path, gguf)["nearer"] == "b"


def test_models_that_do_not_compare(unquantized):
    report = compare("tiny-gemma4", "tiny-gemma4-float")
    assert not report["same"] and report["nearer"] == "a"
    assert "off every lattice: 0 of a, 56,832 of b" in report_text(report)
    with pytest.raises(CheckpointError, match="not of the same model: their layers differ in shape"):
        compare(unquantized, "tiny-qwen35")
