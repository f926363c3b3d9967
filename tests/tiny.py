"""Tiny models for the tests: random checkpoints, a Markov chain that passes for a target, and plain references."""

import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from random_models import layers, rope, write_assistant, write_target

import minimtp
from minimtp import gemma4
from minimtp.cache import Cache
from minimtp.checkpoint import open_checkpoint, write_safetensors
from minimtp.drafting import choose
from minimtp.layers import Output, token_ids

FOLDER = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
TARGET = dict(hidden_size=32, intermediate_size=64, rope_parameters=rope(), final_logit_softcapping=30.0, echo=0.8)
ASSISTANT = dict(hidden_size=32, layer_types=layers("sf"), repeat=2.0)

# name -> (seed, what write_target is called with)
MODELS = {
    "window_4": (
        3,
        dict(layer_types=layers("sf"), num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=1,
             head_dim=8, global_head_dim=16, sliding_window=4, attention_k_eq_v=True, vocab_size=50),
    ),
    "window_7": (
        5,
        dict(layer_types=layers("ssf"), num_attention_heads=3, num_key_value_heads=3, num_global_key_value_heads=None,
             head_dim=6, global_head_dim=10, sliding_window=7, attention_k_eq_v=False, vocab_size=37,
             intermediate_size=33),
    ),
    "window_20": (
        7,
        dict(layer_types=layers("fsf"), num_attention_heads=8, num_key_value_heads=1, num_global_key_value_heads=2,
             head_dim=8, global_head_dim=8, sliding_window=20, attention_k_eq_v=True, vocab_size=65, int4=True),
    ),
    "experts": (
        9,
        dict(layer_types=layers("sf"), num_attention_heads=4, num_key_value_heads=2, num_global_key_value_heads=1,
             head_dim=8, global_head_dim=8, sliding_window=5, attention_k_eq_v=True, vocab_size=45,
             enable_moe_block=True, num_experts=7, top_k_experts=3, moe_intermediate_size=24),
    ),
    "shared_kv": (
        11,
        dict(layer_types=layers("sfsf"), num_attention_heads=2, num_key_value_heads=1, num_global_key_value_heads=None,
             head_dim=8, global_head_dim=16, sliding_window=6, attention_k_eq_v=False, vocab_size=45,
             num_kv_shared_layers=2, use_double_wide_mlp=True, hidden_size_per_layer_input=8),
    ),
}  # fmt: skip


@cache
def folders(name):
    """The checkpoints of MODELS[name], written when first asked for -> (target, assistant)."""
    seed, target = MODELS[name]
    folder = Path(FOLDER.name) / name
    config = write_target(folder / "target", seed, **TARGET | target)
    write_assistant(folder / "assistant", config, seed, **ASSISTANT)
    if {"enable_moe_block", "num_kv_shared_layers"} & set(target):
        complete(folder / "target", folder / "whole", seed)
        return folder / "whole", folder / "assistant"
    return folder / "target", folder / "assistant"


def complete(folder, whole, seed):
    """Copy a checkpoint and add what write_target leaves out: experts, per-layer inputs, layers of double width."""
    checkpoint, random = open_checkpoint(folder), np.random.default_rng(seed)
    arrays = {}
    for name, shape, kind in gemma4.tensors(gemma4.parse_config(checkpoint.config)).values():
        name = name.replace("model.", "model.language_model.", 1)
        if name in checkpoint.tensors and checkpoint.tensors[name].shape == shape:
            arrays[name] = checkpoint.tensors[name].stored()
        else:
            values = random.normal(size=shape) * shape[-1] ** -0.5 if kind != "vector" else random.random(shape) + 0.5
            arrays[name] = values.astype(np.float32)
    whole.mkdir()
    (whole / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_safetensors(whole / "model.safetensors", arrays)


@cache
def pair(name, dtype="float32", keep="auto"):
    """(target, drafter) of MODELS[name], or the bundled pair."""
    path, assistant = ("tiny-gemma4", "auto") if name == "bundled" else folders(name)
    target = minimtp.load(path, dtype=dtype, keep=keep)
    return target, minimtp.load_drafter(assistant, target, keep=keep)


def random_ids(count, vocab_size, seed=0):
    return np.random.default_rng(seed).integers(vocab_size, size=count).tolist()


def random_prompt(target, count, seed=0):
    """Random ids that the target can read: none that stands for an image or a sound."""
    ids = random_ids(2 * count + 9, target.config.vocab_size, seed)
    return [token for token in ids if token not in target.config.placeholders][:count]


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def emitted(steps):
    return [token for step in steps for token in step.tokens]


def greedy(target, prompt, count):
    """`count` tokens by argmax, one a pass, nothing committed or un-read -> (tokens, their logits rows)."""
    cache, unread, tokens, rows = target.new_cache(), prompt, [], []
    for _ in range(count):
        rows.append(target.forward(unread, cache, last=1).logits_TV[0])
        tokens.append(int(rows[-1].argmax()))
        unread = tokens[-1:]
    return tokens, np.stack(rows)


class Recorded:
    """A target that keeps what every pass returned, and the last logits row computed at every position."""

    def __init__(self, target):
        self.target, self.passes, self.rows = target, [], {}

    def __getattr__(self, name):
        return getattr(self.target, name)

    def forward(self, ids_T, cache, taps=(), last=None):
        out = self.target.forward(ids_T, cache, taps, last)
        first = cache.length - len(out.logits_TV)
        self.passes.append(out)
        self.rows |= {first + i: row_V for i, row_V in enumerate(out.logits_TV)}
        return out


class Restless(Recorded):
    """Adds noise to the logits that depends on the position alone: a random model's argmax soon repeats itself."""

    def __init__(self, target, noise=5.0):
        super().__init__(target)
        random = np.random.default_rng(0)
        self.noise_SV = random.normal(size=(600, target.config.vocab_size)).astype(target.dtype) * target.dtype.type(
            noise
        )

    def forward(self, ids_T, cache, taps=(), last=None):
        first = cache.length + (0 if last is None else max(0, len(ids_T) - last))
        out = self.target.forward(ids_T, cache, taps, last)
        out.logits_TV[:] += self.noise_SV[first : cache.length]
        self.rows |= {first + i: row_V for i, row_V in enumerate(out.logits_TV)}
        return out


class Chain:
    """A Markov chain as a target: the next token's law is the last token's row of p_VV.

    A hidden state is [position, id] of the token that was read.
    """

    def __init__(self, p_VV, capacity=2048):
        self.p_VV, self.capacity = np.asarray(p_VV, np.float64), capacity
        self.config = SimpleNamespace(vocab_size=len(self.p_VV), placeholders={})

    def new_cache(self, capacity=None):
        return Cache([], capacity or self.capacity)

    def forward(self, ids_T, cache, taps=(), last=None):
        ids_T = token_ids(ids_T, len(self.p_VV))
        with cache.reading(ids_T) as start:
            hidden_TD = np.stack([np.arange(start, start + len(ids_T)), ids_T], axis=1)
        rows = ids_T if last is None else ids_T[max(0, len(ids_T) - last) :]
        return Output(log(self.p_VV[rows]), hidden_TD, {})


class ChainDrafter:
    """Drafts with another chain: at most `most` tokens, or in turn as many as a list says."""

    def __init__(self, q_VV, most=15):
        self.q_VV, self.most = np.asarray(q_VV, np.float64), most

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        most = self.most if isinstance(self.most, int) else self.most[cache.length % len(self.most)]
        token, tokens, laws = new_tokens_N[-1], [], []
        for u in list(u_K[: min(num_draft, most)]):
            token, law_V = choose(log(self.q_VV[token]), sampling, u)
            tokens.append(token)
            laws.append(law_V)
        return minimtp.Draft(tokens, None if not laws or laws[0] is None else np.stack(laws))


class Witness:
    """A drafter over a chain that reads all it is given, as one with entries of its own must, and checks every bit."""

    def __init__(self, inner):
        self.inner, self.read = inner, {}

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        read = self.read.setdefault(cache, cache.tokens[:1])
        first, read[len(read) :] = len(read), new_tokens_N
        assert read[:-1] == cache.tokens
        behind = [[position, cache.tokens[position]] for position in range(first - 1, cache.length)]
        assert hidden_ND.tolist() == behind
        assert len(u_K) == num_draft
        return self.inner.propose(new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K)


def log(p):
    with np.errstate(divide="ignore"):
        return np.log(p)
