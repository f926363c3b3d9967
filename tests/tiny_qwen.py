"""Tiny Qwen models for the tests, with the MTP layers that draft for them, and what reading a text afresh leaves."""

from copy import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from random_qwen import layers, rope, write_model
from tiny import FOLDER

import minimtp
from minimtp.kv import FullKV

BEHIND = 40  # instead of 1,024
GREEDY, PLAIN = minimtp.Sampling(temperature=0.0), minimtp.Sampling()
TOLERANCES = {"float32": 3e-5, "float64": 1e-12}  # of what wide passes leave, relative to the largest number
SHARED = dict(
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=6, linear_value_head_dim=8, rope_parameters=rope(1e3, 0.5), layout="bare",
)  # fmt: skip

# name -> (seed, what write_model is called with)
MODELS = {
    "dense": (3, dict(layer_types=layers("lfl"), hidden_size=32, intermediate_size=48, vocab_size=50)),
    "int4": (
        5,
        dict(layer_types=layers("llf"), hidden_size=32, intermediate_size=64, vocab_size=61, int4=True, store="BF16",
             linear_conv_kernel_dim=3),
    ),
    "experts": (
        7,
        dict(layer_types=layers("lfl"), hidden_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=12,
             num_experts=6, num_experts_per_tok=2, vocab_size=45, tie_word_embeddings=True, gain=0.8,
             linear_conv_kernel_dim=2),
    ),
}  # fmt: skip


def write(name, path, **overrides):
    """Write the checkpoint of MODELS[name], with changes -> its folder."""
    seed, model = MODELS[name]
    write_model(path, seed, **SHARED | model | overrides)
    return Path(path)


@cache
def folder(name):
    """The checkpoint of MODELS[name], written when first asked for."""
    return write(name, Path(FOLDER.name) / f"qwen-{name}")


@cache
def pair(name, dtype="float32", keep="auto", **options):
    """(target, its MTP layer) of MODELS[name]."""
    target = minimtp.load(folder(name), dtype=dtype, keep=keep)
    return target, minimtp.load_drafter("auto", target, keep=keep, **options)


def failing(real, error, w=None, after=0):
    """A function that fails: at a layer's parameters, or after so many calls."""
    calls = []

    def function(x, weights, *others):
        calls.append(1)
        if weights is w or w is None and len(calls) > after:
            raise error
        return real(x, weights, *others)

    return function


def off(found, expected):
    """Largest difference, relative to the largest number expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape and np.isfinite(found).all() and np.isfinite(expected).all()
    return np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30)


def contents(cache):
    """Everything that can be read from the layers from now on, as arrays."""
    return {f"{i}.{key}": array for i, layer in enumerate(cache.layers) for key, array in layer.state().items()}


def copied(cache):
    """The same again: what is changed in place is copied."""
    twin, twin_drafter = copy(cache), copy(cache.drafter)
    twin.tokens, twin_drafter.made_with = [*cache.tokens], [*cache.drafter.made_with]
    twin.layers, twin_drafter.kv = [_copied_memory(layer) for layer in cache.layers], _copied_memory(cache.drafter.kv)
    twin.drafter = twin_drafter
    return twin


def _copied_memory(memory):
    twin = copy(memory)
    if isinstance(memory, FullKV):
        twin.buffers = {name: buffer.copy() for name, buffer in memory.buffers.items()}
    return twin


class Afresh:
    """What reading leaves at every length of a text. Un-reads nothing: it copies.

    caches[n] has read the first n tokens one by one, each committed, the drafter (where there is one) along with them;
    rows, hidden and before are each token's logits, and its hidden state after and before the final norm.
    """

    def __init__(self, target, drafter=None):
        self.target, self.drafter, self.caches = target, drafter, [target.new_cache()]
        self.rows, self.hidden, self.before = [], [], []
        self.last_layer = f"layer.{len(target.config.layers) - 1}.out"

    @property
    def tokens(self):
        return self.caches[-1].tokens

    def read(self, ids_T):
        for token in ids_T:
            cache, out = self._forward(self.with_entries(token), [token])
            self._keep(cache, out, 1)
        return self

    def read_wide(self, ids_T):
        """The last cache is then of one wide pass, those before it still of single ones -> how far they are apart."""
        start = len(self.rows)
        cache, out = self._forward(self.with_entries(ids_T[0]), ids_T)
        single = self.read(ids_T).caches.pop()
        pairs = [(out.logits_TV, self.rows[start:]), *zip(contents(cache).values(), contents(single).values())]
        for values in (self.rows, self.hidden, self.before):
            del values[start:]
        self._keep(cache, out, len(ids_T))
        return max(off(found, expected) for found, expected in pairs)

    def _forward(self, cache, ids_T):
        out = self.target.forward(ids_T, cache, taps=[self.last_layer])
        cache.commit()
        return cache, out

    def _keep(self, cache, out, count):
        self.caches.append(cache)
        self.rows += list(out.logits_TV[-count:])
        self.hidden += list(out.hidden_TD[-count:])
        self.before += list(out.taps[self.last_layer][-count:])

    def cut(self, length):
        for values in (self.rows, self.hidden, self.before):
            del values[length:]
        del self.caches[length + 1 :]

    def with_entries(self, token, length=None):
        """A copy of the cache at a length, in which the drafter has read all and that next token."""
        length = len(self.rows) if length is None else length
        cache = copied(self.caches[length])
        if self.drafter is not None and length:
            self.drafter.propose([token], self.hidden[length - 1][None], cache, 0, GREEDY, ())
        return cache

    def draft(self, token, num_draft, sampling, u_K, length=None):
        """The draft after the first `length` tokens and that next one."""
        length = len(self.rows) if length is None else length
        cache, hidden_ND = copied(self.caches[length]), self.hidden[length - 1][None]
        return self.drafter.propose([token], hidden_ND, cache, num_draft, sampling, u_K)


def run(machine, examples, steps=25, phases=tuple(Phase)):
    """A state machine, the same examples every time; caches forget the hidden states of what lies BEHIND."""
    options = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, database=None, derandomize=True, phases=phases,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimtp.drafter_kv.BEHIND", BEHIND)
        run_state_machine_as_test(machine, settings=options)
