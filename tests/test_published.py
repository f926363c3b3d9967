"""The published configurations: what they say, and what they cost, to the unit and the byte."""

import json
import math
from functools import cache

import pytest
from random_sizes import SIZES
from test_loading import read_encoded
from test_sizes import folders

from minimtp.cli import main
from minimtp.gemma4 import lendable_kv, new_cache
from minimtp.loading import open_model, published_config
from minimtp.memory import kv_bytes, parameters, stored_bytes

MIB = 2**20
TARGETS = ("gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-12b", "gemma-4-e4b", "gemma-4-e2b")
ASSISTANTS = tuple(f"{name}-assistant" for name in TARGETS)

# As base checkpoints store them: E4B and E2B with keys and values that no layer uses.
PARAMETERS = {
    "gemma-4-31b": 30_697_345_340,
    "gemma-4-26b-a4b": 25_233_141_790,
    "gemma-4-12b": 11_907_350_320,
    "gemma-4-e4b": 7_518_069_034,
    "gemma-4-e2b": 4_647_449_891,
    "gemma-4-31b-assistant": 469_518_596,
    "gemma-4-26b-a4b-assistant": 419_711_236,
    "gemma-4-12b-assistant": 422_856_964,
    "gemma-4-e4b-assistant": 78_517_764,
    "gemma-4-e2b-assistant": 77_731_332,
}
USED = {"gemma-4-e4b": 7_463_013_418, "gemma-4-e2b": 4_628_569_379}

# hidden, heads, kv heads and head width of sliding and of full layers, feed-forward, window, context
SIZES_OF = {
    "gemma-4-31b": (5376, 32, (16, 256), (4, 512), 21504, 1024, 262144),
    "gemma-4-26b-a4b": (2816, 16, (8, 256), (2, 512), 2112, 1024, 262144),
    "gemma-4-12b": (3840, 16, (8, 256), (1, 512), 15360, 1024, 262144),
    "gemma-4-e4b": (2560, 8, (2, 256), (2, 512), 10240, 512, 131072),
    "gemma-4-e2b": (1536, 8, (1, 256), (1, 512), 6144, 512, 131072),
    "gemma-4-31b-assistant": (1024, 32, (16, 256), (4, 512), 8192, 1024, 262144),
    "gemma-4-26b-a4b-assistant": (1024, 16, (8, 256), (2, 512), 8192, 1024, 262144),
    "gemma-4-12b-assistant": (1024, 16, (8, 256), (1, 512), 8192, 1024, 262144),
    "gemma-4-e4b-assistant": (256, 4, (2, 256), (2, 512), 2048, 512, 131072),
    "gemma-4-e2b-assistant": (256, 4, (1, 256), (1, 512), 2048, 512, 131072),
}
PATTERNS = {
    "gemma-4-31b": "sssssf" * 10,
    "gemma-4-26b-a4b": "sssssf" * 5,
    "gemma-4-12b": "sssssf" * 8,
    "gemma-4-e4b": "sssssf" * 7,
    "gemma-4-e2b": "ssssf" * 7,
    **dict.fromkeys(ASSISTANTS, "sssf"),
}
LENDERS = {  # the last sliding and the last full layer with KV of its own, and how many layers have some
    "gemma-4-31b": (58, 59, 60),
    "gemma-4-26b-a4b": (28, 29, 30),
    "gemma-4-12b": (46, 47, 48),
    "gemma-4-e4b": (22, 23, 24),
    "gemma-4-e2b": (13, 14, 15),
}

every_config = pytest.mark.parametrize("name", PARAMETERS)
every_target = pytest.mark.parametrize("name", TARGETS)


@cache
def published(name):
    """(configuration, tensors)"""
    family, config = published_config(name)
    return config, family.tensors(config)


def weights(name, kind, place=""):
    """How many weights tensors of a kind have, whose place ends with `place`."""
    return sum(math.prod(shape) for at, (_, shape, k) in published(name)[1].items() if k == kind and at.endswith(place))


# What they say


@every_config
def test_sizes(name):
    config, _ = published(name)
    hidden, heads, sliding, full, inner, window, context = SIZES_OF[name]
    assert (config.hidden_size, config.vocab_size) == (hidden, 262144)
    assert (config.sliding_window, config.max_position_embeddings) == (window, context)
    assert "".join(layer.kind[0] for layer in config.layers) == PATTERNS[name]
    for i, layer in enumerate(config.layers):
        assert (layer.heads, (layer.kv_heads, layer.head_dim)) == (heads, sliding if layer.kind == "sliding" else full)
        assert layer.intermediate_size == inner * (2 if name == "gemma-4-e2b" and i >= 15 else 1)
        assert layer.k_eq_v == (layer.kind == "full" and "-e" not in name)
    assert config.final_logit_softcapping == (30.0 if name in TARGETS else None)
    assert (config.ropes["sliding"].kind, config.ropes["sliding"].theta) == ("default", 1e4)
    full_rope = config.ropes["full"]
    assert (full_rope.kind, full_rope.theta, full_rope.fraction) == ("proportional", 1e6, 0.25)


@every_target
def test_who_lends_to_whom(name):
    config, _ = published(name)
    sliding, full, own = LENDERS[name]
    assert [layer.owns_kv for layer in config.layers] == [True] * own + [False] * (len(config.layers) - own)
    borrowed = {(layer.kind, layer.kv) for layer in config.layers if not layer.owns_kv}
    assert borrowed == ({("sliding", sliding), ("full", full)} if own < len(config.layers) else set())
    kv = new_cache(config, "float32", 1, "")
    assert len(kv.layers) == own
    assert lendable_kv(config, kv) == {"sliding": kv.layers[sliding], "full": kv.layers[full]}


@every_config
def test_what_only_some_sizes_have(name):
    config, tensors = published(name)
    assert config.per_layer_input == (256 if name in ("gemma-4-e4b", "gemma-4-e2b") else 0)
    if name == "gemma-4-26b-a4b":
        assert (config.experts.count, config.experts.top_k, config.experts.intermediate_size) == (128, 8, 704)
    else:
        assert config.experts is None
    ends = {place.split(".")[-1] for place in tensors}
    assert ("centroids" in ends) == ("-e" in name and name in ASSISTANTS)
    assert ("pre_projection" in ends) == (name in ASSISTANTS)
    if "centroids" in ends:
        assert (config.clusters.count, config.clusters.top_k) == (2048, 32)


@every_target
def test_an_assistant_fits_its_target_and_no_other(name):
    family, config = published_config(f"{name}-assistant")
    for other in TARGETS:
        if other == name:
            family.check_fits(config, published(other)[0])
        else:
            with pytest.raises(ValueError, match="does not fit"):
                family.check_fits(config, published(other)[0])


def test_a_name_that_is_not_published():
    with pytest.raises(ValueError, match="no published configuration 'gemma-4-4b': there are .*gemma-4-e2b-assistant"):
        published_config("gemma-4-4b")


# Parameters


@every_config
def test_parameters_to_the_unit(name):
    counts = parameters(published(name)[1])
    total = counts.pop("total")
    assert total == PARAMETERS[name] == sum(counts.values())
    assert total - weights(name, "unused") == USED.get(name, total)


def test_components_of_the_31b():
    counts = parameters(published("gemma-4-31b")[1])
    assert counts["embedding"] == 1_409_286_144
    assert counts["attention"] == 3_082_813_440 + 1_211_105_280 + 1_101_004_800 + 3_082_813_440  # q, k, v, o
    assert counts["mlp"] == 20_808_990_720
    assert counts["norms"] == 1_331_516


def test_components_of_the_others():
    counts = parameters(published("gemma-4-26b-a4b")[1])
    assert counts["experts"] == 30 * (128 * 3 * 704 * 2816 + 128 * 2816)  # experts, and what routes to them
    assert counts["mlp"] == 30 * 3 * 2112 * 2816
    counts = parameters(published("gemma-4-e2b")[1])
    table, projection, layer = 262144 * 35 * 256, 35 * 256 * 1536, 2 * 256 * 1536
    assert counts["per-layer input"] == table + projection + 35 * layer
    assert counts["mlp"] == 3 * 1536 * (15 * 6144 + 20 * 12288)
    counts = parameters(published("gemma-4-e4b-assistant")[1])
    assert counts["embedding"] == 262144 * 256 + 2048 * 256  # with the centroids
    assert counts["projections"] == 256 * 2 * 2560 + 2560 * 256


@pytest.mark.parametrize("name, quantized, tensors", [
    ("gemma-4-31b", 410, 832), ("gemma-4-26b-a4b", 265, 657), ("gemma-4-e2b", 275, 540),
])  # fmt: skip
def test_as_many_tensors_as_published_files_have(name, quantized, tensors):
    """Of GGUF files. A table of rotary factors comes on top; E2B's projection of all layers' inputs is F16 there."""
    used = {place: kind for place, (_, _, kind) in published(name)[1].items() if kind != "unused"}
    assert len(used) == tensors
    matrices = [place for place, kind in used.items() if kind in ("linear", "experts") and "router" not in place]
    assert len([place for place in matrices if place != "per_layer_model_projection"]) == quantized


@pytest.mark.parametrize("name", SIZES)
def test_a_checkpoint_holds_the_parameters_that_its_configuration_counts(name):
    for folder in folders(name):
        checkpoint, family, config = open_model(folder)
        held = sum(elements(tensor) for tensor in checkpoint.tensors.values())
        table = family.tensors(config)
        unused = sum(math.prod(shape) for _, shape, kind in table.values() if kind == "unused")
        assert parameters(table)["total"] - held in (0, unused)


def elements(tensor):
    """Weights that a stored tensor stands for."""
    if tensor.name.endswith(("_scale", "_shape", "token_ordering")) and not tensor.name.endswith("expert_scale"):
        return 0
    return math.prod(tensor.shape) * (8 if tensor.name.endswith("_packed") else 1)


# Bytes


def bytes_of(name, format):
    return stored_bytes(published(name)[1], format)


@pytest.mark.parametrize("name, size, header", [
    ("gemma-4-31b-assistant", 939_042_560, 5368), ("gemma-4-12b-assistant", 845_719_296, 5368),
    ("gemma-4-e4b-assistant", 159_138_208, 5528),
])  # fmt: skip
def test_bf16_files(name, size, header):
    """The published file less its header; of equal plans, equal headers."""
    assert bytes_of(name, "bf16") == size - header


def test_bf16_files_of_the_31b():
    vision_and_headers = 1_151_647_568
    assert bytes_of("gemma-4-31b", "bf16") == 49_784_788_364 + 12_761_549_884 - vision_and_headers


@pytest.mark.parametrize("name, size", [
    ("gemma-4-31b", 17_651_001_568), ("gemma-4-26b-a4b", 14_439_361_440), ("gemma-4-e4b", 5_154_939_136),
    ("gemma-4-e2b", 3_349_516_256),
])  # fmt: skip
def test_gguf_files(name, size):
    """What is left of each published file is its header, nearly all of it the vocabulary: much the same in all four."""
    assert 15_816_000 < size - bytes_of(name, "q4_0") < 15_836_000


def test_q4_0_of_the_31b():
    linears, embedding, small, factors = 29_286_727_680, 1_409_286_144, 1_331_516, 256
    expected = linears // 32 * 18 + embedding // 256 * 210 + 4 * small + 4 * factors
    assert bytes_of("gemma-4-31b", "q4_0") == expected == 17_635_166_448


def test_w4a16_of_the_31b():
    packed, scales, embedding, norms = 14_643_363_840, 1_830_420_480, 2_818_572_288, 2_663_032
    file_without_vision, head = 22_113_591_928, embedding
    assert bytes_of("gemma-4-31b", "w4a16-ct") == packed + scales + embedding + norms == file_without_vision - head


def test_w4a16_of_the_e2b_packs_276_matrices():
    kinds = [kind for _, _, kind in published("gemma-4-e2b")[1].values()]
    assert kinds.count("linear") == 15 * 9 + 20 * 7 + 1 == 276


# MiB of the text models by format, from a table that was made by other means (rounded).
TABLE = {
    "gemma-4-31b": (16_818, 18_401, 58_551),
    "gemma-4-26b-a4b": (13_755, 14_564, 48_128),
    "gemma-4-12b": (6_638, 7_769, 22_711),
    "gemma-4-e4b": (4_893, 8_818, 14_340),
    "gemma-4-e2b": (3_171, 6_265, 8_864),
}


@every_target
def test_bytes_by_format(name):
    """The table counts keys and values that no layer uses, and takes the projection of all layers' inputs for 4-bit."""
    unused = weights(name, "unused", "_proj")
    small = weights(name, "unused") - unused
    projection = weights(name, "linear", "per_layer_model_projection")
    as_there = {
        "q4_0": bytes_of(name, "q4_0") + unused * 18 // 32 + 4 * small - projection * 2 + projection * 18 // 32,
        "w4a16-ct": bytes_of(name, "w4a16-ct") + unused * 18 // 32 + 2 * small,
        "bf16": bytes_of(name, "bf16") + 2 * (unused + small),
    }
    assert tuple(round(size / MIB) for size in as_there.values()) == TABLE[name]
    assert as_there["bf16"] == 2 * PARAMETERS[name]


# MiB of keys and values in bf16 at some contexts, from the same table: windows of 16 tokens more than the window
KV = {
    "gemma-4-31b": {8_192: 1_452.5, 40_960: 4_012.5, 131_072: 11_052.5, 262_144: 21_292.5},
    "gemma-4-26b-a4b": {8_192: 363, 40_960: 1_003, 131_072: 2_763},
    "gemma-4-12b": {8_192: 453, 40_960: 965, 131_072: 2_373},
    "gemma-4-e4b": {8_192: 149, 40_960: 661, 131_072: 2_069},
    "gemma-4-e2b": {8_192: 54, 40_960: 246, 131_072: 774},
}


@every_target
def test_kv_bytes(name):
    """Ours holds one token more than the window."""
    config, _ = published(name)
    sliding = kv_bytes(config, 1, 2)["sliding"]
    for context, expected in KV[name].items():
        ours = sum(kv_bytes(config, context, 2).values())
        assert abs((ours + (16 - 1) * sliding) / MIB - expected) <= (0 if name == "gemma-4-31b" else 0.5)


def test_kv_bytes_a_token_of_the_31b():
    config, _ = published("gemma-4-31b")
    assert kv_bytes(config, 1, 2) == {"sliding": 50 * 2 * 16 * 256 * 2, "full": 10 * 2 * 4 * 512 * 2}
    assert kv_bytes(config, 1024, 4) == {"sliding": 1024 * 2 * 819_200, "full": 1024 * 2 * 81_920}
    for context in (1025, 1026, 262_144):
        assert kv_bytes(config, context, 2)["sliding"] == 1025 * 819_200


@pytest.mark.parametrize("name", ASSISTANTS)
def test_an_assistant_holds_nothing(name):
    assert kv_bytes(published(name)[0], 1000, 2) == {}


# show --config


@every_config
def test_show_config_as_json(name, capsys):
    assert main(["show", "--config", name, "--json", "--context", "8192"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert not err and out.count("\n") == 1
    assert report["model"] == name and report["parameters"]["total"] == PARAMETERS[name]
    assert sum(report["parameters"].values()) == 2 * PARAMETERS[name]
    assert report["parameters"].keys() >= {"embedding", "attention", "mlp", "norms"}
    assert report["bytes"] == {format: bytes_of(name, format) for format in ("bf16", "q4_0", "w4a16-ct")}
    assert sorted(i for plan in report["layers"] for i in plan["at"]) == list(range(len(PATTERNS[name])))
    assert report["kv"]["context"] == 8192 and report["kv"]["bytes"] == kv_bytes(published(name)[0], 8192, 4)
    assert (report["experts"] or {}).get("count") == (128 if name == "gemma-4-26b-a4b" else None)


@every_config
def test_show_config_as_text(name, capsys):
    assert main(["show", "--config", name]) == 0
    out, err = capsys.readouterr()
    assert not err and out.split()[0] == name and f"{PARAMETERS[name]:,}" in out
    assert f"sliding window {SIZES_OF[name][5]}" in out and f"{bytes_of(name, 'q4_0'):,}" in out
    assert ("128 experts" in out) == (name == "gemma-4-26b-a4b")
    assert ("per-layer input of width 256" in out) == (name in USED)
    assert ("borrowed kv" in out) == (name in USED or name in ASSISTANTS)


def test_show_names_the_configurations_there_are(capsys):
    assert main(["show", "--config", "gemma-5"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and all(name in err for name in PARAMETERS)


@pytest.mark.parametrize("name", ["e2b", "26b_int4", "12b", "everything"])
def test_show_a_checkpoint_of_each_kind(name, capsys):
    for folder in folders(name):
        assert main(["show", str(folder), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        _, family, config = open_model(folder)
        assert report["parameters"] == parameters(family.tensors(config))
        if "model.safetensors" in {path.name for path in folder.iterdir()}:
            stored = read_encoded(folder / "model.safetensors")
            assert report["stored_bytes"]["total"] == sum(array.nbytes for _, array in stored.values())
