"""Qwen 3.5 checkpoints become models and drafters: every layout the same numbers, every wrong one a line that says why.

As test_loading, whose helpers are used; and the text around a model: its tokenizer and its chat template.
"""

import json
import math
import shutil
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from random_qwen import CONFIGS, layers, rope, write_model, write_qwen
from test_loading import (
    DELETED,
    NASTY,
    add,
    edit_json,
    edit_tensors,
    field,
    fields,
    little_memory,
    logits,
    read_encoded,
    replaced,
    same_model,
    text_field,
    text_fields,
)
from tiny import FOLDER, emitted
from tiny import folders as gemma_folders
from tiny import pair as gemma_pair
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import minimtp
from minimtp.cache import CacheError
from minimtp.chat import Conversation
from minimtp.checkpoint import Checkpoint, CheckpointError
from minimtp.quant import Quantized
from minimtp.text import ChatTemplateError, load_chat_template, load_tokenizer

SHARED = dict(
    layer_types=layers("llf"), hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, vocab_size=40,
    rope_parameters=rope(1e4, 0.5),
)  # fmt: skip
KINDS = {
    "dense": SHARED | dict(intermediate_size=64),
    "moe": SHARED | dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=3,
                         num_experts_per_tok=2),
}  # fmt: skip
KINDS |= {"tied": KINDS["dense"] | dict(tie_word_embeddings=True), "single": KINDS["moe"] | dict(single=True)}
KINDS |= {f"{kind}_int4": KINDS[kind] | dict(int4=True, store="BF16") for kind in ("dense", "single")}
BODY = "model.language_model."
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("kind", ["dense", "moe"])


def write(folder, kind="dense", seed=1, **overrides):
    """Write the checkpoint of KINDS[kind], with changes -> its folder."""
    write_model(folder, seed, **KINDS[kind] | overrides)
    return Path(folder)


def drafts(target, count=4):
    """What its MTP layer drafts after a few tokens, with laws."""
    drafter, kv = minimtp.load_drafter("auto", target), target.new_cache()
    out = target.forward([3, 17, 0, 39], kv)
    return drafter.propose([17, 0, 39, 5], out.hidden_TD, kv, count, minimtp.Sampling(), np.linspace(0.1, 0.9, count))


def same_drafter(a, b):
    a, b = drafts(a), drafts(b)
    return a.tokens == b.tokens and np.array_equal(a.q_KV, b.q_KV)


def refused(message, call, *arguments, **keywords):
    """The call raises a CheckpointError whose message is one line, not long, and matches."""
    with pytest.raises(CheckpointError, match=message) as caught:
        call(*arguments, **keywords)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


def rename(change):
    """An edit of all names."""

    def edit(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return edit


# Right checkpoints


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["nested", "bare"])
@both
def test_every_published_layout_is_the_same_model(kind, layout, shards, tmp_path):
    plain = minimtp.load(write(tmp_path / "plain", kind))
    other = minimtp.load(write(tmp_path / "other", kind, layout=layout, shards=shards))
    assert np.array_equal(logits(plain), logits(other)) and plain.config.layers == other.config.layers
    assert same_drafter(plain, other)
    another = minimtp.load(write(tmp_path / "another", kind, seed=2))
    assert not np.array_equal(logits(plain), logits(another)) and not same_drafter(plain, another)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_random_model_loads_and_drafts(name, tmp_path):
    target = minimtp.load(write_qwen(name, tmp_path / "model"))
    assert np.isfinite(logits(target)).all()
    assert target.has_mtp == CONFIGS[name]["model"].get("mtp", True)
    if target.has_mtp:
        steps = list(minimtp.generate(target, [1, 2, 3], minimtp.load_drafter("auto", target), max_new_tokens=9))
        assert len(emitted(steps)) == 9 and steps[1].drafted == 4


def test_layers_are_as_listed_or_every_so_many_in_full(tmp_path):
    listed = write(tmp_path / "listed", layer_types=layers("llfllf"))
    for interval in (2, 3, 4, None):
        folder = shutil.copytree(listed, tmp_path / f"every-{interval}")
        text_field("layer_types", DELETED)(folder)
        if interval:
            text_field("full_attention_interval", interval)(folder)
        if interval == 3:
            assert same_model(minimtp.load(listed), minimtp.load(folder))
        else:
            refused("is missing|unknown tensor", minimtp.load, folder)


def test_a_silent_config_means_what_transformers_assumes(tmp_path):
    sizes = dict(head_dim=256, linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
                 linear_value_head_dim=128, layer_types=layers("lllf"), rope_parameters=rope(1e4, 0.25))  # fmt: skip
    said = minimtp.load(write(tmp_path / "model", **sizes))
    for name in ("head_dim", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "rms_norm_eps",
                 "linear_value_head_dim", "linear_conv_kernel_dim", "layer_types", "attention_bias", "hidden_act",
                 "attn_output_gate", "mamba_ssm_dtype", "rope_parameters.partial_rotary_factor",
                 "rope_parameters.rope_type"):  # fmt: skip
        text_field(name, DELETED)(tmp_path / "model")
    assert same_model(said, minimtp.load(tmp_path / "model"))


def test_the_three_positions_of_text_are_one(tmp_path):
    """Sections of interleaved M-RoPE share out angles between positions that are equal, so they change nothing."""
    plain = minimtp.load(write(tmp_path / "model"))
    for section, interleaved in (([1, 1, 0], False), ([2, 0, 0], True), (DELETED, DELETED)):
        text_field("rope_parameters.mrope_section", section)(tmp_path / "model")
        text_field("rope_parameters.mrope_interleaved", interleaved)(tmp_path / "model")
        assert same_model(plain, minimtp.load(tmp_path / "model"))


@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
@both
def test_other_spellings_of_the_names(kind, prefix, tmp_path):
    before = minimtp.load(write(tmp_path / "model", kind))
    edit_tensors(tmp_path / "model", rename(lambda name: name.replace(BODY, prefix)))
    assert same_model(before, minimtp.load(tmp_path / "model"))


@pytest.mark.parametrize("tower", ["model.visual.x.weight", "visual.x.weight"])
def test_the_visual_tower_is_skipped_by_name(tower, tmp_path):
    before = minimtp.load(write(tmp_path / "model"))
    nan = np.full((2, 3), np.nan, np.float32)  # skipped means unread
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update({tower: ("F32", nan)}))
    assert same_model(before, minimtp.load(tmp_path / "model"))
    name = f"{BODY}visual.x.weight"
    add(name)(tmp_path / "model")
    refused(f"unknown tensor {name!r}", minimtp.load, tmp_path / "model")


@both
def test_the_mtp_layer_is_not_read_with_its_target(kind, tmp_path):
    before = minimtp.load(write(tmp_path / "model", kind))

    def spoil(tensors):
        for name in [name for name in tensors if name.startswith("mtp.")]:
            tensors[name][1][:] = np.nan
        tensors["mtp.surprise"] = ("I64", np.zeros(3, np.int64))

    after = minimtp.load(edit_tensors(tmp_path / "model", spoil))
    assert same_model(before, after) and after.has_mtp
    refused("mtp.", minimtp.load_drafter, "auto", after)


def test_tensors_say_whether_there_is_an_mtp_layer(tmp_path):
    """Not mtp_num_hidden_layers."""
    for said in (0, 1, DELETED):
        with_one = write(tmp_path / "with")
        text_field("mtp_num_hidden_layers", said)(with_one)
        assert len(drafts(minimtp.load(with_one)).tokens) == 4
        without = write(tmp_path / "without", mtp=False)
        text_field("mtp_num_hidden_layers", said)(without)
        target = minimtp.load(without)
        assert not target.has_mtp and np.isfinite(logits(target)).all()
        refused("no drafter for .*without: no mtp.* tensors", minimtp.load_drafter, "auto", target)
        refused("without has no mtp.* tensors, so no drafter", minimtp.load_drafter, without, target)


@both
def test_experts_and_norms_in_every_float_type(kind, tmp_path):
    """A zero-centred norm is 1 more than its stored number in the run's type, not in the stored one."""
    for store in ("BF16", "F16"):
        write(tmp_path / "narrow", kind, store=store)
        write(tmp_path / "wide", kind, store=store, twin=True)
        for dtype in ("float32", "float64"):
            narrow, wide = (minimtp.load(tmp_path / name, dtype=dtype) for name in ("narrow", "wide"))
            assert same_model_but_config(narrow, wide)
            assert narrow.params.norm.dtype == dtype and np.all(narrow.params.norm - 1 != 0)


def same_model_but_config(a, b):
    return np.array_equal(logits(a), logits(b)) and same_drafter(a, b)


def test_one_tensor_for_each_expert_is_the_same_model_as_all_in_one(tmp_path):
    packed, single = (minimtp.load(write(tmp_path / kind, kind)) for kind in ("moe", "single"))
    names = {kind: read_encoded(tmp_path / kind / "model.safetensors") for kind in ("moe", "single")}
    assert f"{BODY}layers.0.mlp.experts.gate_up_proj" in names["moe"]
    assert f"{BODY}layers.0.mlp.experts.2.gate_proj.weight" in names["single"]
    assert same_model(packed, single) and same_drafter(packed, single)


def test_the_mtp_layer_alone_may_have_its_experts_one_by_one(tmp_path):
    """As FP8 repositories have them in every layer."""
    packed = minimtp.load(write(tmp_path / "moe", "moe"))
    single = read_encoded(write(tmp_path / "single", "single") / "model.safetensors")

    def mix(tensors):
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]
        tensors.update({name: value for name, value in single.items() if name.startswith("mtp.")})

    mixed = minimtp.load(edit_tensors(shutil.copytree(tmp_path / "moe", tmp_path / "mixed"), mix))
    assert same_model(packed, mixed) and same_drafter(packed, mixed)


# Heads


@pytest.mark.parametrize("layout", ["nested", "bare"])
def test_a_second_copy_of_the_tied_head_is_read_once_and_another_head_is_used(layout, tmp_path):
    folder = write(tmp_path / "model", "tied", layout=layout)
    tied, prefix = minimtp.load(folder), BODY if layout == "nested" else "model."

    def copy(tensors):
        dtype, array = tensors[f"{prefix}embed_tokens.weight"]
        tensors["lm_head.weight"] = (dtype, array.copy())

    def another(tensors):
        tensors["lm_head.weight"][1][-1, -1] += 1

    copied = minimtp.load(edit_tensors(folder, copy))
    assert tied.config.tied and same_model(tied, copied) and same_drafter(tied, copied)
    other = minimtp.load(edit_tensors(folder, another))
    assert np.array_equal((logits(other) != logits(tied)).any(0), np.arange(40) == 39)
    assert not same_drafter(tied, other)  # which has the target's head


def test_an_untied_head_is_the_one_that_is_used_by_model_and_drafter(tmp_path):
    folder = write(tmp_path / "model")
    before = minimtp.load(folder, dtype="float64")

    def negate(tensors):
        tensors["lm_head.weight"][1][:] *= -1

    after = minimtp.load(edit_tensors(folder, negate), dtype="float64")
    assert not before.config.tied and np.array_equal(logits(after), -logits(before))
    opposite = np.log(drafts(before).q_KV[0]) + np.log(drafts(after).q_KV[0])
    assert np.ptp(opposite) < 1e-9


@pytest.mark.parametrize("place", ["text_config.tie_word_embeddings", "tie_word_embeddings"])
def test_a_tied_head_may_be_said_inside_or_outside(place, tmp_path):
    folder = write(tmp_path / "model", "tied")
    for other in {"text_config.tie_word_embeddings", "tie_word_embeddings"} - {place}:
        edit_json(folder, other, DELETED)
    assert minimtp.load(folder).config.tied
    edit_json(folder, place, DELETED)
    refused("'lm_head.weight' is missing", minimtp.load, folder)  # untied, unless said


# Int4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["dense_int4", "single_int4"])
def test_int4_is_the_same_numbers_packed_dense_or_as_floats(kind, dtype, tmp_path):
    write(tmp_path / "int4", kind)
    write(tmp_path / "floats", kind, twin=True)
    kept = [minimtp.load(tmp_path / "int4", dtype=dtype, keep=keep) for keep in ("packed", "dense", "auto")]
    floats = minimtp.load(tmp_path / "floats", dtype=dtype)
    assert all(np.array_equal(logits(floats), logits(model)) and logits(model).dtype == dtype for model in kept)
    assert all(same_drafter(floats, model) for model in kept)


@pytest.mark.parametrize("kind", ["dense_int4", "single_int4"])
def test_what_the_releases_do_not_quantize_is_kept_as_stored(kind, tmp_path):
    params = minimtp.load(write(tmp_path / "model", kind), keep="packed").params
    packed = {"in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
    packed |= {"gate_proj", "up_proj", "down_proj"} if kind == "dense_int4" else {
        f"{which}_{part}_proj" for which in ("experts", "shared_expert") for part in ("gate", "up", "down")
    }  # fmt: skip
    quantized, vectors = set(), set()
    for w in (*params.layers, params):
        for place, value in vars(w).items():
            first = value[0] if isinstance(value, list) and place != "layers" else value
            (quantized if isinstance(first, Quantized) else vectors if isinstance(first, np.ndarray) else set()).add(
                place
            )
    assert quantized == packed
    norms = {"input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "gated_norm", "norm"}
    assert vectors == norms | {"conv1d", "A_log", "dt_bias"}
    drafter = minimtp.load_drafter("auto", minimtp.load(tmp_path / "model", keep="packed"), keep="packed")
    assert not any(isinstance(value, Quantized) for value in vars(drafter.params.layers[0]).values())


def test_an_mtp_layer_may_be_quantized_too(tmp_path):
    """Presence of tensors says what is; the list of what is ignored is not asked."""
    target = minimtp.load(write(tmp_path / "model", "dense_int4"))
    body = read_encoded(tmp_path / "model" / "model.safetensors")

    def quantize(tensors):
        del tensors["mtp.layers.0.self_attn.o_proj.weight"]
        for part in ("packed", "scale", "shape"):
            name = f"layers.2.self_attn.o_proj.weight_{part}"
            tensors[f"mtp.{name.replace('layers.2', 'layers.0')}"] = body[BODY + name]

    quantized = minimtp.load(edit_tensors(shutil.copytree(tmp_path / "model", tmp_path / "other"), quantize))
    assert same_model(target, quantized) and not same_drafter(target, quantized)


# Every tensor is used exactly once. Damages: change(tensors, name) -> nothing; what the refusal must say of the name


def remove(tensors, name):
    del tensors[name]


def misname(tensors, name):
    tensors[name + "x"] = tensors.pop(name)


def shorten(tensors, name):
    dtype, array = tensors[name]
    tensors[name] = (dtype, array[:-1].copy())


def wrap(tensors, name):
    dtype, array = tensors[name]
    tensors[name] = (dtype, array[None])


def spoil(tensors, name):
    """One NaN in the middle."""
    dtype, array = tensors[name]
    array.reshape(-1)[array.size // 2] = 0x7FC0 if dtype == "BF16" else np.nan


def make_infinite(tensors, name):
    dtype, array = tensors[name]
    array.reshape(-1)[-1] = 0xFF80 if dtype == "BF16" else -np.inf


def make_integers(tensors, name):
    tensors[name] = ("I32", np.zeros(tensors[name][1].shape, np.int32))


def repeat(tensors, name):
    tensors[f"another.{name}"] = tensors[name]


DAMAGES = {
    remove: "'{}' is missing",
    misname: "'{}' is missing",
    shorten: r"'{}' is \[",
    wrap: r"'{}' is \[1, ",
    spoil: "'{}': NaN or infinite",
    make_infinite: "'{}': NaN or infinite",
    make_integers: "'{}'.* I32",
    repeat: "unknown tensor 'another.{}'",
}


PARTS = {  # kind -> which of its tensors are damaged
    "dense": lambda name: ".layers.1." not in name,  # like layer 0
    "tied": lambda name: "layers" not in name,
    "moe": lambda name: ".mlp." in name and ".layers.1." not in name,
    "single": lambda name: ".experts." in name and ".layers.1." not in name,
}


def as_looked_for(name, damage):
    """Where experts are not all in one tensor, one tensor for each is looked for."""
    one_by_one = name.replace("experts.gate_up_proj", "experts.0.gate_proj.weight")
    return (
        one_by_one.replace("experts.down_proj", "experts.0.down_proj.weight") if damage in (remove, misname) else name
    )


def loading(folder, name):
    """The call that reads a tensor of that name."""
    if not name.startswith("mtp."):
        return lambda: minimtp.load(folder)
    target = minimtp.load(folder)
    return lambda: minimtp.load_drafter("auto", target)


@pytest.mark.parametrize("kind, damage", [
    *(("moe", damage) for damage in DAMAGES),
    *((kind, damage) for i, damage in enumerate(DAMAGES) for j, kind in enumerate(["dense", "tied", "single"])
      if (i + j) % 2 == 0),
])  # fmt: skip
def test_every_tensor_is_used_exactly_once(kind, damage, tmp_path):
    folder = write(tmp_path / "model", kind)
    whole = read_encoded(folder / "model.safetensors")
    for name in filter(PARTS[kind], whole):
        if damage is repeat and name.startswith("mtp."):
            continue  # the name of the copy is not the MTP layer's
        edit_tensors(folder, lambda tensors: damage(tensors, name))  # noqa: B023
        refused(DAMAGES[damage].format(as_looked_for(name, damage)), loading(folder, name))
        edit_tensors(folder, lambda tensors: (tensors.clear(), tensors.update(copied(whole))))
    assert np.isfinite(logits(minimtp.load(folder))).all()


def copied(tensors):
    return {name: (dtype, array.copy()) for name, (dtype, array) in tensors.items()}


@pytest.mark.parametrize("kind", ["dense_int4", "single_int4"])
def test_every_part_of_a_packed_tensor_is_used_exactly_once(kind, tmp_path):
    folder = write(tmp_path / "model", kind)
    whole = read_encoded(folder / "model.safetensors")
    where = ".layers.0." if kind == "dense_int4" else ".layers.0.mlp.experts.2."
    names = [name for name in whole if name.endswith(("_packed", "_scale", "_shape")) and where in name]
    for name in names:
        stem = name.rsplit("_", 1)[0]
        damages = {remove: stem, misname: stem, wrap: name, shorten: name, repeat: f"unknown tensor 'another.{name}"}
        damages |= {spoil: f"{name}': NaN"} if name.endswith("_scale") else {}
        for damage, message in damages.items():
            edit_tensors(folder, lambda tensors: damage(tensors, name))  # noqa: B023
            refused(message, minimtp.load, folder)
            edit_tensors(folder, lambda tensors: (tensors.clear(), tensors.update(copied(whole))))
    assert len(names) == 3 * (6 if kind == "dense_int4" else 3)


UNKNOWN = [
    "layers.3.input_layernorm.weight", "layers.0.self_attn.q_proj.weight", "layers.2.linear_attn.A_log",
    "layers.0.linear_attn.conv1d.bias", "layers.0.mlp.experts.0.gate_proj.weight", "layers.0.mlp.gate.weight",
    "embed_tokens.bias", "mtp.fc.weight",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_tensor_too_many_is_named(name, tmp_path):
    folder = write(tmp_path / "model")
    add(BODY + name)(folder)
    refused(f"unknown tensor '{BODY}{name}'", minimtp.load, folder)


@pytest.mark.parametrize(
    "name", ["mtp.layers.1.input_layernorm.weight", "mtp.embed_tokens.weight", "mtp.lm_head.weight"]
)
def test_a_tensor_too_many_in_the_mtp_layer_is_named(name, tmp_path):
    folder = write(tmp_path / "model")
    add(name)(folder)
    refused(f"unknown tensor '{name}'", minimtp.load_drafter, "auto", minimtp.load(folder))


def test_experts_packed_and_one_by_one_are_too_many(tmp_path):
    single = read_encoded(write(tmp_path / "single", "single") / "model.safetensors")
    folder, name = write(tmp_path / "moe", "moe"), f"{BODY}layers.1.mlp.experts.2.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: single[name]}))
    refused(f"unknown tensor '{name}'", minimtp.load, folder)


@pytest.mark.parametrize("expert", [0, 2])
@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_one_expert_that_is_missing_is_named(part, expert, tmp_path):
    folder, name = write(tmp_path / "model", "single"), f"{BODY}layers.1.mlp.experts.{expert}.{part}_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    refused(f"'{name}' is missing", minimtp.load, folder)


# Wrong configurations

INTS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
        "linear_conv_kernel_dim", "max_position_embeddings"]  # fmt: skip
MOE_INTS = ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
FLOATS = ["rms_norm_eps", "rope_parameters.rope_theta", "rope_parameters.partial_rotary_factor"]
OPTIONAL = ["head_dim", *(name for name in INTS if name.startswith("linear_"))]
REQUIRED = {
    "dense": [*(name for name in INTS if name not in OPTIONAL), "intermediate_size", "rope_parameters",
              "rope_parameters.rope_theta"],
    "moe": MOE_INTS,
}  # fmt: skip
NO_INT = ["3", "", -1, 0, 8.0, 2**31, 2**70, math.nan, True, [8], {}]
NO_FLOAT = ["1.0", 0, -1, -0.5, math.nan, math.inf, -math.inf, True, [1.0], {}, 10**400]
WRONG_VALUES = {
    "dense": [
        *((name, bad) for name in (*INTS, "intermediate_size") for bad in NO_INT),
        *((name, bad) for name in FLOATS for bad in NO_FLOAT),
        *(("tie_word_embeddings", bad) for bad in (1, 0, "true", [], math.nan)),
        *(("mtp_num_hidden_layers", bad) for bad in ("1", -1, 1.0, 2**70, [1], True)),
        *(("layer_types", bad) for bad in (3, "full_attention", {}, True)),
        *(("rope_parameters", bad) for bad in (3, "default", [], True)),
    ],
    "moe": [(name, bad) for name in MOE_INTS for bad in NO_INT],
}


@both
def test_malformed_values_are_refused_by_their_field(kind, tmp_path):
    folder = write(tmp_path / "model", kind)
    right = (folder / "config.json").read_text()
    missing = [(name, bad) for name in REQUIRED[kind] for bad in (None, DELETED)]
    for name, bad in [*WRONG_VALUES[kind], *missing]:
        text_field(name, bad)(folder)
        refused(f"config: .*{name.split('.')[-1]}", minimtp.load, folder)
        (folder / "config.json").write_text(right)
    assert np.isfinite(logits(minimtp.load(folder))).all()


@pytest.mark.parametrize("name, bad", [("mrope_section", bad) for bad in ("abc", 3, [1], [1, 1, -1], [1, 1, 0.5], {})]
                         + [("mrope_interleaved", bad) for bad in ("no", 1, [])])  # fmt: skip
def test_malformed_sections_of_positions_are_refused(name, bad, tmp_path):
    """Though no number of text depends on them."""
    folder = write(tmp_path / "model")
    text_field(f"rope_parameters.{name}", bad)(folder)
    refused(f"config: .*{name}", minimtp.load, folder)


@pytest.mark.parametrize("bad", NO_INT)
def test_a_malformed_interval_is_refused(bad, tmp_path):
    folder = write(tmp_path / "model")
    text_fields(layer_types=None, full_attention_interval=bad)(folder)
    refused("config: full_attention_interval", minimtp.load, folder)


@both
def test_huge_sizes_cost_nothing(kind, tmp_path):
    folder = write(tmp_path / "model", kind)
    right = (folder / "config.json").read_text()
    for name in [*INTS, *(MOE_INTS if kind == "moe" else ["intermediate_size"])]:
        if name == "max_position_embeddings":
            continue  # costs nothing by itself
        text_field(name, 2**31 - 1)(folder)
        with little_memory():
            refused("config: |expected|is missing", minimtp.load, folder)
        (folder / "config.json").write_text(right)


ROPE = "rope_parameters"
WRONG_CONFIGS = {
    "model type of another family": (field("model_type", "qwen3_next"), "unknown model type 'qwen3_next'"),
    "no model type": (field("model_type", DELETED), "unknown model type None"),
    "model type a list": (field("model_type", ["qwen3_5"]), r"unknown model type \['qwen3_5'\]"),
    "text config a list": (field("text_config", []), "text_config"),
    "no text config": (field("text_config", DELETED), "text_config is missing"),
    "dense as experts": (field("model_type", "qwen3_5_moe"), "num_experts is missing"),
    "an unknown layer type": (text_field("layer_types", [*layers("ll"), "sliding_attention"]),
                              "layer_types must name 3 layers, each one of linear_attention, full_attention"),
    "too few layer types": (text_field("layer_types", layers("lf")), "layer_types must name 3 layers"),
    "too many layer types": (text_field("layer_types", layers("llff")), "layer_types must name 3 layers"),
    "no layer types": (text_field("layer_types", []), "layer_types must name 3 layers"),
    "layer types of tables": (text_field("layer_types", [{}, [], None]), "layer_types"),
    "other layer types": (text_field("layer_types", layers("lff")), r"'model.language_model.layers.1.* is missing"),
    "more layers than are believed": (text_fields(layer_types=None, num_hidden_layers=1001),
                                      "num_hidden_layers 1001 is more than 1000"),
    "heads not in groups": (text_field("num_key_value_heads", 3), "4 heads for 3 kv heads"),
    "more kv heads than heads": (text_field("num_key_value_heads", 8), "4 heads for 8 kv heads"),
    "linear heads not in groups": (text_field("linear_num_key_heads", 3), "4 linear value heads for 3 key heads"),
    "yarn": (text_field(f"{ROPE}.rope_type", "yarn"), "rope_type 'yarn' is not supported"),
    "proportional rope": (text_field(f"{ROPE}.rope_type", "proportional"), "rope_type 'proportional'"),
    "rope type a list": (text_field(f"{ROPE}.rope_type", ["default"]), r"rope_type \['default'\]"),
    "an unknown rope field": (text_field(f"{ROPE}.beta_fast", 32), "rope field 'beta_fast'"),
    "a factor": (text_field(f"{ROPE}.factor", 4.0), "rope field 'factor'"),
    "rope by layer type": (text_field(f"{ROPE}.full_attention", {"rope_theta": 1e4}), "rope field 'full_attention'"),
    "the old name of rope type": (text_field(f"{ROPE}.type", "default"), "rope field 'type'"),
    "old rope scaling": (text_field("rope_scaling", {"rope_type": "yarn", "factor": 4.0}), "rope_scaling"),
    "an odd part that rotates": (text_field(f"{ROPE}.partial_rotary_factor", 0.375), "partial_rotary_factor 0.375"),
    "nothing that rotates": (text_field(f"{ROPE}.partial_rotary_factor", 0.1), "partial_rotary_factor 0.1"),
    "more than all that rotates": (text_field(f"{ROPE}.partial_rotary_factor", 1.5), "partial_rotary_factor 1.5"),
    "theta below 1": (text_field(f"{ROPE}.rope_theta", 0.5), "rope_theta 0.5"),
    "biases": (text_field("attention_bias", True), "attention_bias True"),
    "activation": (text_field("hidden_act", "gelu"), "hidden_act 'gelu'"),
    "attention without gate": (text_field("attn_output_gate", False), "attn_output_gate False"),
    "another gate": (text_field("output_gate_type", "sigmoid"), "output_gate_type 'sigmoid'"),
    "a narrow state": (text_field("mamba_ssm_dtype", "bfloat16"), "mamba_ssm_dtype 'bfloat16'"),
    "some layers dense": (text_field("mlp_only_layers", [0]), r"mlp_only_layers \[0\]"),
    "image token a text": (field("image_token_id", "x"), "image_token_id"),
    "video token below 0": (field("video_token_id", -1), "video_token_id"),
    "other sizes": (text_field("hidden_size", 64), r"embed_tokens.weight' is \[40, 32\], expected \[40, 64\]"),
    "other vocabulary": (text_field("vocab_size", 41), r"embed_tokens.weight' is \[40, 32\], expected \[41, 32\]"),
    "another kernel": (text_field("linear_conv_kernel_dim", 3),
                       r"conv1d.weight' is \[64, 1, 4\], expected \[64, 1, 3\]"),
    "another state": (text_field("linear_value_head_dim", 4),
                      r"in_proj_qkv.weight' is \[64, 32\], expected \[48, 32\]"),
}  # fmt: skip
WRONG_EXPERTS = {
    "more chosen than there are": (text_field("num_experts_per_tok", 4), "num_experts_per_tok 4 of 3 experts"),
    "fewer than stored": (text_field("num_experts", 2), r"mlp.gate.weight' is \[3, 32\], expected \[2, 32\]"),
    "of another width": (text_field("moe_intermediate_size", 16),
                         r"gate_up_proj' is \[3, 64, 32\], expected \[3, 32, 32\]"),
    "shared of another width": (text_field("shared_expert_intermediate_size", 16),
                                r"shared_expert.gate_proj.weight' is \[32, 32\], expected \[16, 32\]"),
    "as a dense model": (field("model_type", "qwen3_5"), "intermediate_size is missing"),
}  # fmt: skip
WRONG_DRAFTERS = {
    "two layers": (text_field("mtp_num_hidden_layers", 2), "mtp_num_hidden_layers 2 is not supported"),
    "an embedding of its own": (text_field("mtp_use_dedicated_embeddings", True), "mtp_use_dedicated_embeddings"),
}


@pytest.mark.parametrize("case", [*WRONG_CONFIGS, *WRONG_EXPERTS])
def test_a_wrong_configuration_is_refused(case, tmp_path):
    (change, message), kind = (WRONG_CONFIGS | WRONG_EXPERTS)[case], "dense" if case in WRONG_CONFIGS else "moe"
    folder = write(tmp_path / "model", kind)
    change(folder)
    refused(message, minimtp.load, folder)


def test_a_bare_configuration_is_checked_alike(tmp_path):
    for name, bad, message in (("vocab_size", 0, "vocab_size is 0"), ("attention_bias", True, "attention_bias True")):
        folder = write(tmp_path / "model", layout="bare")
        edit_json(folder, name, bad)
        refused(message, minimtp.load, folder)


@pytest.mark.parametrize("case", WRONG_DRAFTERS)
def test_an_mtp_layer_that_is_not_supported_is_refused_and_its_target_is_not(case, tmp_path):
    folder = write(tmp_path / "model")
    change, message = WRONG_DRAFTERS[case]
    change(folder)
    target = minimtp.load(folder)
    refused(message, minimtp.load_drafter, "auto", target)
    assert np.isfinite(logits(target)).all()


def test_a_kernel_of_one_input_has_no_window(tmp_path):
    target = minimtp.load(write(tmp_path / "model", linear_conv_kernel_dim=1))
    kv = target.new_cache()
    whole = target.forward([1, 2, 3, 4], target.new_cache()).logits_TV
    parts = [target.forward(ids, kv).logits_TV for ids in ([1, 2], [3], [4])]
    assert np.array_equal(np.concatenate(parts), whole)


@both
def test_any_field_may_be_any_nasty_value(kind, tmp_path):
    """A working model or a refusal, never another exception, NaN, or much memory; by chance, the same every time."""
    folder = write(tmp_path / "model", kind, vocab_size=20)
    right = json.loads((folder / "config.json").read_text())
    config, paths, chance = minimtp.load(folder).config, list(fields(right)), np.random.RandomState(5)
    for i in chance.permutation(len(paths) * len(NASTY))[:60]:
        value = NASTY[i % len(NASTY)]
        (folder / "config.json").write_text(json.dumps(replaced(right, paths[i // len(NASTY)], value)))
        try:
            with little_memory(), warnings.catch_warnings():
                warnings.simplefilter("error")
                target = minimtp.load(folder)
                assert target.config == config or np.isfinite(logits(target, [1, 2, 3])).all()
        except ValueError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000


# Using a model wrongly


def test_placeholders_of_images_and_videos_are_refused_and_never_made(tmp_path):
    folder = write(tmp_path / "model")
    before = minimtp.load(folder)
    for name, token in (("image_token_id", 7), ("video_token_id", 9)):
        edit_json(folder, name, token)
    target = minimtp.load(folder)
    assert target.config.placeholders == {7: "an image", 9: "a video"} and same_numbers(before, target)
    kv = target.new_cache()
    for ids, message in (([1, 7], "token 7 stands for an image"), ([9], "token 9 stands for a video")):
        with pytest.raises(ValueError, match=message):
            target.forward(ids, kv)
        with pytest.raises(ValueError, match=message):
            next(minimtp.generate(target, ids, cache=kv))
    assert kv.length == 0
    drafter, hot = minimtp.load_drafter("auto", target), minimtp.Sampling(temperature=50.0)
    steps = list(minimtp.generate(target, [1], drafter, sampling=hot, max_new_tokens=300))
    tokens = {*emitted(steps), *(token for step in steps for token in step.draft.tokens)}
    assert len(tokens) == 38 and not tokens & {7, 9}


def same_numbers(a, b):
    return np.array_equal(logits(a, [1, 2, 3]), logits(b, [1, 2, 3]))


def test_placeholders_beyond_the_vocabulary_are_none(tmp_path):
    assert minimtp.load(write(tmp_path / "nested")).config.placeholders == {}
    assert minimtp.load(write(tmp_path / "bare", layout="bare")).config.placeholders == {}


def test_a_drafter_of_another_model_is_refused(tmp_path):
    target = minimtp.load(write(tmp_path / "model"))
    for kind, change in (("moe", {}), ("tied", {}), ("dense", dict(head_dim=16)), ("dense", dict(vocab_size=41))):
        other = write(tmp_path / "other", kind, **change)
        refused("does not fit its target", minimtp.load_drafter, other, target)
        shutil.rmtree(other)
    assert same_drafter(target, minimtp.load(write(tmp_path / "other")))


def test_a_drafter_of_another_family_is_refused(tmp_path):
    qwen, (gemma, _) = minimtp.load(write(tmp_path / "model")), gemma_pair("window_4")
    refused("does not fit|is not a drafter", minimtp.load_drafter, gemma_folders("window_4")[1], qwen)
    refused("does not fit|is not a drafter", minimtp.load_drafter, tmp_path / "model", gemma)


def test_readings_of_the_mtp_layer_are_named(tmp_path):
    target = minimtp.load(write(tmp_path / "model"))
    with pytest.raises(ValueError, match="hidden is 'x', expected one of post-norm, pre-norm"):
        minimtp.load_drafter("auto", target, hidden="x")


@both
def test_a_cache_of_another_family_is_refused(kind, tmp_path):
    qwen, (gemma, _) = minimtp.load(write(tmp_path / "model", kind)), gemma_pair("window_4")
    for mine, other in ((qwen, gemma), (gemma, qwen)):
        kv = other.new_cache()
        with pytest.raises(CacheError, match="belongs to another model"):
            mine.forward([1, 2], kv)
        assert kv.length == 0
        other.forward([1, 2], kv)
        kv.save(tmp_path / "cache.safetensors")
        with pytest.raises(CacheError, match="cache of another model"):
            mine.load_cache(tmp_path / "cache.safetensors")
        assert other.load_cache(tmp_path / "cache.safetensors").tokens == [1, 2]


def test_a_cache_belongs_to_one_model(tmp_path):
    target = minimtp.load(write(tmp_path / "model"))
    kv = target.new_cache()
    target.forward([1, 2, 3], kv)
    kv.save(tmp_path / "cache.safetensors")
    for other in (
        minimtp.load(tmp_path / "model", dtype="float64"),
        minimtp.load(write(tmp_path / "seed", seed=2)),
        minimtp.load(write(tmp_path / "moe", "moe")),
    ):
        with pytest.raises(CacheError, match="cache of another model"):
            other.load_cache(tmp_path / "cache.safetensors")
    again = minimtp.load(tmp_path / "model", keep="packed").load_cache(tmp_path / "cache.safetensors")
    assert np.array_equal(target.forward([4], kv).logits_TV, target.forward([4], again).logits_TV)


# The tokenizer: bytes, split beforehand as published, composed characters, special tokens at the end

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "! !", "s s", "' s", "Ċ Ċ", "Ã ©", "u s", "e r", "us er"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"]
ADDED = ["<think>", "</think>", "<tool_call>"]  # tokens, but part of the text
TEXTS = ["hello hello", "Hello there", " leading", "trailing ", "a  b   c", "a\nb\n\nc\n", "\t\tx", "\r\n", "café",
         "naïve Ångström", "日本語のテキスト", "🙂", "🙂👩\u200d👩\u200d👧x", "\u200b", "नमस्ते", "don't", "12 345",
         "x\u00a0y", "!!\n", "<think>\nhm\n</think>\n\nhello", "<0x41>", "\U0010ffff"]  # fmt: skip


def write_tokenizer(folder):
    """A small tokenizer.json of the published form -> how many tokens it has."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(merge.split()) for merge in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


@cache
def tokenizer():
    folder = Path(FOLDER.name) / "qwen-tokenizer"
    return load_tokenizer(Checkpoint(folder, {}, {}), write_tokenizer(folder) + 50)


def test_special_tokens_come_last_and_none_is_added():
    size = tokenizer().backend.get_vocab_size()
    ids = [tokenizer().id(token) for token in (*SPECIAL, *ADDED)]
    assert ids == list(range(size - len(ids), size))
    for text in ("", "hello", "<|im_start|>user\nhello<|im_end|>"):
        assert tokenizer().encode(text) == tokenizer().encode(text, special=False)
    assert tokenizer().encode("") == []


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text):
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids) == text == "".join(map(tokenizer().stream(), ids))


SPLITS = {
    "hello hello": ["hello", "Ġhello"], "12": ["1", "2"], "!!": ["!!"], "'ss": ["'s", "s"], "x ss": ["x", "Ġ", "ss"],
    "\n\n": ["ĊĊ"], "x\n\nhello": ["x", "ĊĊ", "hello"], "cafe\u0301": ["c", "a", "f", "Ã©"],
    "he  hello": ["he", "Ġ", "Ġhello"], "<|im_start|>user": ["<|im_start|>", "user"],
    "<think>hello": ["<think>", "hello"],
}  # fmt: skip


@pytest.mark.parametrize("text", SPLITS)
def test_text_is_split_as_published(text):
    """Digits one by one, a mark with its letter, at most one space before a word; never a merge across."""
    assert [tokenizer().token(id) for id in tokenizer().encode(text)] == SPLITS[text]


def test_characters_are_composed():
    assert tokenizer().encode("cafe\u0301") == tokenizer().encode("café")
    assert tokenizer().decode(tokenizer().encode("e\u0301")) == "é"


def test_special_tokens_are_hidden_and_added_ones_are_text():
    text = "<|im_start|>user\n<think>hello</think><|im_end|>\n<|endoftext|>"
    ids = tokenizer().encode(text)
    assert tokenizer().decode(ids, special=True) == text
    assert tokenizer().decode(ids) == "user\n<think>hello</think>\n"
    assert "".join(map(tokenizer().stream(special=True), ids)) == text


def test_a_character_of_several_bytes_is_streamed_whole():
    step, ids = tokenizer().stream(), tokenizer().encode("語🙂")
    assert len(ids) == 7 and [step(id) for id in ids] == ["", "", "語", "", "", "", "🙂"]


def test_a_model_may_have_more_tokens_than_its_tokenizer_but_not_fewer(tmp_path):
    size = write_tokenizer(tmp_path)
    assert load_tokenizer(Checkpoint(tmp_path, {}, {}), size) and load_tokenizer(Checkpoint(tmp_path, {}, {}), size + 1)
    refused(
        f"tokenizer.json: {size} tokens, the model has {size - 1}",
        load_tokenizer,
        Checkpoint(tmp_path, {}, {}),
        size - 1,
    )


# The chat template. Like the published one in what it writes of turns, thoughts and tools, and in what it asks of Jinja

TEMPLATE = r"""
{%- set count = namespace(images=0, last_question=-1) %}
{%- macro written(content, in_system=false) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image_url' in part %}
                {%- if in_system %}
                    {{- raise_exception('A system message holds text only.') }}
                {%- endif %}
                {%- set count.images = count.images + 1 %}
                {{- 'Picture ' ~ count.images ~ ': ' if number_pictures is defined and number_pictures else '' }}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.text is defined %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception('Unknown part: ' ~ part | tojson) }}
            {%- endif %}
        {%- endfor %}
    {%- elif content is not none and content is not undefined %}
        {{- raise_exception('Content must be text or parts.') }}
    {%- endif %}
{%- endmacro %}
{%- macro called(call, apart) %}
    {%- set call = call.function if call.function is defined else call %}
    {{- ('\n\n' if apart else '') ~ '<tool_call>\n<function=' ~ call.name ~ '>\n' }}
    {%- for name, value in (call.arguments or {}) | items %}
        {{- '<parameter=' + name + '>\n' }}
        {%- set plain = value is string or not (value is mapping or value is sequence) %}
        {{- value | string if plain else value | tojson | safe }}
        {{- '\n</parameter>\n' }}
    {%- endfor %}
    {{- '</function>\n</tool_call>' }}
{%- endmacro %}
{%- if not messages %}
    {{- raise_exception('There is nothing to answer.') }}
{%- endif %}
{%- set system = written(messages[0].content, true) | trim if messages[0].role == 'system' else '' %}
{%- if tools and tools is iterable and tools is not mapping %}
    {{- '<|im_start|>system\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' ~ tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>' ~ ('\n\n' ~ system if system else '') ~ '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if count.last_question < 0 and message.role == 'user' %}
        {%- set text = written(message.content) | trim %}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
            {%- set count.last_question = messages | length - 1 - loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- set count.images = 0 %}
{%- if count.last_question < 0 %}
    {{- raise_exception('There is no question.') }}
{%- endif %}
{%- for message in messages %}
    {%- set text = written(message.content) | trim if message.role != 'system' else '' %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('A system message comes first.') }}
        {%- endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + text + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in text %}
            {%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set text = text.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>' ~ message.role ~ '\n' }}
        {%- if loop.index0 > count.last_question %}
            {{- '<think>\n' ~ thought | trim ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- text }}
        {%- for call in message.tool_calls or [] %}
            {{- called(call, text and loop.first) if loop.first else '\n' ~ called(call, false) }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if not (loop.previtem and loop.previtem.role == 'tool') }}
        {{- '\n<tool_response>\n' ~ text ~ '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- else %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""
SYSTEM, USER, ANSWER, END = "<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
THINK, QUIET = "<think>\n", "<think>\n\n</think>\n\n"
GO = ANSWER + THINK
HELLO, BRIEF = {"role": "user", "content": " Hello\n"}, {"role": "system", "content": " Be brief. "}
HOT, HELLO_USER = {"role": "user", "content": "Hot?"}, f"{USER}Hello{END}"
WEATHER = {"type": "function", "function": {"name": "weather", "description": 'How "hot" is <it>? é', "parameters": {}}}
WRITTEN_WEATHER = (
    '{"type": "function", "function": {"name": "weather", "description": "How \\"hot\\" is <it>? é", "parameters": {}}}'
)


def said(content, **more):
    return {"role": "assistant", "content": content} | more


def result(content):
    return {"role": "tool", "content": content}


def call(function, **arguments):
    return {"type": "function", "function": {"name": function, "arguments": arguments}}


def parameter(name, text):
    return f"<parameter={name}>\n{text}\n</parameter>\n"


def written_call(function, *parameters):
    return f"<tool_call>\n<function={function}>\n{''.join(parameters)}</function>\n</tool_call>"


RENDERED = {
    "a question": ([HELLO], {}, HELLO_USER + GO),
    "thinking on": ([HELLO], dict(enable_thinking=True), HELLO_USER + GO),
    "thinking off": ([HELLO], dict(enable_thinking=False), HELLO_USER + ANSWER + QUIET),
    "system": ([BRIEF, HELLO], {}, f"{SYSTEM}Be brief.{END}{HELLO_USER}{GO}"),
    "no answer asked for": (
        [HELLO, said("Hi")], dict(add_generation_prompt=False), f"{HELLO_USER}{ANSWER}{QUIET}Hi{END}",
    ),
    "thoughts of earlier answers": (
        [HELLO, said("<think>\nhm\n</think>\n\nHi "), HOT, said("Yes", reasoning_content=" a\n")],
        dict(add_generation_prompt=False),
        f"{HELLO_USER}{ANSWER}Hi{END}{USER}Hot?{END}{ANSWER}<think>\na\n</think>\n\nYes{END}",
    ),
    "thoughts without their beginning": (
        [HELLO, said("hm</think>Hi")], dict(add_generation_prompt=False),
        f"{HELLO_USER}{ANSWER}<think>\nhm\n</think>\n\nHi{END}",
    ),
    "tools": (
        [BRIEF, HELLO], dict(tools=[WEATHER]),
        f"{SYSTEM}<tools>\n{WRITTEN_WEATHER}\n</tools>\n\nBe brief.{END}{HELLO_USER}{GO}",
    ),
    "tools, and no system message": (
        [HELLO], dict(tools=[WEATHER, WEATHER]),
        f"{SYSTEM}<tools>\n{WRITTEN_WEATHER}\n{WRITTEN_WEATHER}\n</tools>{END}{HELLO_USER}{GO}",
    ),
    "no tools": ([HELLO], dict(tools=[]), HELLO_USER + GO),
    "a call and its results": (
        [HOT, said("", tool_calls=[call("weather", city="Köln <b>", days=[1, 2], where={"a": None, "b": "é"}, n=3,
                                        x=1.5, t=True, s=None)]), result("hot"), result('{"a": 1}')], {},
        f"{USER}Hot?{END}{ANSWER}{QUIET}" + written_call(
            "weather", parameter("city", "Köln <b>"), parameter("days", "[1, 2]"),
            parameter("where", '{"a": null, "b": "é"}'), parameter("n", "3"), parameter("x", "1.5"),
            parameter("t", "True"), parameter("s", "None"),
        ) + f"{END}<|im_start|>user\n<tool_response>\nhot\n</tool_response>\n<tool_response>\n"
        f'{{"a": 1}}\n</tool_response>{END}{GO}',
    ),
    "two calls in earlier turns": (
        [HOT, said("Let me see.", tool_calls=[call("weather", city="A"), {"name": "clock"}]), result("hot"), HELLO], {},
        f"{USER}Hot?{END}{ANSWER}Let me see.\n\n{written_call('weather', parameter('city', 'A'))}\n"
        f"{written_call('clock')}{END}<|im_start|>user\n<tool_response>\nhot\n</tool_response>{END}{HELLO_USER}{GO}",
    ),
    "a result that the user wrote": (
        [HOT, said("a"), {"role": "user", "content": "<tool_response>\nb\n</tool_response>"}], {},
        f"{USER}Hot?{END}{ANSWER}{QUIET}a{END}{USER}<tool_response>\nb\n</tool_response>{END}{GO}",
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {},
              f"{USER}ab{END}{GO}"),
    "pictures": (
        [{"role": "user", "content": [{"type": "image"}, {"image_url": "x"}]}, said(None), HELLO],
        dict(number_pictures=True),
        f"{USER}Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|><|image_pad|>"
        f"<|vision_end|>{END}{ANSWER}{END}{HELLO_USER}{GO}",
    ),
}  # fmt: skip
REFUSED = {
    "nothing": ([], "There is nothing to answer"),
    "a late system message": ([HELLO, BRIEF], "A system message comes first"),
    "an unknown role": ([HELLO, {"role": "robot", "content": "x"}], "Unknown role: robot"),
    "a picture in a system message": ([{"role": "system", "content": [{"type": "image"}]}, HELLO], "holds text only"),
    "a number": ([{"role": "user", "content": 3}], "Content must be text or parts"),
    "an unknown part": ([{"role": "user", "content": [{"type": "sound"}]}], 'Unknown part: {"type": "sound"}'),
    "no question": ([said("Hi")], "There is no question"),
}


@pytest.fixture
def template_of(tmp_path):
    """A function: the source of a chat template -> ChatTemplate, as found in a folder."""

    def load(source):
        (tmp_path / "chat_template.jinja").write_text(source)
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}')
        return load_chat_template(Checkpoint(tmp_path, {}, {}))

    return load


@pytest.mark.parametrize("case", RENDERED)
def test_conversations_are_written_as_transformers_writes_them(case, template_of):
    messages, options, expected = RENDERED[case]
    before = json.dumps(messages)
    assert template_of(TEMPLATE).render(messages, **options) == expected
    assert json.dumps(messages) == before


@pytest.mark.parametrize("case", REFUSED)
def test_the_template_refuses_in_its_own_words(case, template_of):
    messages, words = REFUSED[case]
    with pytest.raises(ChatTemplateError, match=f"^chat template: .*{words}"):
        template_of(TEMPLATE).render(messages)


# What templates ask of Jinja -> what transformers 5.22 makes of it
FEATURES = {
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "3",
    "{% set n = 0 %}{% for m in messages %}{% set n = n + 1 %}{% endfor %}{{ n }}": "0",
    "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role[0] }}{% endfor %}": "0u1a2u",
    "{% for m in messages %}{{ '[' if loop.first }}{{ loop.revindex }}{{ ']' if loop.last }}{% endfor %}": "[321]",
    "{% for m in messages %}{{ loop.previtem.role[0] if loop.previtem }}-{% endfor %}": "-u-a-",
    "{% for m in messages %}{{ loop.nextitem.role[0] if loop.nextitem is defined }}-{% endfor %}": "a-u--",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% else %}none{% endfor %}": "22",
    "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 2 %}{% break %}{% endif %}{{ i }}"
    "{% endfor %}": "02",
    "{% macro m(a, b=true) %}{{ a }}{{ b }}{% endmacro %}{{ m('x') }}{{ m('y', b=1 > 2) | lower }}": "xTrueyfalse",
    "{{ enable_thinking is defined }} {{ messages[0].tool_calls is defined }} {{ x is none }}": "False False False",
    "{{ messages is sequence }} {{ messages[0] is mapping }} {{ 'a' is string and 'a' is iterable }}": "True True True",
    "{{ false is false }} {{ 0 is false }} {{ none is none }} {{ true is boolean }}": "True False True True",
    r"{{ 'a</think>b</think>c'.split('</think>')[-1] }} {{ '\n\nx\n'.lstrip('\n').rstrip('\n') }}": "c x",
    "{{ 'abc'.startswith('ab') and not 'abc'.endswith('ab') }} {{ ' a '.strip() }}": "True a",
    "{{ {'b': '<é>', 'a': [1, none, true]} | tojson }}": '{"b": "<é>", "a": [1, null, true]}',
    "{{ {'a': [1]} | tojson(indent=1) }}": '{\n "a": [\n  1\n ]\n}',
    "{{ '<a>' ~ {'b': '<'} | tojson }} {{ '<a>' + ({'b': '<'} | tojson | safe) }}": '<a>{"b": "<"} &lt;a&gt;{"b": "<"}',
    "{% for k, v in {'b': 1, 'a': 2} | items %}{{ k }}={{ v }};{% endfor %}": "b=1;a=2;",
    "{{ 'Picture ' ~ 1 ~ ': ' }}{{ none | string }}{{ 1.0 | string }}{{ true | string }}": "Picture 1: None1.0True",
    "{{ messages | length }} {{ messages | map(attribute='role') | join(',') }}": "3 user,assistant,user",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ x | default('y') }}": "2 y",
    "{{ 'a' if false }}|{{ 'a' in 'cat' }}|{{ 'k' in {'k': 1} }}|{{ '%s-%s' % (1, 2) }}": "|True|True|1-2",
    "  {% if true %}\n  a\n  {% endif %}\nb\n": "  a\nb",
    "a {%- if true -%} b {%- endif -%} c": "abc",
    "{{ eos_token }}{{ pad_token }}": "<|im_end|><|endoftext|>",
}
MORE_FEATURES = {
    "{{ {'a': 'é'} | tojson(ensure_ascii=False) }}": '{"a": "é"}',
    "{{ {'a': 'é'} | tojson(ensure_ascii=True) }}": r'{"a": "\u00e9"}',
    "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}": '{"a":2,"b":1}',
    "{% generation %}a{% endgeneration %}": "a",
    "{{ tools is defined and tools is none }}": "True",
}


@pytest.mark.parametrize("source", [*FEATURES, *MORE_FEATURES])
def test_jinja_is_set_up_as_in_transformers(source, template_of):
    messages = [HELLO, said("Hi"), HELLO]
    assert template_of(source).render(messages) == (FEATURES | MORE_FEATURES)[source]


@pytest.mark.parametrize("source", ["{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{{ messages[9].role }}",
                                    "{{ 'a' + 1 }}", "{{ none.split('a') }}"])  # fmt: skip
def test_a_template_that_fails_says_so(source, template_of):
    with pytest.raises(ChatTemplateError, match="^chat template: "):
        template_of(source).render([HELLO])


# Together


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A target with tokenizer and template."""
    folder = tmp_path_factory.mktemp("talker")
    size = write_tokenizer(folder)
    write(folder, "moe", vocab_size=size + 3)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    stops = [size - len(ADDED) - len(SPECIAL) + i for i in (2, 0)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    return minimtp.load(folder)


@pytest.mark.parametrize("thinking", [None, False])
def test_a_conversation_goes_on_as_if_all_of_it_were_read_afresh(talker, thinking):
    """Thoughts are dropped from earlier answers, so that part of what was read is un-read, from states too."""
    options = {} if thinking is None else {"enable_thinking": thinking}
    conversation, drafter = Conversation(talker, "Be brief.", **options), minimtp.load_drafter("auto", talker)
    spans = dict(drafter=drafter, num_draft=3, max_new_tokens=12, stop=talker.stop_ids)
    for question in ("Hello", "Hot?", "And then?"):
        again = Conversation(talker, **options)
        again.messages = [dict(message) for message in conversation.messages]
        answers = [emitted(one.ask(question, **spans)) for one in (conversation, again)]
        assert answers[0] == answers[1] and conversation.cache.tokens == again.cache.tokens
        said_last = conversation.messages[-1]["content"]
        text = conversation.template.render(conversation.messages[:-1], **options)
        assert said_last and talker.tokenizer.encode(text) == again.cache.tokens[: -len(answers[0]) + 1]


def test_stop_tokens_are_the_chats(talker):
    assert [talker.tokenizer.token(id) for id in talker.stop_ids] == ["<|im_end|>", "<|endoftext|>"]
