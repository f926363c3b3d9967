"""What precision explains: transformers in float32, float16 and bfloat16 against golden runs, and wrong norms."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from double import load_reference

import minimtp
from minimtp.golden import compare, make, read_golden, record, replay
from minimtp.loading import bundled

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=["tiny-gemma4", "tiny-qwen35"])
def reference(request, tmp_path_factory):
    """(transformers' model, golden.json, arrays)"""
    folder, pairs = tmp_path_factory.mktemp("golden"), []
    for dtype in ("float32", "float64"):
        target = minimtp.load(request.param, dtype=dtype)
        pairs.append((target, minimtp.load_drafter("auto", target)))
    prompt = pairs[0][0].tokenizer.encode("ROMEO:\nBut soft, what light")
    run = record(*pairs[0], prompt, 4, "rejection", minimtp.Sampling(temperature=0.0), None, 40, 0)
    make(folder, run, *(replay(run, *pair) for pair in pairs))
    return load_reference(bundled(request.param)), *read_golden(folder)


def dumped(model, run):
    """What transformers computes at each position of the text, by our names."""
    ids = torch.tensor([run["text"][: run["steps"][-1]["cache_length"]]])
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
    first, *between, last = out.hidden_states
    layers = {f"layer.{i}.out": x for i, x in enumerate(between)}
    dump = {"embed": first, **layers, "final_norm": last, "logits": out.logits}
    return {name: np.asarray(x[0].double()) for name, x in dump.items()}


@pytest.mark.parametrize("precision", TYPES)
def test_transformers_differs_by_what_its_precision_explains(reference, precision):
    model, run, arrays = reference
    model = deepcopy(model).to(TYPES[precision])
    report = compare(run, arrays, dumped(model, run), precision)
    assert report["passed"], report["first"]
    assert 0.1 < max(one["worst"] for one in report["compared"])
    finer = {"bfloat16": "float16", "float16": "float32", "float32": "float64"}[precision]
    assert not compare(run, arrays, dumped(model, run), finer)["passed"]


@pytest.mark.parametrize("precision", TYPES)
def test_a_norm_too_large_by_half_is_named_in_every_precision(reference, precision):
    model, run, arrays = reference
    model = deepcopy(model).to(TYPES[precision])
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    weight = layers[3].post_attention_layernorm.weight.data
    weight += (weight if run["model"]["family"] == "gemma4" else 1 + weight) / 2  # Qwen's are stored less 1
    report = compare(run, arrays, dumped(model, run), precision)
    assert report["first"]["name"] == "layer.3.out"


def test_another_layers_norm_is_named_in_float32(reference):
    model, run, arrays = reference
    model = deepcopy(model)
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    layers[3].input_layernorm = layers[2].input_layernorm
    report = compare(run, arrays, dumped(model, run), "float32")
    assert (report["first"]["name"], report["first"]["position"]) == ("layer.3.out", 0)
