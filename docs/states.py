"""Two ways to un-read a DeltaNet state, in time and bytes: keep the state after every token, or write again.

python docs/states.py [CONFIGURATION] [DRAFT TOKENS]
"""

import sys
import time
from statistics import median

import numpy as np

from minimtp.backend import arithmetic
from minimtp.layers import delta_writes, gated_delta, gated_delta_step
from minimtp.loading import published_config

MIB = 2**20


def random_pass(layer, tokens):
    """Queries, keys, values, log decays and betas of one layer, and a state."""
    random = np.random.default_rng(0)
    shapes = [(tokens, layer.key_heads, layer.key_dim)] * 2 + [(tokens, layer.value_heads, layer.value_dim)]
    q_TGK, k_TGK, v_THV = (random.normal(size=shape).astype(np.float32) / shape[-1] ** 0.5 for shape in shapes)
    decay_TH, beta_TH = (random.random((tokens, layer.value_heads)).astype(np.float32) for _ in range(2))
    state_HKV = random.normal(size=(layer.value_heads, layer.key_dim, layer.value_dim)).astype(np.float32)
    return (q_TGK, k_TGK, v_THV, -decay_TH, beta_TH), state_HKV


def pass_with_planes(inputs, state_HKV, planes, scratch):
    """The pass as gated_delta does it, the state after each token in a buffer of its own."""
    q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH = inputs
    q_THK, k_THK = (np.repeat(x, v_THV.shape[1] // x.shape[1], axis=1) for x in (q_TGK, k_TGK))
    for token, plane in zip(zip(q_THK, k_THK, v_THV, np.exp(log_decay_TH), beta_TH), planes):
        state_HKV = gated_delta_step(*token, state_HKV, plane, scratch)[2]


def milliseconds(work, rounds=30):
    """Median time of each function, called in turn."""
    taken = {name: [] for name in work}
    for _ in range(rounds):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(times) for name, times in taken.items()}


def main(name="qwen3.6-27b", k=4):
    _, config = published_config(name)
    linear = [layer for layer in config.layers if layer.kind == "linear"]
    layer, tokens = linear[0], k + 1
    inputs, state = random_pass(layer, tokens)
    planes, scratch = [np.empty_like(state) for _ in range(tokens)], np.empty_like(state)
    with arithmetic():
        _, u_THV, _ = gated_delta(*inputs, state)
        work = {
            f"a pass of {tokens} tokens": lambda: gated_delta(*inputs, state),
            "the same, keeping every state": lambda: pass_with_planes(inputs, state, planes, scratch),
        }
        for kept in range(1, tokens):
            writes = inputs[1][:kept], u_THV[:kept], inputs[3][:kept]
            work[f"un-reading {tokens - kept} of them by writing again"] = lambda w=writes: delta_writes(*w, state)
        for what, taken in milliseconds(work).items():
            print(f"{what:42} {taken:8.2f} ms a layer {taken * len(linear):8.0f} ms in all")
    writes = 4 * tokens * (layer.channels + layer.key_heads * layer.key_dim + layer.value_heads * (layer.value_dim + 1))
    window = 4 * layer.channels * (layer.kernel - 1)
    every = len(linear) * (tokens + 1) * (state.nbytes + window) / MIB
    again = len(linear) * (2 * state.nbytes + window + writes) / MIB
    print(f"bytes until the commit, {tokens} tokens: every state {every:.0f} MiB, two and the writes {again:.0f} MiB")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
