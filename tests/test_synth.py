"""Random checkpoints of any shape: every family and format, the published sizes byte by byte, and numbers that stay."""

import json
import math
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from random_qwen import CONFIGS, write_qwen
from random_sizes import SIZES, write_pair
from tiny import FOLDER

import minimtp
from minimtp import convert, memory, qwen35_mtp, synth
from minimtp.checkpoint import CheckpointError
from minimtp.gguf_file import read_header
from minimtp.loading import open_model, published, published_config
from minimtp.synth import Noise, keep_layers, synthesize

GGUF = ("f32", "q4_0", "q8_0")
FORMATS = tuple(synth.STORED)
SHAPES = ["e2b_int4", "26b_int4", "12b", "everything_int4", "moe_int4", "interval"]
PUBLISHED = json.loads((Path(synth.__file__).parent / "published.json").read_text(encoding="utf-8"))
TOKENS = 24


@cache
def config_files(name):
    """config.json of a small target, and of its assistant or None."""
    folder = Path(FOLDER.name) / "shapes" / name
    if name in SIZES:
        return [part / "config.json" for part in write_pair(name, folder)]
    return [write_qwen(name, folder) / "config.json", None]


def destination(folder, name, format):
    return folder / f"{name}.gguf" if format in GGUF else folder / name


def narrow(name, folder, **sizes):
    """The file of a published configuration with all its layers, and little in each."""
    raw = published(name)
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "head_dim": 16, "moe_intermediate_size": 32}
    small |= {"vocab_size_per_layer_input": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
    small |= {"global_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts_per_tok": 4}
    small |= {"num_global_key_value_heads": 1, "shared_expert_intermediate_size": 32, "linear_key_head_dim": 16}
    small |= {"linear_value_head_dim": 16, "hidden_size_per_layer_input": 32, "backbone_hidden_size": 64} | sizes
    text = {key: small[key] if value and key in small else value for key, value in raw["text_config"].items()}
    if "mrope_section" in text["rope_parameters"]:
        text["rope_parameters"]["mrope_section"] = [1, 1, 0]
    raw = {key: value for key, value in raw.items() if not key.endswith("token_id")} | {"text_config": text}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(raw | ({"backbone_hidden_size": 64} if "backbone_hidden_size" in raw else {})))
    return path


# What is written


@pytest.mark.parametrize(
    "name, format", [(n, f) for i, n in enumerate(SHAPES) for j, f in enumerate(FORMATS) if (i + j) % 2 == 0]
)
def test_it_loads_and_its_numbers_stay(name, format, tmp_path):
    """Strictly, as any checkpoint; logits of order 3, neither alike nor at the cap; its drafter drafts."""
    target_file, assistant_file = config_files(name)
    path = destination(tmp_path, "model", format)
    synthesize(target_file, path, format)
    if assistant_file:
        synthesize(assistant_file, destination(tmp_path, "model-assistant", format), format)
    target = minimtp.load(path)
    prompt = np.random.RandomState(1).randint(0, target.config.vocab_size, TOKENS)
    out = target.forward(prompt, target.new_cache())
    assert np.isfinite(out.logits_TV).all() and np.isfinite(out.hidden_TD).all()
    assert 2 < out.logits_TV.std() < 4 and np.abs(out.logits_TV).max() < 20
    assert len(set(out.logits_TV.argmax(1).tolist())) > TOKENS / 3
    drafter = minimtp.load_drafter("auto", target)
    steps = list(minimtp.generate(target, prompt.tolist(), drafter, num_draft=3, max_new_tokens=4))
    assert any(step.drafted for step in steps)
    assert target.tokenizer is None  # the bundled one has more tokens than these models


@pytest.mark.parametrize("name", ["gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-e2b", "qwen3.6-27b"])
def test_tokens_stay_different_through_all_layers(name, tmp_path):
    synthesize(narrow(name, tmp_path), tmp_path / "deep")
    target = minimtp.load(tmp_path / "deep")
    layers = range(len(target.config.layers))
    prompt = np.random.RandomState(2).randint(0, 256, 48)
    out = target.forward(prompt, target.new_cache(), taps=[f"layer.{i}.out" for i in layers])
    sizes = [math.sqrt(np.mean(np.square(out.taps[f"layer.{i}.out"]))) for i in layers]
    assert 0.2 < min(sizes) and max(sizes) < 10
    alike = np.corrcoef(out.hidden_TD[8:])[np.triu_indices(40, 1)]
    assert alike.mean() < 0.6, "attention has averaged the tokens away"
    assert 2 < out.logits_TV.std() < 4 and np.abs(out.logits_TV).max() < 25


def contents(path):
    """Bytes of a file, or of all in a folder."""
    return path.read_bytes() if path.is_file() else {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("format", ["q4_0", "compressed-tensors"])
def test_the_seed_decides(format, tmp_path):
    file = config_files("everything_int4")[0]
    written = []
    for seed in (3, 3, 4):
        path = destination(tmp_path / str(len(written)), "model", format)
        path.parent.mkdir()
        synthesize(file, path, format, seed=seed)
        written.append(contents(path))
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", *synth.CODES])
def test_any_rows_are_those_of_the_whole(type):
    weight = Noise("some.weight", (50, 768), type, 0.0, 0.02, seed=5)
    whole_OI = weight.rows(0, 50, np.float64)
    random = np.random.RandomState(6)
    for _ in range(20):
        a, b = sorted(random.randint(0, 51, 2).tolist())
        if a < b:
            assert np.array_equal(weight.rows(a, b, np.float64), whole_OI[a:b])
    assert not np.array_equal(Noise("other.weight", (50, 768), type, 0.0, 0.02, 5).rows(0, 50, np.float64), whole_OI)
    assert abs(whole_OI.std() / 0.02 - 1) < 0.03 and abs(whole_OI.mean()) < 0.0005
    assert np.unique(whole_OI, axis=0).shape[0] == 50 and abs(np.corrcoef(whole_OI)[np.triu_indices(50, 1)]).max() < 0.2


# Sizes


class Enough(Exception):
    pass


def planned(monkeypatch, name, format, folder):
    """What would be written of a published configuration: {name: Lazy}."""
    found = {}

    def note(path, *arguments):
        found.update(arguments[-1] if format in GGUF else arguments[0])
        raise Enough

    for writer in ("write_gguf", "write_safetensors"):
        monkeypatch.setattr(convert, writer, note)
    with pytest.raises(Enough):
        synthesize(name, destination(folder, "model", format), format)
    return found


def size_of(tensors):
    """Bytes, without the shapes that compressed-tensors writes beside packed weights."""
    return sum(convert.stored_bytes(name, each) for name, each in tensors.items() if not name.endswith("weight_shape"))


@pytest.mark.parametrize(
    "name, counts",
    [
        ("gemma-4-31b", {"Q4_0": 410, "F32": 422, "Q6_K": 1}),
        ("gemma-4-26b-a4b", {"Q4_0": 265, "F32": 392, "Q6_K": 1}),
        ("gemma-4-e2b", {"Q4_0": 275, "F32": 263, "Q6_K": 2, "F16": 1}),
    ],
)
def test_a_gguf_file_has_the_tensors_of_the_published_one(name, counts, monkeypatch, tmp_path):
    tensors = planned(monkeypatch, name, "q4_0", tmp_path)
    types = [tensor.dtype for tensor in tensors.values()]
    assert {type: types.count(type) for type in types} == counts
    if name == "gemma-4-31b":
        assert size_of(tensors) == 17_635_166_448


@pytest.mark.parametrize(
    "name, formats",  # int4 as Google releases it: no int4 experts in folders, and no assistants
    [
        ("gemma-4-31b", ["bf16", "q4_0", "compressed-tensors"]),
        ("gemma-4-26b-a4b", ["bf16", "q4_0"]),
        ("gemma-4-12b", ["bf16", "q4_0", "compressed-tensors"]),
        ("gemma-4-e4b", ["bf16", "q4_0", "compressed-tensors"]),
        ("gemma-4-e2b", ["bf16", "q4_0", "compressed-tensors"]),
        ("gemma-4-31b-assistant", ["bf16", "q4_0"]),
        ("gemma-4-e2b-assistant", ["bf16"]),  # with its centroids, for which GGUF has no place
        ("qwen3.6-27b", ["bf16", "q4_0", "q8_0"]),
        ("qwen3.6-35b-a3b", ["bf16", "q4_0", "q8_0"]),
    ],
)
def test_sizes_are_those_that_are_counted(name, formats, monkeypatch, tmp_path):
    family, config = published_config(name)
    table = family.tensors(config)
    if getattr(config, "mtp_layers", 0):
        mtp = qwen35_mtp.tensors(qwen35_mtp.layer_config(config))
        table = table | {f"mtp {place}": spec for place, spec in mtp.items()}
    for format in formats:
        counted = memory.stored_bytes(table, {"compressed-tensors": "w4a16-ct"}.get(format, format))
        assert size_of(planned(monkeypatch, name, format, tmp_path)) == counted


def test_memory_stays_small(tmp_path):
    path = narrow("gemma-4-31b", tmp_path, vocab_size=1 << 16, hidden_size=128)
    tracemalloc.start()
    synthesize(path, tmp_path / "wide")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "wide" / "model.safetensors").stat().st_size > 16e6 and peak < 12e6


# Fewer layers


@pytest.mark.parametrize("name", PUBLISHED)
def test_fewer_layers_keep_the_pattern(name):
    raw = published(name)
    total = len(published_config(name)[1].layers)
    kinds = [layer.kind for layer in published_config(name)[1].layers]
    possible = []
    for count in range(1, total + 2):
        try:
            few = keep_layers(raw, count)
        except ValueError as error:
            assert str(total) in str(error) and str(count) in str(error)
            continue
        possible.append(count)
        layers = synth.parse_model(few, "")[1].layers
        assert [layer.kind for layer in layers] == kinds[:count] and {layer.kind for layer in layers} == set(kinds)
    period = {"gemma-4-e2b": 5}.get(name, 6 if name.startswith("gemma") else 4)
    start = 2 * period if name in ("gemma-4-e2b", "gemma-4-e4b") else period
    assert possible == ([4] if name.endswith("assistant") else list(range(start, total + 1, period)))
    assert keep_layers(raw, total) == raw


@pytest.mark.parametrize(
    "shared, count, owning",
    [(20, 10, 5), (20, 15, 5), (20, 20, 10), (20, 25, 10), (20, 30, 15), (30, 10, 5), (5, 10, 5)],
)
def test_the_layers_that_share_stay_wide_and_have_donors(shared, count, owning):
    raw = published("gemma-4-e2b")
    raw["text_config"]["num_kv_shared_layers"] = shared
    layers = synth.parse_model(keep_layers(raw, count), "")[1].layers
    assert [layer.owns_kv for layer in layers] == [True] * owning + [False] * (count - owning)
    assert {layer.intermediate_size for layer in layers[:owning]} == {6144}
    assert {layer.intermediate_size for layer in layers[owning:]} == {12288}
    assert {layer.kv for layer in layers[owning:]} == {owning - 2, owning - 1}


def test_layers_in_sizes_of_their_own_and_bare_configurations(tmp_path):
    """`per_layer_config` goes by index; a text configuration without an outer one; an assistant of two periods."""
    raw = published("gemma-4-12b")["text_config"] | {"model_type": "gemma4_text"}
    few = keep_layers(raw, 12)
    assert few["num_hidden_layers"] == 12 == len(few["layer_types"]) and "text_config" not in few
    raw = published("gemma-4-31b-assistant")
    text = raw["text_config"]
    text |= {"num_hidden_layers": 8, "layer_types": text["layer_types"] * 2, "num_kv_shared_layers": 8}
    few = keep_layers(raw, 4)
    assert few["text_config"]["num_kv_shared_layers"] == 4 and raw["text_config"]["num_hidden_layers"] == 8


def test_layers_are_left_out_of_the_file(tmp_path):
    report = synthesize(narrow("gemma-4-31b", tmp_path), tmp_path / "short", "compressed-tensors", layers=6)
    assert len(minimtp.load(tmp_path / "short").config.layers) == 6
    assert {row.stored for row in report.tensors} == {"int4", "BF16"}


# Around it


@pytest.mark.parametrize("format", ["bf16", "q4_0"])
@pytest.mark.parametrize("name", ["gemma-4-31b", "qwen3.5-0.8b"])
def test_the_bundled_tokenizer_comes_with_it(name, format, tmp_path):
    path = destination(tmp_path, "model", format)
    synthesize(narrow(name, tmp_path, vocab_size=1280), path, format, layers=12)
    target = minimtp.load(path)
    ids = target.tokenizer.encode("To be, or not")
    steps = minimtp.generate(target, ids, max_new_tokens=3, stop=target.stop_ids)
    assert len(ids) > 2 and isinstance(target.tokenizer.decode([t for step in steps for t in step.tokens]), str)
    assert target.chat_template() is not None and target.stop_ids


def test_a_folder_for_a_gguf_file(tmp_path):
    synthesize(str(config_files("12b")[0]), str(tmp_path / "one"), "q4_0")
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["one.gguf"]
    tensors = read_header(tmp_path / "one" / "one.gguf")[1]
    assert len(open_model(tmp_path / "one")[0].tensors) == len(tensors) - 1  # rope_freqs became configuration
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("name", ["there", "there.gguf"])
@pytest.mark.parametrize("format", ["bf16", "q8_0"])
def test_nothing_is_overwritten(name, format, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match="there"):
        synthesize(config_files("12b")[0], tmp_path / name, format)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("name, format", [("model", "bf16"), ("model", "q4_0"), ("model.gguf", "q4_0")])
def test_what_is_interrupted_is_not_there(name, format, tmp_path):
    seen = []

    def stop(done, total):
        seen.append((done, total))
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(config_files("int4")[0], tmp_path / name, format, progress=stop)
    assert list(tmp_path.iterdir()) == [] and seen == sorted(seen) and len({total for _, total in seen}) == 1
    synthesize(config_files("int4")[0], tmp_path / name, format)
    minimtp.load(tmp_path / name)


@pytest.mark.parametrize(
    "config, format, layers, words",
    [
        ("gemma-4-4b", "bf16", None, "no published configuration 'gemma-4-4b'"),
        ("gemma-4-31b", "q2_0", None, "'q2_0', expected one of bf16"),
        ("gemma-4-e2b", "bf16", 5, "5 layers .* of 35: possible are 10, 15, 20"),
        ("gemma-4-31b", "bf16", 0, "0 layers"),
        ("gemma-4-e2b-assistant", "bf16", 3, "possible are 4"),
    ],
)
def test_what_cannot_be(config, format, layers, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        synthesize(config, tmp_path / "model", format, layers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "llama"}', '{"model_type": "gemma4"}'])
def test_a_file_that_is_no_configuration(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(CheckpointError):
        synthesize(tmp_path / "c.json", tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]


def test_every_small_configuration_is_one_that_is_tested():
    assert {name in SIZES or name in CONFIGS for name in SHAPES} == {True}
