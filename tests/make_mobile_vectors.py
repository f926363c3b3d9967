"""Make tests/vectors/mobile.safetensors: what transformers computes, in double, for the checkpoints of random_mobile.

    python tests/make_mobile_vectors.py

In double, since activations are rounded: where two sums differ in their last bit, a value near the middle of two steps
may be rounded to one or to the other, and the results then differ by a step. In float32 that happens to one row in
some; in double to one in a billion.
"""

import tempfile

import numpy as np
import torch
import transformers
from double import double, round_frequencies
from make_vectors import FOLDER, numpy
from random_mobile import CASES, prompt, write_mobile
from random_models import fingerprint
from safetensors.numpy import save_file
from transformers.integrations.gemma_quant import QuantizedEmbedding

CLASSES = {"nested": transformers.Gemma4ForConditionalGeneration, "bare": transformers.Gemma4ForCausalLM}


def load_mobile(folder, layout):
    """The transformers model of a folder in the mobile layout, in float32, every tensor accounted for."""
    model, report = CLASSES[layout].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    model.is_quantized = False  # which would refuse to be turned to double
    for module in model.modules():
        if isinstance(module, QuantizedEmbedding):
            module.embed_scale = torch.zeros(())  # of unquantized ones, which double.py sets
    return round_frequencies(model.eval())


def make(name):
    """The vectors of one case, as named arrays."""
    with tempfile.TemporaryDirectory() as folder:
        write_mobile(name, folder)
        model, digest = load_mobile(folder, CASES[name]["layout"]), fingerprint(folder)
    with torch.no_grad(), double(model):
        logits_TV = numpy(model(torch.tensor([prompt(name)])).logits[0])
    return {f"{name}.logits_TV": logits_TV, f"{name}.fingerprint": np.frombuffer(digest, np.uint8)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    vectors = {key: value for name in CASES for key, value in make(name).items()}
    save_file(vectors, FOLDER / "mobile.safetensors", {"transformers": transformers.__version__})
    print(f"{sum(value.nbytes for value in vectors.values()) / 1000:.0f} kB")
