"""Against llama.cpp (make_llama_vectors.py): the bundled models as its converter writes them; needs no llama.cpp.

Its CPU kernels compute two things otherwise than the models define them: GELU is read from a table in half precision,
and what meets a quantized weight is rounded to 8 bits first. Each test says by how much that moves the logits, and that
with the same done here the difference is gone: as long as no value lies so near the edge between two codes that
rounding errors decide. From there on the two are draws of the same noise. All in float64, so that the figures are
llama.cpp's, on any machine.
"""

import json
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from llama_cases import COLUMNS_C, PREFIXES, ROWS_R, SINGLES, STORES, TEXTS, digests, rebuild
from safetensors import safe_open
from test_numerical import GREEDY, VECTORS, worst
from tiny import FOLDER

import minimtp
from minimtp import backend, drafting, gemma4, layers, qwen35
from minimtp.convert import convert
from minimtp.loading import bundled

TARGETS = ("gemma4", "qwen35")
MODELS = (*TARGETS, "gemma4-assistant")
QUANTIZED = [(name, store) for name in TARGETS for store in STORES[1:]]
AS_DEFINED, HALF_GELU, AS_LLAMA = "as defined", "half-precision GELU", "and 8-bit activations"

every_quantized = pytest.mark.parametrize("name, store", QUANTIZED)


@cache
def vectors():
    """(arrays by name, notes)"""
    with safe_open(VECTORS / "llama.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["notes"])


@cache
def written(name, store):
    """The converter's file, made without it."""
    given = {key.removeprefix(f"{name}."): a for key, a in vectors()[0].items() if key.startswith(f"{name}.blk")}
    return rebuild(Path(FOLDER.name) / f"llama-{name}-{store}.gguf", bundled(f"tiny-{name}"), store, given)


@cache
def loaded(name, store, dtype="float64"):
    return minimtp.load(written(name, store), keep="dense", dtype=dtype)


# What llama.cpp computes otherwise


def half_gelu(x):
    """ggml_vec_gelu_f32: between -10 and 10 a table of float16 by float16."""

    def half(x):
        return x.astype(np.float16).astype(x.dtype)

    return np.where(np.abs(x) < 10, half(layers.gelu(half(x))), np.maximum(x, 0))


def eight_bits(x_TI):
    """quantize_row_q8_0: of 32 numbers the largest becomes ±127, and the step is kept in float16."""
    x_NK = x_TI.astype(np.float32).reshape(-1, 32)
    peak_N1 = np.maximum(np.abs(x_NK).max(1, keepdims=True), np.float32(1e-30))
    codes_NK = np.rint(x_NK * (np.float32(127) / peak_N1))
    return (codes_NK * (peak_N1 / np.float32(127)).astype(np.float16)).reshape(x_TI.shape).astype(x_TI.dtype)


def eight_bit_matmul(x_TI, w_OI):
    """All the weights of these models that something is multiplied by are quantized."""
    return backend.matmul(eight_bits(x_TI), w_OI)


def change(patch, way):
    """Have the forward pass computed that way."""
    if way != AS_DEFINED:
        patch.setattr(gemma4, "gelu", half_gelu)
    if way == AS_LLAMA:
        for module in (layers, gemma4, qwen35):
            patch.setattr(module, "matmul", eight_bit_matmul)


def prompt_of(name):
    return vectors()[0][f"{name}.ids_T"].tolist()


@cache
def after_prompt(name, store, way, dtype="float64"):
    """Our logits of the vectors' rows and columns [R, C]."""
    target = loaded(name, store, dtype)
    with pytest.MonkeyPatch.context() as patch:
        change(patch, way)
        return target.forward(prompt_of(name), target.new_cache()).logits_TV[np.ix_(ROWS_R, COLUMNS_C)]


@cache
def alone(name, store, way):
    """Our logits of tokens that are each read alone [N, C]."""
    target, ids_N = loaded(name, store), list(dict.fromkeys(prompt_of(name)[1:]))[:SINGLES]
    with pytest.MonkeyPatch.context() as patch:
        change(patch, way)
        return np.stack([target.forward([id], target.new_cache()).logits_TV[0, COLUMNS_C] for id in ids_N])


def theirs(name, store, key):
    return vectors()[0][f"{name}.{store}.{key}"]


def rms(x):
    return float(np.sqrt(np.mean(x * x)))


# Files


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", MODELS)
def test_the_files_are_those_of_the_vectors(name, store):
    """Names, types, shapes and bytes of all tensors are as llama.cpp's converter (Q4_0: its quantizer) wrote them."""
    assert digests(written(name, store)) == vectors()[1][f"{name}.{store}"], "run tests/make_llama_vectors.py"


@pytest.mark.parametrize("store", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_convert_writes_what_the_converter_writes(name, store, tmp_path):
    """Q4_0 it does not: the models' own int4 weights stay as they are, and are not rounded a second time."""
    convert(bundled(f"tiny-{name}"), tmp_path / "x.gguf", store.lower())
    assert digests(tmp_path / "x.gguf") == vectors()[1][f"{name}.{store}"]


def test_the_vectors_are_worth_comparing_with():
    for case in [(name, store) for name in TARGETS for store in STORES]:
        prompt_RC, single_NC = (theirs(*case, key) for key in ("logits_RC", "single_NC"))
        assert 3 < prompt_RC.std() < 7 and 3 < single_NC.std() < 7
        assert len(set(prompt_RC.argmax(-1))) > 5 and len(set(single_NC.argmax(-1))) > 10


# F32


def test_gemma_differs_by_the_half_precision_gelu():
    """By 0.0017 of logits up to 17, and with the same GELU by a twentieth of that: what is left are its edges.

    Of tokens read alone the largest of 152 differences is 0.0011 in the middle, and then 0.00002.
    """
    llama_RC, llama_NC = (theirs("gemma4", "F32", key) for key in ("logits_RC", "single_NC"))
    before, after = (worst(after_prompt("gemma4", "F32", way), llama_RC) for way in (AS_DEFINED, HALF_GELU))
    assert 1e-3 < before < 3e-3 and after < before / 10
    before_N, after_N = (np.abs(alone("gemma4", "F32", way) - llama_NC).max(-1) for way in (AS_DEFINED, HALF_GELU))
    assert 5e-4 < np.median(before_N) < 2e-3 and np.median(after_N) < np.median(before_N) / 30


def test_qwen_is_the_same():
    """Neither SiLU nor anything else is rounded: what is left is float32."""
    assert worst(after_prompt("qwen35", "F32", AS_DEFINED), theirs("qwen35", "F32", "logits_RC")) < 2e-5
    assert worst(alone("qwen35", "F32", AS_DEFINED), theirs("qwen35", "F32", "single_NC")) < 2e-5


# Q8_0, Q4_0


@every_quantized
def test_a_token_differs_by_its_activations_rounding(name, store):
    """By 0.04 to 0.06, the largest of 152 logits; with the same rounding by less than 0.00001, of most tokens."""
    llama_NC = theirs(name, store, "single_NC")
    before_N, after_N = (np.abs(alone(name, store, way) - llama_NC).max(-1) for way in (AS_DEFINED, AS_LLAMA))
    assert 0.03 < np.median(before_N) and before_N.max() < 0.2
    assert np.median(after_N) < 1e-5 and (after_N < 1e-4).sum() >= 30


@every_quantized
def test_a_prompt_differs_by_as_much_as_the_rounding_moves_it(name, store):
    """By 0.02 to 0.04 (root mean square), which is what the rounding does to our own logits, within 15 %.

    With the same rounding the difference is another draw of it, since what one code on an edge changes grows with every
    layer and token: our own float32 and float64 then end as far apart.
    """
    llama_RC = theirs(name, store, "logits_RC")
    plain_RC, rounded_RC = (after_prompt(name, store, way) for way in (AS_DEFINED, AS_LLAMA))
    moved = rms(rounded_RC - plain_RC)
    assert 0.015 < moved < 0.04 and 0.85 < rms(llama_RC - plain_RC) / moved < 1.15
    apart = rms(after_prompt(name, store, AS_LLAMA, "float32") - rounded_RC)
    assert 1 / 3 < rms(llama_RC - rounded_RC) / apart < 3


@pytest.mark.parametrize("name", TARGETS)
def test_our_q4_0_is_the_model_and_theirs_is_not(name, tmp_path):
    """How far llama.cpp's logits are from its own in F32 (root mean square): with the int4 weights that convert keeps
    0.025 and 0.029, most of which are the activations; with weights rounded a second time 0.21 and 0.23.
    """
    in_f32_RC = theirs(name, "F32", "logits_RC")
    kept, again = (rms(theirs(name, "Q4_0", key) - in_f32_RC) for key in ("own_RC", "logits_RC"))
    assert 0.02 < kept < 0.04 and 0.2 < again < 0.3
    convert(bundled(f"tiny-{name}"), tmp_path / "x.gguf", "q4_0")
    target = minimtp.load(tmp_path / "x.gguf")
    ours_RC = target.forward(prompt_of(name), target.new_cache()).logits_TV[np.ix_(ROWS_R, COLUMNS_C)]
    assert rms(ours_RC - theirs(name, "Q4_0", "own_RC")) < 0.04 and rms(ours_RC - in_f32_RC) < 0.02


# Drafts


def drafts(target, drafter, ids_T, patch):
    """Logits of the vectors' draft steps [N, K, C], each after the prompt's next token."""
    found = []
    for length in PREFIXES:
        cache_, kept = target.new_cache(), []
        hidden_TD = target.forward(ids_T[:length], cache_).hidden_TD
        patch.setattr(drafting, "choose", noting(kept, ids_T[length + 1 :]))
        drafter.propose(ids_T[1 : length + 1], hidden_TD, cache_, 2, GREEDY, ())
        found.append(np.stack(kept)[:, COLUMNS_C])
    return np.stack(found)


def noting(kept, tokens):
    """In place of drafting.choose: keeps the logits and drafts these tokens."""
    tokens = iter(tokens)

    def choose(logits_V, sampling, u):
        kept.append(logits_V)
        return next(tokens), None

    return choose


@pytest.mark.parametrize("position, window_edge, least, most", [
    ("bonus", "exclusive", 0, 3e-4), ("bonus", "inclusive", 0.05, 0.2), ("committed", "exclusive", 0.5, 1),
])  # fmt: skip
def test_the_assistant_is_at_the_bonus_tokens_position_with_an_exclusive_window(
    position, window_edge, least, most, monkeypatch
):
    target = loaded("gemma4", "F32")
    options = dict(position=position, window_edge=window_edge)
    drafter = minimtp.load_drafter(written("gemma4-assistant", "F32"), target, **options)
    change(monkeypatch, HALF_GELU)
    ours_NKC = drafts(target, drafter, prompt_of("gemma4"), monkeypatch)
    assert least <= worst(ours_NKC, theirs("gemma4", "F32", "draft_NKC")) < most


def test_the_mtp_layer_drafts_the_same(monkeypatch):
    target = loaded("qwen35", "F32")
    ours_NKC = drafts(target, minimtp.load_drafter("auto", target), prompt_of("qwen35"), monkeypatch)
    assert worst(ours_NKC, theirs("qwen35", "F32", "draft_NKC")) < 2e-5


# Tokens


@pytest.mark.parametrize("name", TARGETS)
def test_texts_are_encoded_as_llama_cpp_encodes_them(name):
    """But that llama.cpp does not compose what Qwen's tokenizer.json composes (NFC)."""
    tokenizer = loaded(name, "F32").tokenizer
    for text, ids in zip(TEXTS, vectors()[1][f"{name}.texts"], strict=True):
        if name == "qwen35" and text != unicodedata.normalize("NFC", text):
            assert tokenizer.encode(text) != ids and tokenizer.decode(ids) == text
        else:
            assert tokenizer.encode(text) == ids, text
