"""Make tests/vectors: what transformers computes, in double, for the random checkpoints of random_models.

    python tests/make_vectors.py [NAME ...]

One safetensors file for each configuration: logits, hidden states and layer outputs of the target, and steps of its
assistant after several prefixes. Beside them transformers' own float32 error, the yardstick for ours.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from double import double, load_reference
from random_models import CONFIGS, fingerprint, prompt, write_pair
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "vectors"
STEPS = 3
COLUMNS = 8
DRAFT_KEYS = ("prefix_N", "tokens_K", "logits_KV", "hidden_KD")


def text_model(model):
    return model.model.language_model if hasattr(model.model, "language_model") else model.model


def numpy(tensor):
    return tensor.detach().double().numpy()


@torch.no_grad()
def read(model, ids_T, chunks=None, taps=()):
    """Read ids_T, in one piece or in chunks -> (logits [T, V], hidden [T, D], {tap: [T, D]}, borrowed KV)."""
    text, kept, hooks = text_model(model), {}, []
    for name in ["final_norm", *taps]:
        kept[name] = []
        hooks.append(tap_module(text, name).register_forward_hook(keeper(kept[name])))
    ids, logits, start = torch.tensor([ids_T]), [], 0
    cache = transformers.DynamicCache(config=model.config.get_text_config()) if chunks else None
    for size in filter(None, chunks or [len(ids_T)]):
        piece = ids[:, start : start + size]
        out = model(piece, past_key_values=cache, use_cache=bool(chunks), return_shared_kv_states=True)
        logits.append(out.logits[0])
        start += size
    for hook in hooks:
        hook.remove()
    joined = {name: numpy(torch.cat(parts)) for name, parts in kept.items()}
    return numpy(torch.cat(logits)), joined.pop("final_norm"), joined, dict(out.shared_kv_states or {})


def tap_module(text, name):
    """The module whose output a tap is."""
    if "." not in name:
        return {"embed": text.embed_tokens, "final_norm": text.norm}[name]
    _, index, part = name.split(".")
    layer = text.layers[int(index)]
    return {"attn": layer.self_attn, "mlp": layer.mlp, "out": layer}[part]


def keeper(parts):
    def hook(module, inputs, output):
        parts.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    return hook


@torch.no_grad()
def assistant_steps(target, assistant, kv, hidden_D, tokens, position):
    """Steps of the assistant over the given KV, fed tokens[j] at step j -> (logits [K, V], hidden [K, D]).

    transformers' own generator leaves KV of rejected drafts visible; here the caller crops.
    """
    hidden = torch.as_tensor(hidden_D).to(target.dtype)[None, None]
    logits, hiddens = [], []
    for token in tokens:
        embedded = target.get_input_embeddings()(torch.tensor([[token]]))
        out = assistant(
            inputs_embeds=torch.cat([embedded, hidden], dim=-1), position_ids=torch.tensor([[position]]),
            attention_mask=None, shared_kv_states=kv, use_cache=False,
        )  # fmt: skip
        hidden = out.last_hidden_state
        logits.append(numpy(out.logits[0, 0]))
        hiddens.append(numpy(hidden[0, 0]))
    return np.stack(logits), np.stack(hiddens)


def crop(kv, length, sliding_keys=None):
    """The entries of the first `length` tokens; of those the last `sliding_keys` in the sliding layer."""
    kv = {kind: [x[:, :, :length] for x in pair] for kind, pair in kv.items()}
    if sliding_keys is not None:
        kv["sliding_attention"] = [x[:, :, -sliding_keys:] for x in kv["sliding_attention"]]
    return kv


def draft(target, assistant, kv, hidden_TD, ids_T, length, window):
    """What the assistant drafts after `length` read tokens, in each reading of its position and window."""
    behind, first = hidden_TD[length - 1], ids_T[length]
    whole = crop(kv, length)
    tokens = [first]
    for _ in range(STEPS - 1):
        logits_KV, _ = assistant_steps(target, assistant, whole, behind, tokens, length)
        tokens.append(int(logits_KV[-1].argmax()))
    logits_KV, hidden_KD = assistant_steps(target, assistant, whole, behind, tokens, length)

    def one(position, sliding_keys):
        cropped = crop(kv, length, sliding_keys)
        return assistant_steps(target, assistant, cropped, behind, [first], position)[0][0]

    return {
        "tokens_K": np.array(tokens), "logits_KV": logits_KV, "hidden_KD": hidden_KD,
        "committed_V": one(length - 1, None),
        "exclusive_V": one(length, window - 1),  # distance < window from the bonus token's position
        "committed_exclusive_V": one(length - 1, window),
    }  # fmt: skip


def prefixes(length, window):
    """How much has been read when the assistant drafts: below, at and beyond the window, by one too."""
    wanted = {1, window // 2, window - 1, window, window + 1, window + 2, 2 * window + 1, length - 2}
    return sorted(n for n in wanted if 1 <= n < length)


def rows(length, window):
    wanted = {0, 1, window - 1, window, window + 1, 2 * window, 3 * window, length // 2, length - 2, length - 1}
    return sorted(n for n in wanted if 0 <= n < length)


def worst(a, b):
    return np.abs(a - b).max()


def make(name):
    """All vectors of one configuration, as named arrays."""
    with tempfile.TemporaryDirectory() as folder:
        folders = write_pair(name, folder)
        target, assistant = map(load_reference, folders)
        digest = np.frombuffer(fingerprint(*folders), np.uint8)
    text, ids_T = target.config.get_text_config(), prompt(name)
    last, window = text.num_hidden_layers - 1, text.sliding_window
    taps = ["embed", "layer.0.attn", "layer.0.mlp", "layer.0.out", f"layer.{last}.attn", f"layer.{last}.out"]
    single = [1] * len(ids_T)

    with double(target, assistant):
        logits_TV, hidden_TD, tapped, kv = read(target, ids_T, taps=taps)
        again_TV, *_ = read(target, ids_T, single)
        assert worst(again_TV, logits_TV) < 1e-11, "the double reference depends on chunks: it is not double"
        drafts = [draft(target, assistant, kv, hidden_TD, ids_T, n, window) for n in prefixes(len(ids_T), window)]
    vectors = target_vectors(ids_T, logits_TV, hidden_TD, tapped, window)
    drafts = {f"draft.{key}": np.stack([each[key] for each in drafts]) for key in drafts[0]}
    vectors |= drafts | {"draft.prefix_N": np.array(prefixes(len(ids_T), window)), "fingerprint": digest}
    return vectors | float32_errors(target, assistant, vectors)


def target_vectors(ids_T, logits_TV, hidden_TD, tapped, window):
    rows_R = np.array(rows(len(ids_T), window))
    columns_C = np.linspace(0, logits_TV.shape[1] - 1, COLUMNS).astype(int)
    return {
        "ids_T": np.array(ids_T), "rows_R": rows_R, "columns_C": columns_C, "logits_RV": logits_TV[rows_R],
        "logits_TC": logits_TV[:, columns_C], "hidden_RD": hidden_TD[rows_R],
        **{f"tap.{name}": value_TD[rows_R] for name, value_TD in tapped.items()},
    }  # fmt: skip


def float32_errors(target, assistant, vectors):
    """transformers' own float32 error on the vectors: the worst of its ways to attend and to read."""
    ids_T, errors = vectors["ids_T"].tolist(), {}
    for logits_TV, hidden_TD, kv in float32_ways(target, ids_T):
        keep_worst(errors, "logits", logits_error(vectors, logits_TV))
        keep_worst(errors, "hidden", worst(hidden_TD[vectors["rows_R"]], vectors["hidden_RD"]))
        if not kv:
            continue
        assistant.set_attn_implementation(target.config._attn_implementation)
        for n, tokens, logits_KV, hidden_KD in zip(*(vectors[f"draft.{key}"] for key in DRAFT_KEYS), strict=True):
            drafted = assistant_steps(target, assistant, crop(kv, n), hidden_TD[n - 1], tokens.tolist(), int(n))
            keep_worst(errors, "draft.logits", worst(drafted[0], logits_KV))
            keep_worst(errors, "draft.hidden", worst(drafted[1], hidden_KD))
    return {f"error.{key}": np.array([value]) for key, value in errors.items()}


def float32_ways(target, ids_T):
    """Read the prompt in float32, by both attention implementations, in one piece (with KV), in chunks, one by one."""
    for implementation in ("eager", "sdpa"):
        target.set_attn_implementation(implementation)
        for chunks in (None, [9] * (len(ids_T) // 9) + [len(ids_T) % 9], [1] * len(ids_T)):
            logits_TV, hidden_TD, _, kv = read(target, ids_T, chunks)
            yield logits_TV, hidden_TD, None if chunks else kv


def keep_worst(errors, key, value):
    errors[key] = max(value, errors.get(key, 0.0))


def logits_error(vectors, logits_TV):
    """Largest difference from the logits kept in the vectors."""
    return max(
        worst(logits_TV[vectors["rows_R"]], vectors["logits_RV"]),
        worst(logits_TV[:, vectors["columns_C"]], vectors["logits_TC"]),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CONFIGS:
        vectors = {key: np.ascontiguousarray(value) for key, value in make(name).items()}
        save_file(vectors, FOLDER / f"{name}.safetensors", {"transformers": transformers.__version__})
        size = (FOLDER / f"{name}.safetensors").stat().st_size
        print(name, f"{size / 1000:.0f} kB", {k: f"{v[0]:.1e}" for k, v in vectors.items() if k.startswith("error")})
