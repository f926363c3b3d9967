"""Make tests/vectors/size_*: what transformers computes, in double, for the random checkpoints of random_sizes.

    python tests/make_size_vectors.py [NAME ...]

As make_vectors.py does for its configurations, and with its functions; kept small: few rows, few prefixes, no taps.
"""

import sys
import tempfile

import numpy as np
import torch
import transformers
from double import double, load_reference
from make_vectors import FOLDER, draft, float32_errors, read, target_vectors, worst
from random_models import fingerprint
from random_sizes import SIZES, prompt, write_pair, write_target
from safetensors.numpy import save_file


def load_target(name, folder, seed=None, **overrides):
    """The transformers model of SIZES[name]; where it knows no such layout, of the same numbers in plain float32."""
    size = SIZES[name]
    if size["target"].get("single"):
        folder = folder.with_name("twin")
        write_target(folder, size["seed"] if seed is None else seed, **size["target"] | overrides, twin=True)
    model = load_reference(folder)
    if model.config.get_text_config().to_dict().get("enable_moe_block"):
        model.set_experts_implementation("eager")  # the others do not work in double
    return model


def few_rows(vectors):
    """Every third of the rows, and the last."""
    kept = sorted({*range(0, len(vectors["rows_R"]), 3), len(vectors["rows_R"]) - 1})
    return vectors | {key: vectors[key][kept] for key in ("rows_R", "logits_RV", "hidden_RD")}


def make(name):
    """All vectors of one size, as named arrays."""
    with tempfile.TemporaryDirectory() as folder:
        folders = write_pair(name, folder)
        target, assistant = load_target(name, folders[0]), load_reference(folders[1])
        digest = np.frombuffer(fingerprint(*folders), np.uint8)
    ids_T, window = prompt(name), target.config.get_text_config().sliding_window
    lengths = [window - 1, window + 2, len(ids_T) - 2]  # read when the assistant drafts: below the window and beyond
    with double(target, assistant):
        logits_TV, hidden_TD, _, kv = read(target, ids_T)
        again_TV, *_ = read(target, ids_T, [1] * len(ids_T))
        assert worst(again_TV, logits_TV) < 1e-11, "the double reference depends on chunks: it is not double"
        drafts = [draft(target, assistant, kv, hidden_TD, ids_T, n, window) for n in lengths]
    vectors = few_rows(target_vectors(ids_T, logits_TV, hidden_TD, {}, window))
    kept = ("tokens_K", "logits_KV", "hidden_KD")
    vectors |= {f"draft.{key}": np.stack([each[key] for each in drafts]) for key in kept}
    vectors |= {"draft.prefix_N": np.array(lengths), "fingerprint": digest}
    return vectors | float32_errors(target, assistant, vectors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or SIZES:
        path = FOLDER / f"size_{name}.safetensors"
        vectors = {key: np.ascontiguousarray(value) for key, value in make(name).items()}
        save_file(vectors, path, {"transformers": transformers.__version__})
        errors = {key: f"{value[0]:.1e}" for key, value in vectors.items() if key.startswith("error")}
        print(name, f"{path.stat().st_size / 1000:.0f} kB", errors)
