"""The int4 lattice under bf16 weights: found wherever there is one, nowhere else, as exact arithmetic finds it.

Weights are made by the rules that QAT weights may come from, with their integers and steps known; ordinary weights,
altered weights and other formats' versions of the same weights are what must not pass for them.
"""

import json

import numpy as np
import pytest

from minimtp import lattice
from minimtp.checkpoint import (
    CheckpointError,
    bf16_to_float,
    float_to_bf16,
    open_checkpoint,
    read_safetensors,
    write_safetensors,
)
from minimtp.formats import FORMATS
from minimtp.lattice import (
    OFF,
    ON,
    STEPS,
    UNDETERMINED,
    admits,
    compare,
    compare_weights,
    examine,
    examine_weight,
    exit_status,
    find,
    ggml_q4_0,
    minmax,
    report_text,
    step_interval,
)
from minimtp.loading import bundled
from minimtp.quant import Plain, Quantized, pack, pack_codes

f32 = np.float32
rng = np.random.default_rng(11)
RULES = {
    "signed extreme / -8": lambda w_GK: np.take_along_axis(w_GK, np.abs(w_GK).argmax(1)[:, None], 1)[:, 0] / f32(-8),
    "absmax / 7.5": lambda w_GK: np.abs(w_GK).max(1) / f32(7.5),
    "absmax / 7": lambda w_GK: np.abs(w_GK).max(1) / f32(7),
    "absmax / 8, cut": lambda w_GK: np.abs(w_GK).max(1) / f32(8),
}
LAWS = {
    "gauss": lambda shape: rng.standard_normal(shape, dtype=np.float32),
    "laplace": lambda shape: rng.laplace(size=shape).astype(np.float32),
    "student": lambda shape: rng.standard_t(3, shape).astype(np.float32),
}


def groups_of(count, law="gauss"):
    """Float32 weights [count, 32], every group of its own size."""
    return LAWS[law]((count, 32)) * np.exp2(rng.uniform(-12, 2, (count, 1)).astype(np.float32))


def on_lattice(w_GK, rule="absmax / 7.5", step="f32"):
    """What QAT could have made of weights -> (bf16 bits [G, 32], integers, steps float64 [G])"""
    step_G = STEPS[step](RULES[rule](w_GK)).astype(np.float32)
    codes_GK = np.rint(w_GK / step_G[:, None]).clip(-8, 7)
    step_G = step_G.astype(np.float64)
    return float_to_bf16(codes_GK * step_G[:, None]), codes_GK.astype(np.int8), step_G


def products(levels_OI, steps_OG):
    return float_to_bf16(levels_OI * np.repeat(steps_OG.astype(np.float64), 32, 1))


def same_numbers(a_bits, b_bits):
    return np.array_equal(bf16_to_float(a_bits), bf16_to_float(b_bits))  # bf16 has two zeros


def bits_of(*values):
    """One group: these weights, then zeros."""
    return float_to_bf16(np.array([[*values, *[0.0] * (32 - len(values))]]))


# Exact arithmetic, one group at a time, in whole numbers: a bf16 has a 256 · 2^127 · 840th part of 1 that every level
# from 1 to 8 divides

UNIT = 256 * 2**127 * 840


def interval(bits):
    """The numbers that round to a positive bf16 -> (low, high, whether its ends do), in UNITs"""
    return between(2 * bits - 1), between(2 * bits + 1), bits % 2 == 0


def between(twice):
    """The number in the middle of bf16 bits and bits + 1: twice is 2 · bits + 1."""
    exponent, mantissa = divmod(twice, 256)
    return (256 + mantissa) * 840 << exponent


def slow_find(bits_K):
    """-> (largest level, levels, low, high) of the lattice with the smallest largest level, or None"""
    sizes = [int(bits) & 0x7FFF for bits in bits_K]
    for peak in range(1, 9):
        for sign in (1, -1):
            levels = [slow_level(size, max(sizes), peak) for size in sizes]
            if None in levels:
                continue
            levels = [sign * (-level if bits > 0x7FFF else level) for level, bits in zip(levels, bits_K)]
            ends = [
                (low // abs(level), high // abs(level), closed)
                for level, (low, high, closed) in ((n, interval(size)) for n, size in zip(levels, sizes) if n)
            ]
            low, high = max(end[0] for end in ends), min(end[1] for end in ends)
            touching = all(closed for *two, closed in ends if low in two or high in two)
            if max(levels) < 8 and (low < high or low == high and touching):
                return levels, low, high
    return None


def slow_level(size, largest, peak):
    """The level whose steps for this weight meet those of the largest weight at `peak`; None where there is none."""
    if size == 0:
        return 0
    low, high, closed = interval(size)
    low_peak, high_peak, closed_peak = interval(largest)
    for level in range(1, peak + 1):
        below, above = max(low // level, low_peak // peak), min(high // level, high_peak // peak)
        if below < above or below == above and closed and closed_peak:
            return level
    return None


def test_exact_arithmetic_finds_the_same():
    """On lattices of every step, and on lattices where weights were moved by a unit, which ties decide."""
    parts = [on_lattice(groups_of(20, law), rule, step)[0] for law in LAWS for rule in RULES for step in STEPS]
    bits_GK = np.concatenate(parts)
    moved = rng.random(bits_GK.shape) < 0.03
    bits_GK[::2] += (moved * rng.integers(-1, 2, bits_GK.shape)).astype(np.uint16)[::2] * (bits_GK[::2] & 0x7FFF > 0)
    found = find(bits_GK)
    status_G, seen = found.status_OG[:, 0], {ON: 0, OFF: 0}
    for g in np.flatnonzero(status_G != UNDETERMINED):
        slow = slow_find(bits_GK[g])
        seen[status_G[g]] += 1
        assert (status_G[g] == ON) == (slow is not None), g
        if slow:
            levels, low, high = slow
            sign = -1 if found.low_OG[g] < 0 else 1
            assert found.levels_OI[g].tolist() == levels or found.levels_OI[g].tolist() == [-n for n in levels]
            ends = sorted((sign * low / UNIT, sign * high / UNIT))
            assert np.allclose([found.low_OG[g, 0], found.high_OG[g, 0]], ends, rtol=2.0**-20, atol=0)
    assert min(seen.values()) > 100


def test_the_interval_includes_its_ends_where_ties_go_to_the_weight():
    """1 is even: 511/512 … 257/256 round to it, ends included. The next bf16, 1 + 1/128, is odd: not so."""
    even, odd = 0x3F80, 0x3F81
    low, high = step_interval(np.array([[even, odd]], np.uint16), np.array([[1, 1]], np.int8))
    assert (low[0], high[0]) == (1 - 2.0**-9, 1 + 2.0**-8)
    assert 1 + 2.0**-8 < low[1] < 1 + 2.0**-8 + 2.0**-20 and 1 + 3 * 2.0**-8 - 2.0**-20 < high[1] < 1 + 3 * 2.0**-8
    same = step_interval(np.array([[even], [0x4041]], np.uint16), np.array([[1], [3]], np.int8))
    assert same[0] <= same[1]  # 3 + 1/64, odd, by 3: the steps above 1 + 1/384
    # together they leave one step: 1 + 2^-8 is the last for 1, and for 5 + 1/64 · k the first of an even weight
    five = float_to_bf16(np.array([5 * (1 + 2.0**-8)]))[0]
    one_step = step_interval(np.array([[even], [five]], np.uint16), np.array([[1], [5]], np.int8))
    assert one_step[0] <= 1 + 2.0**-8 == one_step[1]


def test_an_interval_knows_signs():
    bits_KN = float_to_bf16(np.array([[2.0, 2.0, -2.0, 0.0, 0.0, 2.0]] + [[-3.0, -3.0, 3.0, 0.0, 0.0, 0.0]]))
    levels_KN = np.array([[2, -2, 2, 0, 1, 0], [-3, -3, -3, 0, 1, 1]], np.int8)
    low, high = step_interval(bits_KN, levels_KN)
    assert low[0] < 1 < high[0] and not low[1] <= high[1]  # signs that no step explains
    assert low[2] < -1 < high[2] < 0
    assert (low[3], high[3]) == (-np.inf, np.inf) and high[4] < 1e-39
    assert not (low[5] <= high[5] < np.inf)


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
            again_GK = products(found.levels_OI, np.nan_to_num(steps_OG)).reshape(-1, 32)
            assert same_numbers(again_GK[on_G], bits_GK[on_G])
        sign_G = np.sign(found.low_OG.reshape(-1)[on_G]) * np.sign(step_G[on_G])
        factor_G = np.gcd.reduce(codes_GK[on_G], axis=1) * sign_G
        assert np.array_equal(levels_GK * factor_G[:, None], codes_GK[on_G])  # equal up to sign and common factor
        own = step_G[on_G] * factor_G
        margin = np.abs(own) * 2.0**-20
        low, high = found.low_OG.reshape(-1)[on_G], found.high_OG.reshape(-1)[on_G]
        assert np.all((low - margin <= own) & (own <= high + margin))
        for dtype in STEPS:
            held = admits(low, high, dtype)
            assert held.all() if dtype in ("f32", step) else held.mean() > 0.2


def test_weights_multiplied_in_float32_are_found_too():
    """Rounded to float32 first and then to bf16, as training code does."""
    w_GK = groups_of(30_000)
    step_G = (np.abs(w_GK).max(1) / f32(7.5))[:, None]
    bits_GK = float_to_bf16(np.rint(w_GK / step_G).clip(-8, 7) * step_G)
    assert set(find(bits_GK).status_OG.flat) <= {ON, UNDETERMINED}


def test_integers_are_the_smallest_and_never_plus_eight():
    found = find(np.concatenate([bits_of(0, 2, 4, -6, 8), bits_of(8, 7, -3, 1), bits_of(-8, 7, -3, 1)]))
    assert found.levels_OI[:, :5].tolist() == [[0, 1, 2, -3, 4], [-8, -7, 3, -1, 0], [-8, 7, -3, 1, 0]]
    assert found.steps()[0] == pytest.approx(2, rel=2.0**-8)
    assert found.low_OG[1] < -1 < found.high_OG[1] < 0 < found.low_OG[2] < 1 < found.high_OG[2]
    assert find(bits_of(8, -8, 7, 3, 1)).status_OG[0, 0] == OFF
    assert find(bits_of(7, -7, 3, 1)).status_OG[0, 0] == ON


def test_groups_that_cannot_tell_are_undetermined():
    for values in ((), (0.3,), (0.3,) * 32, (0.3, -0.3) * 16, (1, 2, 3) * 10 + (1, 2), (1, 2), (5, -5.03), (1, 1.5)):
        found = find(bits_of(*values))
        assert found.status_OG[0, 0] == UNDETERMINED, values
        assert not found.levels_OI.any() and np.isnan(found.steps()).all()
    assert find(bits_of(1, 2, 3)).levels_OI[0, :4].tolist() == [1, 2, 3, 0]  # zero is the fourth
    assert find(bits_of(1, 2, 3.1)).status_OG[0, 0] == OFF
    for scale, status in ((2.0**-119, ON), (2.0**-123, UNDETERMINED), (2.0**-130, UNDETERMINED), (2.0**124, ON)):
        assert find(bits_of(*(scale * np.array([1, 3, 5, -7])))).status_OG[0, 0] == status
    assert find(bits_of(1, 3, 5, -7, -0.0)).status_OG[0, 0] == ON


@pytest.mark.parametrize("law", LAWS)
def test_ordinary_weights_are_on_no_lattice(law):
    """200,000 groups, none of them found; and with every weight made one of a lattice's, all are."""
    w_GK = LAWS[law]((200_000, 32)) * f32(0.02)
    assert not (find(float_to_bf16(w_GK).reshape(-1, 3200)).status_OG == ON).any()
    assert (find(on_lattice(w_GK[:2000])[0]).status_OG != OFF).all()


@pytest.mark.parametrize("group", [16, 64])
def test_a_lattice_by_other_groups_is_no_lattice(group):
    w = rng.standard_normal((400, group)).astype(np.float32)
    step = np.abs(w).max(1, keepdims=True) / f32(7.5)
    bits = float_to_bf16(np.rint(w / step).clip(-8, 7) * step).reshape(-1, 64)
    share = (find(bits).status_OG == ON).mean()
    assert share < 0.2 if group == 16 else share == 1  # halves of a group of 64 share its step: they are on one, too


def test_one_altered_weight_is_named_by_its_group():
    bits_GK, codes_GK, step_G = on_lattice(groups_of(64 * 8), "absmax / 7.5")
    for _ in range(60):
        g, k = rng.integers(len(bits_GK)), rng.integers(32)
        altered_OI = bits_GK.reshape(64, 256).copy()
        altered_OI[g // 8, g % 8 * 32 + k] = float_to_bf16((codes_GK[g, k] + 0.5) * step_G[g])
        report = examine_weight(altered_OI)
        assert report["off_at"] == [[g // 8, g % 8]] and report["groups"]["off"] == 1
    assert examine_weight(bits_GK.reshape(64, 256))["off_at"] == []


def test_wrong_weights_are_refused():
    right = on_lattice(groups_of(6))[0].reshape(3, 64)
    for wrong in (right.astype(np.int32), right[:, :48], right[0], right[:0], bf16_to_float(right)):
        with pytest.raises(ValueError, match=r"expected bf16 bits, uint16 \[out, in\]"):
            find(wrong)
        with pytest.raises(ValueError, match="expected bf16 bits"):
            examine_weight(wrong)
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            find(np.where(np.arange(192).reshape(3, 64) == 100, np.uint16(bits), right))


# Formats and naive rules


def test_a_format_admits_a_step_exactly_where_it_has_one():
    low = np.exp2(rng.uniform(-16, 3, 4000)).astype(np.float32)
    high = (low * (1 + 10 ** rng.uniform(-5, -2, low.shape))).astype(np.float32)
    grids = {
        "bf16": np.sort(bf16_to_float(np.arange(0x7F80, dtype=np.uint16))),
        "f16": np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32),
    }
    for dtype, grid in grids.items():
        wanted = np.searchsorted(grid, low, "left") < np.searchsorted(grid, high, "right")
        assert 0.05 < wanted.mean() < 0.95
        assert np.array_equal(admits(low, high, dtype), wanted)
        assert np.array_equal(admits(-high, -low, dtype), wanted)
        edge = grid[(grid > 0) & (grid < 1e4)][::97]
        assert admits(edge, edge, dtype).all()
        assert not admits(np.nextafter(edge, 9e9), edge + (edge * 2.0**-13), dtype).any()
    assert admits(low, high, "f32").all()
    assert not admits(np.float32([1e6]), np.float32([1.1e6]), "f16")[0]  # beyond 65504


def slow_q4_0(w_K):
    """ggml's quantize_row_q4_0_ref and dequantize_row_q4_0, a weight at a time."""
    largest = np.float32(0)
    for w in w_K:
        if abs(w) > abs(largest):
            largest = w
    d = largest / np.float32(-8)
    inverse = np.float32(1) / d if d else np.float32(0)
    codes = [min(15, int(w * inverse + np.float32(8.5))) for w in w_K]
    return [(code - 8) * np.float32(np.float16(d)) for code in codes]


def test_naive_rules_are_those_of_the_formats():
    w_GK = np.concatenate([groups_of(300), bf16_to_float(on_lattice(groups_of(300), "absmax / 7")[0])])
    w_GK[5], w_GK[6, :3], w_GK[7, :2] = 0, 1, (-99, 99)
    w_KN = np.ascontiguousarray(w_GK.T)
    assert np.array_equal(ggml_q4_0(w_KN).T, [slow_q4_0(w_K) for w_K in w_GK])
    w_GK[5] = 1  # a group of zeros has another scale in quant.pack
    w_KN[:, 5] = 1
    assert np.array_equal(minmax(w_KN).T, pack(w_GK).dequantize("float32"))


def test_ggml_itself_makes_the_same():
    quants = pytest.importorskip("gguf").quants
    w_GK = np.concatenate([groups_of(3000), bf16_to_float(on_lattice(groups_of(3000))[0])])
    theirs = quants.dequantize(
        quants.quantize(w_GK, quants.GGMLQuantizationType.Q4_0), quants.GGMLQuantizationType.Q4_0
    )
    ours = ggml_q4_0(np.ascontiguousarray(w_GK.T)).T
    assert (ours != theirs).mean() < 1e-4  # it computes in double: another code at a tie


NAIVE = {"signed extreme / -8": (0, 0.003), "absmax / 7.5": (0.055, 0.07), "absmax / 7": (0.08, 0.09),
         "absmax / 8, cut": (0.05, 0.06)}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_what_naive_rules_cost_on_a_lattice(rule):
    """Q4_0 is right about one rule only, minmax is a fifteenth off about all."""
    w_GK = rng.standard_normal((8000, 32)).astype(np.float32)
    error = examine_weight(on_lattice(w_GK, rule)[0].reshape(-1, 320))["error"]
    low, high = NAIVE[rule]
    assert low <= error["q4_0"] < high and error["minmax"] == pytest.approx(1 / 15, abs=4e-4)
    plain = examine_weight(float_to_bf16(w_GK).reshape(-1, 320))["error"]
    assert plain["q4_0"] == pytest.approx(0.086, abs=2e-3) and plain["minmax"] == pytest.approx(0.0945, abs=2e-3)


# A weight's report


def test_a_report_is_the_same_however_the_rows_are_cut(monkeypatch):
    bits_OI = on_lattice(groups_of(70 * 5), "absmax / 8, cut")[0].reshape(70, 160)
    bits_OI[3:20:4, 40] += 9
    bits_OI[60] = bits_OI[61, 0]
    whole, found = examine_weight(bits_OI), find(bits_OI)
    assert whole["groups"] == {"on": 340, "off": 5, "undetermined": 5}
    assert whole["off_at"] == [[row, 1] for row in range(3, 20, 4)]
    assert sum(whole["peaks"].values()) == whole["steps"]["f32"] == 340 and whole["steps"]["bf16"] < 250
    bits_OI[20:40, 40] += 9
    assert examine_weight(bits_OI)["off_at"] == [[row, 1] for row in (3, 7, 11, 15, 19, 20, 21, 22)]  # and no more
    whole, found = examine_weight(bits_OI), find(bits_OI)
    for block in (1, 700, 1 << 12):
        monkeypatch.setattr(lattice, "BLOCK", block)
        cut, again = examine_weight(bits_OI), find(bits_OI)
        assert cut.pop("error") == pytest.approx(whole["error"], rel=1e-9)
        assert cut == {name: value for name, value in whole.items() if name != "error"}
        for name in ("levels_OI", "low_OG", "high_OG", "status_OG"):
            assert np.array_equal(getattr(again, name), getattr(found, name), equal_nan=name[0] in "lh")


# Checkpoints


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def bf16(*shape, qat=True, rule="absmax / 7.5"):
    w_GK = rng.standard_normal((np.prod(shape) // 32, 32)).astype(np.float32) * f32(0.02)
    return "BF16", (on_lattice(w_GK, rule)[0] if qat else float_to_bf16(w_GK)).reshape(shape)


LAYER = "model.language_model.layers.0."


def tensors(**changes):
    """A language model's tensors: what int4 formats quantize is on a lattice, nothing else is."""
    plain = {
        "model.language_model.embed_tokens.weight": bf16(64, 64, qat=False),
        "model.language_model.norm.weight": ("BF16", np.full(64, 0x3F80, np.uint16)),
        "model.vision_tower.layers.0.mlp.weight": bf16(32, 64, qat=False),
        f"{LAYER}router.proj.weight": bf16(32, 64, qat=False),
        f"{LAYER}linear_attn.conv1d.weight": bf16(32, 1, 32, qat=False),
        "mtp.layers.0.mlp.up_proj.weight": bf16(32, 64, qat=False),
        "mtp.fc.weight": bf16(32, 64, qat=False),
    }
    quantized = {
        f"{LAYER}self_attn.q_proj.weight": bf16(64, 64),
        f"{LAYER}mlp.down_proj.weight": bf16(64, 96, rule="absmax / 7"),
        f"{LAYER}experts.gate_up_proj": bf16(4, 32, 64),
    }
    return {**plain, **quantized, **{LAYER + name.replace("__", "."): value for name, value in changes.items()}}


def test_qat_weights_are_called_so(tmp_path):
    report = examine(write(tmp_path, tensors()))
    assert report["qat"] is True and exit_status(report) == 0
    assert {row["name"]: row["kind"] for row in report["tensors"]} == {
        "embed_tokens": "embedding", "layers.0.router.proj": "other", "mtp.layers.0.mlp.up_proj": "other",
        "mtp.fc": "other", "layers.0.self_attn.q_proj": "linear", "layers.0.mlp.down_proj": "linear",
        "layers.0.experts.gate_up_proj": "linear",
    }  # fmt: skip
    for row in report["tensors"]:
        on = row["kind"] == "linear"
        assert row["groups"]["off" if on else "on"] == 0 < row["groups"]["on" if on else "off"]
        assert sum(row["groups"].values()) == np.prod(row["shape"]) // 32
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = report_text(report)
    assert "QAT weights: all 3 of linear layers" in text and "not" not in text
    assert "layers.0.mlp.down_proj" in text


def test_weights_that_are_not_qat_are_not_called_so(tmp_path):
    altered = tensors()
    altered[f"{LAYER}experts.gate_up_proj"][1][2, 5, 37] ^= 64
    report = examine(write(tmp_path / "altered", altered))
    assert report["qat"] is False and exit_status(report) == 1
    assert [row["off_at"] for row in report["tensors"] if row["name"].endswith("gate_up_proj")] == [[[2, 5, 1]]]
    text = report_text(report)
    assert "layers.0.experts.gate_up_proj: off at [2, 5, 1]" in text
    assert "not QAT weights: 1 of 3 weights of linear layers are off every int4 lattice, in 1 of" in text
    for change in (
        {"self_attn__q_proj__weight": bf16(64, 64, qat=False)},
        {"mlp__new__weight": bf16(1, 32, qat=False)},
    ):
        report = examine(write(tmp_path / "plain", tensors(**change)))
        assert not report["qat"] and report["linear"]["off"] == 1
    zeros = {name: (dtype, bits * 0) for name, (dtype, bits) in tensors().items()}
    report = examine(write(tmp_path / "zeros", zeros))
    assert not report["qat"] and report["linear"]["undetermined"] == 3
    assert "not shown to be QAT weights" in report_text(report)


def test_undetermined_weights_do_not_count(tmp_path):
    assert examine(write(tmp_path, tensors(mlp__zero__weight=("BF16", np.zeros((4, 64), np.uint16)))))["qat"]


def test_the_bundled_float_model_is_not_qat_and_the_int4_one_does_not_show():
    report = examine(bundled("tiny-gemma4-float"))
    assert not report["qat"] and not any(row["groups"]["on"] for row in report["tensors"])
    with pytest.raises(CheckpointError, match="no bf16 weights of linear layers to examine .33 in int4"):
        examine("tiny-gemma4")


def test_what_cannot_be_examined_is_refused(tmp_path):
    infinite = tensors()
    infinite[f"{LAYER}mlp.down_proj.weight"][1][7, 7] = 0x7F80
    with pytest.raises(CheckpointError, match="down_proj.weight': NaN or infinite"):
        examine(write(tmp_path / "infinite", infinite))
    with pytest.raises(CheckpointError, match="none of any type"):
        examine(write(tmp_path / "none", {"x.weight": bf16(32, 32)}))
    wide = {f"{LAYER}mlp.up_proj.weight": np.zeros((4, 32), np.float32), f"{LAYER}q.weight": bf16(4, 48)}
    with pytest.raises(CheckpointError, match=r"\(1 in F32\)"):
        examine(write(tmp_path / "wide", wide))


# Two weights


def quantized(levels_OI, steps_OG, dtype="bf16"):
    stored = {"bf16": float_to_bf16, "f16": lambda x: x.astype(np.float16), "f32": lambda x: x.astype(np.float32)}[
        dtype
    ]
    return Quantized(pack_codes(levels_OI), Plain(stored(steps_OG), dtype.upper().replace("BF", "BF"), "s"), name="w")


def a_lattice(rows=50, rule="absmax / 7.5", step="f32"):
    """-> (Plain bf16, integers [rows, 160], steps [rows, 5])"""
    bits_GK, codes_GK, step_G = on_lattice(rng.standard_normal((rows * 5, 32)).astype(np.float32), rule, step)
    return Plain(bits_GK.reshape(rows, 160), "BF16", "a"), codes_GK.reshape(rows, 160), step_G.reshape(rows, 5)


@pytest.mark.parametrize("step", STEPS)
def test_the_int4_weights_that_bf16_ones_were_made_of_are_the_same(step):
    plain, codes_OI, step_OG = a_lattice(step=step)
    for a, b in ((plain, quantized(codes_OI, step_OG, step)), (quantized(-codes_OI.clip(-7), -step_OG, step), plain)):
        report = compare_weights(a, b)
        if a is plain:
            assert report["groups"] == {"same": 250, "same_but_peak": 0, "different": 0, "unknown": 0}
            assert report["scales_agree"] == 250 and report["same"] and report["nearer"] == "both"
            assert report["stored"] == ["bf16", "int4"] and report["distance"] == [0, None]
        else:  # -8 was cut to -7
            assert report["groups"]["same"] + report["groups"]["same_but_peak"] == 250
            assert not report["same"] and report["nearer"] == "b"
        assert report["ratio"]["1"] == 250 and report["ratio"]["median"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("step", ["f16", "bf16"])
def test_a_scale_agrees_if_rounding_explains_it(step):
    """A scale's type may not hold the step: some weights change, yet nothing better can be stored. The next can."""
    _, codes_OI, step_OG = a_lattice()
    codes_OI, flips_OG = codes_OI.clip(-7), rng.choice([1, -1], step_OG.shape)
    plain, stored_OI = Plain(products(codes_OI, step_OG), "BF16", "a"), codes_OI * np.repeat(flips_OG, 32, 1)
    rounded = quantized(stored_OI, step_OG * flips_OG, step)
    for a, b in ((plain, rounded), (rounded, plain)):
        report = compare_weights(a, b)
        assert report["groups"]["same"] == report["scales_agree"] == 250 > report["equal"] > 20
        assert report["same"] and report["nearer"] == "both" and report["difference"] < 0.004
    found, unit = find(plain.stored), {"f16": 2.0**-10, "bf16": 2.0**-7}[step]
    for end_OG, off in ((found.low_OG, -1), (found.high_OG, 1)):
        beyond_OG = STEPS[step](end_OG.astype(np.float64)).astype(np.float64) * (1 + off * unit)
        report = compare_weights(plain, quantized(stored_OI, beyond_OG * flips_OG, step))
        assert report["groups"]["same"] == 250 and report["scales_agree"] == 0 and report["nearer"] == "a"


def test_float32_steps_agree_up_to_the_ends_of_their_intervals():
    _, codes_OI, step_OG = a_lattice(6000)
    b = quantized(codes_OI, step_OG, "f32")
    report = compare_weights(Plain(float_to_bf16(b.dequantize("float32")), "BF16", "a"), b)
    assert report["scales_agree"] == report["equal"] == 30_000 and report["same"]


def test_a_common_factor_belongs_to_the_step():
    _, codes_OI, step_OG = a_lattice()
    codes_OI = codes_OI.clip(-4, 3)
    plain, b = Plain(products(codes_OI, step_OG), "BF16", "a"), quantized(2 * codes_OI, step_OG / 2, "bf16")
    for report in (compare_weights(plain, b), compare_weights(b, plain)):
        assert report["groups"]["same"] == report["ratio"]["1"] == report["scales_agree"] == 250 > report["equal"]


def test_minmax_of_a_lattice_has_its_integers_and_another_scale():
    """What compressed-tensors' minmax makes of QAT weights: the same but for cut peaks, 16/15 and 14/15 of the step."""
    plain, _, _ = a_lattice(400)
    cut = pack(bf16_to_float(plain.stored))
    report = compare_weights(plain, cut)
    assert report["groups"]["different"] == report["groups"]["unknown"] == report["scales_agree"] == 0
    assert report["groups"]["same"] > 200 < report["groups"]["same_but_peak"]
    peaks = examine_weight(plain.stored)["peaks"]
    assert report["ratio"]["16/15"] == peaks["8"] and report["ratio"]["14/15"] == peaks["7"]
    assert report["ratio"]["other"] == 0 and report["difference"] == pytest.approx(1 / 15, abs=1e-3)
    assert report["nearer"] == "a" and not report["same"]
    back = compare_weights(cut, plain)
    assert back["groups"] == report["groups"] and back["nearer"] == "b"
    assert back["ratio"]["median"] in (pytest.approx(15 / 16, abs=3e-3), pytest.approx(15 / 14, abs=3e-3))


def test_both_in_bf16():
    a, codes_OI, step_OG = a_lattice()
    other = Plain(products(codes_OI, step_OG * 1.1), "BF16", "b")
    report = compare_weights(a, other)
    assert report["groups"]["same"] == 250 == report["ratio"]["other"] and report["scales_agree"] == 0
    assert report["ratio"]["median"] == pytest.approx(1.1, abs=2e-3) and report["nearer"] == "both"
    assert not report["same"] and report["difference"] == pytest.approx(0.1, abs=1e-3)
    assert compare_weights(a, a)["same"] and compare_weights(a, a)["scales_agree"] == 250
    flipped = compare_weights(a, Plain(a.stored ^ np.uint16(0x8000), "BF16", "b"))
    assert flipped["groups"]["same"] == 250 and flipped["scales_agree"] == 0
    assert flipped["ratio"]["median"] == pytest.approx(-1, abs=1e-3)


def test_the_side_that_training_moved_is_farther_from_the_lattice():
    a, _, _ = a_lattice()
    w_OI, distances = bf16_to_float(a.stored), []
    for noise in (1e-3, 1e-2, 3e-2):
        moved = Plain(float_to_bf16(w_OI * (1 + noise * rng.standard_normal(w_OI.shape))), "BF16", "b")
        report = compare_weights(a, moved)
        assert report["nearer"] == "a" and not report["same"] and report["distance"][0] == 0
        assert compare_weights(moved, a)["nearer"] == "b"
        distances.append(report["distance"][1])
    assert distances == sorted(distances) and 0 < distances[0] < 5e-3 < distances[-1] < 0.04
    assert compare_weights(moved, pack(w_OI))["nearer"] == "b"  # off every lattice: int4 is nearer, whatever its scale
    plain = Plain(float_to_bf16(rng.standard_normal((50, 160))), "BF16", "plain")
    assert compare_weights(plain, moved)["nearer"] == "b"
    assert compare_weights(plain, plain)["same"] and compare_weights(plain, plain)["groups"]["unknown"] == 250


def test_bf16_scales_agree_where_no_weight_differs():
    a, codes_OI, step_OG = a_lattice()
    b = Plain(products(codes_OI, step_OG * (1 + 2.0**-11)), "BF16", "b")
    equal = (bf16_to_float(a.stored) == bf16_to_float(b.stored)).reshape(-1, 32).all(1).sum()
    assert 20 < equal < 230
    for report in (compare_weights(a, b), compare_weights(b, a)):
        assert report["scales_agree"] == equal and report["groups"]["same"] == 250 and not report["same"]


def test_a_group_off_the_lattice_is_unknown_and_one_that_cannot_tell_costs_no_distance():
    a, codes_OI, step_OG = a_lattice()
    altered, flat = a.stored.copy(), a.stored.copy()
    altered[9, 70] += 9
    flat[9, 64:96], flat[9, 64:66] = float_to_bf16(np.array([1.0])), float_to_bf16(np.array([1.3, -1.4]))
    for stored, nearer, distant in ((altered, "b", True), (flat, "both", False)):
        report = compare_weights(Plain(stored, "BF16", "a"), quantized(codes_OI, step_OG, "f32"))
        assert report["groups"]["unknown"] == 1 and report["scales_agree"] == report["groups"]["same"] == 249
        assert report["nearer"] == nearer and report["same"] != distant == (report["distance"][0] > 0)


def test_other_integers_are_different():
    a, codes_OI, step_OG = a_lattice()
    codes_OI = codes_OI.copy()
    codes_OI[7, 65] += 1 if codes_OI[7, 65] < 3 else -1
    for b in (quantized(codes_OI, step_OG, "f32"), Plain(products(codes_OI, step_OG), "BF16", "b")):
        report = compare_weights(a, b)
        assert report["groups"] == {"same": 249, "same_but_peak": 0, "different": 1, "unknown": 0}
        assert report["scales_agree"] == 249 and not report["same"] and report["ratio"]["1"] == 249
    assert compare_weights(a, a_lattice()[0])["groups"]["different"] > 240


def test_both_in_int4():
    _, codes_OI, step_OG = a_lattice()
    small_OI = codes_OI.clip(-3, 3)
    a = quantized(small_OI, step_OG)
    for b, ratio in ((quantized(2 * small_OI, step_OG / 2), 1), (quantized(-small_OI, step_OG), -1)):
        report = compare_weights(a, b)
        assert report["groups"]["same"] == 250 and report["nearer"] is None and report["distance"] == [None, None]
        assert report["ratio"]["median"] == ratio and report["same"] == (ratio == 1)
    assert compare_weights(a, quantized(small_OI, step_OG * 1.02))["scales_agree"] == 0
    assert compare_weights(a, quantized(small_OI[::-1], step_OG))["groups"]["different"] > 240
    assert compare_weights(a, quantized(codes_OI, step_OG))["groups"]["same_but_peak"] > 200  # cut at 3
    signs_OI = rng.choice([-7, 7], codes_OI.shape)
    assert compare_weights(quantized(signs_OI, step_OG), a)["groups"]["different"] == 250
    assert compare_weights(quantized(signs_OI, step_OG), quantized(signs_OI[::-1], step_OG))["groups"]["same"] == 0
    step_OG[3, 2] = 0
    assert compare_weights(quantized(codes_OI, step_OG), quantized(codes_OI, step_OG))["groups"]["unknown"] == 1
    zero = quantized(small_OI * 0, step_OG)
    assert compare_weights(a, zero)["groups"]["unknown"] == 250 and not compare_weights(a, zero)["same"]


def test_weights_that_do_not_compare_are_refused():
    a, codes_OI, step_OG = a_lattice(64)
    b = quantized(codes_OI, step_OG)
    wide = Quantized(b.packed, Plain(np.ones((64, 1), np.float32), "F32"), 160, 4, "wide")
    eight = Quantized(pack_codes(codes_OI.astype(int), 8), b.scales, 32, 8, "eight")
    for other in (wide, eight, Plain(a.stored[1:], "BF16", "short"), Plain(np.ones((64, 160), np.float32), "F32", "f")):
        with pytest.raises(CheckpointError, match="'(wide|eight|short|f)' is .* expected BF16 or int4 by 32"):
            compare_weights(a, other)
        with pytest.raises(CheckpointError, match="expected BF16 or int4 by 32"):
            compare_weights(b, other)


def test_a_comparison_is_the_same_however_the_rows_are_cut(monkeypatch):
    plain, _, _ = a_lattice()
    cut = pack(bf16_to_float(plain.stored))
    whole = compare_weights(plain, cut)
    for block in (1, 1000):
        monkeypatch.setattr(lattice, "BLOCK", block)
        again = compare_weights(plain, cut)
        assert again.pop("difference") == pytest.approx(whole["difference"], rel=1e-9)
        assert again == {name: value for name, value in whole.items() if name != "difference"}


# Two checkpoints


@pytest.fixture
def unquantized(tmp_path):
    """The bundled int4 model as a -unquantized release would have it: bf16 products, and no codes."""
    checkpoint = open_checkpoint(bundled("tiny-gemma4"))
    stored, found = checkpoint.tensors, {}
    for name, raw in stored.items():
        if name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            packed, scales = raw.data.reshape(raw.shape[0], -1), stored[f"{base}_scale"]
            weight = Quantized(packed, Plain(scales.stored(), scales.dtype))
            found[base] = "BF16", float_to_bf16(weight.dequantize("float64"))
        elif not name.endswith(("_scale", "_shape")):
            found[name] = raw.dtype, raw.stored()
    return write(tmp_path / "unquantized", found, {"model_type": "gemma4"})


def test_the_bundled_model_is_its_own_bf16_version(unquantized):
    assert examine(unquantized)["qat"]
    for a, b in ((unquantized, "tiny-gemma4"), ("tiny-gemma4", unquantized)):
        report = compare(a, b)
        assert report["same"] and exit_status(report) == 0 and report["nearer"] == "both"
        linear = [row for row in report["tensors"] if row["kind"] == "linear"]
        assert len(linear) == 33 and all(row["groups"]["same"] == row["scales_agree"] > 0 for row in linear)
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        text = report_text(report)
        assert text.endswith("\nthe same weights") and "integers same 56,832, same but peak 0, different 0" in text


def test_quantizing_it_again_keeps_the_integers_and_misses_the_scale(unquantized, tmp_path):
    tensors = read_safetensors(unquantized / "model.safetensors")[0]
    again = {}
    for name, raw in tensors.items():
        linear = ".layers." in name and len(raw.shape) == 2
        base = name.removesuffix(".weight")
        packed = FORMATS["pack-quantized"].write(base, pack(raw.to("float32"))) if linear else {}
        again |= packed or {name: (raw.dtype, raw.stored())}
    config = json.loads((bundled("tiny-gemma4") / "config.json").read_text())
    folder = write(tmp_path / "again", again, config)
    report = compare(unquantized, folder)
    assert not report["same"] and exit_status(report) == 1 and report["nearer"] == "a"
    ratios = [row["ratio"] for row in report["tensors"] if row["kind"] == "linear"]
    assert sum(ratio["16/15"] for ratio in ratios) > 10_000 < sum(ratio["14/15"] for ratio in ratios)
    assert not any(row["groups"]["different"] for row in report["tensors"])
    assert compare(folder, unquantized)["nearer"] == "b"
    text = report_text(report)
    assert "nearer to the lattice: a" in text and "16/15 in" in text and text.endswith("not the same weights")


def test_a_float_model_is_not_what_qat_made_of_it(unquantized):
    report = compare(unquantized, bundled("tiny-gemma4-float"))
    assert not report["same"] and report["nearer"] == "a" and exit_status(report) == 1
    assert "cannot be told" not in report_text(report)
    assert not compare("tiny-gemma4", bundled("tiny-gemma4-float"))["same"]


def test_checkpoints_that_have_nothing_in_common_are_refused(tmp_path):
    a = write(tmp_path / "a", tensors())
    with pytest.raises(CheckpointError, match="no weights of linear layers, bf16 or int4, in both"):
        compare(a, write(tmp_path / "b", {f"{LAYER}mlp.other.weight": bf16(32, 32)}))
    with pytest.raises(CheckpointError, match=r"down_proj.weight' is BF16 \[32, 96\], expected .* \[64, 96\]"):
        compare(a, write(tmp_path / "c", tensors(mlp__down_proj__weight=bf16(32, 96))))
    fewer = {name: value for name, value in tensors().items() if "q_proj" not in name}
    fewer["lm_head.weight"] = bf16(32, 32)
    fewer[f"{LAYER}mlp.down_proj.weight"] = np.zeros((64, 96), np.float32)
    report = compare(a, write(tmp_path / "d", fewer))
    assert report["skipped"] == {"only in a": 1, "F32": 1, "only in b": 1}


def test_weights_that_disagree_are_neither_the_same_nor_nearer(tmp_path):
    a = tensors()
    b = {**a, f"{LAYER}mlp.down_proj.weight": bf16(64, 96, qat=False)}
    report = compare(write(tmp_path / "a", a), write(tmp_path / "b", b))
    assert not report["same"] and report["nearer"] == "a"
    assert {row["name"]: row["same"] for row in report["tensors"] if row["kind"] == "linear"} == {
        "layers.0.self_attn.q_proj": True, "layers.0.mlp.down_proj": False, "layers.0.experts.gate_up_proj": True,
    }  # fmt: skip
    a[f"{LAYER}self_attn.q_proj.weight"] = bf16(64, 64, qat=False)
    report = compare(write(tmp_path / "a", a), tmp_path / "b")
    assert report["nearer"] == "mixed" and "nearer to the lattice: mixed" in report_text(report)
