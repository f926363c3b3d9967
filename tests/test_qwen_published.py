"""The published configurations of Qwen 3.5 and 3.6: what they say, and what they cost, to the unit and the byte.

Every number is taken from tables made by other means, or computed here from the published sizes alone.
"""

import json
import math
from functools import cache
from importlib.resources import files

import pytest
from random_qwen import CONFIGS, write_qwen
from test_loading import read_encoded

from minimtp import qwen35, qwen35_mtp
from minimtp.cli import main
from minimtp.loading import open_model, published_config
from minimtp.memory import kv_bytes, parameters, stored_bytes

MIB, VOCABULARY, CONTEXT, HEAD, INTERVAL, KERNEL = 2**20, 248_320, 262_144, 256, 4, 4

# text model, MTP layer
PARAMETERS = {
    "qwen3.6-27b": (26_895_998_464, 424_699_392),
    "qwen3.6-35b-a3b": (34_660_610_688, 844_640_768),
    "qwen3.5-122b-a10b": (122_111_526_912, 2_523_679_232),
    "qwen3.5-397b-a17b": (396_346_350_336, 6_595_568_128),
    "qwen3.5-0.8b": (752_393_024, 20_452_864),
}
# hidden, layers, heads, kv heads, linear key and value heads of width 128, feed-forward, tied
SIZES_OF = {
    "qwen3.6-27b": (5120, 64, 24, 4, 16, 48, 17408, False),
    "qwen3.6-35b-a3b": (2048, 40, 16, 2, 16, 32, None, False),
    "qwen3.5-122b-a10b": (3072, 48, 32, 2, 16, 64, None, False),
    "qwen3.5-397b-a17b": (4096, 60, 32, 2, 16, 64, None, False),
    "qwen3.5-0.8b": (1024, 24, 8, 2, 16, 16, 3584, True),
}
EXPERTS = {  # how many, of which a token uses, width of one, of the shared one
    "qwen3.6-35b-a3b": (256, 8, 512, 512),
    "qwen3.5-122b-a10b": (256, 8, 1024, 1024),
    "qwen3.5-397b-a17b": (512, 10, 1024, 1024),
}
KV_BYTES = {  # a token, in bf16: the model, its MTP layer
    "qwen3.6-27b": (65_536, 4_096),
    "qwen3.6-35b-a3b": (20_480, 2_048),
    "qwen3.5-122b-a10b": (24_576, 2_048),
    "qwen3.5-397b-a17b": (30_720, 2_048),
    "qwen3.5-0.8b": (12_288, 2_048),
}
STATE_MIB = {  # the states in float32 and the windows of the convolutions in bf16, rounded as in the table
    "qwen3.6-27b": (144.0, 2.8),
    "qwen3.6-35b-a3b": (60.0, 1.4),
    "qwen3.5-122b-a10b": (144.0, 2.5),
    "qwen3.5-397b-a17b": (180.0, 3.2),
    "qwen3.5-0.8b": (18.0, 0.6),
}

every_config = pytest.mark.parametrize("name", PARAMETERS)


@cache
def published(name):
    """(configuration, tensors of the text model, tensors of its MTP layer)"""
    family, config = published_config(name)
    assert family is qwen35
    return config, family.tensors(config), qwen35_mtp.tensors(qwen35_mtp.layer_config(config))


def raw(name):
    """Its config.json, a copy."""
    return json.loads((files("minimtp") / "published.json").read_text())[name]


# What they say


@every_config
def test_sizes(name):
    config, *_ = published(name)
    hidden, count, heads, kv_heads, key_heads, value_heads, inner, tied = SIZES_OF[name]
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (hidden, VOCABULARY, CONTEXT)
    assert (config.intermediate_size, config.tied, config.mtp_layers) == (inner, tied, 1)
    full = qwen35.FullAttention(heads, kv_heads, HEAD)
    linear = qwen35.DeltaNet(key_heads, value_heads, 128, 128, KERNEL)
    assert config.attention == full
    assert config.layers == (linear, linear, linear, full) * (count // 4)
    assert (config.rope.kind, config.rope.theta, config.rotary_dim, config.rms_norm_eps) == ("default", 1e7, 64, 1e-6)
    assert config.placeholders == {248056: "an image", 248057: "a video"}


@every_config
def test_experts(name):
    experts = published(name)[0].experts
    assert experts == (qwen35.Experts(*EXPERTS[name]) if name in EXPERTS else None)


@every_config
def test_channels_of_the_convolution(name):
    known = {"qwen3.6-27b": 10240, "qwen3.6-35b-a3b": 8192}
    *_, key_heads, value_heads, _, _ = SIZES_OF[name]
    channels = published(name)[0].layers[0].channels
    assert channels == 2 * 128 * key_heads + 128 * value_heads == known.get(name, channels)


@every_config
def test_the_mtp_layer_fits_its_target_and_no_other(name):
    config = qwen35_mtp.parse_config(raw(name))
    assert config.layers == (published(name)[0].attention,)
    for other in PARAMETERS:
        if other == name:
            qwen35_mtp.check_fits(config, published(other)[0])
        else:
            with pytest.raises(ValueError, match="does not fit"):
                qwen35_mtp.check_fits(config, published(other)[0])


@pytest.mark.parametrize("name, wrong", [("qwen3.6-27B", "qwen3.6-27B"), ("qwen3.5-27b", "qwen3.5-27b"), ("", "")])
def test_a_name_that_is_not_published(name, wrong):
    with pytest.raises(ValueError, match=f"no published configuration '{wrong}': there are .*qwen3.5-0.8b") as caught:
        published_config(name)
    assert all(known in str(caught.value) for known in PARAMETERS)


# Parameters


def components(name):
    """Parameters by component, from the published sizes."""
    D, count, H, G, key_heads, value_heads, F, tied = SIZES_OF[name]
    full, linear, channels, values = count // 4, 3 * count // 4, 128 * (2 * key_heads + value_heads), 128 * value_heads
    attention = D * (2 * H * HEAD) + 2 * D * (G * HEAD) + (H * HEAD) * D  # queries and gates, keys, values, output
    projections = D * channels + D * values + 2 * D * value_heads + values * D  # qkv, z, a and b, output
    small = channels * KERNEL + 2 * value_heads  # convolution, decay and its bias
    found = {
        "embedding": VOCABULARY * D * (1 if tied else 2),
        "attention": full * attention,
        "deltanet": linear * (projections + small),
        "norms": D + count * 2 * D + full * 2 * HEAD + linear * 128,
    }
    if name not in EXPERTS:
        return found | {"mlp": count * 3 * D * F}
    E, _, width, shared = EXPERTS[name]
    return found | {"experts": count * (E * 3 * D * width + E * D), "shared expert": count * (3 * D * shared + D)}


def mtp_components(name):
    D, _, H, G, _, _, F, _ = SIZES_OF[name]
    found = {
        "projections": D * 2 * D,
        "attention": D * (2 * H * HEAD) + 2 * D * (G * HEAD) + (H * HEAD) * D,
        "norms": 3 * D + 2 * D + 2 * HEAD,
    }
    if name not in EXPERTS:
        return found | {"mlp": 3 * D * F}
    E, _, width, shared = EXPERTS[name]
    return found | {"experts": E * 3 * D * width + E * D, "shared expert": 3 * D * shared + D}


@every_config
def test_parameters_to_the_unit(name):
    _, table, mtp_table = published(name)
    for tensors, expected, total in zip((table, mtp_table), (components(name), mtp_components(name)), PARAMETERS[name]):
        assert parameters(tensors) == {**expected, "total": total}


@every_config
def test_parameters_are_counted_over_every_tensor(name):
    """One by one; a kind that was not counted, or counted twice, would show."""
    for tensors, total in zip(published(name)[1:], PARAMETERS[name]):
        assert sum(math.prod(shape) for _, shape, _ in tensors.values()) == total


UNCOUNTED = ("max_position_embeddings", "num_experts_per_tok", "full_attention_interval", "mtp_num_hidden_layers")


@pytest.mark.parametrize("name", ["qwen3.6-27b", "qwen3.6-35b-a3b"])
def test_every_size_counts(name):
    """Negative control: twice any size, or half, is another number of parameters."""
    text = raw(name)["text_config"]
    sizes = [field for field in text if type(text[field]) is int and field not in UNCOUNTED]
    assert len(sizes) == (14 if name in EXPERTS else 12)
    for field in sizes:
        config = raw(name)
        config["text_config"][field] = text[field] // 2 if field == "linear_num_key_heads" else 2 * text[field]
        assert parameters(qwen35.tensors(qwen35.parse_config(config)))["total"] != PARAMETERS[name][0], field


@every_config
def test_as_many_tensors_as_published_files_have(name):
    _, table, mtp_table = published(name)
    count, tied = SIZES_OF[name][1], SIZES_OF[name][-1]
    feed_forward = 7 if name in EXPERTS else 3
    assert len(table) == (2 if tied else 3) + count * (2 + feed_forward) + count // 4 * 6 + 3 * count // 4 * 9
    assert len(mtp_table) == (19 if name in EXPERTS else 15)
    assert all(name.startswith("mtp.") for name, _, _ in mtp_table.values())


def test_some_names_and_shapes_as_published():
    _, table, mtp_table = published("qwen3.6-35b-a3b")
    shapes = {name: shape for name, shape, _ in (*table.values(), *mtp_table.values())}
    for name, shape in {
        "model.embed_tokens.weight": (248_320, 2048),
        "lm_head.weight": (248_320, 2048),
        "model.layers.0.linear_attn.in_proj_qkv.weight": (8192, 2048),
        "model.layers.0.linear_attn.in_proj_a.weight": (32, 2048),
        "model.layers.0.linear_attn.conv1d.weight": (8192, 1, 4),
        "model.layers.0.linear_attn.norm.weight": (128,),
        "model.layers.0.linear_attn.A_log": (32,),
        "model.layers.3.self_attn.q_proj.weight": (2 * 16 * 256, 2048),
        "model.layers.3.self_attn.k_norm.weight": (256,),
        "model.layers.39.mlp.experts.gate_up_proj": (256, 1024, 2048),
        "model.layers.39.mlp.experts.down_proj": (256, 2048, 512),
        "model.layers.39.mlp.shared_expert_gate.weight": (1, 2048),
        "mtp.fc.weight": (2048, 4096),
        "mtp.layers.0.mlp.gate.weight": (256, 2048),
    }.items():
        assert shapes[name] == shape
    assert "lm_head.weight" not in {name for name, _, _ in published("qwen3.5-0.8b")[1].values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_holds_the_parameters_that_its_configuration_counts(name, tmp_path):
    checkpoint, family, config = open_model(write_qwen(name, tmp_path / "model"))
    held = {True: 0, False: 0}
    for tensor in checkpoint.tensors.values():
        if not tensor.name.startswith("model.visual."):
            held[tensor.name.startswith("mtp.")] += elements(tensor)
    tables = {False: family.tensors(config), True: qwen35_mtp.tensors(qwen35_mtp.layer_config(config))}
    has_mtp = CONFIGS[name]["model"].get("mtp", True)
    assert held == {mtp: parameters(table)["total"] * (has_mtp or not mtp) for mtp, table in tables.items()}


def elements(tensor):
    """Weights that a stored tensor stands for."""
    if tensor.name.endswith(("_scale", "_shape")):
        return 0
    return math.prod(tensor.shape) * (8 if tensor.name.endswith("_packed") else 1)


# Bytes


@every_config
def test_bf16_is_two_bytes_a_parameter(name):
    _, table, mtp_table = published(name)
    assert tuple(stored_bytes(tensors, "bf16") for tensors in (table, mtp_table)) == tuple(
        2 * total for total in PARAMETERS[name]
    )


def test_the_mtp_layers_of_the_table():
    assert round(stored_bytes(published("qwen3.6-27b")[2], "bf16") / MIB) == 810
    assert round(stored_bytes(published("qwen3.6-35b-a3b")[2], "bf16") / MIB) == 1611


@every_config
def test_kv_bytes_a_token(name):
    _, count, _, kv_heads, *_ = SIZES_OF[name]
    one = 2 * kv_heads * HEAD * 2
    assert KV_BYTES[name] == (count // 4 * one, one)
    for context in (1, 1000, CONTEXT):
        held = kv_bytes(published(name)[0], context, 2)
        assert (held["full"], held["mtp"]) == tuple(context * size for size in KV_BYTES[name])
        assert set(held) == {"linear", "full", "mtp"}


@every_config
def test_state_bytes(name):
    """Whatever the context, and however narrow the rest: states are in float32 at least."""
    _, count, _, _, key_heads, value_heads, *_ = SIZES_OF[name]
    state = 3 * count // 4 * value_heads * 128 * 128
    window = 3 * count // 4 * (KERNEL - 1) * 128 * (2 * key_heads + value_heads)
    assert (round(state * 4 / MIB, 1), round(window * 2 / MIB, 1)) == STATE_MIB[name]
    for context in (1, CONTEXT):
        for itemsize, state_size in ((2, 4), (4, 4), (8, 8)):
            held = kv_bytes(published(name)[0], context, itemsize)["linear"]
            assert held == state * state_size + window * itemsize


@pytest.mark.parametrize("name", ["dense", "kernel_3", "moe"])
def test_a_cache_takes_the_bytes_that_are_counted(name, tmp_path):
    """Its layers, read to the capacity; the drafter's slot also holds hidden states."""
    _, family, config = open_model(write_qwen(name, tmp_path / "model"))
    kv = family.new_cache(config, "float32", 30, "")
    expected = kv_bytes(config, 30, 4)
    kinds = [layer.kind for layer in config.layers]
    for kind in ("linear", "full"):
        assert sum(memory.nbytes for memory, k in zip(kv.layers, kinds) if k == kind) == expected[kind]


# show --config


def show(capsys, *arguments):
    assert main(["show", *arguments]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


@every_config
def test_show_config_as_json(name, capsys):
    out = show(capsys, "--config", name, "--json", "--context", "8192")
    report = json.loads(out)
    total, mtp = PARAMETERS[name]
    assert out.count("\n") == 1 and report["model"] == name and report["family"] == "qwen35"
    assert report["parameters"] == components(name) | {"total": total, "mtp": mtp}
    assert report["bytes"] == {"bf16": 2 * total}
    linear, full = report["layers"]
    assert (linear["kind"], full["kind"]) == ("linear", "full")
    assert full["at"] == list(range(3, SIZES_OF[name][1], 4))
    assert sorted(linear["at"] + full["at"]) == list(range(SIZES_OF[name][1]))
    assert linear["value_heads"] == SIZES_OF[name][5] and full["kv_heads"] == SIZES_OF[name][3]
    assert report["kv"]["context"] == 8192 and report["kv"]["bytes"] == kv_bytes(published(name)[0], 8192, 4)
    assert report["kv"]["bytes_per_token"] == {"full": 2 * KV_BYTES[name][0], "mtp": 2 * KV_BYTES[name][1]}
    assert (report["experts"] or {}).get("count") == EXPERTS.get(name, (None,))[0]


@every_config
def test_show_config_as_text(name, capsys):
    out = show(capsys, "--config", name)
    assert out.split()[0] == name and all(f"{count:,}" in out for count in PARAMETERS[name])
    hidden, count, heads, kv_heads, key_heads, value_heads, inner, _ = SIZES_OF[name]
    assert f"hidden size {hidden}, vocabulary {VOCABULARY}, context {CONTEXT}" in out
    assert f"{key_heads} key heads of 128, {value_heads} value heads of 128; convolution of 4" in out
    assert f"{heads} heads, {kv_heads} kv heads, of 256" in out
    assert (f"feed-forward {inner}" in out) == (name not in EXPERTS) and "None" not in out
    rows = [line.split()[:2] for line in out.splitlines()]
    assert [str(3 * count // 4), "linear"] in rows and [str(count // 4), "full"] in rows
    if name in EXPERTS:
        many, used, width, shared = EXPERTS[name]
        assert f"{many} experts of width {width}, {used} a token, and one of width {shared} for all" in out
    else:
        assert "experts" not in out


@pytest.mark.parametrize("name", ["Qwen3.6-27B", "qwen3.6", "qwen3.5-0.8b-mtp"])
def test_show_names_the_configurations_there_are(name, capsys):
    assert main(["show", "--config", name]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and all(known in err for known in PARAMETERS)


@pytest.mark.parametrize("name", ["dense", "moe_int4", "moe_no_mtp"])
def test_show_a_checkpoint(name, capsys, tmp_path):
    folder = write_qwen(name, tmp_path / "model", shards=1)
    report = json.loads(show(capsys, str(folder), "--json"))
    _, family, config = open_model(folder)
    expected = parameters(family.tensors(config))
    if CONFIGS[name]["model"].get("mtp", True):
        expected["mtp"] = parameters(qwen35_mtp.tensors(qwen35_mtp.layer_config(config)))["total"]
    assert report["parameters"] == expected
    stored = read_encoded(folder / "model.safetensors")
    assert report["stored_bytes"]["total"] == sum(array.nbytes for _, array in stored.values())
    assert str(folder) in show(capsys, str(folder))


@pytest.mark.parametrize("said", [0, 1])
@pytest.mark.parametrize("mtp", [False, True])
def test_show_counts_an_mtp_layer_where_its_tensors_are(mtp, said, capsys, tmp_path):
    """Whatever the configuration says of it, and its keys and values like its parameters."""
    folder = write_qwen("dense", tmp_path / "model", mtp=mtp, mtp_num_hidden_layers=said)
    report = json.loads(show(capsys, str(folder), "--json"))
    assert ["mtp" in part for part in (report["parameters"], report["kv"]["bytes"])] == [mtp, mtp]
