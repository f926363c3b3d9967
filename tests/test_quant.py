"""Quantized weights: unpacked bit for bit as a slow loop does it, from every side, and refused when they do not fit."""

import copy
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimtp import quant
from minimtp.checkpoint import CheckpointError, bf16_to_float, float_to_bf16, open_checkpoint, write_safetensors
from minimtp.formats import FORMATS, CompressedConfig, Scheme, parse_quantization, read_weight
from minimtp.quant import Plain, Quantized, pack, pack_codes

rng = np.random.default_rng(3)
INT4 = CompressedConfig({"Linear": Scheme(4, 32, True, "config_groups.'group_0'")}, {})
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 32,
                "dynamic": False,
                "observer": "memoryless_minmax",
            },
        }
    },
}


def tensors_of(tmp_path, arrays, config=None):
    """Write arrays as a checkpoint, and open it."""
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    write_safetensors(tmp_path / "model.safetensors", arrays)
    return open_checkpoint(tmp_path).tensors


def random_quantized(rows=70, columns=96, scales="BF16"):
    values = rng.standard_normal((rows, columns // 32)).astype(np.float32)
    stored = float_to_bf16(values) if scales == "BF16" else values.astype({"F16": "f2", "F32": "f4"}[scales])
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    return Quantized(packed, Plain(stored, scales, "w.weight_scale"), name="w")


def slow(words, scales, group=32):
    """compressed-tensors' definition, one weight at a time: bits 4·(i mod 8) of the int32 word i/8, minus 8."""
    w_OI = np.empty((words.shape[0], 8 * words.shape[1]))
    for o, i in np.ndindex(w_OI.shape):
        code = (int(words[o, i // 8]) >> 4 * (i % 8) & 15) - 8
        w_OI[o, i] = code * float(scales[o, i // group])
    return w_OI


# Unpacking


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_pack_quantized_unpacks_as_the_slow_loop_does(tmp_path, dtype):
    w = random_quantized(5, 96, dtype)
    tensors = tensors_of(tmp_path, FORMATS["pack-quantized"].write("w", w))
    words, scales = tensors["w.weight_packed"].stored(), tensors["w.weight_scale"].to("float64")
    truth = slow(words, scales)
    read, used = read_weight(tensors, "w", INT4)
    assert sorted(used) == ["w.weight_packed", "w.weight_scale", "w.weight_shape"] and read.shape == (5, 96)
    assert np.array_equal(read.dequantize("float64"), truth)
    single = read.dequantize("float32")
    assert single.dtype == np.float32 and np.array_equal(single, truth.astype(np.float32))
    assert np.shares_memory(read.packed, tensors["w.weight_packed"].data)  # nothing was copied
    assert len(np.unique(read.codes())) == 16 and read.codes().dtype == np.int8


def test_swapped_nibbles_are_another_weight():
    w = random_quantized(3, 64)
    swapped = Quantized(w.packed >> 4 | w.packed << 4, w.scales)
    truth = slow(w.packed.view("<i4"), w.scales.dequantize("float64"))
    assert np.array_equal(w.dequantize("float64"), truth)
    assert not np.array_equal(swapped.dequantize("float64"), truth)
    assert np.array_equal(swapped.codes()[:, ::2], w.codes()[:, 1::2])


def test_float64_rows_are_the_exact_products():
    w = random_quantized(4, 64, "F32")
    w_OI, codes, scales = w.dequantize("float64"), w.codes(), w.scales.stored
    for o, i in np.ndindex(w_OI.shape):
        assert Fraction(float(w_OI[o, i])) == int(codes[o, i]) * Fraction(float(scales[o, i // 32]))


@pytest.mark.parametrize("bits, group", [(2, 32), (4, 64), (8, 32), (2, 192), (4, 192), (8, 192)])
def test_other_widths_and_groups_up_to_a_whole_row(bits, group):
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (7, 192))
    scales = rng.standard_normal((7, 192 // group)).astype(np.float32)
    w = Quantized(pack_codes(codes, bits), Plain(scales, "F32"), group, bits)
    assert w.packed.nbytes == 7 * 192 * bits // 8 and np.array_equal(w.codes(), codes)
    assert np.array_equal(w.dequantize("float64"), codes * np.repeat(scales.astype(np.float64), group, axis=1))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_codes_survive_packing(rows, groups, seed):
    codes = np.random.default_rng(seed).integers(-8, 8, (rows, 32 * groups))
    packed = pack_codes(codes)
    assert [(byte & 15) - 8 for byte in packed[0].tolist()] == codes[0, ::2].tolist()  # low nibble first
    assert np.array_equal(Quantized(packed, Plain(np.ones((rows, groups), np.float32), "F32")).codes(), codes)


# Rows


def plain(dtype, shape=(70, 96)):
    values = rng.standard_normal(shape).astype(np.float32)
    stored = float_to_bf16(values) if dtype == "BF16" else values.astype({"F16": "f2", "F32": "f4", "F64": "f8"}[dtype])
    stored.flags.writeable = False
    return Plain(stored, dtype, "w.weight")


WEIGHTS = {kind: plain(kind) for kind in ("F64", "F32", "F16", "BF16")} | {"int4": random_quantized()}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_rows_take_and_dequantize_agree(monkeypatch, kind, dtype):
    w = WEIGHTS[kind]
    whole = w.dequantize(dtype)
    assert whole.shape == w.shape == (70, 96) and whole.dtype == dtype
    ids = [69, 0, 3, 3, 41]
    for block in (1, 1000, quant.BLOCK):  # however the unpacking is cut
        monkeypatch.setattr(quant, "BLOCK", block)
        for start, stop in ((0, 70), (0, 1), (69, 70), (13, 57), (20, 20)):
            rows = w.rows(start, stop, dtype)
            assert rows.shape == (stop - start, 96) and rows.dtype == dtype and rows.flags.c_contiguous
            assert rows.flags.aligned and np.array_equal(rows, whole[start:stop])
        taken = w.take(ids, np.dtype(dtype))
        assert taken.dtype == dtype and taken.flags.c_contiguous and np.array_equal(taken, whole[ids])
        assert w.take([], dtype).shape == (0, 96) and np.array_equal(w.take(np.array(ids), dtype), taken)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_rows_outside_the_weight_are_refused(kind):
    w = WEIGHTS[kind]
    for start, stop in ((0, 71), (-1, 3), (5, 4), (70, 71)):
        with pytest.raises(IndexError, match="'w.*': rows"):
            w.rows(start, stop, "float32")
    for ids in ([70], [-1], [0, 10**9]):
        with pytest.raises(IndexError, match="'w.*': row"):
            w.take(ids, "float32")


def test_plain_widens_exactly_at_any_alignment():
    data = np.frombuffer(b"x" + np.arange(64, dtype=np.float32).tobytes(), np.uint8)[1:]
    w = Plain(data.view(np.float32).reshape(2, 32), "F32")
    assert not w.stored.flags.aligned and w.rows(1, 2, "float32").flags.aligned
    assert np.array_equal(w.dequantize("float32"), np.arange(64).reshape(2, 32))
    assert np.array_equal(WEIGHTS["BF16"].dequantize("float64"), bf16_to_float(WEIGHTS["BF16"].stored))
    assert np.shares_memory(WEIGHTS["F32"].rows(3, 9, "float32"), WEIGHTS["F32"].stored)  # what is right is not copied


# Rounding to int4


def test_pack_rounds_every_group_by_its_largest_weight():
    w_OI = rng.standard_normal((40, 128)).astype(np.float32) * np.exp(rng.standard_normal((40, 1)))
    w_OI[3, 32:64] = 0
    w = pack(w_OI)
    assert w.shape == (40, 128) and w.scales.dtype == "BF16" and w.scales.shape == (40, 4)
    for o, g in np.ndindex(40, 4):
        group, scale = w_OI[o, 32 * g : 32 * g + 32], w.scales.dequantize("float64")[o, g]
        codes = w.codes()[o, 32 * g : 32 * g + 32]
        if (o, g) == (3, 1):
            assert scale == 2.0**-23 and not codes.any()
            continue
        assert abs(scale / (np.abs(group).max() / 7.5) - 1) <= 2**-8
        error = np.abs(codes * scale - group)
        assert np.all(error <= scale * (0.5 + (codes == 7) * 0.54)) and np.abs(codes).max() >= 7  # +7.5 is cut to 7
    assert np.array_equal(pack(w.dequantize("float32").astype("float64")).codes()[3, 32:64], np.zeros(32))


def test_pack_knows_its_ties():
    group = np.array([7.5, -7.5, 0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 7.49] + [0] * 23, np.float32)[None]
    assert pack(group).codes()[0, :9].tolist() == [7, -8, 0, 2, 2, 0, -2, 6, 7]  # scale 1: to even, then cut


def test_what_is_written_is_read_again(tmp_path):
    w, embed = pack(rng.standard_normal((33, 64))), plain("BF16", (10, 4))
    arrays = FORMATS["pack-quantized"].write("a.q_proj", w) | FORMATS["plain"].write("a.embed", embed)
    tensors = tensors_of(tmp_path, arrays, {"quantization_config": CONFIG})
    again, _ = read_weight(tensors, "a.q_proj", INT4)
    assert np.array_equal(again.packed, w.packed) and np.array_equal(again.scales.stored, w.scales.stored)
    again, used = read_weight(tensors, "a.embed", INT4)
    assert used == ("a.embed.weight",) and again.dtype == "BF16" and np.array_equal(again.stored, embed.stored)
    assert again.name == "a.embed.weight"


def test_pack_refuses_what_it_cannot_round():
    for wrong in (np.zeros((4, 33)), np.zeros(32), np.zeros((0, 32)), np.zeros((2, 0))):
        with pytest.raises(CheckpointError, match="'w': weights .* do not divide into groups"):
            pack(wrong, name="w")
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(CheckpointError, match="'w': NaN or infinite"):
            pack(np.where(np.arange(64) == 63, value, 1.0)[None], name="w")
    with pytest.raises(ValueError, match="codes -9 to 0 do not fit into 4 bits"):
        pack_codes([[-9, 0]])
    with pytest.raises(ValueError, match="codes 0 to 8 do not fit into 4 bits"):
        pack_codes([[8, 0]])


# Wrong tensors


def parts(**changes):
    """The three tensors of a [4, 64] weight "w", some of them changed, removed (None) or added."""
    right = FORMATS["pack-quantized"].write("w", random_quantized(4, 64))
    tensors = {name.removeprefix("w.weight_"): value for name, value in right.items()} | changes
    return {f"w.weight_{name}": value for name, value in tensors.items() if value is not None}


f32, i32 = np.float32, np.int32
BAD_SCALES = {"NaN": [0x7FC0, 1], "infinite": [1, 0xFF80], "signalling NaN": [0x7F81, 1]}
WRONG = {
    "packed too narrow": (
        parts(packed=np.zeros((4, 7), i32)),
        r"weight_packed' is I32 \[4, 7\], expected I32 \[4, 8\]",
    ),
    "packed too short": (parts(packed=np.zeros((3, 8), i32)), r"weight_packed' is I32 \[3, 8\], expected I32 \[4, 8\]"),
    "packed flat": (parts(packed=np.zeros(32, i32)), r"weight_packed' is I32 \[32\], expected"),
    "packed in bytes": (parts(packed=np.zeros((4, 32), np.uint8)), "weight_packed' is U8, expected I32"),
    "packed as floats": (parts(packed=np.zeros((4, 8), f32)), "weight_packed' is F32, expected I32"),
    "scale of integers": (parts(scale=np.ones((4, 2), i32)), r"weight_scale' is I32 .*expected BF16 or F16 or F32"),
    "scale too wide": (parts(scale=np.ones((4, 4), f32)), r"weight_scale' is F32 \[4, 4\], expected .* \[4, 2\]"),
    "scale per channel": (parts(scale=np.ones((4, 1), f32)), r"weight_scale' is F32 \[4, 1\], expected .* \[4, 2\]"),
    "shape transposed": (parts(shape=np.array([64, 4])), r"weight_shape' \[64, 4\]: not groups of 32"),
    "shape of other size": (parts(shape=np.array([4, 96])), r"weight_packed' is I32 \[4, 8\], expected I32 \[4, 12\]"),
    "shape vast": (parts(shape=np.array([2**62, 2**62])), "weight_packed' is I32"),
    "shape negative": (parts(shape=np.array([-4, 64])), r"weight_shape' \[-4, 64\]"),
    "shape of nothing": (parts(shape=np.array([4, 0])), r"weight_shape' \[4, 0\]"),
    "shape not in groups": (parts(shape=np.array([4, 63])), "not groups of 32"),
    "shape in words, not in groups": (
        parts(shape=np.array([4, 72])),
        r"\[4, 72\]: not groups of 32 \(4 bits in groups",
    ),
    "shape of three": (parts(shape=np.array([4, 64, 1])), r"weight_shape' is I64 \[3\], expected I64 \[2\]"),
    "shape in 32 bits": (parts(shape=np.array([4, 64], i32)), "weight_shape' is I32"),
    "no scale": (parts(scale=None), "tensor 'w.weight_scale' is missing"),
    "no shape": (parts(shape=None), "tensor 'w.weight_shape' is missing"),
    "no packed": (parts(packed=None), "tensor 'w.weight' is missing"),
    "zero points": (
        parts(zero_point=np.zeros((1, 2), i32)),
        "weight_zero_point' is there, but quantization_config.config_groups.'group_0' says symmetric",
    ),
    "activation order": (parts(g_idx=np.zeros(64, i32)), "w.weight_g_idx': .* not supported"),
    "both": (parts() | {"w.weight": np.zeros((4, 64), f32)}, "'w.weight' and 'w.weight_packed': the same weight twice"),
    "an integer weight": (
        {"w.weight": np.zeros((4, 64), np.int8)},
        "'w.weight' is there, but .*quant_method is 'compressed-tensors'",
    ),
} | {
    f"{what} scale": (
        parts(scale=("BF16", np.array([[1, 1], bits, [1, 1], [1, 1]], np.uint16))),
        "'w.weight_scale': NaN or infinite",
    )
    for what, bits in BAD_SCALES.items()
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_fit_together_are_refused_by_name(tmp_path, case):
    arrays, message = WRONG[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weight(tensors_of(tmp_path, arrays), "w", INT4)[0].check_finite()
    assert len(str(caught.value).splitlines()) == 1


def test_packed_tensors_need_a_config_that_says_how(tmp_path):
    with pytest.raises(CheckpointError, match="'w.weight_packed' is there, but config.json has no quantization_config"):
        read_weight(tensors_of(tmp_path, parts()), "w", None)


def test_objects_that_contradict_themselves_are_refused():
    packed, scales = np.zeros((4, 32), np.uint8), Plain(np.ones((4, 2), np.float32), "F32")
    Quantized(packed, scales)
    for wrong in (
        lambda: Quantized(packed.view(np.int8), scales),
        lambda: Quantized(packed[:3], scales),
        lambda: Quantized(packed, scales, group=64),
        lambda: Quantized(packed, scales, group=24),
        lambda: Quantized(packed[:, :24], scales, bits=3),
        lambda: Quantized(packed[:, :0], Plain(np.ones((4, 0), np.float32), "F32")),
        lambda: Plain(np.zeros(3, np.float32), "BF16"),
        lambda: Plain(np.zeros(3, np.int32), "I32"),
    ):
        with pytest.raises(CheckpointError):
            wrong()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_not_finite_weights_are_found_wherever_they_are(monkeypatch, dtype):
    largest = {"F64": 1.7e308, "F32": 3.4e38, "F16": 65504.0, "BF16": 3.38e38}[dtype]
    for block in (7, quant.BLOCK):
        monkeypatch.setattr(quant, "BLOCK", block)
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            for at in (0, 6, 7, 29, 59):
                values = np.full((6, 10), -largest, {"F64": "f8", "F16": "f2"}.get(dtype, "f4"))
                Plain(float_to_bf16(values) if dtype == "BF16" else values, dtype, "w.weight").check_finite()
                values.flat[at] = bad
                with pytest.raises(CheckpointError, match="'w.weight': NaN or infinite"):
                    Plain(float_to_bf16(values) if dtype == "BF16" else values, dtype, "w.weight").check_finite()


def test_not_finite_scales_of_a_quantized_weight_are_found():
    w = random_quantized()
    w.check_finite()
    w.scales.stored[4, 1] = 0x7F80
    with pytest.raises(CheckpointError, match="'w.weight_scale': NaN or infinite"):
        w.check_finite()


# Configurations


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *parents, last = path.replace("weights", "config_groups.group_0.weights").split(".")
    table = config
    for key in parents:
        table = table[key]
    if value is DELETED:
        del table[last]
    else:
        table[last] = value
    return config


DELETED = object()
SUPPORTED = [
    ("ignore", []), ("global_compression_ratio", 1.5), ("sparsity_config", {}), ("transform_config", {}),
    ("version", "0.9"), ("weights.dynamic", DELETED), ("weights.type", DELETED),
    ("weights.actorder", "weight"), ("weights.actorder", None), ("weights.block_structure", None),
    ("weights.observer_kwargs", {}), ("weights.zp_dtype", None), ("weights.scale_dtype", None),
    ("weights.symmetric", DELETED), ("weights.strategy", DELETED),
    ("config_groups.group_0.format", "pack-quantized"), ("config_groups.group_0.targets", ["Linear", "re:.*x"]),
    ("config_groups.group_1", CONFIG["config_groups"]["group_0"]),
]  # fmt: skip
UNSUPPORTED = [
    ("quant_method", "gptq"), ("quant_method", DELETED), ("format", "int-quantized"), ("format", DELETED),
    ("quantization_status", "frozen"), ("quantization_status", DELETED), ("kv_cache_scheme", {"num_bits": 8}),
    ("transform_config", {"R1": 1}), ("config_groups", {}), ("config_groups", []), ("config_groups", DELETED),
    ("config_groups", ["W4A16"]),
    ("config_groups.group_0", "W4A16"), ("config_groups.group_0.format", "marlin-24"),
    ("config_groups.group_0.input_activations", {"num_bits": 8}), ("config_groups.group_0.output_activations", {}),
    ("config_groups.group_0.surprise", 1), ("weights", None), ("weights", DELETED), ("weights.num_bits", 3),
    ("weights.num_bits", "4"), ("weights.num_bits", DELETED), ("weights.type", "float"), ("weights.symmetric", 0),
    ("weights.strategy", "channel"), ("weights.group_size", 0), ("weights.group_size", True),
    ("weights.group_size", DELETED),
    ("weights.dynamic", True), ("weights.dynamic", "local"), ("weights.actorder", "group"),
    ("weights.block_structure", [1, 32]), ("weights.surprise", 1),
    ("config_groups.group_1", {"targets": ["Linear"], "weights": {"num_bits": 8}}),
]  # fmt: skip


def test_the_published_config_is_understood():
    assert parse_quantization({"quantization_config": CONFIG}) == INT4
    assert parse_quantization({"text_config": {"quantization_config": CONFIG}}) == INT4
    for without in ({}, {"quantization_config": None}, {"text_config": {}}, {"text_config": None}):
        assert parse_quantization(without) is None


@pytest.mark.parametrize("path, value", SUPPORTED)
def test_fields_that_change_nothing_are_accepted(path, value):
    scheme = parse_quantization({"quantization_config": changed(path, value)}).scheme_of("layers.0.q_proj")
    assert scheme[:3] == INT4.targets["Linear"][:3]


@pytest.mark.parametrize("path, value", UNSUPPORTED)
def test_anything_else_is_refused_by_its_field(path, value):
    name = path.split(".")[-1] if path != "config_groups.group_1" else "group_1"
    with pytest.raises(CheckpointError, match=f"^config: quantization_config.*{name}") as caught:
        parse_quantization({"quantization_config": changed(path, value)})
    assert len(str(caught.value).splitlines()) == 1


def test_a_config_of_another_kind_is_refused():
    for wrong in ("int4", 4, [CONFIG], True):
        with pytest.raises(CheckpointError, match="quantization_config is .*, expected a table"):
            parse_quantization({"quantization_config": wrong})
