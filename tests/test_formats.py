"""Storage layouts: Google's mobile one with its rounded activations, and every variant of compressed-tensors.

What transformers computes is in vectors/mobile.safetensors (make_mobile_vectors.py); against the libraries themselves,
see hf/test_mobile_live.py and hf/test_quant_live.py.
"""

import copy
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_mobile import CASES, prompt, write_mobile
from random_models import fingerprint
from safetensors.numpy import load_file
from test_loading import DELETED, edit_json, edit_tensors, read_encoded, refused
from test_quant import CONFIG, tensors_of
from tiny import FOLDER

import minimtp
from minimtp import ggml, memory
from minimtp.backend import Rounded, matmul, round_activations
from minimtp.checkpoint import CheckpointError, RawTensor
from minimtp.config import name_patterns
from minimtp.formats import FORMATS, parse_quantization, read_weight
from minimtp.mobile import MobileConfig
from minimtp.parameters import notes
from minimtp.quant import Plain, Quantized

VECTORS = load_file(Path(__file__).parent / "vectors" / "mobile.safetensors")
LAYER = "model.language_model.layers.0."


@cache
def written(name):
    """(folder, codes and scales of every quantized weight) of a case, never changed."""
    folder = Path(FOLDER.name) / f"mobile-{name}"
    return folder, write_mobile(name, folder)


def logits(target, ids_T, width=None):
    cache, width = target.new_cache(), width or len(ids_T)
    return np.concatenate([target.forward(ids_T[i : i + width], cache).logits_TV for i in range(0, len(ids_T), width)])


def weights(params):
    """{place: weight} of everything in a parameter tree."""
    layers = {f"layers.{i}.{k}": v for i, layer in enumerate(params.layers) for k, v in vars(layer).items()}
    return {k: v for k, v in vars(params).items() if k != "layers"} | layers


# Mobile: numbers


@pytest.mark.parametrize("name", CASES)
def test_the_checkpoints_are_those_of_the_vectors(name):
    assert np.array_equal(np.frombuffer(fingerprint(written(name)[0]), np.uint8), VECTORS[f"{name}.fingerprint"])


@pytest.mark.parametrize("keep", ["packed", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_logits_in_double(name, keep):
    target = minimtp.load(written(name)[0], dtype="float64", keep=keep)
    assert np.abs(logits(target, prompt(name)) - VECTORS[f"{name}.logits_TV"]).max() < 1e-11


@pytest.mark.parametrize("name", CASES)
def test_logits_in_float32(name):
    """Where sums differ in the last bit an activation may be rounded to the next step: in a minority of rows."""
    error_T = np.abs(logits(minimtp.load(written(name)[0]), prompt(name)) - VECTORS[f"{name}.logits_TV"]).max(1)
    assert np.median(error_T) < 1e-4 and error_T.max() < 2


@pytest.mark.parametrize("name", CASES)
def test_narrow_passes_give_the_same_bits_whatever_their_width(name):
    packed, dense = (minimtp.load(written(name)[0], keep=keep) for keep in ("packed", "dense"))
    one_by_one = logits(packed, prompt(name), 1)
    for target, width in ((packed, 5), (packed, 16), (dense, 1), (dense, 3)):
        assert np.array_equal(logits(target, prompt(name), width), one_by_one)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_codes_times_scales(name):
    folder, stored = written(name)
    checked, found = 0, weights(minimtp.load(folder, keep="packed").params)
    for base, (codes_OI, scales_OB) in stored.items():
        place = base.removeprefix("model.").removeprefix("language_model.")
        weight = found[place.replace("self_attn.", "").replace("mlp.", "")]
        weight = weight.weight if isinstance(weight, Rounded) else weight
        expected = codes_OI * np.repeat(scales_OB, codes_OI.shape[1] // scales_OB.shape[1], axis=1)
        assert np.array_equal(weight.codes(), codes_OI) and np.array_equal(weight.dequantize("float32"), expected)
        checked += 1
    assert checked == sum(isinstance(getattr(w, "weight", w), Quantized) for w in found.values())


def test_rounding_activations():
    x = np.array([0.49, -0.5, 0.5, 1.5, 2.5, -2.6, 126.5, 127.4, 127.6, 1e30, np.inf, -128.4, -128.6, -np.inf])
    steps = [0, -0.0, 0, 2, 2, -3, 126, 127, 127, 127, 127, -128, -128, -128]  # ties to even, then cut
    for dtype in ("float32", "float64"):
        for scale in (0.25, 3.0):
            rounded = round_activations((x * scale).astype(dtype), scale)
            assert rounded.dtype == dtype and np.array_equal(rounded, np.array(steps, dtype) * scale)
            assert np.array_equal(np.signbit(rounded), np.signbit(steps))
    assert np.isnan(round_activations(np.array([np.nan]), 1.0)) and round_activations(x, None) is x


def test_a_product_rounds_what_goes_in_and_what_comes_out():
    random = np.random.RandomState(0)
    x_TI, w_OI = random.standard_normal((20, 32)), random.standard_normal((70, 32))
    for scales in ((0.1, 0.2), (None, 0.2), (0.1, None)):
        expected = round_activations(round_activations(x_TI, scales[0]) @ w_OI.T, scales[1])
        assert np.allclose(matmul(x_TI, Rounded(w_OI, *scales)), expected, rtol=0, atol=1e-12)
    assert Rounded(w_OI, 0.1, 0.1).shape == (70, 32)


def test_scales_of_zero_and_absent_ones_round_nothing(tmp_path):
    write_mobile("tied", tmp_path)

    def without(tensors):
        for name in [name for name in tensors if name.endswith("activation_scale")]:
            dtype, array = tensors.pop(name)
            if "q_proj" in name:
                tensors[name] = dtype, np.zeros_like(array)

    target = minimtp.load(edit_tensors(tmp_path, without))
    assert not any(isinstance(weight, Rounded) for weight in weights(target.params).values())


def test_what_is_reported():
    target = minimtp.load(written("e2b")[0])
    checkpoint = target.checkpoint
    rounded, cached = notes(checkpoint, target.family, target.config)
    assert rounded == "activations are rounded to 8 bits: 118 scales of inputs and outputs"
    low, high = sorted(float(checkpoint.tensors[f"{LAYER}self_attn.{kv}_cache_scale"].to("float64")) for kv in "kv")
    assert cached == f"2 cache scales, {low:.4g} to {high:.4g}: not used"


def test_a_report_ends_with_the_notes():
    target = minimtp.load(written("e2b")[0])
    report = memory.describe(target.config, target.family.tensors(target.config), 64)
    for lines in ([], ["one", "another"]):
        text = memory.report_text(report | {"model": "x", "family": "gemma4", "notes": lines})
        assert text.split("\n")[-2:] == lines if lines else "bytes of cache at 64" in text.split("\n\n")[-1]


# Mobile: what config.json says of a module


@pytest.mark.parametrize("name, bits", [
    ("model.layers.1.mlp.up_proj", 2), ("model.layers.12.mlp.up_proj", 4), ("model.layers.1.q_proj", 4),
    ("model.layers.2.q_proj", 8), ("model.vision_tower.q_proj", None), ("model.vision_towers.q_proj", 8),
    ("lm_head", None), ("model.other_lm_head", None), ("model.embed_tokens", 4),
])  # fmt: skip
def test_the_first_match_in_a_name_says_the_bits(name, bits):
    config = parse_quantization({"quantization_config": {
        "quant_method": "gemma", "quantize_embeddings": True,
        "modules_to_not_convert": ["model.vision_tower", "lm_head"],
        "module_quant_configs": {"q_proj": {"num_bits": 8}, r"layers\.1\.mlp": {"num_bits": 2}, "layers.1": {}},
    }})  # fmt: skip
    assert config.bits_of(name)[0] == bits


def test_what_a_silent_config_means():
    silent = {"quant_method": "gemma"}
    assert parse_quantization({"quantization_config": silent}).bits_of("x.q_proj") == (4, "num_bits")
    for tied in (True, False):
        whole = {"quantization_config": silent | {"quantize_embeddings": True}, "tie_word_embeddings": tied}
        config = parse_quantization(whole)
        assert config.bits_of("lm_head")[0] is None and config.bits_of("model.embed_tokens_per_layer")[0] == 4
        assert config.bits_of("model.embed_tokens")[0] == (None if tied else 4)
    assert parse_quantization({"quantization_config": silent}).bits_of("model.embed_tokens")[0] is None


BAD_CONFIGS = {
    "num_bits": [3, "4", True, None, 4.0], "quantize_embeddings": [1, "yes", None],
    "module_quant_configs": [[1], "mlp"],
    "modules_to_not_convert": ["mlp", {}, [1], [[1]], [{}], ["("], ["a{99999999999}"], ["x" * 1001]],
}  # fmt: skip
BAD_OVERRIDES = [{"mlp": 2}, {"mlp": {"bits": 2}}, {"mlp": {"num_bits": 3}}, {"(": {}}, {"(?P<g0>a)": {}}, {"a**": {}}]


@pytest.mark.parametrize("field, value", [(field, value) for field, values in BAD_CONFIGS.items() for value in values]
                         + [("module_quant_configs", value) for value in BAD_OVERRIDES])  # fmt: skip
def test_a_wrong_config_is_refused_by_its_field(field, value):
    with pytest.raises(CheckpointError, match=f"^config: quantization_config.{field}") as caught:
        parse_quantization({"quantization_config": {"quant_method": "gemma", field: value}})
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500


@pytest.mark.parametrize("text", [
    "lm_head", r"model\.layers\.(?:1[5-9]|2\d|3[0-4])\.mlp\.", ".*self_attn.*", "(q|k|v)_proj$", "(model.)?layers",
    r".*mlp\.(gate|up)_proj.*", "^(?!.*vision).*proj", r"layers\.[0-9]+\.mlp", "[a*+?{]x", r"\*\+", "[]a*+?{]", "",
])  # fmt: skip
def test_usual_patterns_are_taken(text):
    assert name_patterns([text], "here")[text].pattern == text


@pytest.mark.parametrize("text", [
    "(a+)+$", "(a|aa)*b", "(?:.*)*x", "(a+){9}", ".*.*.*.*.*x", "(?x)(a+) +b", "(a+)(?#c)+b", "a?" * 30, "(?>a)",
    "(a)(?P=b)", "([a-z.]+)+!", r"(a\)+)+b", "[(](a+)+", "(?i)a", "(?P<a>.)", "(", "[", "*", "a{2,1}", "\\",
])  # fmt: skip
def test_patterns_that_could_hang_or_are_none_are_refused(text):
    with pytest.raises(CheckpointError, match="^here: "):
        name_patterns([text], "here")


def test_more_patterns_than_anyone_needs_are_refused():
    for texts in (
        [f"layers.{i}" for i in range(10_001)],
        [f".*{i}.*{i}.*" for i in range(81)],
        [".*" * 4 + "!", "a*" * 4],
    ):
        with pytest.raises(CheckpointError, match="^here: patterns that could take long"):
            name_patterns(texts, "here")
        name_patterns(texts[1:], "here")


@pytest.mark.filterwarnings("ignore:Possible")  # set operations, some day
@settings(deadline=None, max_examples=300)
@given(st.text("ab.*+?{}()[]|^$\\:!=<1,", max_size=30))
def test_no_pattern_takes_long(text):
    try:
        pattern = name_patterns([text], "here")[text]
    except CheckpointError:
        return
    before = time.process_time()
    for name in ("model.language_model.layers.10.self_attn.q_proj", "a" * 60, "ab" * 30):
        pattern.search(name)
    assert time.process_time() - before < 0.5


# Mobile: tensors and config.json that do not agree


def quant(field, value):
    return lambda folder: edit_json(folder, f"quantization_config.{field}", value)


def tensor(name, change):
    """Change the array of a tensor (its dtype, too, where a pair comes back), or take it away."""

    def edit(tensors):
        dtype, array = tensors.pop(name)
        if change is not DELETED:
            changed = change(array)
            tensors[name] = changed if isinstance(changed, tuple) else (dtype, changed)

    return lambda folder: edit_tensors(folder, edit)


def renamed(old, new):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({new: tensors.pop(old)}))


def added(name, dtype, array):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({name: (dtype, array)}))


Q, EMBED, GATE = f"{LAYER}self_attn.q_proj", "model.language_model.embed_tokens", f"{LAYER}per_layer_input_gate"
WRONG = {
    "4 bits as 2": (
        quant("num_bits", 2),
        r"per_layer.weight' is \[96, 224\] \(2 bits, quantization_config.module_quant_configs '.*' says\), expected",
    ),
    "4 bits as 8": (
        quant("num_bits", 8), "quantized' is U8, but quantization_config.module_quant_configs .* says 8 bits, .* in I8",
    ),
    "8 bits as 4": (
        quant("module_quant_configs", {"lm_head|embed_tokens$|layers.[456].mlp": {"num_bits": 2}}),
        "per_layer_input_gate.weight' is I8, but quantization_config.num_bits says 4 bits, .* in U8",
    ),
    "2 bits as 4": (
        quant("module_quant_configs", {"per_layer_(input_gate|projection)": {"num_bits": 8}, "head": {"num_bits": 2}}),
        r"embed_tokens.weight' is \[96, 32\] \(4 bits, .*num_bits says\), expected \[96, 64\]",
    ),
    "quantized but kept": (
        quant("modules_to_not_convert", ["q_proj"]),
        "q_proj.weight' is U8, but quantization_config.modules_to_not_convert 'q_proj' says not quantized",
    ),
    "embeddings not quantized": (
        quant("quantize_embeddings", False),
        "embedding_quantized' is U8, but quantization_config.quantize_embeddings says not quantized",
    ),
    "plain but quantized": (
        tensor(f"{Q}.weight", lambda _: ("F32", np.ones((128, 64), np.float32))),
        "q_proj.weight' is F32, but quantization_config.num_bits says 4 bits",
    ),
    "no config": (
        lambda folder: edit_json(folder, "quantization_config", DELETED),
        "is there, but config.json has no quantization_config",
    ),
    "another config": (
        lambda folder: edit_json(folder, "quantization_config", CONFIG), "quant_method is 'compressed-tensors'",
    ),
    "no scale": (tensor(f"{Q}.weight_scale", DELETED), "tensor .*q_proj.weight_scale' is missing"),
    "scale flat": (tensor(f"{Q}.weight_scale", np.ravel), r"weight_scale' is F32 \[128\], expected .* \[128, 1\]"),
    "scale by block": (
        tensor(f"{Q}.weight_scale", lambda a: np.repeat(a, 2, 1)), r"is F32 \[128, 2\], expected .* \[128, 1\]",
    ),
    "scale NaN": (tensor(f"{Q}.weight_scale", lambda a: a * np.float32(np.nan)), "weight_scale': NaN or infinite"),
    "embedding scale infinite": (
        tensor(f"{EMBED}.embedding_scale", lambda a: a / np.float32(0)), "embedding_scale': NaN or infinite",
    ),
    "embedding in odd blocks": (
        tensor(f"{EMBED}.embedding_scale", lambda a: np.repeat(a, 7, 1)),
        "embedding_scale' has 7 blocks for rows of 64",
    ),
    "embedding in no blocks": (tensor(f"{EMBED}.embedding_scale", lambda a: a[:, :0]), "embedding_scale' has 0 blocks"),
    "embedding scale flat": (tensor(f"{EMBED}.embedding_scale", np.ravel), r"is F32 \[96\], expected .* \[96, 1\]"),
    "too few rows": (tensor(f"{Q}.weight", lambda a: a[1:]), r"scale' is F32 \[128, 1\], expected .* \[127, 1\]"),
    "flat": (tensor(f"{Q}.weight", np.ravel), r"q_proj.weight' is \[4096\], expected rows"),
    "empty": (tensor(f"{Q}.weight", lambda a: a[:0]), r"q_proj.weight' is \[0, 32\], expected rows"),
    "a linear layer as an embedding": (
        added(f"{Q}.embedding_quantized", "U8", np.ones((128, 32), np.uint8)), "the same weight twice",
    ),
    "an embedding as a linear layer": (
        renamed(f"{EMBED}.embedding_quantized", f"{EMBED}.weight"),
        "embed_tokens.weight' is U8, but .* says 2 bits, '.*embed_tokens.embedding_quantized' in U8",
    ),
    "input scale negative": (
        tensor(f"{Q}.input_activation_scale", np.negative), "q_proj.input_activation_scale' is -0.*, expected a scale",
    ),
    "input scale NaN": (
        tensor(f"{Q}.input_activation_scale", lambda a: a * np.float32(np.nan)), "expected one finite float",
    ),
    "output scale a row": (
        tensor(f"{Q}.output_activation_scale", lambda a: np.full(128, a)), r"one finite float, not F32 \[128\]",
    ),
    "output scale a code": (
        tensor(f"{Q}.output_activation_scale", lambda a: ("I32", np.ones((), np.int32))), "one finite float, not I32",
    ),
    "cache scale infinite": (
        tensor(f"{LAYER}self_attn.k_cache_scale", lambda a: a / np.float32(0)), "k_cache_scale': expected one finite",
    ),
    "a scale of a module that has none": (
        added(f"{LAYER}layer_scalar.input_activation_scale", "F32", np.ones((), np.float32)), "unknown tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_tensors_and_config_that_do_not_agree_are_refused_with_both(tmp_path, case):
    edit, message = WRONG[case]
    write_mobile("e2b", tmp_path)
    with np.errstate(divide="ignore"):
        edit(tmp_path)
    refused(message, minimtp.load, tmp_path)


def test_unused_layers_may_be_stored_or_not(tmp_path):
    """Keys and values of layers that borrow them are read over, with all that belongs to them."""
    write_mobile("e2b", tmp_path)
    before = logits(minimtp.load(tmp_path), prompt("e2b"))

    def lend(tensors):
        for name in [name for name in tensors if ".layers.3." in name and ("k_proj" in name or "v_proj" in name)]:
            tensors[name.replace(".3.", ".6.").replace("layers.3", "layers.6")] = tensors[name]

    assert np.array_equal(logits(minimtp.load(edit_tensors(tmp_path, lend)), prompt("e2b")), before)


# compressed-tensors


def config_of(bits, group, symmetric, **changes):
    """quantization_config of one group for everything. group None: a whole row."""
    config = copy.deepcopy(CONFIG)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    args = (
        config["config_groups"]["group_0"]["weights"] | {"num_bits": bits, "symmetric": symmetric} | strategy | changes
    )
    config["config_groups"]["group_0"]["weights"] = args
    return config


def words_of(codes, bits):
    """Unsigned codes [N, I] packed into int32 along a row, one bit at a time."""
    words = np.zeros((len(codes), -(-codes.shape[1] * bits // 32)), np.uint32)
    for n, i in np.ndindex(codes.shape):
        for bit in range(bits):
            at = i * bits + bit
            words[n, at // 32] |= np.uint32(int(codes[n, i]) >> bit & 1) << np.uint32(at % 32)
    return words.view(np.int32)


def random_variant(bits, group, symmetric, rows=11, columns=128, seed=0):
    """(tensors of a weight "w", its values)"""
    random = np.random.RandomState(seed)
    codes, groups = random.randint(1 << bits, size=(rows, columns)), columns // (group or columns)
    scales = random.standard_normal((rows, groups)).astype(np.float32)
    zeros = np.full((rows, groups), 1 << bits - 1) if symmetric else random.randint(1 << bits, size=(rows, groups))
    tensors = {
        "w.weight_packed": words_of(codes, bits), "w.weight_scale": scales, "w.weight_shape": np.array([rows, columns]),
    }  # fmt: skip
    if not symmetric:
        tensors["w.weight_zero_point"] = np.ascontiguousarray(words_of(zeros.T, bits).T)
    wide = (np.repeat(array, columns // groups, axis=1) for array in (zeros, scales.astype(np.float64)))
    return tensors, (codes - next(wide)) * next(wide)


VARIANTS = [(bits, group, symmetric) for bits in (2, 4, 8) for group in (32, 64, None) for symmetric in (True, False)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_unpacked_as_it_is_defined(tmp_path, variant):
    tensors, truth = random_variant(*variant)
    read, used = read_weight(
        tensors_of(tmp_path, tensors), "w", parse_quantization({"quantization_config": config_of(*variant)})
    )
    assert sorted(used) == sorted(tensors) and read.shape == (11, 128) and (read.zeros is None) == variant[2]
    assert np.array_equal(read.dequantize("float64"), truth)
    assert np.array_equal(read.rows(3, 9, "float32"), truth[3:9].astype(np.float32))
    assert np.array_equal(read.take([10, 0], "float64"), truth[[10, 0]])


def test_group_size_may_say_by_itself_that_a_row_is_a_group():
    for changes in ({"group_size": -1}, {"group_size": -1, "strategy": None}, {"group_size": None}):
        scheme = parse_quantization({"quantization_config": config_of(4, None, True, **changes)}).scheme_of("w")
        assert scheme[:3] == (4, None, True)


@pytest.mark.parametrize("changes", [
    {"group_size": 32}, {"group_size": None, "strategy": "group"}, {"group_size": None, "strategy": None},
    {"group_size": 0, "strategy": "group"}, {"group_size": 2.0, "strategy": "group"},
    {"group_size": 2**31, "strategy": "group"},
])  # fmt: skip
def test_a_group_size_that_does_not_fit_its_strategy_is_refused(changes):
    with pytest.raises(CheckpointError, match="weights.group_size is .* with strategy"):
        parse_quantization({"quantization_config": config_of(4, None, True, **changes)})


def test_groups_for_different_targets():
    config = config_of(4, 32, True)
    for i, (targets, weights_) in enumerate([
        (["re:.*down_proj", "re:.*layers.1.*gate"], {"num_bits": 8, "group_size": None, "strategy": "channel"}),
        (["re:.*up_proj"], {"num_bits": 2}), (["re:.*layers.0.*up"], {"group_size": 64}),
        (["model.layers.1.up_proj"], {"symmetric": False}), (["Embedding"], {"group_size": 128}),
    ]):  # fmt: skip
        group = copy.deepcopy(config["config_groups"]["group_0"])
        config["config_groups"][f"more_{i}"] = group | {"targets": targets, "weights": group["weights"] | weights_}
    schemes = parse_quantization({"quantization_config": config})
    found = {name: schemes.scheme_of(f"model.{name}")[:3] for name in (
        "layers.0.down_proj", "layers.1.gate_proj", "layers.0.gate_proj", "layers.0.up_proj", "layers.2.up_proj",
        "layers.1.up_proj", "embed_tokens", "lm_head",
    )}  # fmt: skip
    expected = [(8, None, True), (8, None, True), (4, 32, True), (4, 64, True), (2, 32, True), (4, 32, False),
                (4, 128, True), (4, 32, True)]  # fmt: skip
    assert list(found.values()) == expected


def test_packed_weights_that_are_no_target_are_refused(tmp_path):
    config = config_of(4, 32, True)
    config["config_groups"]["group_0"]["targets"] = ["re:.*_proj"]
    with pytest.raises(CheckpointError, match="'w': packed, but no target of quantization_config.config_groups is it"):
        read_weight(
            tensors_of(tmp_path, random_variant(4, 32, True)[0]),
            "w",
            parse_quantization({"quantization_config": config}),
        )
    for targets in (None, "Linear", [1], ["re:(a+)+"], {}):
        config["config_groups"]["group_0"]["targets"] = targets
        with pytest.raises(CheckpointError, match="^config: quantization_config.config_groups"):
            parse_quantization({"quantization_config": config})


ASYMMETRIC, ZEROS = random_variant(4, 32, False)[0], "w.weight_zero_point"
WRONG_ZEROS = {
    "absent": (DELETED, "tensor 'w.weight_zero_point' is missing"),
    "not packed": (np.zeros((11, 4), np.int8), r"is I8 \[11, 4\], expected I32 \[2, 4\]"),
    "too many words": (np.zeros((11, 4), np.int32), r"is I32 \[11, 4\], expected I32 \[2, 4\]"),
    "packed along rows": (np.zeros((11, 1), np.int32), r"is I32 \[11, 1\], expected"),
    "for the whole row": (np.zeros((2, 1), np.int32), r"is I32 \[2, 1\], expected"),
}


@pytest.mark.parametrize("case", WRONG_ZEROS)
def test_wrong_zero_points_are_refused(tmp_path, case):
    wrong, message = WRONG_ZEROS[case]
    tensors = {k: v for k, v in (ASYMMETRIC | {ZEROS: wrong}).items() if v is not DELETED}
    with pytest.raises(CheckpointError, match=message):
        read_weight(
            tensors_of(tmp_path, tensors), "w", parse_quantization({"quantization_config": config_of(4, 32, False)})
        )


def test_zero_points_that_contradict_their_weight_are_refused():
    packed, scales = np.zeros((4, 32), np.uint8), Plain(np.ones((4, 2), np.float32), "F32")
    Quantized(packed, scales, zeros=np.zeros((4, 2), np.int8))
    for zeros in (np.zeros((4, 1), np.int8), np.zeros((4, 2), np.uint8), np.zeros(8, np.int8)):
        with pytest.raises(CheckpointError, match="'w': zero points are"):
            Quantized(packed, scales, name="w", zeros=zeros)


def test_asymmetric_weights_are_not_written_as_symmetric_ones():
    packed, scales = np.zeros((4, 32), np.uint8), Plain(np.ones((4, 2), np.float32), "F32")
    weight = Quantized(packed, scales, name="w", zeros=np.ones((4, 2), np.int8))
    for write in (ggml.encode_q4_0, lambda weight: FORMATS["pack-quantized"].write("w", weight)):
        with pytest.raises(CheckpointError, match="'w': "):
            write(weight)


# Hostile files


def raws(tensors):
    """{name: RawTensor} of {name: (dtype, array)}, in memory."""
    return {
        name: RawTensor(name, dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8), Path("x"))
        for name, (dtype, array) in tensors.items()
    }


def variants():
    """name of a weight, its tensors, config -> a few of each layout."""
    for variant in ((4, 32, True), (4, 32, False), (8, None, True), (2, 64, False)):
        names = {"packed": "I32", "scale": "F32", "shape": "I64", "zero_point": "I32"}
        tensors = {key: (names[key[9:]], value) for key, value in random_variant(*variant)[0].items()}
        yield "w", tensors, parse_quantization({"quantization_config": config_of(*variant)})
    folder, _ = written("e2b")
    tensors = read_encoded(folder / "model.safetensors")
    config = parse_quantization({"quantization_config": {"quant_method": "gemma"} | CASES["e2b"]["config"]})
    assert isinstance(config, MobileConfig)
    for base in (Q, EMBED, GATE, f"{EMBED}_per_layer"):
        yield base, {key: value for key, value in tensors.items() if key.startswith(f"{base}.")}, config


VALUES = {"F32": [np.nan, np.inf, -np.inf, 0, -1, 1e-45, 3e38], "I64": [0, -1, 7, 2**62, -(2**63), 64, 11, 128]}
DTYPES = {"U8": "u1", "I8": "i1", "I32": "i4", "I64": "i8", "F32": "f4", "F16": "f2", "BF16": "u2", "F64": "f8"}


def damage(data, dtype, array):
    """One of the things that can be wrong with a tensor."""
    kind = data.draw(st.sampled_from(["dtype", "cut", "flip", "extend", "reshape", "value"]))
    if kind == "dtype":
        other = data.draw(st.sampled_from(sorted(DTYPES)))
        return other, np.zeros(array.shape, DTYPES[other])
    if kind == "value" and dtype in VALUES and array.size:
        array = array.copy()
        array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from(VALUES[dtype]))
    elif kind == "flip" and array.size:
        bits = array.copy().reshape(-1).view(np.uint8)
        bits[data.draw(st.integers(0, bits.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
        return dtype, bits.view(array.dtype).reshape(array.shape)
    elif kind == "reshape":
        return dtype, array.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (*array.shape, 1)])))
    elif array.ndim:
        axis = data.draw(st.integers(0, array.ndim - 1))
        size = data.draw(st.integers(0, 2 * array.shape[axis]))
        return dtype, np.take(array, np.arange(size) % max(1, array.shape[axis]), axis) if array.size else array
    return dtype, array


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_damaged_tensors_are_refused_or_read_as_they_are(data):
    """Whatever is read has the shape its parts have, and is finite."""
    base, tensors, config = data.draw(st.sampled_from(list(variants_once())))
    tensors = dict(tensors)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        if data.draw(st.integers(0, 9)) == 0:
            del tensors[name]
        else:
            tensors[name] = damage(data, *tensors[name])
        if not tensors:
            return
    try:
        with np.errstate(all="ignore"):
            weight, used = read_weight(raws(tensors), base, config)
        inner, *scales = weight if isinstance(weight, Rounded) else (weight, None, None)
        inner.check_finite()
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 600
        return
    assert set(used) <= set(tensors) and all(scale is None or 0 < scale < np.inf for scale in scales)
    assert inner.shape[0] * inner.shape[1] * getattr(inner, "bits", 0) <= 8 * sum(
        array.nbytes for _, array in tensors.values()
    )
    assert np.isfinite(inner.dequantize("float64")).all()


@cache
def variants_once():
    return tuple(variants())
