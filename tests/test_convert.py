"""convert: what llama.cpp's converter makes, int4 kept as it is, lattices found again, and nothing half written.

What a GGUF file must be is made with random_gguf, by the `gguf` library and none of the package's code; its files equal
those of llama.cpp's own converter.
"""

import json
import os
import shutil
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
from random_gguf import write_gguf as write_expected
from random_mobile import write_mobile
from tiny import FOLDER
from tokenizers import Tokenizer

import minimtp
from minimtp import convert as module
from minimtp import encode, ggml, gguf_write
from minimtp.checkpoint import (
    CheckpointError,
    Lazy,
    bf16_to_float,
    float_to_bf16,
    open_checkpoint,
    read_safetensors,
    write_safetensors,
)
from minimtp.convert import convert, write_checkpoint
from minimtp.ggml import Blocks
from minimtp.gguf_file import Reordered
from minimtp.gguf_model import open_gguf
from minimtp.loading import bundled, open_model
from minimtp.quant import Plain, Quantized, pack, pack_codes
from minimtp.source import Source, open_source

BUNDLED = ("tiny-gemma4", "tiny-gemma4-assistant", "tiny-qwen35")
RANDOM = {
    "gemma-experts": (random_sizes, "26b"), "gemma-per-layer": (random_sizes, "e2b_int4"),
    "gemma-shared": (random_sizes, "e4b_qat"), "qwen-experts": (random_qwen, "moe"),
    "qwen-int4": (random_qwen, "int4"), "qwen-towers": (random_qwen, "dense"),
    "gemma-f16": (random_models, "no_softcap"),
}  # fmt: skip
WORK = Path(FOLDER.name)


@cache
def folder(name):
    if name in RANDOM:
        maker, config = RANDOM[name]
        path = WORK / f"convert-{name}"
        return maker.write_qwen(config, path) if maker is random_qwen else maker.write_pair(config, path)[0]
    return bundled(name)


@cache
def converted(name, to, then=None):
    """-> (path, report) of a checkpoint converted once, or twice."""
    source = folder(name) if then is None else converted(name, to)[0]
    to = then or to
    path = WORK / f"convert-{name}-{to}-{source.stem}{'.gguf' if to in gguf_write.FILE_TYPES else ''}"
    return path, convert(source, path, to)


def weights(path):
    return {name: (kind, found) for name, kind, found in open_source(path).tensors}


def matrices(path):
    """Linear layers and experts, one by one."""
    found = {name: each for name, (kind, each) in weights(path).items() if kind in ("linear", "experts")}
    parts = {f"{name} {i}": weight for name, each in found.items() for i, weight in enumerate(each)}
    return {at: w.part(0, w.shape[0]) if isinstance(w, Reordered) else w for at, w in parts.items()}


# As llama.cpp's converter


@pytest.mark.parametrize(
    "name, to", [*((name, "f32") for name in BUNDLED), *((n, "q8_0") for n in (*BUNDLED, *RANDOM))]
)
def test_a_file_is_what_the_converter_of_llama_cpp_writes(name, to):
    def store(_, array):
        return "F32" if to == "f32" else "Q8_0" if array.shape[-1] % 32 == 0 else "F16"

    text = folder(name) if name in BUNDLED else None
    path = write_expected(WORK / f"expected-{name}-{to}.gguf", folder(name), store=store, tokenizer=text)
    ours, theirs = gguf.GGUFReader(converted(name, to)[0]), gguf.GGUFReader(path)
    found, expected = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].tensor_type, *found[key].shape) == (tensor.tensor_type, *tensor.shape), key
        if key.endswith("ssm_a"):  # an exponential, rounded once from double
            assert np.allclose(found[key].data, tensor.data, rtol=2**-22, atol=0)
        else:
            assert found[key].data.tobytes() == tensor.data.tobytes(), key
    for key in theirs.fields:
        if not key.startswith(("GGUF.", "general.", "tokenizer.ggml.add_bos_token")) and key in ours.fields:
            a, b = ours.fields[key].contents(), theirs.fields[key].contents()
            assert np.allclose(a, b) if isinstance(a, float) else a == b, key
    missing = {key for key in theirs.fields if key not in ours.fields}
    assert not missing - {"tokenizer.ggml.add_sep_token"}, missing


@pytest.mark.parametrize("name", BUNDLED)
def test_the_tokenizer_goes_with_it(name):
    checkpoint, reference = (
        open_gguf(converted(name, "q4_0")[0]),
        Tokenizer.from_file(str(folder(name) / "tokenizer.json")),
    )
    texts = [
        "KING RICHARD:\nNow is the winter's  end …",
        "<|turn>user\nA<turn|><|im_start|>x<|im_end|>",
        "é🙂\t\n\n 12",
    ]
    for text in texts:
        assert checkpoint.tokenizer().encode(text).ids == reference.encode(text).ids
    assert (
        checkpoint.settings("tokenizer_config")["chat_template"] == (folder(name) / "chat_template.jinja").read_text()
    )
    generation = json.loads((folder(name) / "generation_config.json").read_text())
    found = checkpoint.settings("generation_config")
    assert (found["top_k"], found["top_p"]) == (generation["top_k"], generation["top_p"])
    assert set(generation["eos_token_id"]) <= set(found["eos_token_id"])
    if "gemma" in name:
        types = checkpoint.metadata["tokenizer.ggml.token_type"].list()
        assert types[reference.token_to_id("<|turn>")] == gguf.TokenType.CONTROL
        assert types[reference.token_to_id("<|channel>")] == gguf.TokenType.USER_DEFINED  # its parser has to see it


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_a_file_gives_the_logits_of_its_folder(name):
    ids = [5, 300, 17, 900, 2, 44]
    a, b = (minimtp.load(path, keep="dense") for path in (folder(name), converted(name, "f32")[0]))
    logits = [model.forward(ids, model.new_cache()).logits_TV for model in (a, b)]
    assert np.array_equal(*logits)


# int4 stays int4


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35", "gemma-per-layer", "qwen-int4"])
def test_q4_0_keeps_every_integer_and_every_step(name):
    before, after = matrices(folder(name)), matrices(converted(name, "q4_0")[0])
    count = 0
    for key, weight in before.items():
        if isinstance(weight, Quantized) and isinstance(after[key], Blocks) and after[key].type == "Q4_0":
            found = after[key].as_quantized()
            assert np.array_equal(found.packed, weight.packed)
            assert np.array_equal(found.scales.dequantize("float64"), weight.scales.dequantize("float64"))
            naive = Blocks(ggml.quantize(weight.dequantize(np.float32), "Q4_0"), "Q4_0", weight.shape).as_quantized()
            assert not np.array_equal(naive.packed, weight.packed)  # what rounding would have done
            count += 1
    if name in BUNDLED:
        assert count == sum(isinstance(weight, Quantized) for weight in before.values())
    report = converted(name, "q4_0")[1]
    assert count == sum(row.stored == "Q4_0" for row in report.tensors) > 30
    assert all(row.changed == row.rounded == row.steps == 0 for row in report.tensors if row.stored == "Q4_0")


def test_what_is_no_int4_in_a_file_of_int4():
    types = {
        name: {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(converted(name, "q4_0")[0]).tensors}
        for name in ("gemma-shared", "gemma-experts", "tiny-qwen35")
    }
    assert types["gemma-shared"]["per_layer_model_proj.weight"] == "BF16"  # its own
    assert types["gemma-shared"]["per_layer_token_embd.weight"] == "Q8_0"
    assert types["gemma-experts"]["blk.0.ffn_gate_inp.weight"] == "F32"
    assert types["gemma-experts"]["blk.0.ffn_gate_up_exps.weight"] == "Q4_0"
    qwen = types["tiny-qwen35"]
    assert (qwen["blk.0.ssm_alpha.weight"], qwen["blk.0.ssm_beta.weight"], qwen["output.weight"]) == (
        "F32",
        "F32",
        "Q8_0",
    )
    assert qwen["blk.8.nextn.eh_proj.weight"] == "Q8_0"  # no int4 in the source, unlike the others there


@pytest.mark.parametrize("name", BUNDLED)
def test_there_and_back_is_the_same_file(name):
    path = converted(name, "q4_0")[0]
    back = WORK / f"again-{name}.gguf"
    report = convert(converted(name, "q4_0", "compressed-tensors")[0], back, "q4_0")
    a, b = (
        {t.name: t.data.tobytes() for t in gguf.GGUFReader(p).tensors if t.tensor_type.name == "Q4_0"}
        for p in (path, back)
    )
    assert a and a == b and all(row.kept for row in report.tensors if row.stored == "Q4_0")
    straight = convert(path, WORK / f"copied-{name}.gguf", "q4_0")
    assert straight.exact  # what was in Q8_0 stays, too
    top_k = gguf.GGUFReader(WORK / f"copied-{name}.gguf").fields["general.sampling.top_k"]
    assert top_k.types == [gguf.GGUFValueType.INT32]


def test_a_folder_of_int4_stays_as_it_is():
    path, report = converted("tiny-gemma4", "compressed-tensors")
    before, after = (read_safetensors(p / "model.safetensors")[0] for p in (folder("tiny-gemma4"), path))
    assert report.exact and before.keys() == after.keys()
    for name, raw in before.items():
        assert (raw.dtype, raw.shape, raw.data.tobytes()) == (
            after[name].dtype,
            after[name].shape,
            after[name].data.tobytes(),
        )
    assert {p.name for p in path.iterdir()} == {p.name for p in folder("tiny-gemma4").iterdir()}


def test_a_float_file_of_int4_weights_gets_its_integers_back():
    """The products are exact in float32, so their quotients are the steps."""
    before, after = matrices(folder("tiny-gemma4")), matrices(converted("tiny-gemma4", "f32", "q4_0")[0])
    for key, weight in before.items():
        assert np.array_equal(after[key].dequantize(np.float64), weight.dequantize(np.float64))
    report = converted("tiny-gemma4", "f32", "q4_0")[1]
    assert sum(row.found for row in report.tensors) == sum(weight.packed.size // 16 for weight in before.values())


def test_floats_that_are_bf16_are_kept_as_that():
    path, report = converted("tiny-gemma4", "f32", "compressed-tensors")
    assert report.exact and {row.stored for row in report.tensors} == {"BF16", "int4"}


# bf16 on a lattice


@pytest.mark.parametrize("to", ["q4_0", "compressed-tensors"])
@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_bf16_on_a_lattice_comes_back_whole(name, to):
    """tiny models unpacked to bf16 are what a QAT release in bf16 is."""
    before, after = matrices(converted(name, "bf16")[0]), matrices(converted(name, "bf16", to)[0])
    report = converted(name, "bf16", to)[1]
    int4 = [key for key, weight in matrices(folder(name)).items() if isinstance(weight, Quantized)]
    naive_differs = 0
    for key in int4:
        bits, w_OI = before[key].stored, before[key].dequantize(np.float32)
        assert np.array_equal(float_to_bf16(after[key].dequantize(np.float64)), bits), key
        naive = pack(w_OI) if to != "q4_0" else Blocks(ggml.quantize(w_OI, "Q4_0"), "Q4_0", w_OI.shape)
        if to != "q4_0":  # where there is a step in bf16 it is taken: all of these were
            scales = after[key].scales.dequantize(np.float32)
            assert np.array_equal(bf16_to_float(float_to_bf16(scales)), scales)
        naive_differs += not np.array_equal(float_to_bf16(naive.dequantize(np.float64)), bits)
    assert naive_differs == len(int4)  # what other converters do
    rows = [row for row in report.tensors if row.name + " 0" in int4]
    assert rows and all(row.found == row.weights // 32 and row.changed == row.rounded == row.steps == 0 for row in rows)


@pytest.mark.parametrize("to", ["q4_0", "compressed-tensors"])
def test_ordinary_weights_are_rounded_and_said_to_be(to):
    before = matrices(bundled("tiny-gemma4-float"))
    path = WORK / f"ordinary-{to}{'.gguf' if to == 'q4_0' else ''}"
    report, key = convert("tiny-gemma4-float", path, to), "model.layers.0.mlp.gate_proj.weight 0"
    w_OI = before[key].dequantize(np.float32)
    rule = Blocks(ggml.quantize(w_OI, "Q4_0"), "Q4_0", w_OI.shape) if to == "q4_0" else pack(w_OI)
    assert np.array_equal(matrices(path)[key].dequantize(np.float64), rule.dequantize(np.float64))
    row = next(row for row in report.tensors if row.name == key.split()[0])
    assert row.rounded == row.weights // 32 and 0.05 < row.error < 0.2 and not report.exact
    assert "rounded" in report.text() and report.text().endswith("not exact")
    assert json.loads(json.dumps(report.as_dict()))["tensors"]


def bf16(values):
    return Plain(float_to_bf16(np.asarray(values, float)), "BF16", "w")


ODD_GROUPS = {
    "zeros": np.zeros(32), "constant": np.full(32, -0.37), "one": np.eye(32)[3] * 0.5,
    "both": np.resize([0.3, -0.3], 32), "three": np.resize([0.1, 0.2, 0.0, -0.1], 32), "alone": np.eye(32)[0] * -3,
}  # fmt: skip


@pytest.mark.parametrize("step", [np.float16, np.float32])
@pytest.mark.parametrize("kind", ODD_GROUPS)
def test_groups_that_show_no_lattice_are_kept_all_the_same(kind, step):
    weight, row = bf16(ODD_GROUPS[kind][None]), encode.Counts()
    found = encode.as_int4(weight, row, step)
    assert np.array_equal(float_to_bf16(found.dequantize(np.float64)), weight.stored)
    assert (row.found, row.rounded, row.steps) == (1, 0, 0)


def test_of_a_group_off_its_lattice_only_that_one_is_rounded():
    codes = np.random.RandomState(0).randint(-8, 8, (4, 64))
    w_OI = bf16_to_float(float_to_bf16(codes * 0.0123))
    w_OI[2, 40] *= 1.07
    row = encode.Counts()
    found = encode.as_int4(bf16(w_OI), row, np.float16)
    same = (float_to_bf16(found.dequantize(np.float64)) == float_to_bf16(w_OI)).reshape(4, 2, 32).all(-1)
    assert np.argwhere(~same).tolist() == [[2, 1]] and (row.found, row.rounded) == (7, 1)
    expected = Blocks(ggml.quantize(w_OI[2:3, 32:], "Q4_0"), "Q4_0", (1, 32)).dequantize(np.float64)
    assert np.array_equal(found.dequantize(np.float64)[2:3, 32:], expected)


def test_steps_below_float16_are_counted():
    codes = np.random.RandomState(1).randint(-8, 8, (2, 32))
    row = encode.Counts()
    encode.as_int4(bf16(codes * [[3.3e-6], [0.02]]), row, np.float16)
    assert (row.found, row.rounded, row.steps) == (2, 0, 1)
    row = encode.Counts()
    encode.as_int4(bf16(codes * [[3.3e-6], [0.02]]), row, np.float32)
    assert (row.found, row.steps) == (2, 0)


def test_a_scale_that_float16_cannot_hold_is_counted(tmp_path):
    """int4 with bf16 scales of 2^-20 and finer: the integers stay, the steps are rounded, and the report says so."""
    path = tmp_path / "source"
    shutil.copytree(folder("tiny-gemma4"), path)
    tensors, _ = read_safetensors(path / "model.safetensors")
    arrays = {name: (raw.dtype, raw.stored().copy()) for name, raw in tensors.items()}
    name = next(name for name in sorted(arrays) if name.endswith("weight_scale"))
    arrays[name][1][0, :2] = float_to_bf16([2**-20 * 1.2578125, 2**-14 * 1.2578125])
    write_safetensors(path / "model.safetensors", arrays)
    report = convert(path, tmp_path / "a.gguf", "q4_0")
    row = next(row for row in report.tensors if row.steps)
    assert (
        row.steps == 1
        and 0 < row.changed <= 32
        and row.rounded == 0
        and "steps that had to be rounded: 1" in report.text()
    )


@pytest.mark.parametrize("value, stored", [(1e6, "F16"), (3.4e38, "BF16"), (np.nan, "F32")])
def test_values_beyond_a_type_are_refused(value, stored):
    weight = Plain(np.full((1, 40), value, np.float64), "F64", "w")
    with pytest.raises(CheckpointError, match=f"'w': values beyond {stored}"):
        encode.encode(weight, stored, encode.Counts())


def test_zero_points_are_not_forgotten():
    random = np.random.RandomState(3)
    codes, zeros = random.randint(-8, 8, (2, 32)), np.int8([[3], [-2]])
    weight = Quantized(pack_codes(codes), Plain(np.float32([[0.5], [0.25]]), "F32"), 32, 4, "w", zeros)
    counts = encode.Counts()
    found = encode.as_int4(weight, counts, np.float32).dequantize(np.float64)
    off = np.abs(found - weight.dequantize(np.float64)).max() / np.abs(weight.dequantize(np.float64)).max()
    assert (counts.kept, counts.found, counts.rounded) == (0, 0, 2) and 0 < off < 0.1


def test_int2_in_long_groups_fits():
    random = np.random.RandomState(2)
    packed, scales = random.randint(0, 256, (3, 16)).astype(np.uint8), random.rand(3, 1).astype(np.float32)
    weight, row = Quantized(packed, Plain(scales, "F32"), 64, 2), encode.Counts()
    found = encode.as_int4(weight, row, np.float32)
    assert (found.bits, found.group, row.kept) == (4, 32, 6)
    assert np.array_equal(found.dequantize(np.float64), weight.dequantize(np.float64))


# To folders


@pytest.mark.parametrize("name", BUNDLED)
def test_bf16_rounds_every_product_once(name):
    before, after = weights(folder(name)), weights(converted(name, "bf16")[0])
    assert "quantization_config" not in json.loads((converted(name, "bf16")[0] / "config.json").read_text())
    for key, (kind, found) in before.items():
        if kind in ("linear", "embedding"):
            assert after[key][1][0].dtype == "BF16"
            assert np.array_equal(after[key][1][0].stored, float_to_bf16(found[0].dequantize(np.float64))), key
        else:
            assert np.array_equal(after[key][1][0].dequantize(np.float64), found[0].dequantize(np.float64)), key


@pytest.mark.parametrize("to", ["compressed-tensors", "bf16"])
@pytest.mark.parametrize("name", [*BUNDLED, "qwen-experts", "gemma-experts"])
def test_a_folder_made_of_a_file_is_a_checkpoint_of_the_same_model(name, to):
    path = converted(name, "q4_0", to)[0]
    (_, family, config), (_, other, theirs) = open_model(path), open_model(folder(name))
    assert family is other
    for field in ("hidden_size", "vocab_size", "tied", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(config, field) == getattr(theirs, field)
    assert [vars(layer) | {"k_eq_v": 0} for layer in config.layers] == [
        vars(layer) | {"k_eq_v": 0} for layer in theirs.layers
    ]
    assert weights(path).keys() == {key for key in weights(folder(name)) if not key.startswith("masked_")}


def test_what_qat_left_alone_stays_alone():
    """Gates, the MTP layer, and layers whose heads are no whole groups are Q8_0 or F32 beside Q4_0: not int4 now."""
    (before, _), (after, report) = converted("qwen-int4", "q4_0"), converted("qwen-int4", "q4_0", "compressed-tensors")
    stored = {row.name: row.stored for row in converted("qwen-int4", "q4_0")[1].tensors}
    left = [row for row in report.tensors if row.name.endswith("proj.weight") and stored[row.name] == "Q8_0"]
    assert len(left) > 5 and all(row.stored == "BF16" for row in left) and before != after
    ignored = json.loads((after / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.linear_attn.out_proj" in ignored


def test_towers_are_kept_in_a_folder_and_left_out_of_a_file():
    (path, report), (_, other) = converted("qwen-towers", "bf16"), converted("qwen-towers", "f32")
    before, after = (open_checkpoint(p).tensors for p in (folder("qwen-towers"), path))
    towers = [name for name in before if "visual" in name]
    assert towers and not report.dropped and sorted(towers) == other.dropped
    assert all(before[name].data.tobytes() == after[name].data.tobytes() for name in towers)


# Nothing half written, nothing wrong


@pytest.mark.parametrize("to", ["q4_0", "bf16"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, to, share):
    def stop(done, total):
        if done >= share * total:
            raise KeyboardInterrupt

    dst = tmp_path / ("a.gguf" if to == "q4_0" else "a")
    with pytest.raises(KeyboardInterrupt):
        convert("tiny-gemma4-assistant", dst, to, stop)
    assert os.listdir(tmp_path) == []


def test_progress_ends_where_it_should(tmp_path):
    seen = []
    convert("tiny-gemma4-assistant", tmp_path / "a.gguf", "q8_0", lambda *at: seen.append(at))
    done, totals = zip(*seen)
    assert list(done) == sorted(done) and len(set(totals)) == 1 and 0.99 < done[-1] / totals[0] <= 1


@pytest.mark.parametrize("to", ["q4_0", "bf16"])
def test_a_byte_that_changed_on_the_way_is_found(tmp_path, to, monkeypatch):
    name = "write_gguf" if to == "q4_0" else "write_safetensors"
    write = getattr(module, name)

    def broken(path, *rest):
        write(path, *rest)
        with open(path, "r+b") as file:
            file.seek(-1000, 2)
            byte = file.read(1)
            file.seek(-1000, 2)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(CheckpointError, match="reads back otherwise than it was written"):
        convert("tiny-gemma4-assistant", tmp_path / ("a.gguf" if to == "q4_0" else "a"), to)
    assert os.listdir(tmp_path) == []


def wrong_codes(weight):
    data, rounded = ENCODE(weight)
    data[0, 5] ^= 1
    return data, rounded


def wrong_order(delta):
    return np.arange(delta.value_heads)


ENCODE = ggml.encode_q4_0


@pytest.mark.parametrize(
    "where, what, broken", [(ggml, "encode_q4_0", wrong_codes), (gguf_write, "_tiled", wrong_order)]
)
def test_an_encoder_that_is_wrong_is_found(tmp_path, monkeypatch, where, what, broken):
    """The bytes are as they were made, but do not read as what was meant."""
    monkeypatch.setattr(where, what, broken)
    with pytest.raises(CheckpointError, match="weights read back as others"):
        convert("tiny-qwen35", tmp_path / "a.gguf", "q4_0")
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_written_is_refused(tmp_path):
    there = tmp_path / "there.gguf"
    there.write_text("mine")
    cases = [
        (there, "q4_0", "is already there"), (tmp_path, "bf16", "is already there"),
        (tmp_path / "a", "q4_0", "is written to a .gguf file"), (tmp_path / "a.gguf", "bf16", "is written to a folder"),
        (tmp_path / "a", "q5_0", "cannot convert to"), (tmp_path / "no" / "a", "bf16", "no such folder"),
    ]  # fmt: skip
    for dst, to, message in cases:
        with pytest.raises(CheckpointError, match=message):
            convert("tiny-gemma4", dst, to)
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "nothing", tmp_path / "a", "bf16")
    assert there.read_text() == "mine" and os.listdir(tmp_path) == ["there.gguf"]


# Made while it is written


class Counting:
    """A weight that is only there a few rows at a time: row i holds (i mod 251) / 256."""

    def __init__(self, rows, columns):
        self.shape, self.name, self.asked = (rows, columns), "counting", 0

    def rows(self, start, stop, dtype):
        self.asked = max(self.asked, stop - start)
        return np.repeat((np.arange(start, stop) % 251 / 256).astype(dtype)[:, None], self.shape[1], 1)

    def dequantize(self, dtype):
        return self.rows(0, self.shape[0], dtype)


@pytest.mark.parametrize("to", ["f32", "bf16"])
def test_a_large_weight_is_never_there_as_a_whole(tmp_path, to, monkeypatch):
    monkeypatch.setattr(encode, "CORES", 1)
    raw = json.loads((folder("tiny-gemma4-assistant") / "config.json").read_text())
    _, family, config = open_model(folder("tiny-gemma4-assistant"))
    big = Counting(1 << 15, 1 << 9)  # 64 MiB in float32
    source = Source(raw, config, [("model.embed_tokens.weight", "embedding", [big])])
    tracemalloc.start()
    write_checkpoint(source, tmp_path / ("a.gguf" if to == "f32" else "a"), to, compare=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20 and big.asked <= 1 << 11
    path = tmp_path / ("a.gguf" if to == "f32" else "a")
    if to == "f32":
        stored = open_gguf(path).tensors["model.embed_tokens.weight"].stored()
    else:
        tensors, _ = read_safetensors(path / "model.safetensors")
        stored = bf16_to_float(tensors["model.embed_tokens.weight"].stored())
    assert np.array_equal(stored[:, 0], big.rows(0, 1 << 15, np.float32)[:, 0])


@pytest.mark.parametrize("size", [3, 5])
def test_a_lazy_tensor_must_come_to_its_size(tmp_path, size):
    tensor = Lazy("F32", (4,), lambda: [np.zeros(size, np.float32)])
    for write, name in ((write_safetensors, "a.safetensors"), (lambda p, t: gguf_write.write_gguf(p, {}, t), "a.gguf")):
        with pytest.raises(CheckpointError, match="bytes too"):
            write(tmp_path / name, {"w": tensor})
    assert os.listdir(tmp_path) == []


def test_every_type_of_metadata_is_what_the_library_reads(tmp_path):
    values = {
        "text": "höß", "yes": True, "count": 7, "share": 0.25, "signed": np.int32(-3), "long": np.uint64(2**40),
        "texts": ["a", "", "é"], "numbers": np.array([1, -2], np.int32), "flags": np.array([True, False]),
        "floats": np.array([0.5], np.float32),
    }  # fmt: skip
    gguf_write.write_gguf(
        tmp_path / "a.gguf", values, {"w": Lazy("F32", (2, 3), lambda: [np.ones((2, 3), np.float32)])}
    )
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    for key, value in values.items():
        found = reader.fields[key].contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value), key
    assert reader.tensors[0].data.shape == (2, 3)


@pytest.mark.parametrize("to", ["q4_0", "compressed-tensors"])
def test_mobile_weights_keep_their_integers(tmp_path, to):
    """int2 and int4 by rows fit; int8 does not, and neither does the rounding of activations."""
    write_mobile("e2b", tmp_path / "mobile")
    path = tmp_path / ("a.gguf" if to == "q4_0" else "a")
    report = convert(tmp_path / "mobile", path, to)
    before, after = matrices(tmp_path / "mobile"), matrices(path)
    int4 = [row for row in report.tensors if row.stored in module.INT4 and f"{row.name} 0" in before]
    assert len(int4) > 30 and all(row.kept and not row.rounded for row in int4)
    assert sum(row.steps for row in int4) > 0 if to == "q4_0" else not any(row.steps or row.changed for row in int4)
    for row in int4:
        old, new = before[f"{row.name} 0"], after[f"{row.name} 0"]
        new = new.as_quantized() if to == "q4_0" else new
        assert np.array_equal(old.codes(), new.codes())
    assert any("activations of" in note for note in report.notes) and "activations of" in report.text()


HOSTILE = {
    "tokenizer.json": [
        b"",
        b"{}",
        b"[1]",
        b"\xff",
        b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
    ],
    "tokenizer_config.json": [b"", b"[]", b"\xff"],
    "generation_config.json": [b"nonsense"],
}


@pytest.mark.parametrize("name, data", [(name, data) for name, each in HOSTILE.items() for data in each])
def test_files_of_text_that_are_none_are_refused(name, data):
    files = {path.name: path.read_bytes() for path in folder("tiny-qwen35").iterdir() if path.suffix == ".json"}
    with pytest.raises(CheckpointError, match=name) as caught:
        gguf_write.text_keys("qwen35", files | {name: data}, 1216)
    assert len(str(caught.value).splitlines()) == 1


def test_odd_settings_are_left_out():
    files = {path.name: path.read_bytes() for path in folder("tiny-qwen35").iterdir() if path.suffix == ".json"}
    settings = {"eos_token": ["a"], "pad_token": {"content": "<|endoftext|>"}, "bos_token": 7, "chat_template": [1]}
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    files["generation_config.json"] = b'{"top_k": "many", "top_p": true, "temperature": null, "suppress_tokens": 3}'
    keys = gguf_write.text_keys("qwen35", files, 1216)
    assert keys["tokenizer.ggml.padding_token_id"] == 1184 and "tokenizer.chat_template" not in keys
    assert not {key for key in keys if "sampling" in key or "eos" in key or "bos_token_id" in key or "suppress" in key}
    with pytest.raises(CheckpointError, match="of a vocabulary|expected BPE, 1000 at most"):
        gguf_write.text_keys("qwen35", files, 1000)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80])
def test_weights_that_are_not_finite_are_refused(tmp_path, bits):
    source = open_source("tiny-gemma4-assistant")
    name, kind, (weight,) = next(entry for entry in source.tensors if entry[1] == "linear")
    stored = weight.stored.copy()
    stored[3, 4] = bits
    tensors = [(n, k, [Plain(stored, "BF16", n)] if n == name else found) for n, k, found in source.tensors]
    for to in ("f32", "q8_0", "q4_0", "compressed-tensors", "bf16"):
        path = tmp_path / ("a.gguf" if to in gguf_write.FILE_TYPES else "a")
        with pytest.raises(CheckpointError, match=name):
            write_checkpoint(replace(source, tensors=tensors), path, to)
    assert os.listdir(tmp_path) == []
