"""Make tests/vectors/qwen_*: what transformers computes, in double, for the random checkpoints of random_qwen.

    python tests/make_qwen_vectors.py [NAME ...]

One safetensors file for each configuration: logits, hidden states, layer outputs and linear layers' memory after a
prompt, and what the MTP layer drafts after several prefixes. Beside them transformers' own float32 error.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from double import double
from make_vectors import FOLDER, keep_worst, logits_error, worst
from qwen_reference import load_qwen, mtp_draft, read
from random_models import fingerprint
from random_qwen import CONFIGS, prompt, write_qwen
from safetensors.numpy import save_file

STEPS = 4
COLUMNS = 3  # kept of every row of logits
CORNER = 4  # kept of keys and values of a state


def load_config(name, folder, seed=None, **overrides):
    """(model, checkpoint folder) of CONFIGS[name]; transformers cannot read packed experts and gets a twin."""
    written, twin = write_qwen(name, Path(folder) / "qwen", seed, **overrides), None
    if CONFIGS[name]["model"].get("int4") and "num_experts" in CONFIGS[name]["model"]:
        twin = write_qwen(name, Path(folder) / "twin", seed, **overrides, twin=True)
    return load_qwen(written, twin), written


def some(length, count):
    """At most `count` indices, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).astype(int))


def rows(length):
    """Both sides of the chunks of 64 that transformers reads in, and the ends."""
    return np.array(sorted(n for n in {0, 1, 63, 64, 127, 128, length // 2, length - 1} if n < length))


def prefixes(length):
    """How much has been read when the MTP layer drafts."""
    return [1, length // 2, length - 1]


def tap_names(config):
    """The first and the last layer of each kind, and what leaves the last layer."""
    names = {"layer.0.mlp", f"layer.{config.num_hidden_layers - 1}.out"}
    for kind in ("linear_attention", "full_attention"):
        of_kind = [i for i, each in enumerate(config.layer_types) if each == kind]
        names |= {f"layer.{i}.attn" for i in (of_kind[0], of_kind[-1])}
    return sorted(names)


def make(name):
    """All vectors of one configuration, as named arrays -> (vectors, the model)."""
    with tempfile.TemporaryDirectory() as folder:
        model, written = load_config(name, folder)
        digest = np.frombuffer(fingerprint(written), np.uint8)
    ids_T, taps = prompt(name), tap_names(model.config)
    with double(model):
        truth = read(model, ids_T, taps=taps)
        whole, single = read(model, ids_T, [len(ids_T)]), read(model, ids_T, [1] * len(ids_T))
        assert worst(single.logits_TV, truth.logits_TV) < 1e-10, "the reference depends on chunks: it is not double"
        vectors = target_vectors(ids_T, truth) | state_vectors(whole.states) | {"fingerprint": digest}
        if model.mtp:
            vectors |= draft_vectors(model, truth, ids_T)
    return vectors, model


def target_vectors(ids_T, truth):
    rows_R, columns_C = rows(len(ids_T)), some(truth.logits_TV.shape[1], COLUMNS)
    few_F = rows_R[1::3]
    return {
        "ids_T": np.array(ids_T), "rows_R": rows_R, "columns_C": columns_C, "logits_RV": truth.logits_TV[rows_R],
        "logits_TC": truth.logits_TV[:, columns_C], "hidden_RD": truth.hidden_TD[rows_R], "tap_rows_F": few_F,
        **{f"tap.{name}": value_TD[few_F] for name, value_TD in truth.taps.items()},
    }  # fmt: skip


def state_vectors(states):
    """Memory of the first and the last linear layer after the prompt; of wide states a grid."""
    vectors = {}
    for i in {min(states), max(states)}:
        window_WC, state_HKV = states[i]
        heads, keys, values = state_HKV.shape
        grid = np.ix_(range(heads), some(keys, CORNER), some(values, CORNER))
        vectors[f"state.{i}"], vectors[f"window.{i}"] = state_HKV[grid], window_WC[:, some(window_WC.shape[1], 24)]
    return vectors


def draft_vectors(model, truth, ids_T):
    """Drafts by argmax after each prefix, and shorter ones from hidden states before the final norm."""
    lengths = prefixes(len(ids_T))
    vectors = {"draft.prefix_N": np.array(lengths)}
    for kind, hidden_TD, steps in (("", truth.hidden_TD, STEPS), ("pre_norm_", truth.before_norm_TD, 2)):
        drafts = [mtp_draft(model, hidden_TD, ids_T, n, steps) for n in lengths]
        for key, values in zip(("tokens_NK", "logits_NKV"), zip(*drafts)):
            vectors[f"draft.{kind}{key}"] = np.array(values)
    return vectors


def float32_errors(model, vectors):
    """transformers' own float32 error on the vectors: the worst of its ways to attend and to read."""
    ids_T, errors = vectors["ids_T"].tolist(), {}
    for reading in float32_ways(model, ids_T):
        keep_worst(errors, "logits", logits_error(vectors, reading.logits_TV))
        keep_worst(errors, "hidden", worst(reading.hidden_TD[vectors["rows_R"]], vectors["hidden_RD"]))
        for key, value in state_vectors(reading.states).items():
            keep_worst(errors, key.partition(".")[0], worst(value, vectors[key]))
        for i, length in enumerate(vectors.get("draft.prefix_N", ())):
            fed = vectors["draft.tokens_NK"][i].tolist()
            _, logits_KV = mtp_draft(model, reading.hidden_TD, ids_T, int(length), STEPS, tokens=fed)
            keep_worst(errors, "draft.logits", worst(logits_KV, vectors["draft.logits_NKV"][i]))
    return {f"error.{key}": np.array([value]) for key, value in errors.items()}


def float32_ways(model, ids_T, single=True):
    """Read the prompt in float32, by both attention implementations, in one piece, in chunks, one by one if asked."""
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        ways = [len(ids_T)], [9] * (len(ids_T) // 9) + [len(ids_T) % 9], [1] * len(ids_T)
        for chunks in ways if single else ways[:2]:
            yield read(model, ids_T, chunks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CONFIGS:
        path = FOLDER / f"qwen_{name}.safetensors"
        vectors, model = make(name)
        vectors |= float32_errors(model, vectors)
        vectors = {key: np.ascontiguousarray(value) for key, value in vectors.items()}
        save_file(vectors, path, {"transformers": transformers.__version__})
        errors = {key: f"{value[0]:.1e}" for key, value in vectors.items() if key.startswith("error")}
        print(name, f"{path.stat().st_size / 1000:.0f} kB", errors)
