"""Hostile files: real small checkpoints of every format, cut, extended, flipped and spliced, loaded as a user does.

Each of the 1,500 cases ends in a CheckpointError of one line, or in the right weights: those that the safetensors and
gguf libraries, with a few lines of NumPy, read from the same damaged bytes. Nothing crashes, warns, takes long or takes
memory that its file does not justify.
"""

import copy
import json
import re
import shutil
import time
import tracemalloc
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import gguf
import numpy as np
import pytest
import random_mobile
import random_models
import random_qwen
import random_sizes
import safetensors
from random_gguf import converted, write_gguf
from random_models import QUANTIZATION, bfloat16_value, layers, rope
from tiny import FOLDER

import minimtp
from minimtp import formats, ggml, gguf_file, gguf_model, loading, mobile, parameters, quant
from minimtp.backend import Rounded
from minimtp.checkpoint import CheckpointError
from minimtp.loading import open_model
from minimtp.parameters import read_parameters

CASES = 100  # of each sample
SECONDS = 2  # of processor time, for one case
FIXED, PER_BYTE = 2 << 20, 40  # bytes that may be allocated: codes of 2 bits become floats of 32, and are looked at

GEMMA = dict(
    layer_types=layers("sf"), hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
    num_global_key_value_heads=1, head_dim=8, global_head_dim=16, sliding_window=4, attention_k_eq_v=True,
    vocab_size=40, rope_parameters=rope(), final_logit_softcapping=30.0,
)  # fmt: skip
INPUTS = GEMMA | dict(hidden_size_per_layer_input=32, tie_word_embeddings=False)
WIDE = GEMMA | dict(hidden_size=256, intermediate_size=256, head_dim=64, global_head_dim=64, layer_types=layers("f"))
QWEN = dict(
    layer_types=random_qwen.layers("lf"), hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=8, vocab_size=44,
    rope_parameters=random_qwen.rope(1e3, 0.5),
)  # fmt: skip
DENSE = dict(intermediate_size=24)
EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
MOBILE = dict(
    seed=6, layout="bare", blocks=(2, 4), off=0.3, sizes=INPUTS, config=dict(
        num_bits=4, quantize_embeddings=True, modules_to_not_convert=[r"model\.layers\.1\.mlp"],
        module_quant_configs={"embed_tokens$|lm_head": {"num_bits": 2}, "q_proj|per_layer": {"num_bits": 8}},
    ),
)  # fmt: skip
VARIANTS = {  # of compressed-tensors: target -> bits, group (None: a row), symmetric
    "re:.*q_proj": (4, None, True), "re:.*down_proj": (8, 32, False), "re:.*up_proj": (2, None, False),
    "Linear": (4, 32, False),
}  # fmt: skip


# The samples: each a folder or a file that loads


class Sample(NamedTuple):
    path: Path  # a folder, or a GGUF file
    source: Path  # the folder that the file was made of, or the folder itself
    options: dict  # of random_gguf.converted

    @property
    def files(self):
        """What there is to damage."""
        if self.path.is_dir():
            return sorted(self.path.glob("*model*")) + [self.path / "config.json"]
        return sorted(self.path.parent.glob("*.gguf"))


def write_variants(folder):
    """A folder with every matrix packed as its target in VARIANTS says."""
    random_models.write_target(folder, 4, int4=True, store="BF16", **GEMMA)
    config = json.loads((folder / "config.json").read_text())
    random, encoded = np.random.RandomState(4), {}
    for name, (dtype, array) in stored(folder).items():
        if not name.endswith(("_packed", "_scale", "_shape")):
            encoded[name] = dtype, array
        elif name.endswith("_shape"):
            bits, group, symmetric = next(v for k, v in VARIANTS.items() if k == "Linear" or k[5:] in name)
            rows, columns = array
            scales, stem = (rows, columns // (group or columns)), name.removesuffix("_shape")
            encoded[name] = dtype, array
            encoded[f"{stem}_packed"] = "I32", words_of(random.randint(1 << bits, size=array), bits)
            encoded[f"{stem}_scale"] = "F32", random.random_sample(scales).astype(np.float32)
            if not symmetric:
                zeros = words_of(random.randint(1 << bits, size=scales).T, bits)
                encoded[f"{stem}_zero_point"] = "I32", np.ascontiguousarray(zeros.T)
    group_0, groups = QUANTIZATION["config_groups"]["group_0"], {}
    for i, (target, (bits, group, symmetric)) in enumerate(VARIANTS.items()):
        how = dict(strategy="group", group_size=group) if group else dict(strategy="channel", group_size=None)
        groups[f"group_{i}"] = copy.deepcopy(group_0) | {"targets": [target]}
        groups[f"group_{i}"]["weights"] |= {"num_bits": bits, "symmetric": symmetric} | how
    config["quantization_config"] = QUANTIZATION | {"config_groups": groups}
    random_models.write(folder, config, encoded, shards=1)


def words_of(codes, bits):
    """Unsigned codes [N, I] packed into int32 along a row, the first lowest."""
    codes = np.pad(codes, [(0, 0), (0, -codes.shape[1] % (32 // bits))])
    each = codes.astype(np.uint32).reshape(len(codes), -1, 32 // bits)
    return np.bitwise_or.reduce(each << np.arange(0, 32, bits, dtype=np.uint32), axis=-1).view(np.int32)


def write_mobile(folder):
    with mock.patch.dict(random_mobile.CASES, hostile=MOBILE):
        random_mobile.write_mobile("hostile", folder)


def write_assistant(folder):
    random_sizes.write_assistant(folder, random_models.outer_config(random_models.text_config(**GEMMA)), 5,
                                 centroids=(8, 3), layer_types=layers("sf"), hidden_size=32)  # fmt: skip


def write_tokenizer(folder, gemma):
    """As tokenizer.json and what is beside it, for random_gguf, of 40 tokens."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"] if gemma else ["<|endoftext|>", "<|im_end|>"]
    texts = names + ["▁" if gemma else "Ġ", *"abcdefghijklmnop", "ab", "abc", "▁a" if gemma else "Ġa"]
    vocab, merges = {text: i for i, text in enumerate(texts)}, [["a", "b"], ["ab", "c"], [texts[len(names)], "a"]]
    added = [{"content": text, "id": i, "special": True} for i, text in enumerate(names)]
    settings = {"eos_token": names[1]} | ({"bos_token": "<bos>", "unk_token": "<unk>"} if gemma else {})
    folder.mkdir()
    for name, content in {
        "tokenizer": {"model": {"vocab": vocab, "merges": merges}, "added_tokens": added},
        "tokenizer_config": settings,
        "generation_config": {"top_k": 20, "top_p": 0.5, "temperature": 1.0},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    template = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


def gemma(**options):
    return lambda folder: random_models.write_target(folder, 1, **GEMMA | options)


def qwen(**options):
    return lambda folder: random_qwen.write_model(folder, 2, **QWEN | options)


def in_turn(*types):
    return lambda name, array: types[sum(name.encode()) % len(types)]


FOLDERS = {
    "bf16": gemma(store="BF16"),
    "shards": gemma(store="F16", shards=2, layout="bare"),
    "int4": gemma(store="BF16", int4=True),
    "variants": write_variants,
    "mobile": write_mobile,
    "assistant": write_assistant,
    "qwen": qwen(store="BF16", tie_word_embeddings=True, **DENSE),
    "experts": qwen(store="BF16", int4=True, single=True, mtp=False, **EXPERTS),
}
FILES = {  # name -> folder it is made of, options of write_gguf
    "plain.gguf": (gemma(), dict(store=in_turn("F32", "F16", "BF16"))),
    "blocks.gguf": (gemma(), dict(store=in_turn("Q4_0", "Q8_0", "Q4_1", "IQ4_NL", "Q5_1", "MXFP4"), tokenizer="gemma")),
    "k-quants.gguf": (
        lambda folder: random_models.write_target(folder, 3, **WIDE),
        dict(store=in_turn("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")),
    ),
    "experts.gguf": (qwen(**EXPERTS), dict(store=in_turn("Q8_0", "Q4_0", "F16"))),
    "qwen.gguf": (qwen(mtp=False, tie_word_embeddings=True, **DENSE), dict(store=in_turn("F16"), tokenizer="qwen")),
    "assistant.gguf": (write_assistant, dict(store=in_turn("F16"), dialect="fork")),
    "split.gguf": (gemma(), dict(store=in_turn("Q8_0"), parts=12)),
}  # fmt: skip
NAMES = [*FOLDERS, *FILES]


@cache
def sample(name):
    """Written when first asked for, never changed."""
    folder = Path(FOLDER.name) / "hostile" / name
    if name in FOLDERS:
        FOLDERS[name](folder)
        return Sample(folder, folder, {})
    write_source, options = FILES[name]
    write_source(folder / "source")
    (folder / "file").mkdir()
    if "tokenizer" in options:
        kind = options["tokenizer"]
        options = options | {"tokenizer": write_tokenizer(folder / "tokenizer", kind == "gemma")}
    path = write_gguf(folder / "file" / name, folder / "source", **options)
    return Sample(path, folder / "source", {key: options[key] for key in ("dialect",) if key in options})


# What the reference libraries read


def stored(folder):
    """{name: (dtype, array)} of a folder's safetensors, bf16 as its bits."""
    kinds = {"F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I8": "i1", "U8": "u1", "F64": "f8",
             "I16": "i2", "U16": "u2", "U32": "u4", "U64": "u8"}  # fmt: skip
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, spec in safetensors.deserialize(path.read_bytes()):
            found[name] = spec["dtype"], np.frombuffer(spec["data"], "<" + kinds[spec["dtype"]]).reshape(spec["shape"])
    return found


def as_floats(dtype, array):
    return bfloat16_value(array) if dtype == "BF16" else array.astype(np.float32)


def of_folder(tensors, name, shape):
    """The float32 [out, in] of a published name, its codes' width known from how many there are."""
    base = name.removesuffix(".weight")
    ends = (".weight_packed", ".embedding_quantized", name.removeprefix(base))
    codes = next(base + end for end in ends if base + end in tensors)
    dtype, array = tensors[codes]
    scale = tensors.get(f"{base}.{'embedding' if codes.endswith('quantized') else 'weight'}_scale")
    if scale is None:
        assert array.shape == tuple(shape)
        return as_floats(dtype, array)
    bits = 8 * array.itemsize * array.shape[1] // shape[1]
    signed = array if dtype == "I8" else fields(array, bits)[:, : shape[1]] - (1 << (bits - 1))
    scales = as_floats(*scale)
    if f"{base}.weight_zero_point" in tensors:
        words = np.ascontiguousarray(tensors[f"{base}.weight_zero_point"][1].T)
        zeros = fields(words, bits)[:, : shape[0]].T - (1 << (bits - 1))
        signed = signed - np.repeat(zeros, shape[1] // zeros.shape[1], 1)
    return signed.astype(np.float32) * np.repeat(scales, shape[1] // scales.shape[1], 1)


def fields(array, bits):
    """Unsigned fields of every word of a row, the lowest first -> int64 [rows, n]"""
    words = array.view(f"u{array.itemsize}").astype(np.uint64)[..., None]
    return (words >> np.arange(0, 8 * array.itemsize, bits, np.uint64) & np.uint64((1 << bits) - 1)).astype(
        np.int64).reshape(len(array), -1)  # fmt: skip


def of_file(path):
    """A GGUF file, with its other parts -> ({name: array}, {key: value of the first part's header})"""
    readers, arrays = [gguf.GGUFReader(part) for part in sorted(path.parent.glob("*.gguf"))], {}
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        is_index = tensor.tensor_type == gguf.GGMLQuantizationType.I32
        arrays[tensor.name] = tensor.data if is_index else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return arrays, {key: field.contents() for key, field in readers[0].fields.items()}


# What was loaded


def loaded(path):
    """All that a user gets of a checkpoint -> [(Checkpoint, family, configuration, parameters)], its tokenizer."""
    if "assistant" in path.name:
        found, tokenizer = [open_model(path, "drafter")], None
        return [(*found[0], read_parameters(*found[0], np.dtype("float32"), "dense"))], tokenizer
    target = minimtp.load(path, keep="dense")
    target.chat_template(), target.stop_ids, target.checkpoint.settings("tokenizer_config")
    models = [(target.checkpoint, target.family, target.config, target.params)]
    if target.has_mtp:
        found = open_model(path, "drafter")
        models.append((*found, read_parameters(*found, np.dtype("float32"), "dense")))
    return models, target.tokenizer


def published(models):
    """{published name: (array, kind, activation scales)}; experts stacked again."""
    found = {}
    for _, family, config, params in models:
        table = family.tensors(config)
        if "embed_tokens" in table and "lm_head" not in table and params.lm_head is not params.embed_tokens:
            table = table | {"lm_head": ("lm_head.weight", *table["embed_tokens"][1:])}
        for place, (name, shape, kind) in table.items():
            if kind == "experts":
                parts = ("gate_proj", "up_proj") if "gate_up" in place else ("down_proj",)
                weights = [value_at(params, place.replace("gate_up_proj", part)) for part in parts]
                found[name] = np.stack([np.concatenate(arrays) for arrays in zip(*weights)]), kind, None
            elif kind != "unused":
                value = value_at(params, place)
                scales = value[1:] if isinstance(value, Rounded) else None
                found[name] = value.weight if scales else value, kind, scales
            if kind != "unused":
                assert found[name][0].shape == tuple(shape) and np.isfinite(found[name][0]).all(), name
    return found


def value_at(params, place):
    if place.startswith("layers."):
        _, i, place = place.split(".")
        params = params.layers[int(i)]
    return getattr(params, place)


# Whether it is right


def check_folder(models, folder):
    """Assert that everything loaded is what the safetensors library reads."""
    tensors = {name.replace("model.language_model.", "model."): value for name, value in stored(folder).items()}
    for name, (array, kind, scales) in published(models).items():
        if kind == "experts" and name not in tensors:
            parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            stem, shape = name.rpartition(".")[0], (array.shape[1] // len(parts), array.shape[2])
            expected = np.stack([
                np.concatenate([of_folder(tensors, f"{stem}.{e}.{part}", shape) for part in parts])
                for e in range(len(array))
            ])  # fmt: skip
        elif kind == "permutation":
            expected = tensors[name][1]
        else:
            expected = of_folder(tensors, name, array.shape) + np.float32(kind == "zero_centred")
        assert np.array_equal(array, expected), name
        base = name.removesuffix(".weight")
        keys = [f"{base}.{put}_activation_scale" for put in ("input", "output")]
        wanted = [float(as_floats(*tensors[key]).item()) or None if key in tensors else None for key in keys]
        assert list(scales or (None, None)) == wanted, name


def check_file(models, tokenizer, found, path):
    """Assert that everything loaded, converted again, is what the gguf library reads; so for the header's values."""
    ours = {}
    for name, (array, kind, _) in published(models).items():
        ours[name] = array - np.float32(1) if kind == "zero_centred" else array
    config, (theirs, header) = json.loads((found.source / "config.json").read_text()), of_file(path)
    again = converted(config, ours, mtp=any(name.startswith("mtp.") for name in ours), **found.options)
    assert again.keys() == theirs.keys()
    for name in again.keys() - {"rope_freqs.weight"}:
        a, b = again[name], theirs[name]
        a = a.reshape(b.shape) if "shexp" in name else a
        inexact = name.endswith("ssm_a") or (a.ndim == 1 and "norm" in name)  # -exp(log), and one less and one more
        assert a.shape == b.shape and (np.allclose(a, b, 1e-6, 1e-6) if inexact else np.array_equal(a, b)), name
    for key, value in models[0][0].metadata.items():
        said = header[key]
        if isinstance(value, gguf_file.Numbers | gguf_file.Texts):
            assert np.array_equal(value.list(), said), key
        else:
            assert (np.float32(value) == np.float32(said)) if isinstance(value, float) else value == said, key
    if tokenizer:
        texts, types = (header[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
        vocabulary = {text: i for i, (text, type) in enumerate(zip(texts, types)) if type != gguf.TokenType.UNUSED}
        assert tokenizer.backend.get_vocab() == vocabulary


def attempt(path, measured=False):
    """Load what is at the path -> what `loaded` gives, or the words of the CheckpointError with which it is refused."""
    before = time.process_time()
    if measured:
        tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return loaded(path)
    except CheckpointError as error:
        message = str(error)
    finally:
        peak, seconds = tracemalloc.get_traced_memory()[1], time.process_time() - before
        tracemalloc.stop()
        size = sum(file.stat().st_size for file in (path if path.is_dir() else path.parent).iterdir())
        assert peak < FIXED + PER_BYTE * size and seconds < SECONDS, (peak, size, seconds)
    assert message and message.isprintable() and len(message) < 1000, message
    return message


def check(found, path, config_alone, measured=False):
    """Assert that what is at the path is refused, or right -> the refusal, or None."""
    result = attempt(path, measured)
    if isinstance(result, str):
        return result
    models, tokenizer = result
    if not path.is_dir():
        check_file(models, tokenizer, found, path)
    else:
        check_folder(models, path)
    if config_alone:  # no number is in the file that was damaged
        ours, theirs = published(models), published(loaded(found.path)[0])
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name][0], theirs[name][0]) for name in ours)
    return None


# Damage

NASTY = (b"0", b"1", b"-1", b"2", b"4", b"64", b"1e999", b"1.5", b"NaN", b"true", b"null", b"[]", b"{}", b'""',
         b'"F16"', b"4294967296", b"9223372036854775807", b"9" * 30, b'"' + b"x" * 3000 + b'"', b"[" * 3000,
         rb'"\u001b[2J"', rb'"\ud800"')  # fmt: skip
NUMBERS = (0, 1, 2, 3, 7, 8, 31, 2**31 - 1, 2**32 - 1, 2**32, 2**40, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1)
KINDS = ("cut", "extend", "delete", "insert", "flip", "overwrite", "number", "splice", "graft", "token")


@cache
def header_size(file):
    """How many bytes of a file come before the first tensor's."""
    data = file.read_bytes()
    if file.suffix == ".json":
        return len(data)
    return gguf.GGUFReader(file).data_offset if file.suffix == ".gguf" else 8 + int.from_bytes(data[:8], "little")


def damaged(data, other, head, random, text):
    """The data after one injury, in its head or behind it, by turns. text: whether the head is JSON."""
    in_head = head == len(data) or random.random_sample() < 0.5
    low, high = (0, head) if in_head else (head, len(data))
    kinds = (
        KINDS + ("number",) * 4 * in_head if not (text and in_head) else KINDS + ("token",) * len(KINDS)
    )  # others seldom leave JSON
    kind, at = kinds[random.randint(len(kinds))], random.randint(low, high)
    size = random.randint(1, 9) if random.random_sample() < 0.6 else random.randint(1, 200)
    new = bytearray(data)
    if kind == "cut":
        del new[at:]
    elif kind == "extend":
        new += (random.bytes(size), bytes(size), data[at : at + size])[random.randint(3)]
    elif kind == "delete":
        del new[at : at + size]
    elif kind == "insert":
        new[at:at] = (random.bytes(size), bytes(size), data[at : at + size])[random.randint(3)]
    elif kind == "flip":
        for spot in random.randint(low, high, random.randint(1, 4)):
            new[spot] ^= 1 << random.randint(8)
    elif kind == "overwrite":
        new[at : at + size] = (random.bytes(size), bytes(size), b"\xff" * size)[random.randint(3)]
    elif kind == "number":
        width = (1, 4, 8)[random.randint(3)]
        if in_head and not text:  # where a key's value stands, or a tensor's shape, type or offset
            words = words_in(new, head, text)
            at = words[random.randint(len(words))][1] + 4 * random.randint(8)
        new[at : at + width] = NUMBERS[random.randint(len(NUMBERS))].to_bytes(8, "little")[:width]
    elif kind == "splice":
        start = random.randint(low, high)
        new[at : at + size] = data[start : start + size]
    elif kind == "graft":
        start = random.randint(min(len(other), 2 * head))
        new[at : at + size] = other[start : start + size]
    else:
        exchange(new, head, random, text)
    return bytes(new[: len(data) + 4000])


def words_in(new, head, text):
    """-> [(start, end)]"""
    return [(m.start(), m.end()) for m in re.finditer(rb'"[^"]*"|[-\w.]+' if text else rb"[\w.]{3,}", new[:head])]


def exchange(new, head, random, text):
    """Two words of the head trade places, or one is replaced by something nasty; in a GGUF file, of the same length."""
    words = words_in(new, head, text)
    a, b = words[random.randint(len(words))]
    same = [word for word in words if text or word[1] - word[0] == b - a]
    c, d = same[random.randint(len(same))]
    if text and random.random_sample() < 0.4:
        new[a:b] = NASTY[random.randint(len(NASTY))]
    elif a != c:
        (a, b), (c, d) = sorted([(a, b), (c, d)])
        new[a:d] = new[c:d] + new[b:c] + new[a:b]


def whole_head(data, head):
    """A safetensors file with the length of its header put right."""
    return (head - 8).to_bytes(8, "little") + data[8:]


def cases(name, seed=0):
    """(number, file to damage, its damaged bytes), one after another, the same every time."""
    found, random = sample(name), np.random.RandomState(sum(name.encode()) + 10_000 * seed)
    others = [file for other in NAMES if other != name for file in sample(other).files]
    originals = {file: file.read_bytes() for file in found.files}
    donors = {file: [o.read_bytes() for o in others if o.suffix == file.suffix][:6] for file in found.files}
    for i in range(CASES):
        weights = [3 if file.suffix != ".json" else 1 for file in found.files]
        file = found.files[random.choice(len(weights), p=np.divide(weights, sum(weights)))]
        data, donor = originals[file], donors[file][random.randint(len(donors[file]))]
        head, text = header_size(file), file.suffix != ".gguf"
        new = damaged(data, donor, head, random, text)
        if file.suffix == ".safetensors" and new[head - len(data) :] == data[head:] and random.random_sample() < 0.7:
            new = whole_head(new, len(new) - len(data) + head)
        yield i, file, new


def place(path, found, file, data):
    """A copy of the sample with the damaged file in it -> its path."""
    root = found.path if found.path.is_dir() else found.path.parent
    if not path.exists():
        shutil.copytree(root, path)
    target = path / file.name
    target.unlink()  # not written over: it may still be mapped
    target.write_bytes(data)
    return path if found.path.is_dir() else path / found.path.name


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_is_refused_or_read_right(name, tmp_path):
    found, refusals, accepted, tried = sample(name), set(), 0, 0
    assert check(found, place(tmp_path / name, found, found.files[0], found.files[0].read_bytes()), False) is None
    for i, file, data in cases(name):
        path = place(tmp_path / name, found, file, data)
        message = check(found, path, config_alone=file.suffix == ".json", measured=i % 5 == 0)
        accepted, tried = accepted + (message is None), tried + 1
        if message:
            reason = message.removeprefix(str(path)).removeprefix(str(tmp_path))
            refusals.add(re.sub(r"'.*?'|\".*?\"|\[.*?\]|\d+", "_", reason)[:60])
        place(tmp_path / name, found, file, file.read_bytes())
    assert tried == CASES and CASES * 0.1 < accepted < CASES * 0.7 and len(refusals) >= 10, (accepted, refusals)


# Whether the test itself can fail: readers that are wrong, on checkpoints that are not, are found out


def nibbles_swapped(packed_RB, bits, codes=quant._codes):
    codes_RBC = codes(packed_RB, bits).reshape(*packed_RB.shape, -1)
    return codes_RBC[..., ::-1].reshape(len(packed_RB), -1)


def one_code_off(packed, *rest):
    return quant.Quantized(packed ^ np.uint8(1), *rest)


def zeros_ignored(codes, scales, group, bits, name, zeros):
    return quant.Quantized(codes, scales, group, bits, name)


def always_plus_one(*arguments, read=parameters.read_weights):
    for name, kind, found in read(*arguments):
        yield name, kind.replace("plus_one", "zero_centred"), found


def heads_in_turn(*arguments, find=gguf_model._value_heads):
    return None, find(*arguments)[1]


def halves_swapped(b, w_NK):
    ggml._unpack_q4_0(b, w_NK)
    w_NK[:] = np.roll(w_NK, 16, axis=1)


def greedy_memory(*arguments, read=read_parameters):
    return read(*arguments), np.empty(4 << 20)[:1]


def norms_mixed_up(*arguments, read=gguf_file.read_header):
    metadata, tensors = read(*arguments)
    norms = [name for name in tensors if name.endswith("ffn_norm.weight")]
    return metadata, tensors | dict(zip(norms, [tensors[name] for name in norms[::-1]]))


WRONG = {
    "nibbles swapped": ("int4", quant, "_codes", nibbles_swapped),
    "one code off": ("mobile", mobile, "Quantized", one_code_off),
    "zeros ignored": ("variants", formats, "Quantized", zeros_ignored),
    "activations not rounded": ("mobile", mobile, "_activation_scale", lambda *_: None),
    "norms of 2 + w": ("experts.gguf", parameters, "read_weights", always_plus_one),
    "heads in turn": ("experts.gguf", gguf_model, "_value_heads", heads_in_turn),
    "halves swapped": ("blocks.gguf", ggml.TYPES["Q4_0"], "unpack", halves_swapped),
    "norms mixed up": ("plain.gguf", gguf_file, "read_header", norms_mixed_up),
    "memory": ("bf16", loading, "read_parameters", greedy_memory),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reader_is_found_out(case, tmp_path):
    name, module, attribute, wrong = WRONG[case]
    found = sample(name)
    path = place(tmp_path / name, found, found.files[0], found.files[0].read_bytes())
    if attribute == "unpack":
        patch = mock.patch.dict(ggml.TYPES, Q4_0=module._replace(unpack=wrong))
    else:
        patch = mock.patch.object(module, attribute, wrong)
    with patch, pytest.raises(AssertionError):
        check(found, path, config_alone=False, measured=True)


@pytest.mark.parametrize("old, new, module, attribute", [
    (b"[32, 64]", b"[64, 32]", parameters, "_check_shape"),
    (None, b"\x80\x7f", quant.Plain, "check_finite"),
])  # fmt: skip
def test_a_careless_reader_is_found_out(old, new, module, attribute, tmp_path):
    """One who does not compare shapes; one who does not look for infinities, of which the file now ends with one."""
    found = sample("bf16")
    file = next(file for file in found.files if file.suffix == ".safetensors")
    data = file.read_bytes()
    path = place(tmp_path / "bf16", found, file, data.replace(old, new) if old else data[: -len(new)] + new)
    assert check(found, path, config_alone=False)
    with mock.patch.object(module, attribute, lambda *_: None), pytest.raises(AssertionError):
        check(found, path, config_alone=False)


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), RecursionError(), CheckpointError("a\nb"),
                                   CheckpointError("x" * 1000), CheckpointError(""), RuntimeWarning("x")])  # fmt: skip
def test_other_errors_and_long_ones_are_found_out(error, tmp_path):
    found = sample("bf16")
    expected = AssertionError if isinstance(error, CheckpointError) else type(error)
    with mock.patch.object(loading, "read_parameters", mock.Mock(side_effect=error)), pytest.raises(expected):
        check(found, found.path, config_alone=False)


def test_damage_is_of_all_kinds_in_heads_and_in_data():
    """And half of it is before the first tensor's numbers."""
    changed = {True: 0, False: 0}
    for file, data in ((file, data) for name in NAMES for _, file, data in cases(name)):
        right, head = file.read_bytes(), header_size(file)
        changed[data[:head] != right[:head]] += data != right
    assert min(changed.values()) > 0.3 * CASES * len(NAMES) and sum(changed.values()) > 0.74 * CASES * len(NAMES)
