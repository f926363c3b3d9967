"""GGUF files: what a converter made of a published folder reads as that folder, and what is wrong in a file is said.

The files are written by random_gguf, with the `gguf` library and none of the package's code.
"""

import json
import re
import struct
import time
import tracemalloc
from dataclasses import replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import random_models
import random_qwen
import random_sizes
from random_gguf import blocks, same_rope, tiled, two_heads, write_gguf, write_sparse
from tiny import FOLDER
from tokenizers import Tokenizer

from minimtp import gemma4, gemma4_assistant, qwen35, qwen35_mtp
from minimtp.checkpoint import CheckpointError, open_checkpoint
from minimtp.gguf_file import Header
from minimtp.gguf_model import open_gguf
from minimtp.loading import bundled

FAMILIES = {name: family for family in (gemma4, gemma4_assistant, qwen35) for name in family.MODEL_TYPES}
TARGETS = {f"sizes-{name}": (random_sizes, name) for name in random_sizes.SIZES}
TARGETS |= {f"models-{name}": (random_models, name) for name in random_models.CONFIGS}
TARGETS |= {f"qwen-{name}": (random_qwen, name) for name in random_qwen.CONFIGS}
GEMMAS = [name for name in TARGETS if not name.startswith("qwen")]
PUBLISHED = json.loads((Path(gemma4.__file__).parent / "published.json").read_text(encoding="utf-8"))
SKIPPED = re.compile(r"model\.(vision|visual|embed_vision)|.*weight_(scale|shape)$")


@cache
def folders(name):
    """The random checkpoint of TARGETS[name] -> (its folder, its drafter's, if that is another)."""
    module, config = TARGETS[name]
    path = Path(FOLDER.name) / f"gguf-{name}"
    return (module.write_qwen(config, path),) if module is random_qwen else module.write_pair(config, path)


@cache
def written(name, role=0, **options):
    """Its GGUF file."""
    file = f"gguf-{name}-{role}-{'-'.join(f'{key}-{value}' for key, value in options.items())}.gguf"
    return write_gguf(Path(FOLDER.name) / file, folders(name)[role], **options)


def config_of(path):
    return json.loads((path / "config.json").read_text())


def parsed(config):
    """The family's configuration; of a rope only how many pairs rotate."""
    found = FAMILIES[config["model_type"]].parse_config(config)
    if hasattr(found, "ropes"):
        width, full = next(layer.head_dim for layer in found.layers if layer.kind == "full"), found.ropes["full"]
        return replace(found, ropes=found.ropes | {"full": full._replace(fraction=same_rope(full.fraction, width))})
    return found


def published(path):
    """{name: array} of a folder: names as family tables have them, experts one by one, int4 as None."""
    found = {}
    for name, raw in open_checkpoint(path).tensors.items():
        name = name.replace("model.language_model.", "model.")
        stem, _, last = name.rpartition(".")
        if name.endswith("weight_packed"):
            found[name.removesuffix("_packed")] = None
        elif stem.endswith("experts"):
            array = raw.to("float32")
            parts = {"gate_proj": 0, "up_proj": 1} if last == "gate_up_proj" else {"down_proj": 0}
            split = np.split(array, len(parts), axis=1)
            found |= {f"{stem}.{e}.{part}.weight": split[i][e] for part, i in parts.items() for e in range(len(array))}
        elif not SKIPPED.match(name):
            found[name] = raw.stored() if raw.dtype == "I64" else raw.to("float32")
    return found


def assert_same(checkpoint, path, but="-"):
    """Every tensor is the folder's, bit for bit; norms with their 1, A_log where it can be."""
    expected = {name: array for name, array in published(path).items() if not name.startswith(but)}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, array in expected.items():
        raw = checkpoint.tensors[name]
        assert raw.name == name and (array is None or raw.shape == array.shape)
        if array is not None and not name.endswith("A_log"):
            found = raw.stored() if raw.dtype == "I64" else raw.to("float32")
            assert np.array_equal(found, array + np.float32(1) if raw.plus_one else array), name


def refused(message, call, *arguments):
    """The call raises CheckpointError, in one line that matches."""
    with pytest.raises(CheckpointError, match=message) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
    return str(caught.value)


# Right files


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_of_a_target_is_its_folder(name):
    checkpoint = open_gguf(written(name))
    assert_same(checkpoint, folders(name)[0])
    if name != "models-int4_sharded":  # num_global_key_value_heads without attention_k_eq_v, which converters heed
        assert parsed(checkpoint.config) == parsed(config_of(folders(name)[0]))
    json.dumps(checkpoint.config)
    assert checkpoint.folder == written(name) and checkpoint.tokenizer() is None
    assert (
        checkpoint.settings("generation_config") == {"eos_token_id": []}
        and checkpoint.settings("tokenizer_config") == {}
    )


@pytest.mark.parametrize("name", [name for name in TARGETS if "qwen" in name])
def test_norms_are_read_with_their_one_and_nothing_else_is(name):
    tables = [qwen35.tensors(qwen35.parse_config(config_of(folders(name)[0])))]
    tables.append(qwen35_mtp.tensors(qwen35_mtp.parse_config(config_of(folders(name)[0]))))
    centred = {name for table in tables for name, _, kind in table.values() if kind == "zero_centred"}
    tensors = open_gguf(written(name)).tensors
    assert {name for name, raw in tensors.items() if raw.plus_one} == centred & tensors.keys()


@pytest.mark.parametrize("dialect", ["llama.cpp", "fork"])
@pytest.mark.parametrize("name", GEMMAS)
def test_a_file_of_an_assistant_is_its_folder_in_both_dialects(name, dialect):
    checkpoint, theirs = open_gguf(written(name, 1, dialect=dialect)), parsed(config_of(folders(name)[1]))
    ours, but = parsed(checkpoint.config), "-"
    if dialect == "llama.cpp":  # leaves the centroids out; whether values are keys, a drafter has no need to know
        layers = tuple(replace(layer, k_eq_v=own.k_eq_v) for layer, own in zip(theirs.layers, ours.layers))
        theirs, but = replace(theirs, clusters=None, layers=layers), "masked_embedding."
    assert ours == theirs
    assert_same(checkpoint, folders(name)[1], but)


def test_centroids_may_have_the_names_that_llama_cpp_knows():
    def rename(tensors):
        tensors["masked_embd_centroids.weight"] = tensors.pop("mtp.centroids.weight")
        tensors["masked_embd_ordering"] = tensors.pop("mtp.token_ordering.weight")

    path = write_gguf(Path(FOLDER.name) / "masked.gguf", folders("sizes-e2b")[1], dialect="fork", edit=rename)
    assert_same(open_gguf(path), folders("sizes-e2b")[1])
    assert parsed(open_gguf(path).config).clusters == gemma4_assistant.Clusters(24, 5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["qwen-moe", "qwen-moe_single", "sizes-26b"])
def test_gate_and_up_in_one_tensor_or_two_are_the_same_experts(name, fused):
    assert_same(open_gguf(written(name, fused=fused)), folders(name)[0])


HALVES = {"qwen-dense": "BF16", "models-no_softcap": "BF16", "models-eight_layers": "F16", "sizes-e4b_qat": "BF16"}


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_holds_checkpoints_of_half_precision_exactly(name, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", folders(name)[0], store=lambda tensor, array: HALVES[name])
    assert_same(open_gguf(path), folders(name)[0])
    assert {raw.dtype for raw in open_gguf(path).tensors.values()} - {"F64"} == {"F32", HALVES[name]}


def test_a_gate_of_one_row_may_have_lost_its_row(tmp_path):
    """llama-quantize counts no dimension of 1 on the outside."""

    def flatten(tensors):
        for name in tensors:
            if "ffn_gate_inp_shexp" in name:
                tensors[name] = tensors[name][0]

    path = write_gguf(tmp_path / "x.gguf", folders("qwen-moe")[0], edit=flatten)
    assert_same(open_gguf(path), folders("qwen-moe")[0])


@pytest.mark.parametrize("name", ["qwen-dense", "qwen-moe"])
def test_the_mtp_layer_may_be_left_out_or_alone(name):
    whole, without, alone = (open_gguf(written(name, mtp=mtp)) for mtp in (True, False, "only"))
    assert_same(without, folders(name)[0], but="mtp.")
    assert parsed(without.config) == replace(parsed(whole.config), mtp_layers=0)
    assert_same(alone, folders(name)[0], but="model.layers.")
    assert qwen35_mtp.parse_config(alone.config) == qwen35_mtp.parse_config(whole.config)


@pytest.mark.parametrize("name", ["qwen-interval", "qwen-moe_one_expert", "qwen-three_to_one"])
def test_files_from_before_the_list_of_recurrent_layers_have_the_same_pattern(name):
    old, new = open_gguf(written(name, old=True)), open_gguf(written(name))
    assert len(new.metadata) == len(old.metadata) + 1 and old.config == new.config


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_configuration_comes_back(name, tmp_path):
    config, found, shapes, start = PUBLISHED[name], parsed(PUBLISHED[name]), {}, ()
    if hasattr(found, "ropes"):
        half = next(layer.head_dim for layer in found.layers if layer.kind == "full") // 2
        shapes["rope_freqs.weight"], start = (half,), [1] * (half // 4) + [1e30] * (half - half // 4)
    for i, layer in enumerate(found.layers):
        if layer.kind == "full" and getattr(layer, "owns_kv", False) and not layer.k_eq_v:
            shapes[f"blk.{i}.attn_v.weight"] = 8, 8
    shapes["token_embd.weight"] = found.vocab_size, found.hidden_size
    if not found.tied:
        shapes["output.weight"] = found.vocab_size, found.hidden_size
    if getattr(found, "per_layer_input", 0):
        shapes["per_layer_token_embd.weight"] = found.vocab_size, found.per_layer_input * len(found.layers)
    if getattr(found, "clusters", None):
        shapes["masked_embd_centroids.weight"] = found.clusters.count, found.hidden_size
    ours = parsed(open_gguf(write_sparse(tmp_path / "x.gguf", config, shapes, start)).config)
    assert ours == replace(found, placeholders={})


# Numbers that were changed on the way


@pytest.mark.parametrize("store", ["BF16", "F16", "F32"])
def test_a_log_comes_back_exactly_where_it_had_16_bits(store, tmp_path):
    path = random_qwen.write_qwen("three_to_one", tmp_path / "model", store=store)
    tensors, names = open_gguf(write_gguf(tmp_path / "x.gguf", path)).tensors, 0
    for name, array in published(path).items():
        if name.endswith("A_log"):
            found, names = tensors[name].to("float64"), names + 1
            assert np.abs(found - array).max() < 2e-7 and (store == "F32" or np.array_equal(found, array))
            decay = np.sort(-np.exp(array).astype(np.float64))
            assert np.allclose(np.sort(-np.exp(found)), decay, rtol=2**-22)
    assert names == 3


def test_heads_of_one_group_stand_together_again():
    text = dict(linear_num_key_heads=2, linear_num_value_heads=6)
    assert tiled(np.array(list("012345")), text, 0, 0, 1).tolist() == list("031425")
    a = np.float32([[-1], [-2], [-4], [-8], [-16], [-32]])

    def number(tensors):
        tensors["blk.0.ssm_dt.bias"] = np.float32([0, 3, 1, 4, 2, 5])
        tensors["blk.0.ssm_a"] = a[[0, 3, 1, 4, 2, 5], 0]

    path = write_gguf(Path(FOLDER.name) / "heads.gguf", folders("qwen-three_to_one")[0], edit=number)
    tensors = open_gguf(path).tensors
    assert tensors["model.layers.0.linear_attn.dt_bias"].stored().tolist() == [0, 1, 2, 3, 4, 5]
    assert np.allclose(tensors["model.layers.0.linear_attn.A_log"].stored(), np.log([1, 2, 4, 8, 16, 32]))


QUANTIZED = dict(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1, head_dim=32, vocab_size=40,
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16, rope_parameters=random_qwen.rope(),
    layer_types=random_qwen.layers("lf"),
)  # fmt: skip


@pytest.mark.parametrize("width", [32, 64, 16])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_quantized_tensors_are_put_in_order_without_unpacking(kind, width, tmp_path):
    experts = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64)
    random_qwen.write_model(
        tmp_path / "m", 5, linear_value_head_dim=width, **QUANTIZED | (experts if kind == "moe" else {})
    )
    checkpoint = open_gguf(write_gguf(tmp_path / "x.gguf", tmp_path / "m", store=blocks))
    found = {raw.dtype for raw in checkpoint.tensors.values()}
    assert {"Q4_0", "Q8_0", "F16", "F32"} <= found
    for name, array in published(tmp_path / "m").items():
        raw = checkpoint.tensors[name]
        if raw.dtype[0] != "Q":
            continue
        type = gguf.GGMLQuantizationType[raw.dtype]
        if raw.head_order is None or width != 16:  # quantizing commutes with moving rows and whole blocks
            assert raw.stored().tobytes() == gguf.quants.quantize(array, type).tobytes()
            expected = gguf.quants.dequantize(gguf.quants.quantize(array, type), type)
        else:
            assert width == 16 and name.endswith("out_proj.weight")
            text = QUANTIZED | {"linear_value_head_dim": width}
            stored = gguf.quants.dequantize(gguf.quants.quantize(tiled(array, text, 1, 0, width), type), type)
            expected = np.empty_like(stored)
            expected[:, tiled(np.arange(stored.shape[1])[None], text, 1, 0, width)[0]] = stored
        weight = raw.weight()
        assert weight.shape == array.shape and weight.name == name
        assert np.array_equal(weight.dequantize("float32"), expected)
        last = len(expected) - 1
        assert np.array_equal(weight.rows(last, last + 1, "float64"), expected[last:].astype(np.float64))
        assert np.array_equal(weight.take([last, 0], "float32"), expected[[last, 0]])
        assert weight.rows(0, last, "float32").flags.c_contiguous


def test_what_needs_no_order_is_a_view_of_the_file():
    for name in ("sizes-26b", "qwen-moe"):
        for raw in open_gguf(written(name)).tensors.values():
            if raw.row_order is None and raw.head_order is None and raw.dtype == "F32":
                assert np.shares_memory(raw.stored(), raw.data) and not raw.stored().flags.writeable


# Text

TEXTS = [
    "", " ", "   two  spaces ", "Hello, world!\n\n\n\tYes\r\n", "naïve café e\u0301 É Ångström", "日本語 🦙🇩🇪",
    "3.14159 10,000 x²", "don't WE'LL I'm", "<|turn>user\nhi<turn|>\n<|turn>model\n", "<bos>a<eos><pad>", "\0\x01\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>", 'a<|tool_call>b<|"|>c<|channel>thought', "▁▁ ▁", "<0x41>",
    "<unused7>", "[PAD1215]", "<|fim_prefix|><tool_call></tool_call>", "߷ ꙮ ﷽ \u200d\ufeff", "\n" * 40, " " * 40 + "x",
    "def f(x):\n    return x  # comment\n",
]  # fmt: skip


def with_text(name, extra=None):
    """The bundled model's file, with its tokenizer -> (checkpoint, its folder)."""
    path = Path(FOLDER.name) / f"text-{name}-{extra and extra.__name__}.gguf"
    if not path.exists():
        write_gguf(path, bundled(name), tokenizer=bundled(name), extra=extra)
    return open_gguf(path), bundled(name)


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_a_tokenizer_encodes_as_the_folders_own(name):
    checkpoint, path = with_text(name)
    ours, theirs = checkpoint.tokenizer(), Tokenizer.from_file(str(path / "tokenizer.json"))
    assert {i: t.content for i, t in ours.get_added_tokens_decoder().items()} == {
        i: t.content for i, t in theirs.get_added_tokens_decoder().items()
    }
    assert ours.get_vocab() == theirs.get_vocab()
    rng = np.random.default_rng(7)
    pieces = [chr(int(i)) for i in rng.integers(1, 0x2FF, 300)] + list(theirs.get_vocab()) + TEXTS
    random = ["".join(rng.choice(pieces, rng.integers(1, 30))) for _ in range(300)]
    for text in TEXTS + random:
        for special in (False, True):
            ids = theirs.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, add_special_tokens=special).ids == ids, text
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_the_folders_other_files_come_back(name):
    checkpoint, path = with_text(name)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    names = [f"{name}_token" for name in ("bos", "eos", "pad", "unk") if settings.get(f"{name}_token")]
    assert checkpoint.settings("tokenizer_config") == {n: settings[n] for n in names} | {"chat_template": template}
    generation, ours = (
        json.loads((path / "generation_config.json").read_text()),
        checkpoint.settings("generation_config"),
    )
    assert sorted(ours.pop("eos_token_id")) == sorted(generation["eos_token_id"])
    assert ours == {name: generation[name] for name in ("temperature", "top_k", "top_p")}
    assert parsed(checkpoint.config).placeholders == parsed(config_of(path)).placeholders != {}


def test_gemmas_turns_are_tokens_even_where_a_converter_took_them_for_words():
    def forget(writer):
        values = writer.kv_data[0]["tokenizer.ggml.token_type"].value
        values[46:107] = [1] * 61

    checkpoint, path = with_text("tiny-gemma4", extra=forget)
    theirs = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = '<|turn>user\nhi<turn|>\n<|tool_call>x<|"|>'
    assert checkpoint.tokenizer().encode(text).ids == theirs.encode(text).ids


def test_a_first_token_that_is_not_named_is_missed():
    def leave_out(writer):
        del writer.kv_data[0]["tokenizer.ggml.bos_token_id"]

    checkpoint, _ = with_text("tiny-gemma4", extra=leave_out)
    refused("tokenizer.ggml.bos_token_id is missing", checkpoint.tokenizer)


def test_qwens_older_words_keep_accents_apart():
    def older(writer):
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "qwen2"

    new, old = (with_text("tiny-qwen35", **options)[0].tokenizer() for options in ({}, {"extra": older}))
    pieces = [[t[0] for t in o.pre_tokenizer.pre_tokenize_str("a\u0900b")] for o in (new, old)]
    assert len(pieces[0]) == 1 and len(pieces[1]) > 1


# Parts


def parts(tmp_path, count=20):
    """A file in parts -> (the first, all of them)."""
    first = write_gguf(tmp_path / "x.gguf", folders("qwen-moe")[0], parts=count)
    return first, sorted(tmp_path.glob("*.gguf"))


def test_a_file_in_parts_is_the_whole(tmp_path):
    first, files = parts(tmp_path)
    whole, checkpoint = open_gguf(written("qwen-moe")), open_gguf(first)
    assert len(files) > 5 and checkpoint.config == whole.config and checkpoint.folder == first
    assert_same(checkpoint, folders("qwen-moe")[0])
    assert len({raw.file for raw in checkpoint.tensors.values()}) == len(files)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    first, files = parts(tmp_path)
    refused("not the first of", open_gguf, files[1])
    second = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    refused("not part 2 of", open_gguf, first)
    files[1].unlink()
    refused(f"{files[1].name}: no such file", open_gguf, first)
    files[1].write_bytes(second)
    first.rename(tmp_path / "renamed.gguf")
    refused("not the first of", open_gguf, tmp_path / "renamed.gguf")
    (tmp_path / "renamed.gguf").rename(first)
    files[1].write_bytes(second.replace(b"split.no", b"split.mo"))
    refused("not part 2 of", open_gguf, first)
    again = write_gguf(tmp_path / "again.gguf", folders("qwen-moe")[0], parts=20)
    for file in sorted(tmp_path.glob("again*")):
        file.rename(tmp_path / file.name.replace("again", "x"))
    assert open_gguf(first).tensors and not again.exists()


# Speed and size


def test_opening_reads_no_tensor_and_many_tokens_fast(tmp_path):
    """A quarter of Gemma's tokens and merges; 8 GiB of weights."""
    config = config_of(folders("sizes-26b")[0])
    words = [f"{i:06x}" * (1 + i % 3) for i in range(65_536)]
    shapes = {"rope_freqs.weight": (16,), "token_embd.weight": (65_536, 32_768)}
    path = write_sparse(tmp_path / "x.gguf", config, shapes, [1] * 4 + [1e30] * 12, lambda writer: (
        writer.add_token_list(words), writer.add_token_merges([f"{a} {a}" for a in words * 2])))  # fmt: skip
    assert path.stat().st_size > 8 << 30
    assert min(seconds(open_gguf, path) for _ in range(3)) < 0.2  # about 0.01 where nothing else runs
    tracemalloc.start()
    checkpoint = open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    assert tokens.list() == words and [tokens.index(words[i]) for i in (0, 7_777, -1)] == [0, 7_777, 65_535]
    assert tokens.index("no such") is None


def test_reading_a_tensor_touches_its_bytes_alone(tmp_path):
    """The pages of the mapped file that are in memory, says the system."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell which pages are in memory")
    shapes = {"token_embd.weight": (1 << 10, 1 << 12), "output.weight": (1 << 10, 1 << 12)}
    path = write_sparse(tmp_path / "one-tensor.gguf", config_of(folders("qwen-dense")[0]), shapes)

    def resident():
        entries = smaps.read_text().split("Rss:")
        return sum(int(after.split()[0]) for before, after in zip(entries, entries[1:]) if path.name in before)

    tensors, size = open_gguf(path).tensors, 1 << 14  # KiB
    assert resident() < 1 << 10
    assert not tensors["lm_head.weight"].to("float32").any() and size <= resident() < size + (1 << 10)
    assert not tensors["model.embed_tokens.weight"].to("float32").any() and resident() >= 2 * size


def seconds(call, *arguments):
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


@pytest.mark.parametrize("words", [[""] * 3000, ["x" * 300] * 2000, ["a\0b", "\0", ""] * 700, ["", "y" * 70_000] * 40,
                                   ["é" * 100, "ab"] * 3000, [], ["one"]])  # fmt: skip
def test_all_kinds_of_texts_are_found(words, tmp_path):
    path = write_sparse(tmp_path / "x.gguf", config_of(folders("qwen-dense")[0]), {"token_embd.weight": (8, 48)}, (),
                        lambda writer: writer.add_array("words", words + ["end"]))  # fmt: skip
    checkpoint = open_gguf(path)
    assert checkpoint.metadata["words"].list() == words + ["end"]
    assert checkpoint.metadata["words"].index("end") == len(words)


# Wrong files

SMALL = dict(hidden_size=16, vocab_size=24, max_position_embeddings=64)
KINDS = {
    "gemma": ("sizes-e2b", {}), "moe": ("sizes-26b", {}), "assistant": ("sizes-e2b", {"dialect": "fork", "role": 1}),
    "qwen": ("qwen-int4", {}), "qwen-moe": ("qwen-moe", {}),
}  # fmt: skip


@cache
def bytes_of(kind):
    """A file of that kind; "text" has a tokenizer, "heads" both a target and its drafter."""
    if kind == "heads":
        target, assistant = folders("sizes-e2b")
        return write_gguf(Path(FOLDER.name) / "heads.gguf", target, **two_heads(assistant)).read_bytes()
    if kind == "text":
        path = random_qwen.write_qwen("moe_no_mtp", Path(FOLDER.name) / "gguf-text", vocab_size=1216)
        return write_gguf(path / "x.gguf", path, tokenizer=bundled("tiny-qwen35")).read_bytes()
    name, options = KINDS[kind]
    return written(name, **options).read_bytes()


def opened(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return open_gguf(path)


def edited(tmp_path, kind, options):
    """Open the file of that kind, written with these options."""
    name, others = KINDS[kind]
    options = {key: value for key, value in others.items() if key != "role"} | options
    return open_gguf(write_gguf(tmp_path / "x.gguf", folders(name)[others.get("role", 0)], **options))


def says(key, new=None):
    """An option: a key has another value, or is there with it, or is not there at all."""

    def change(writer):
        data = writer.kv_data[0]
        full = key if key.startswith(("general.", "gemma4.")) else f"{writer.arch}.{key}"
        old = data.pop(full, None)
        if new is not None:
            type = old.type if old and not isinstance(new, str) else gguf.GGUFValueType.get_type(new)
            writer.add_key_value(full, new, type, old and old.sub_type)

    return dict(extra=change)


def holds(name, change=None):
    """An option: a tensor is another, or is not there."""

    def edit(tensors):
        array = tensors.pop(name)
        if change:
            tensors[name] = change(array)

    return dict(edit=edit)


def adds(name, shape=(2, 2)):
    """An option: one more tensor."""
    return dict(edit=lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))


def twice_as_many(tensors):
    tensors["blk.0.ffn_up_exps.weight"] = tensors["blk.0.ffn_gate_up_exps.weight"][:, :24].copy()


MANY, NO_LIST = [48, 48, 48, 96, 48, 96, 96], [True] * 8
WRONG = {
    "gemma": [
        (says("general.architecture", "llama"), "unknown architecture 'llama'"),
        (says("general.type", "adapter"), "not a language model: its general.type is 'adapter'"),
        (says("general.quantization_version", 1), "general.quantization_version is 1, supported: 2"),
        (says("mtp.hidden_size", 4), "key 'gemma4.mtp.hidden_size' is not known"),
        (says("rope.scaling.factor", 4.0), "key 'gemma4.rope.scaling.factor' is not known"),
        (says("embedding_length", "64"), "hidden_size is '64', expected a positive integer"),
        (says("block_count"), "key 'block_count' is missing"),
        (says("block_count", 2**31), "num_hidden_layers is 2147483648"),
        (says("block_count", 2000), "num_hidden_layers 2000 is more than 1000"),
        (says("block_count", 6), "attention.sliding_window_pattern has 7 values for 6 layers"),
        (says("attention.sliding_window"), "key 'attention.sliding_window' is missing"),
        (says("attention.layer_norm_rms_epsilon"), "key 'attention.layer_norm_rms_epsilon' is missing"),
        (says("rope.freq_base_swa"), "key 'rope.freq_base_swa' is missing"),
        (says("feed_forward_length", MANY), "feed_forward_length .* is not doubled where"),
        (says("attention.value_length", 16), "attention.value_length is 16, supported: 32"),
        (says("rope.dimension_count_swa", 8), "rope.dimension_count_swa is 8, supported: 16"),
        (holds("rope_freqs.weight"), "tensor 'rope_freqs.weight' is missing"),
        (holds("rope_freqs.weight", lambda x: x * 2), "'rope_freqs.weight' is not 1 up to"),
        (holds("rope_freqs.weight", lambda x: x[::-1]), "'rope_freqs.weight' is not 1 up to"),
        (holds("rope_freqs.weight", lambda x: np.append(x, x)), "or not half of"),
        (holds("blk.1.attn_v.weight"), r"of full layers \[1, 3\] only \[3\] have attn_v"),
        (holds("token_embd.weight"), "tensor 'token_embd.weight' is missing"),
        (adds("blk.0.attn_sinks.weight"), "unknown tensor 'blk.0.attn_sinks.weight'"),
        (adds("blk.0.attn_qkv.weight"), "unknown tensor 'blk.0.attn_qkv.weight'"),
        (adds("blk.0.attn_q.bias"), "unknown tensor 'blk.0.attn_q.bias'"),
        (adds("blk.7.attn_norm.weight"), "unknown tensor 'blk.7.attn_norm.weight'"),
        (adds("blk.01.attn_norm.weight"), "unknown tensor 'blk.01.attn_norm.weight'"),
        (adds("nextn.pre_projection.weight"), "unknown tensor 'nextn.pre_projection.weight'"),
    ],
    "moe": [
        (says("expert_count", 13), r"'blk.0.ffn_down_exps.weight' is \[12, 64, 24\]: not 13 experts"),
        (says("expert_count"), "num_experts is missing"),
        (holds("blk.0.ffn_down_exps.weight", lambda x: x[0]), r"is \[64, 24\]: not 12 experts"),
        (holds("blk.0.ffn_gate_up_exps.weight", lambda x: x[:, 1:]), r"is \[12, 47, 64\]: not 12 experts"),
        (dict(edit=twice_as_many), "'model.layers.0.experts.0.up_proj.weight' is there twice"),
    ],
    "assistant": [
        (adds("masked_embd_centroids.weight"), "'masked_embedding.centroids.weight' is there twice"),
        (says("n_centroids", 23), "n_centroids is 23, and there are 24"),
        (holds("mtp.centroids.weight") | says("use_ordered_embeddings", True), "is 24, and there are None"),
        (holds("mtp.token_ordering.weight", np.float32), "'mtp.token_ordering.weight' is F32, expected I32"),
        (says("requires_target_arch", "gemma3"), "requires_target_arch is 'gemma3', supported: 'gemma4'"),
        (says("nextn_predict_layers", 3), "nextn_predict_layers is 3, supported: 4"),
        (says("n_embd_backbone"), "key 'embedding_length_out' is missing"),
    ],
    "qwen": [
        (says("gemma4.block_count", 4), "key 'gemma4.block_count' is not known in a file of qwen35"),
        (says("ssm.time_step_rank", 3), "not 3 heads in 2 groups"),
        (says("ssm.inner_size", 97), "ssm.inner_size 97 for 6 heads"),
        (says("ssm.group_count", 2**31 - 1), "not 6 heads in 2147483647 groups of 1"),
        (says("vocab_size", 7), "vocab_size is 7, supported: 88"),
        (holds("blk.0.ssm_conv1d.weight", lambda x: x[1:]), r"'blk.0.ssm_conv1d.weight' is \[159, 4\]: not 6 heads"),
        (holds("blk.0.ssm_out.weight", lambda x: x[:, 1:]), r"'blk.0.ssm_out.weight' is \[64, 95\]: not 6 heads"),
        (holds("blk.0.ssm_a", lambda x: -x), "'blk.0.ssm_a', F32, is not the -exp of anything"),
        (holds("blk.0.ssm_a", lambda x: x * np.nan), "'blk.0.ssm_a', F32, is not the -exp of anything"),
        (says("attention.recurrent_layers", NO_LIST), "attention.recurrent_layers .* of 8 layers 1 are for MTP"),
        (says("attention.recurrent_layers", NO_LIST[:5]), "attention.recurrent_layers .* of 8 layers"),
        (says("nextn_predict_layers", 8), "of 8 layers 8 are for MTP"),
        (says("rope.dimension_count"), "key 'rope.dimension_count' is missing"),
        (adds("blk.7.nextn.embed_tokens.weight"), "unknown tensor 'blk.7.nextn.embed_tokens.weight'"),
        (adds("blk.8.nextn.enorm.weight"), "unknown tensor 'blk.8.nextn.enorm.weight'"),
        (adds("blk.0.attn_q.weight"), "unknown tensor 'blk.0.attn_q.weight'"),
    ],
}


@pytest.mark.parametrize("kind, options, message", [(kind, *case) for kind in WRONG for case in WRONG[kind]])
def test_what_does_not_fit_is_named(kind, options, message, tmp_path):
    said = refused(message, lambda: parsed(edited(tmp_path, kind, options).config))
    assert said.startswith((str(tmp_path / "x.gguf"), "config: "))


def patched(data, **fields):
    """The first bytes changed: version, tensors, keys."""
    for name, new in fields.items():
        at, size = {"magic": (0, 4), "version": (4, 4), "tensors": (8, 8), "keys": (16, 8)}[name]
        data = data[:at] + (new if isinstance(new, bytes) else new.to_bytes(size, "little")) + data[at + size :]
    return data


def handmade(*entries, keys=(), data=b"", pad=True):
    """A GGUF file of entries (name, dims, type, offset) and of keys' bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(keys)) + b"".join(keys)
    for name, dims, type, offset in entries:
        head += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset)
    return head + bytes(-len(head) % 32 if pad else 0) + data


def key(name, kind, content):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + content


def many(kind, count, content=b""):
    return key(b"k", 9, struct.pack("<IQ", kind, count) + content)


def alignment(kind, content):
    return handmade(keys=[key(b"general.alignment", kind, content)])


def architecture(kind, content):
    return handmade(keys=[key(b"general.architecture", kind, content)])


A, B = (b"a", (4, 2), 0, 0), (b"b", (4, 2), 0, 32)
HANDMADE = [
    (b"", "truncated"),
    (b"G", "truncated"),
    (b"PK\x03\x04" + bytes(60), "not a little-endian GGUF"),
    (patched(handmade(), version=1), "version 2 or 3"),
    (patched(handmade(), version=4), "version 2 or 3"),
    (patched(handmade(), version=3 << 24), "not a little-endian"),
    (patched(handmade(), keys=2**64 - 1), "18446744073709551615 keys or tensors"),
    (patched(handmade(), tensors=2**64 - 1), "18446744073709551615 keys or tensors"),
    (patched(handmade(), keys=2000), "truncated"),
    (handmade(keys=[struct.pack("<Q", 2**63) + b"x"]), "truncated"),
    (handmade(keys=[key(b"k", 8, b"\xff" * 8)]), "truncated"),
    (handmade(keys=[many(12, 2**61)]), "truncated"),
    (handmade(keys=[many(8, 2**61)]), "truncated"),
    (handmade(keys=[many(8, 2**40, bytes(1 << 20))]), "more than 16384 texts"),
    (handmade(keys=[many(9, 1)]), "unknown type 9"),
    (handmade(keys=[key(b"k", 13, bytes(8))]), "unknown type 13"),
    (handmade(keys=[key(b"k", 0, b"1")] * 2), "'k' is there twice"),
    (handmade(keys=[key(b"\xff", 0, b"1")]), "not UTF-8"),
    (alignment(4, bytes(4)), "general.alignment is 0"),
    (alignment(4, b"\x18\0\0\0"), "general.alignment is 24"),
    (alignment(4, b"\0\0\0\x80"), "general.alignment is 2147483648"),
    (alignment(7, b"\x01"), "general.alignment is True"),
    (handmade(A, A, data=bytes(64)), "'a' is there twice"),
    (handmade((b"a", (), 0, 0)), "ggml type 0 is not supported"),
    (handmade((b"a", (1,) * 5, 0, 0), data=bytes(32)), "is not supported"),
    (handmade((b"a", (4, 0), 0, 0)), "is not supported"),
    (handmade((b"a", (2**31, 2**31), 0, 0)), "is not supported"),
    (handmade((b"a", (2**63, 2, 2**63), 0, 0)), "is not supported"),
    (handmade((b"a", (32, 2), 4, 0), data=bytes(64)), "of ggml type 4 is not supported"),
    (handmade((b"a", (32, 2), 99, 0), data=bytes(64)), "of ggml type 99 is not supported"),
    (handmade((b"a", (48, 2), 2, 0), data=bytes(64)), "whole blocks of 32"),
    (handmade(A, data=bytes(31)), "'a': 32 bytes at 0, expected at 0 of 31"),
    (handmade(A, data=bytes(65)), "33 bytes after the last tensor"),
    (handmade(A, (b"b", (4, 2), 0, 64), data=bytes(96)), "'b': 32 bytes at 64, expected at 32"),
    (handmade(A, (b"b", (4, 2), 0, 0), data=bytes(64)), "'b': 32 bytes at 0, expected at 32"),
    (handmade(B, A, data=bytes(64)), "'b': 32 bytes at 32, expected at 0"),
    (handmade((b"a", (4, 2), 0, 2**64 - 32), data=bytes(32)), "'a': 32 bytes at 18446744073709551584"),
    (handmade(A, data=bytes(32), pad=False), "expected at 0"),
    (handmade(A, data=bytes(32)), "unknown architecture None"),
    (architecture(0, b"1"), "unknown architecture 49"),
    (architecture(9, struct.pack("<IQ", 0, 2) + b"ab"), "unknown architecture Numbers"),
]


@pytest.mark.parametrize("data, message", HANDMADE, ids=range(len(HANDMADE)))
def test_an_unsound_file_is_refused_at_once(data, message, tmp_path):
    tracemalloc.start()
    refused(message, opened, tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < (8 << 20) + 40 * len(data)
    tracemalloc.stop()


def test_the_format_itself_allows_more_than_converters_write(tmp_path):
    """Other alignments, no padding behind the last tensor, version 2."""
    short = (b"a", (3, 2), 0, 0)
    for data in (patched(handmade(A, data=bytes(32)), version=2), handmade(short, data=bytes(24)),
                 handmade(short, data=bytes(32))):  # fmt: skip
        refused("unknown architecture None", opened, tmp_path, data)
    aligned = key(b"general.alignment", 4, struct.pack("<I", 128))
    head = handmade(A, (b"b", (4,), 0, 128), keys=[aligned], pad=False)
    refused("unknown architecture None", opened, tmp_path, head + bytes(-len(head) % 128 + 128 + 16))
    refused("'b': 16 bytes", opened, tmp_path, head + bytes(-len(head) % 128 + 128))


def test_a_header_made_to_be_searched_for_long_is_not(tmp_path):
    """A text full of what looks like the one that is looked for; thousands of lists, each with much behind it."""
    pattern = (struct.pack("<Q", 5) + b"<eos>") * (1 << 20)
    data = struct.pack("<Q", len(pattern)) + pattern + struct.pack("<Q", 1) + b"x"
    texts = Header(np.frombuffer(data, "u1")).texts(2)
    assert texts.index("x") == 1 and seconds(texts.index, "<eos>") < 0.5 and texts.index("<eos>") is None
    lists = [key(b"%d" % i, 9, struct.pack("<IQ", 8, 2) + b"\1\0\0\0\0\0\0\0x" * 2) for i in range(4000)]
    name = key(b"general.architecture", 8, struct.pack("<Q", 6) + b"gemma4")
    wrong = handmade(keys=[name, *lists, key(b"z", 8, data[: 8 + len(pattern)])])
    assert seconds(refused, "key 'block_count' is missing", opened, tmp_path, wrong) < 1


@pytest.mark.parametrize("head", [b"k" * 255, b"k" * 256, b"", b"a\0b\0", b"\0" * 9, b"\x05\0\0\0\0\0\0\0<eos>"])
def test_texts_are_found_whatever_they_look_like(head, tmp_path):
    texts = [b"a", head, b"bc", head * 2, b"k" * 70_000, b"\1\0", b"", *[b"%d" % i for i in range(40_000)], head]
    packed = b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    found = Header(np.frombuffer(packed + bytes(64), "u1")).texts(len(texts))
    assert found.list() == [text.decode() for text in texts] and len(found.data) == len(packed)
    assert found.index("bc") == 2 and found.index("39999") == len(texts) - 2 and found.index("40000") is None


def test_no_file_and_a_folder_are_refused(tmp_path):
    refused("no such file", open_gguf, tmp_path / "x.gguf")
    refused("no such file", open_gguf, tmp_path)


def mangled(data, random, header):
    """The data cut, extended, with bits flipped or pieces moved, mostly in its header."""
    data, end = bytearray(data), header if random.random() < 0.9 else len(data)
    match random.integers(5):
        case 0:
            return bytes(data[: random.integers(len(data))])
        case 1:
            return bytes(data) + random.bytes(int(random.integers(1, 200)))
        case 2:
            for at in random.integers(end, size=random.integers(1, 4)):
                data[at] ^= 1 << random.integers(8)
        case 3:
            at = random.integers(end)
            data[at : at + random.integers(1, 9)] = random.bytes(int(random.integers(0, 12)))
        case 4:
            a, b, size = random.integers(end), random.integers(end), random.integers(1, 64)
            data[a : a + size] = data[b : b + size]
    return bytes(data)


@pytest.mark.parametrize("kind", [*KINDS, "text", "heads"])
def test_a_mangled_file_is_refused_or_read_right(kind, tmp_path):
    """What is accepted has every tensor's bytes where they were; all of it can be read, or is refused as it is."""
    data = bytes_of(kind)
    whole, random = opened(tmp_path, data), np.random.default_rng(len(data))
    header = gguf.GGUFReader(tmp_path / "x.gguf").data_offset
    right, accepted = {name: raw.data.tobytes() for name, raw in whole.tensors.items()}, 0
    for _ in range(50):
        wrong = mangled(data, random, header)
        try:
            checkpoint = opened(tmp_path, wrong)
            FAMILIES[checkpoint.config["model_type"]].parse_config(checkpoint.config)
            checkpoint.tokenizer(), checkpoint.settings("generation_config"), checkpoint.settings("tokenizer_config")
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
            continue
        accepted += 1
        assert checkpoint.tensors.keys() == right.keys()
        same = [checkpoint.tensors[name].data.tobytes() == right[name] for name in right]
        assert sum(same) >= len(same) - 3 and (wrong[header:] != data[header:] or all(same))
        for raw in checkpoint.tensors.values():
            raw.stored()
    assert accepted < 38
