"""transformers and compressed-tensors load what convert writes, and compute what this project does."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

import minimtp  # noqa: E402
from minimtp.convert import convert  # noqa: E402

TEXT = "KING RICHARD III:\nNow is the winter of our discontent"
ROUTES = [("compressed-tensors",), ("bf16",), ("q4_0", "compressed-tensors"), ("q8_0", "bf16"),
          ("bf16", "compressed-tensors"), ("f32", "compressed-tensors")]  # fmt: skip


@pytest.mark.parametrize("route", ROUTES, ids="-".join)
@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_transformers_runs_a_converted_folder(tmp_path, name, route):
    path = name
    for i, to in enumerate(route):
        path, source = tmp_path / (f"{i}.gguf" if to[1:2].isdigit() else str(i)), path
        convert(source, path, to)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = minimtp.load(path)
    ids = ours.tokenizer.encode(TEXT)
    assert transformers.AutoTokenizer.from_pretrained(path)(TEXT).input_ids == ids
    with torch.no_grad():
        theirs_TV = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(theirs_TV - ours.forward(ids, ours.new_cache()).logits_TV).max() < 1e-4
    if route[-1] == "compressed-tensors":
        assert json.loads((path / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


def test_transformers_loads_an_assistant(tmp_path):
    """As it was published, and by way of a file."""
    convert("tiny-gemma4-assistant", tmp_path / "a.gguf", "f32")
    convert(tmp_path / "a.gguf", tmp_path / "a", "bf16")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(model).__name__ == "Gemma4AssistantForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
