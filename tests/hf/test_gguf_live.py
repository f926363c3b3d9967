"""Qwen's GGUF files against transformers' own reading of them, live: what is stored otherwise is undone twice, by two.

It reads no `gemma4` and no MTP layer, takes the kinds of layers from `full_attention_interval` alone, drops zeros at
the end of `rope.dimension_sections`, and needs the package `accelerate`.
"""

import numpy as np
import pytest
import torch
from random_gguf import blocks, write_gguf
from random_qwen import CONFIGS, prompt, write_qwen
from transformers import AutoModelForCausalLM

import minimtp
from minimtp.loading import bundled

pytest.importorskip("accelerate")
torch.set_num_threads(1)
CASES = ["interval", "three_to_one", "moe_all_experts", "bundled"]  # which that leaves as they are


def add_words(writer, words):
    """Tokens of no meaning: transformers counts them."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["a b"])


@pytest.mark.parametrize("store", [lambda *_: "F32", blocks], ids=["F32", "blocks"])
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, store, tmp_path):
    options = {"store": store, "mtp": False}
    if name == "bundled":
        folder, ids = bundled("tiny-qwen35"), list(range(100))
        path = write_gguf(tmp_path / "x.gguf", folder, tokenizer=folder, **options)
    else:
        folder, ids = write_qwen(name, tmp_path / "model"), prompt(name)
        words = ["a", "b", "ab", *map(str, range(3, CONFIGS[name]["model"]["vocab_size"]))]
        path = write_gguf(tmp_path / "x.gguf", folder, extra=lambda writer: add_words(writer, words), **options)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits[0].double().numpy()
    target = minimtp.load(path)
    ours = target.forward(ids, target.new_cache()).logits_TV
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
