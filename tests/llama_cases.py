"""What make_llama_vectors computes with llama.cpp and test_llama without it: files, prompts, texts."""

import hashlib

import gguf
import numpy as np
from random_gguf import write_gguf

STORES = ("F32", "Q8_0", "Q4_0")
LENGTH = 80  # of the prompts: more than the sliding window of 32, and than a block of 64 of the delta rule
ROWS_R = np.array([0, 1, 8, 16, 31, 32, 40, 56, 63, 64, 72, 79])
COLUMNS_C = np.arange(0, 1216, 8)  # of the vocabulary, kept of every row of logits
SINGLES = 40  # tokens that are each read alone
PREFIXES = (20, 33, 60)
TEXTS = [
    "", " ", "Hello, world!\n\n\n\tYes\r\n", "   two  spaces ", "naïve café É Ångström", "日本語 🦙🇩🇪",
    "3.14159 10,000 x²", "don't WE'LL I'm", "<bos>a<eos><pad>",
    "<|turn>user\nhi<turn|>\n<|turn>model\n", "<|im_start|>user\nhi<|im_end|>\n",
    "<think>\n\n</think>", 'a<|tool_call>b<|"|>c<|channel>thought', "▁▁ ▁", "<0x41>", "\x01\x7f\u200d\ufeff", "\n" * 9,
    "def f(x):\n    return x  # comment\n", "e\u0301 ﷽ ߷ ꙮ",
]  # fmt: skip


def rebuild(path, folder, store, given):
    """The file that llama.cpp's converter makes of a bundled model, with its tokenizer -> path.

    given: tensors {name: array} to be taken as they are.
    """
    return write_gguf(path, folder, store=lambda name, array: store, tokenizer=folder, edit=lambda t: t.update(given))


def given_tensors(path):
    """{name: array} of a converter's file: what hangs on how a machine computes exp."""
    return {t.name: t.data.copy() for t in gguf.GGUFReader(path).tensors if t.name.endswith("ssm_a")}


def digests(path):
    """{tensor: its type and a digest of its shape and bytes} of a GGUF file."""
    return {
        t.name: f"{t.tensor_type.name} {hashlib.sha256(f'{t.shape}'.encode() + t.data.tobytes()).hexdigest()[:12]}"
        for t in sorted(gguf.GGUFReader(path).tensors, key=lambda t: t.name)
    }
