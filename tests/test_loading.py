"""Checkpoints become models: every published layout gives the same numbers, every wrong one a line that says why."""

import json
import math
import re
import shutil
import tracemalloc
import warnings
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import (
    CONFIGS,
    bfloat16_value,
    layers,
    rope,
    write_assistant,
    write_pair,
    write_safetensors,
    write_target,
)

import minimtp
from minimtp.checkpoint import DTYPES
from minimtp.loading import bundled
from minimtp.parameters import notes

SIZES = dict(
    layer_types=layers("ssf"), hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
    num_global_key_value_heads=1, head_dim=8, global_head_dim=16, sliding_window=4, attention_k_eq_v=True,
    vocab_size=40, final_logit_softcapping=30.0, rope_parameters=rope(),
)  # fmt: skip
IDS = [3, 17, 0, 39, 5, 5, 21, 8, 30, 1, 2, 11]
DELETED = object()


def logits(target, ids=IDS):
    return target.forward(ids, target.new_cache()).logits_TV


def same_model(a, b):
    return a.config == b.config and np.array_equal(logits(a), logits(b))


def refused(message, call, *arguments, **keywords):
    """The call raises a ValueError whose message is one line, not long, and matches."""
    with pytest.raises(ValueError, match=message) as caught:
        call(*arguments, **keywords)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


def read_encoded(path):
    """A safetensors file -> {name: (dtype, array of the stored bits)}, as random_models.write_safetensors takes it."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], stored(data[start:], **entry)) for name, entry in header.items()}


def stored(data, dtype, shape, data_offsets):
    return np.frombuffer(data[slice(*data_offsets)], DTYPES[dtype]).reshape(shape).copy()


def edit_tensors(folder, change):
    """Rewrite the folder's weights after change(tensors)."""
    path = folder / "model.safetensors"
    tensors = read_encoded(path)
    change(tensors)
    path.unlink()  # a loaded model may still look at it
    write_safetensors(path, tensors)
    return folder


def edit_json(folder, path, value, file="config.json"):
    """Set the field at `path` ("text_config.head_dim") of a JSON file of the folder, or take it away."""
    whole = table = json.loads((folder / file).read_text())
    *parents, last = path.split(".")
    for key in parents:
        table = table[key]
    if value is DELETED:
        del table[last]
    else:
        table[last] = value
    (folder / file).write_text(json.dumps(whole))
    return folder


@pytest.fixture
def plain(tmp_path):
    write_target(tmp_path / "plain", 1, **SIZES)
    return tmp_path / "plain"


@pytest.fixture
def int4(tmp_path):
    write_target(tmp_path / "int4", 1, **SIZES, int4=True, store="BF16")
    return tmp_path / "int4"


@pytest.fixture
def assistant(tmp_path):
    return new_assistant(tmp_path)


def new_assistant(folder, **overrides):
    target = write_target(folder / "its-target", 1, **SIZES)
    write_assistant(folder / "assistant", target, 2, **{"layer_types": layers("sf")} | overrides)
    return folder / "assistant"


# Right checkpoints


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("layout", ["nested", "bare"])
def test_every_published_layout_is_the_same_model(plain, tmp_path, layout, per_layer, shards):
    write_target(tmp_path / "other", 1, **SIZES, layout=layout, per_layer=per_layer, shards=shards)
    other = minimtp.load(tmp_path / "other")
    assert same_model(minimtp.load(plain), other)
    assert [layer.head_dim for layer in other.config.layers] == [8, 8, 16]
    assert [layer.kv_heads for layer in other.config.layers] == [2, 2, 1]


@pytest.mark.parametrize("k_eq_v", [False, True])
def test_global_kv_heads_count_only_where_k_is_v(tmp_path, k_eq_v):
    sizes = SIZES | {"attention_k_eq_v": k_eq_v}
    write_target(tmp_path / "plain", 1, **sizes)
    write_target(tmp_path / "newer", 1, **sizes, per_layer=True)
    model = minimtp.load(tmp_path / "plain")
    assert model.config.layers[-1].kv_heads == (1 if k_eq_v else 2)
    assert same_model(model, minimtp.load(tmp_path / "newer"))


def test_a_silent_config_means_what_transformers_assumes(tmp_path):
    sizes = SIZES | {"layer_types": layers("sssssfs" + "f"), "head_dim": 256, "global_head_dim": 512}
    write_target(tmp_path / "said", 1, **sizes, max_position_embeddings=131_072)
    shutil.copytree(tmp_path / "said", tmp_path / "silent")
    for field in ("layer_types", "head_dim", "global_head_dim", "rope_parameters", "max_position_embeddings",
                  "rms_norm_eps", "attention_bias", "use_double_wide_mlp", "enable_moe_block"):  # fmt: skip
        edit_json(tmp_path / "silent", f"text_config.{field}", DELETED)
    assert same_model(minimtp.load(tmp_path / "said"), minimtp.load(tmp_path / "silent"))


def widened(dtype, bits):
    return bfloat16_value(bits) if dtype == "BF16" else bits.astype(np.float32)


@pytest.mark.parametrize("store", ["F16", "BF16", "F64"])
def test_every_float_type_is_the_same_numbers(tmp_path, store):
    def widen(tensors):
        tensors.update({name: ("F32", widened(*value)) for name, value in tensors.items()})

    def store_double(tensors):
        tensors.update({name: ("F64", bits.astype(np.float64)) for name, (_, bits) in tensors.items()})

    write_target(tmp_path / "narrow", 1, **SIZES, store="F32" if store == "F64" else store)
    shutil.copytree(tmp_path / "narrow", tmp_path / "wide")
    edit_tensors(tmp_path / "wide", widen)
    if store == "F64":
        edit_tensors(tmp_path / "narrow", store_double)
    assert same_model(minimtp.load(tmp_path / "wide"), minimtp.load(tmp_path / "narrow"))
    assert not np.array_equal(logits(minimtp.load(tmp_path / "wide")), logits(minimtp.load(other_seed(tmp_path))))


def other_seed(tmp_path):
    write_target(tmp_path / "seed", 2, **SIZES)
    return tmp_path / "seed"


def unpack(tensors):
    """Packed int4 tensors -> float32 ones, one code at a time."""
    for name in [name.removesuffix("_packed") for name in tensors if name.endswith("_packed")]:
        words, scales = tensors.pop(name + "_packed")[1], bfloat16_value(tensors.pop(name + "_scale")[1])
        rows, columns = tensors.pop(name + "_shape")[1]
        dense = np.empty((rows, columns), np.float32)
        for i in range(columns):
            codes = (words[:, i // 8].view(np.uint32) >> (4 * (i % 8)) & 15).astype(int) - 8
            dense[:, i] = codes * scales[:, i // 32]
        tensors[name] = ("F32", dense)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_int4_is_the_same_numbers_packed_dense_or_unpacked_beforehand(int4, tmp_path, dtype):
    shutil.copytree(int4, tmp_path / "unpacked")
    edit_tensors(tmp_path / "unpacked", unpack)
    edit_json(tmp_path / "unpacked", "quantization_config", DELETED)
    kept = [minimtp.load(int4, dtype=dtype, keep=keep) for keep in ("packed", "dense", "auto")]
    unpacked = minimtp.load(tmp_path / "unpacked", dtype=dtype)
    assert all(same_model(unpacked, model) and logits(model).dtype == dtype for model in kept)
    assert not isinstance(kept[0].params.layers[0].q_proj, np.ndarray)
    assert isinstance(kept[1].params.layers[0].q_proj, np.ndarray)


def test_the_bundled_pair_is_the_same_packed_and_dense():
    """Large enough that a weight has several row tiles."""
    targets = [minimtp.load("tiny-gemma4", keep=keep) for keep in ("packed", "dense")]
    prompt = np.arange(40) % targets[0].config.vocab_size
    for width in (40, 16, 5, 1):
        assert np.array_equal(*(logits(target, prompt[:width]) for target in targets))
    runs = [
        list(minimtp.generate(target, prompt, minimtp.load_drafter("auto", target, keep), max_new_tokens=40))
        for target, keep in zip(targets, ("dense", "packed"))
    ]
    assert [step.draft.tokens for step in runs[0]] == [step.draft.tokens for step in runs[1]]
    assert [step.tokens for step in runs[0]] == [step.tokens for step in runs[1]]


TOWERS = ["vision_tower.x.weight", "embed_vision.x.weight", "audio_tower.x.weight", "embed_audio.x.weight",
          "vision_embedder.x.weight"]  # fmt: skip


@pytest.mark.parametrize("tower", [prefix + tower for prefix in ("model.", "") for tower in TOWERS])
def test_other_towers_are_skipped_by_name(plain, tmp_path, tower):
    before = minimtp.load(plain)
    nan = np.full((2, 3), np.nan, np.float32)  # skipped means unread
    edit_tensors(plain, lambda tensors: tensors.update({tower: ("F32", nan)}))
    assert same_model(before, minimtp.load(plain))


def test_a_tower_is_known_by_the_start_of_its_name(plain):
    name = "model.language_model.vision_tower.x.weight"
    edit_tensors(plain, lambda tensors: tensors.update({name: ("F32", np.ones(2, np.float32))}))
    refused(f"unknown tensor {name!r}", minimtp.load, plain)


@pytest.mark.parametrize("prefix", ["model.", "language_model.model."])
def test_other_spellings_of_the_names(plain, prefix):
    before = minimtp.load(plain)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.language_model.", prefix)] = tensors.pop(name)

    assert same_model(before, minimtp.load(edit_tensors(plain, rename)))


@pytest.mark.parametrize("layout", ["nested", "bare"])
def test_a_second_copy_of_the_tied_head_is_read_once_and_another_head_is_used(tmp_path, layout):
    """As transformers does, which warns of the other one."""
    write_target(tmp_path / "model", 1, **SIZES, layout=layout, store_lm_head=True)
    write_target(tmp_path / "tied", 1, **SIZES, layout=layout)
    copied, tied = minimtp.load(tmp_path / "model"), minimtp.load(tmp_path / "tied")
    assert same_model(copied, tied) and copied.params.lm_head is copied.params.embed_tokens
    assert "a copy of the embedding" in notes(copied.checkpoint, copied.family, copied.config)[0]
    assert not notes(tied.checkpoint, tied.family, tied.config)

    def another(tensors):
        tensors["lm_head.weight"][1][-1, -1] += 1

    other = minimtp.load(edit_tensors(tmp_path / "model", another))
    differs_V = (logits(other) != logits(tied)).any(0)
    assert differs_V[-1] and not differs_V[:-1].any()
    assert "not the embedding, and used" in notes(other.checkpoint, other.family, other.config)[0]


def test_an_untied_head_is_the_one_that_is_used(tmp_path):
    write_target(tmp_path / "model", 1, **SIZES, layout="nested", store_lm_head=True)
    tied = minimtp.load(tmp_path / "model", dtype="float64")
    text_field("tie_word_embeddings", False)(tmp_path / "model")
    untied = minimtp.load(tmp_path / "model", dtype="float64")
    assert not untied.config.tied and np.array_equal(logits(tied), logits(untied))

    def another(tensors):
        tensors["lm_head.weight"][1][:] *= -1

    other = minimtp.load(edit_tensors(tmp_path / "model", another), dtype="float64")
    assert np.array_equal(logits(other), -logits(tied))


def test_a_file_may_be_named_instead_of_its_folder(plain):
    assert same_model(minimtp.load(plain), minimtp.load(plain / "model.safetensors"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_random_pair_loads_and_drafts(tmp_path, name):
    target_folder, drafter_folder = write_pair(name, tmp_path)
    target = minimtp.load(target_folder)
    drafter = minimtp.load_drafter(drafter_folder, target)
    steps = list(minimtp.generate(target, [1, 2, 3], drafter, max_new_tokens=9))
    assert sum(len(step.tokens) for step in steps) == 9 and steps[1].drafted == 4


def test_the_assistant_beside_its_target_is_found(tmp_path, monkeypatch):
    config = write_target(tmp_path / "name", 1, **SIZES)
    refused("no name-assistant beside it", minimtp.load_drafter, "auto", minimtp.load(tmp_path / "name"))
    write_assistant(tmp_path / "name-assistant", config, 2)
    monkeypatch.chdir(tmp_path / "name")
    for path in (tmp_path / "name", f"{tmp_path}/name/", ".", "../name", "../name/model.safetensors"):
        assert isinstance(minimtp.load_drafter("auto", minimtp.load(path)), minimtp.GemmaAssistant)


def test_a_name_is_a_folder_before_it_is_a_bundled_model(plain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert minimtp.load("tiny-gemma4").folder == bundled("tiny-gemma4")
    plain.rename(tmp_path / "tiny-gemma4")
    assert minimtp.load("tiny-gemma4").config.vocab_size == SIZES["vocab_size"]


def test_stop_tokens_are_those_of_the_generation_config(plain):
    path = plain / "generation_config.json"
    assert minimtp.load(plain).stop_ids == ()
    for said, ids in (("{}", ()), ('{"eos_token_id": null}', ()), ('{"eos_token_id": 0}', (0,)),
                      ('{"eos_token_id": 7}', (7,)), ('{"eos_token_id": [1, 50]}', (1, 50))):  # fmt: skip
        path.write_text(said)
        assert minimtp.load(plain).stop_ids == ids


def test_a_cache_belongs_to_one_model(plain, tmp_path):
    def change(tensors):
        tensors["model.language_model.norm.weight"][1][0] += 1

    def save(target):
        filled = target.new_cache()
        target.forward(IDS, filled)
        filled.save(tmp_path / "cache.safetensors")

    target = minimtp.load(plain)
    save(target)
    assert target.load_cache(tmp_path / "cache.safetensors").tokens == IDS
    assert minimtp.load(plain, keep="packed").load_cache(tmp_path / "cache.safetensors").tokens == IDS
    refused("cache of another model", minimtp.load(plain, dtype="float64").load_cache, tmp_path / "cache.safetensors")
    changed = minimtp.load(edit_tensors(plain, change))
    refused("cache of another model", changed.load_cache, tmp_path / "cache.safetensors")


# Wrong checkpoints. name -> (what breaks the folder, what the message must say); the CLI's tests run these too.


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


def weights(change):
    return lambda folder: damage(folder / "model.safetensors", change)


def header(old, new):
    """Replace text inside the safetensors header, keeping its length."""
    return weights(lambda data: data.replace(old, new.ljust(len(old)), 1))


def tensors(change):
    return lambda folder: edit_tensors(folder, change)


def value(name, x, prefix="model.language_model."):
    """Put x somewhere into a tensor."""

    def change(tensors):
        dtype, array = tensors[prefix + name]
        array.reshape(-1)[array.size // 2] = np.uint16(x) if dtype == "BF16" else x

    return tensors(change)


def retype(name, dtype, array_dtype):
    def change(tensors):
        name_ = "model.language_model." + name
        tensors[name_] = (dtype, tensors[name_][1].astype(array_dtype))

    return tensors(change)


def reshape(name, shape):
    def change(tensors):
        dtype, array = tensors["model.language_model." + name]
        tensors["model.language_model." + name] = (dtype, np.resize(array, shape))

    return tensors(change)


def drop(name):
    return tensors(lambda tensors: tensors.pop("model.language_model." + name))


def add(name):
    return tensors(lambda tensors: tensors.update({name: ("F32", np.zeros(3, np.float32))}))


def text_field(name, x):
    return lambda folder: edit_json(folder, f"text_config.{name}", x)


def text_fields(**values):
    return each(*(text_field(name, x) for name, x in values.items()))


def each(*changes):
    """All of these changes, one after another."""

    def change(folder):
        for one in changes:
            one(folder)

    return change


def field(name, x):
    return lambda folder: edit_json(folder, name, x)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def shard(file):
    """The weights move into a shard; the index says they are in `file`."""

    def change(folder):
        names = read_encoded(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        write("model.safetensors.index.json", json.dumps({"weight_map": dict.fromkeys(names, file)}))(folder)

    return change


def unlink(name):
    return lambda folder: (folder / name).unlink()


Q, NORM = "layers.1.self_attn.q_proj.weight", "layers.1.input_layernorm.weight"
WRONG_FILES = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no such file or folder"),
    "no config": (unlink("config.json"), "config.json: no such file"),
    "no weights": (unlink("model.safetensors"), "no model.safetensors"),
    "config not JSON": (write("config.json", '{"a": '), "config.json: not JSON"),
    "config a list": (write("config.json", "[]"), "config.json: a JSON object"),
    "empty file": (weights(lambda data: b""), "model.safetensors: truncated"),
    "half a header": (weights(lambda data: data[:100]), "model.safetensors: truncated"),
    "half the data": (weights(lambda data: data[: len(data) // 2]), "model.safetensors: '.*' ends at byte"),
    "one byte less": (weights(lambda data: data[:-1]), "model.safetensors: '.*' ends at byte"),
    "one byte more": (weights(lambda data: data + b"x"), "model.safetensors: 1 bytes after the last tensor"),
    "corrupt header": (header(b'"dtype"', b'"dtype\x00'), "model.safetensors: header: not JSON"),
    "huge header": (weights(lambda data: b"\xff" * 8 + data[8:]), "model.safetensors: not a safetensors file"),
    "offsets outside": (header(b'"data_offsets": [0,', b'"data_offsets":[-1,'), "data_offsets"),
    "index outside": (shard("../other.safetensors"), "index.json: '../other.safetensors' is not a file inside"),
    "index absolute": (shard("/etc/hosts"), "index.json: '/etc/hosts' is not a file inside"),
    "index of no file": (shard("two.safetensors"), "two.safetensors: no such file"),
    "index not JSON": (lambda folder: (shard("x")(folder), write("model.safetensors.index.json", "{")(folder)),
                       "index.json: not JSON"),
    "generation config not JSON": (write("generation_config.json", "{"), "generation_config.json: not JSON"),
    "tokenizer not JSON": (write("tokenizer.json", "{"), "tokenizer.json: not a tokenizer"),
    "tokenizer of nothing": (write("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
    "tokenizer empty": (write("tokenizer.json", ""), "tokenizer.json: not a tokenizer"),
}  # fmt: skip
WRONG_TENSORS = {
    "unknown tensor": (add("model.language_model.layers.1.surprise.weight"), "unknown tensor '.*layers.1.surprise"),
    "unknown layer": (add("model.language_model.layers.3.input_layernorm.weight"), "unknown tensor '.*layers.3"),
    "missing linear": (drop(Q), f"'model.language_model.{Q}' is missing"),
    "missing norm": (drop(NORM), f"'model.language_model.{NORM}' is missing"),
    "missing scalar": (drop("layers.0.layer_scalar"), "layers.0.layer_scalar' is missing"),
    "missing embedding": (drop("embed_tokens.weight"), "embed_tokens.weight' is missing"),
    "linear of another shape": (reshape(Q, (31, 32)), rf"{Q}' is \[31, 32\], expected \[32, 32\]"),
    "linear turned": (reshape("layers.0.mlp.up_proj.weight", (32, 64)), r"up_proj.*\[32, 64\], expected \[64, 32\]"),
    "linear of one axis": (reshape(Q, (1024,)), rf"{Q}' is \[1024\], expected \[32, 32\]"),
    "norm of another shape": (reshape(NORM, (1, 32)), rf"{NORM}' is \[1, 32\], expected \[32\]"),
    "scalar of another shape": (reshape("layers.0.layer_scalar", ()), r"layer_scalar' is \[\], expected \[1\]"),
    "integer linear": (retype(Q, "I32", "<i4"), f"{Q}' is I32"),
    "integer norm": (retype(NORM, "I64", "<i8"), NORM),
    "boolean norm": (retype(NORM, "BOOL", "u1"), NORM),
    "8-bit float linear": (retype(Q, "F8_E4M3", "u1"), f"{Q}' is F8_E4M3"),
    "NaN linear": (value(Q, np.nan), f"{Q}': NaN or infinite"),
    "infinite linear": (value(Q, -np.inf), f"{Q}': NaN or infinite"),
    "NaN norm": (value(NORM, np.nan), f"{NORM}': NaN or infinite"),
    "NaN scalar": (value("layers.0.layer_scalar", np.nan), "layer_scalar': NaN or infinite"),
    "NaN embedding": (value("embed_tokens.weight", np.nan), "embed_tokens.weight': NaN or infinite"),
}  # fmt: skip
WRONG_INT4 = {
    "packed NaN scale": (value(f"{Q}_scale", 0x7FC0), f"{Q}_scale': NaN or infinite"),
    "packed infinite scale": (value(f"{Q}_scale", 0xFF80), f"{Q}_scale': NaN or infinite"),
    "packed bf16 NaN norm": (value(NORM, 0x7F81), f"{NORM}': NaN or infinite"),
    "packed bf16 NaN embedding": (value("embed_tokens.weight", 0xFFFF), "embed_tokens.weight': NaN or infinite"),
    "packed without scale": (drop(f"{Q}_scale"), f"{Q}_scale' is missing"),
    "packed without shape": (drop(f"{Q}_shape"), f"{Q}_shape' is missing"),
    "packed without codes": (drop(f"{Q}_packed"), f"{Q}' is missing"),
    "packed scales of another shape": (reshape(f"{Q}_scale", (16, 2)), rf"{Q}_scale' is BF16 \[16, 2\]"),
    "packed codes of another shape": (reshape(f"{Q}_packed", (32, 8)), rf"{Q}_packed' is I32 \[32, 8\]"),
    "packed codes of another type": (retype(f"{Q}_packed", "U32", "<u4"), f"{Q}_packed' is U32"),
    "packed scales of another type": (retype(f"{Q}_scale", "I16", "<i2"), f"{Q}_scale' is I16"),
    "packed and plain": (add(f"model.language_model.{Q}"), f"{Q}.*the same weight twice"),
    "packed zero points": (add(f"model.language_model.{Q}_zero_point"), f"{Q}_zero_point"),
    "packed without config": (field("quantization_config", DELETED), "no quantization_config"),
    "packed quantization method": (field("quantization_config.quant_method", "gptq"), "quant_method is 'gptq'"),
    "packed quantization format": (field("quantization_config.format", "int-quantized"), "format is 'int-quantized'"),
    "packed group size": (field("quantization_config.config_groups.group_0.weights.group_size", 128),
                          "not groups of 128 .4 bits in groups of 128, quantization_config.config_groups.'group_0'"),
    "packed 8 bits": (field("quantization_config.config_groups.group_0.weights.num_bits", 8),
                      "weight_packed' is I32 .* .8 bits in groups of 32, quantization_config.config_groups.'group_0'"),
    "packed asymmetric": (field("quantization_config.config_groups.group_0.weights.symmetric", False),
                          "weight_zero_point' is missing"),
    "packed KV quantized": (field("quantization_config.kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
}  # fmt: skip
SLIDING, FULL = "rope_parameters.sliding_attention", "rope_parameters.full_attention"
WRONG_CONFIGS = {
    "unknown model type": (field("model_type", "llama"), "unknown model type 'llama'"),
    "no model type": (field("model_type", DELETED), "unknown model type None"),
    "model type a list": (field("model_type", ["gemma4"]), r"unknown model type \['gemma4'\]"),
    "text config a list": (field("text_config", []), "text_config"),
    "text config null": (field("text_config", None), "text_config"),
    "no text config": (field("text_config", DELETED), "text_config is missing"),
    "per-layer inputs": (text_field("hidden_size_per_layer_input", 8), "'.*embed_tokens_per_layer.weight' is missing"),
    "per-layer inputs by default": (text_field("hidden_size_per_layer_input", DELETED), "per_layer.* is missing"),
    "per-layer vocabulary": (text_fields(hidden_size_per_layer_input=8, vocab_size_per_layer_input=9),
                             "vocab_size_per_layer_input"),
    "shared KV of no layer": (text_field("num_kv_shared_layers", 2), "layer 2 shares KV, and no full layer before it"),
    "more layers share KV than there are": (text_field("num_kv_shared_layers", 4), "num_kv_shared_layers 4 of 3"),
    "all layers share KV": (text_field("num_kv_shared_layers", 3), "num_kv_shared_layers 3 of 3"),
    "experts without number": (text_field("enable_moe_block", True), "num_experts is missing"),
    "more experts chosen than there are": (text_fields(enable_moe_block=True, num_experts=2, top_k_experts=3,
                                                       moe_intermediate_size=8), "top_k_experts 3 of 2"),
    "no experts": (text_fields(enable_moe_block=True, num_experts=2, top_k_experts=1, moe_intermediate_size=8),
                   "router.*' is missing"),
    "biases": (text_field("attention_bias", True), "attention_bias True"),
    "bidirectional": (text_field("use_bidirectional_attention", "all"), "use_bidirectional_attention 'all'"),
    "activation": (text_field("hidden_activation", "silu"), "hidden_activation 'silu'"),
    "untied": (text_field("tie_word_embeddings", False), "'lm_head.weight' is missing"),
    "yarn": (text_field(f"{FULL}.rope_type", "yarn"), "rope_type 'yarn' of full_attention"),
    "linear rope": (text_field(f"{SLIDING}.rope_type", "linear"), "rope_type 'linear' of sliding_attention"),
    "rope type a list": (text_field(f"{SLIDING}.rope_type", ["default"]), "rope_type"),
    "old rope scaling": (text_field("rope_scaling", {"rope_type": "yarn", "factor": 4.0}), "rope_scaling"),
    "rope field": (text_field(f"{FULL}.beta_fast", 32), "'beta_fast' of full_attention"),
    "partial default rope": (text_field(f"{SLIDING}.partial_rotary_factor", 0.5), "'partial_rotary_factor'"),
    "partial above 1": (text_field(f"{FULL}.partial_rotary_factor", 1.5), "partial_rotary_factor"),
    "partial below 0": (text_field(f"{FULL}.partial_rotary_factor", -0.5), "partial_rotary_factor of full_attention"),
    "no theta": (text_field(f"{FULL}.rope_theta", DELETED), "rope_theta"),
    "theta 0": (text_field(f"{FULL}.rope_theta", 0), "rope_theta"),
    "theta below 0": (text_field(f"{SLIDING}.rope_theta", -1e4), "rope_theta"),
    "factor 0": (text_field(f"{FULL}.factor", 0.0), "factor"),
    "no full rope": (text_field(FULL, DELETED), "full_attention"),
    "no sliding rope": (text_field(SLIDING, None), "sliding_attention"),
    "flat rope": (text_field("rope_parameters", {"rope_type": "default", "rope_theta": 1e4}), "sliding_attention"),
    "too few layer types": (text_field("layer_types", layers("sf")), "layer_types must name 3 layers"),
    "unknown layer type": (text_field("layer_types", [*layers("sf"), "linear_attention"]), "layer_types"),
    "layer types a number": (text_field("layer_types", 3), "layer_types"),
    "layer types of tables": (text_field("layer_types", [{}, [], None]), "layer_types"),
    "last layer slides": (text_field("layer_types", layers("sfs")), "layer_types must be full_attention"),
    "heads not in groups": (text_field("num_key_value_heads", 3), "layer 0 cannot have 4 heads, 3 kv heads"),
    "odd heads": (text_field("head_dim", 7), "layer 0 cannot have .* of width 7"),
    "per-layer surprise": (text_field("per_layer_config", {"2": {"sliding_window": 3}}), "per_layer_config of layer 2"),
    "per-layer list": (text_field("per_layer_config", [{}]), "per_layer_config"),
    "soft cap 0": (text_field("final_logit_softcapping", 0), "final_logit_softcapping"),
    "soft cap below 0": (text_field("final_logit_softcapping", -30.0), "final_logit_softcapping"),
    "eps below 0": (text_field("rms_norm_eps", -1e-6), "rms_norm_eps"),
    "other sizes": (text_field("hidden_size", 64), r"embed_tokens.weight' is \[40, 32\], expected \[40, 64\]"),
    "other vocabulary": (text_field("vocab_size", 41), r"embed_tokens.weight' is \[40, 32\], expected \[41, 32\]"),
    "stop token a text": (write("generation_config.json", '{"eos_token_id": "1"}'), "eos_token_id"),
    "stop tokens in a table": (write("generation_config.json", '{"eos_token_id": {"a": 1}}'), "eos_token_id"),
    "stop token not whole": (write("generation_config.json", '{"eos_token_id": [1, 1.5]}'), "eos_token_id"),
    "suppressed no list": (write("generation_config.json", '{"suppress_tokens": 5}'), "suppress_tokens"),
}  # fmt: skip
WRONG = WRONG_FILES | WRONG_TENSORS | WRONG_INT4 | WRONG_CONFIGS


def break_target(folder, case):
    """Write the target and break it -> (its folder, what the message must say)."""
    change, message = WRONG[case]
    packed = case.startswith("packed")
    write_target(folder / "model", 1, **SIZES, int4=packed, store="BF16" if packed else "F32")
    change(folder / "model")
    return folder / "model", message


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_refused_by_name(tmp_path, case):
    folder, message = break_target(tmp_path, case)
    refused(message, minimtp.load, folder)


@pytest.mark.parametrize("keep", ["packed", "dense", "auto"])
def test_nan_half_floats_are_found_however_weights_are_kept(tmp_path, keep):
    write_target(tmp_path / "model", 1, **SIZES, store="F16")
    value(Q, np.float16(np.nan))(tmp_path / "model")
    refused(f"{Q}': NaN", minimtp.load, tmp_path / "model", keep=keep)


INTS = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "num_global_key_value_heads", "head_dim", "global_head_dim", "sliding_window",
        "max_position_embeddings"]  # fmt: skip
FLOATS = ["rms_norm_eps", "final_logit_softcapping", f"{SLIDING}.rope_theta", f"{FULL}.partial_rotary_factor",
          f"{FULL}.factor"]  # fmt: skip
REQUIRED = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", f"{FULL}.rope_theta"]  # fmt: skip
WRONG_VALUES = (
    [(name, bad) for name in INTS for bad in ("3", "", -1, 0, 8.0, 2**70, math.nan, True, [8], {})]
    + [(name, bad) for name in FLOATS for bad in ("1.0", math.nan, math.inf, -math.inf, True, [1.0], {}, 10**400)]
    + [(name, bad) for name in REQUIRED for bad in (None, DELETED)]
    + [("attention_k_eq_v", bad) for bad in (1, 0, "true", [], math.nan)]
)


def test_malformed_values_are_refused_by_their_field(plain):
    for name, bad in WRONG_VALUES:
        right = (plain / "config.json").read_text()
        edit_json(plain, f"text_config.{name}", bad)
        refused(name.split(".")[-1], minimtp.load, plain)
        (plain / "config.json").write_text(right)


def test_a_config_that_claims_many_layers_costs_nothing(plain):
    edit_json(plain, "text_config.layer_types", DELETED)
    edit_json(plain, "text_config.num_hidden_layers", 100_000)
    with little_memory():
        refused("num_hidden_layers|is missing", minimtp.load, plain)


@pytest.mark.parametrize(
    "option, bad", [("backend", "torch"), ("dtype", "bfloat16"), ("keep", "int8"), ("embed_scale", 16)]
)
def test_unknown_options_are_named(plain, option, bad):
    refused(f"{option}.*{bad}", minimtp.load, plain, **{option: bad})


def test_a_tokenizer_larger_than_the_model_is_refused(plain):
    shutil.copy(bundled("tiny-gemma4") / "tokenizer.json", plain)
    refused(r"tokenizer.json: \d+ tokens, the model has 40", minimtp.load, plain)


# Drafters

WRONG_DRAFTERS = {
    "backbone": (field("backbone_hidden_size", 64), "backbone hidden size 64, the target's is 32"),
    "vocabulary": (text_field("vocab_size", 41), "vocabulary 41, the target's is 40"),
    "window": (text_field("sliding_window", 5), "sliding window 5, the target's is 4"),
    "sliding width": (text_field("head_dim", 16), r"sliding KV shape \(2, 16\), the target's is \(2, 8\)"),
    "sliding heads": (text_field("num_key_value_heads", 4), r"sliding KV shape \(4, 8\), the target's is \(2, 8\)"),
    "full width": (text_field("global_head_dim", 8), r"full KV shape \(1, 8\), the target's is \(1, 16\)"),
    "full heads": (text_field("num_global_key_value_heads", 2), r"full KV shape \(2, 16\), the target's is \(1, 16\)"),
    "layers with KV": (text_field("num_kv_shared_layers", 1), "num_kv_shared_layers"),
    "clusters that do not divide": (field("use_ordered_embeddings", True), "2048 centroids, 32 chosen, for 40 tokens"),
    "no clusters": (each(field("use_ordered_embeddings", True), field("num_centroids", 8),
                         field("centroid_intermediate_top_k", 2)), "masked_embedding.* is missing"),
    "per-layer inputs": (text_field("hidden_size_per_layer_input", 8), "size_per_layer_input"),
    "no backbone": (field("backbone_hidden_size", DELETED), "backbone_hidden_size is missing"),
    "no text config": (field("text_config", DELETED), "text_config is missing"),
    "no pre-projection": (tensors(lambda tensors: tensors.pop("pre_projection.weight")), "'pre_projection.weight'"),
    "no post-projection": (tensors(lambda tensors: tensors.pop("post_projection.weight")), "'post_projection.weight'"),
    "keys of its own": (add("model.layers.0.self_attn.k_proj.weight"), "unknown tensor '.*k_proj"),
    "NaN": (value("pre_projection.weight", np.nan, prefix=""), "'pre_projection.weight': NaN"),
    "no folder": (lambda folder: shutil.rmtree(folder), "assistant: no such file or folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_DRAFTERS)
def test_a_drafter_that_does_not_fit_is_refused(assistant, plain, case):
    change, message = WRONG_DRAFTERS[case]
    target = minimtp.load(plain)
    minimtp.load_drafter(assistant, target)
    change(assistant)
    refused(message, minimtp.load_drafter, assistant, target)


def test_a_drafter_with_sliding_layers_needs_a_target_with_some(assistant, tmp_path):
    write_target(tmp_path / "full", 1, **SIZES | {"layer_types": layers("fff")})
    target = minimtp.load(tmp_path / "full")
    refused("no sliding layer to borrow KV from", minimtp.load_drafter, assistant, target)


def test_target_and_drafter_are_not_taken_for_each_other(assistant, plain):
    refused("'gemma4_assistant' is not a target", minimtp.load, assistant)
    refused("'gemma4' is not a drafter", minimtp.load_drafter, plain, minimtp.load(plain))


@pytest.mark.parametrize("option", ["position", "window_edge"])
def test_unknown_readings_of_the_drafter_are_named(assistant, plain, option):
    refused(f"{option} is 'x'", minimtp.load_drafter, assistant, minimtp.load(plain), **{option: "x"})


# Using a model wrongly

WRONG_IDS = {
    "empty": ([], "non-empty"), "the vocabulary's size": ([1, 40], "token id 40"), "negative": ([-1], "token id -1"),
    "huge": ([2**70], "token ids"), "float": ([1.0], "integers"), "bool": ([True], "integers"),
    "text": ("ab", "token ids"), "nested": ([[1]], "shape"), "ragged": ([[1], [1, 2]], "."),
    "null": ([None], "integers"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_IDS)
def test_wrong_prompts_are_refused_before_anything_is_read(plain, case):
    ids, message = WRONG_IDS[case]
    target = minimtp.load(plain)
    used = target.new_cache()
    refused(message, target.forward, ids, used)
    refused(message, lambda: next(minimtp.generate(target, ids, cache=used)))
    assert used.length == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_draft=0), "num_draft .* 0"),
        (dict(num_draft=-1), "num_draft .* -1"),
        (dict(num_draft=16), "num_draft .* 16"),
        (dict(max_new_tokens=0), "max_new_tokens .* 0"),
        (dict(rule="best"), "best"),
        (dict(epsilon=0.1), "epsilon"),
    ],
)
def test_wrong_options_of_generate_are_named(plain, options, message):
    refused(message, lambda: next(minimtp.generate(minimtp.load(plain), [1], **options)))


def test_a_prompt_longer_than_the_context_is_refused(plain):
    target = minimtp.load(edit_json(plain, "text_config.max_position_embeddings", 8))
    refused("prompt of 9 tokens is 1 longer", lambda: next(minimtp.generate(target, [1] * 9)))
    refused("9 tokens do not fit a context of 8", target.forward, [1] * 9, target.new_cache())
    assert sum(len(step.tokens) for step in minimtp.generate(target, [1] * 8)) == 1
    for capacity in (0, -1, 9):
        refused(f"cache of {capacity} tokens", target.new_cache, capacity)


def test_a_temperature_below_zero_is_refused():
    refused("temperature is -1", minimtp.Sampling, temperature=-1)


# Any JSON in any field: a working model or a refusal, never another exception, NaN, or much memory.

NASTY = [0, -1, 1, 2, 3, 1 << 16, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70, 10**400, -(2**63), 0.0, -0.0, 0.5, 1e-300,
         1e-45, 1e300, -1e-6, math.nan, math.inf, -math.inf, True, False, None, "", "0", "full_attention", "default",
         "proportional", "\ud800", "a\nb", "x" * 5000, [], {}, [None], [[]], ["full_attention"], {"": None},
         {"0": {}}, {"2": {"head_dim": 16}}, {"rope_type": "default", "rope_theta": 10}]  # fmt: skip
ANY_JSON = st.sampled_from(NASTY) | st.recursive(
    st.sampled_from(NASTY) | st.integers(-300, 300) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def fields(table, at=()):
    """Paths of all fields of a JSON value, those inside lists included."""
    for key, inner in table.items() if isinstance(table, dict) else enumerate(table):
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from fields(inner, (*at, key))


@cache
def fuzzed_models():
    folder = Path(mkdtemp(prefix="minimtp-fuzz-"))
    write_target(folder / "int4", 1, **SIZES, int4=True, store="BF16")
    config = write_target(folder / "plain", 1, **SIZES, per_layer=True)
    write_assistant(folder / "assistant", config, 2, layer_types=layers("sf"))
    for name in ("int4", "plain"):
        write("generation_config.json", '{"eos_token_id": [1], "do_sample": true}')(folder / name)
    return folder, minimtp.load(folder / "plain"), minimtp.load(folder / "int4").config


@pytest.fixture(scope="module", autouse=True)
def no_fuzzed_models_left():
    yield
    if fuzzed_models.cache_info().currsize:
        shutil.rmtree(fuzzed_models()[0])


class little_memory:
    """Inside, memory may not grow by more than 16 MB."""

    def __enter__(self):
        tracemalloc.start()

    def __exit__(self, kind, *_):
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kind is not None or peak < 16 << 20, f"{peak} bytes"


def replaced(table, path, value):
    table = json.loads(json.dumps(table))
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return table


def use(name, file):
    """Load the fuzzed model, and run it a little where it came out another one -> some of its numbers."""
    folder, right, int4_config = fuzzed_models()
    if name == "assistant":
        drafter, used = minimtp.load_drafter(folder / name, right), right.new_cache()
        return drafter.forward(3, right.forward(IDS, used).hidden_TD[-1], used)[0]
    target = minimtp.load(folder / name)
    if file == "generation_config.json":
        return [step.seconds for step in minimtp.generate(target, [1], max_new_tokens=2, stop=target.stop_ids)]
    unchanged = target.config == (int4_config if name == "int4" else right.config)
    return [0.0] if unchanged else logits(target)


def check_fuzzed(name, file, path, value):
    folder = fuzzed_models()[0] / name
    right = (folder / file).read_text()
    (folder / file).write_text(json.dumps(replaced(json.loads(right), path, value)))
    try:
        with little_memory(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.isfinite(use(name, file)).all()
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
    finally:
        (folder / file).write_text(right)


FILES = [("int4", "config.json"), ("plain", "config.json"), ("plain", "generation_config.json"),
         ("assistant", "config.json")]  # fmt: skip


@pytest.mark.parametrize("name, file", FILES)
def test_any_field_may_be_any_nasty_value(name, file):
    """A few hundred fields and values by chance, the same in every run."""
    paths = list(fields(json.loads((fuzzed_models()[0] / name / file).read_text())))
    chance = np.random.RandomState(3)
    for i in chance.permutation(len(paths) * len(NASTY))[: 30 if "generation" in file else 60]:
        check_fuzzed(name, file, paths[i // len(NASTY)], NASTY[i % len(NASTY)])


@settings(max_examples=50, deadline=timedelta(seconds=10), suppress_health_check=list(HealthCheck), database=None)
@given(data=st.data(), which=st.sampled_from(FILES), value=ANY_JSON)
def test_any_field_may_be_any_json(data, which, value):
    name, file = which
    paths = list(fields(json.loads((fuzzed_models()[0] / name / file).read_text())))
    check_fuzzed(name, file, data.draw(st.sampled_from(paths)), value)


def test_messages_escape_what_they_quote(plain):
    edit_json(plain, "model_type", "a\nb\x1b[31m\ud800" + "x" * 10_000)
    with pytest.raises(ValueError) as caught:
        minimtp.load(plain)
    assert re.fullmatch(r"[ -~]+", str(caught.value).replace(str(plain), "")) and len(str(caught.value)) < 1000
