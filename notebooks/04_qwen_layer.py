# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # A Qwen 3.6 layer: how can a state of fixed size replace a growing cache?
#
# An attention layer keeps a key and a value of every token, its *cache*. Three layers of four in Qwen 3.5 and 3.6 do
# not attend. Each of their *heads* (several work side by side) keeps one matrix, the *state*, and every token changes
# it: it fades, forgets what it knew at one place, and learns something new there. This is Gated DeltaNet; the layers
# are called *linear*.
#
# You will see: a state of 4 × 4 numbers, step by step; the same computed many tokens at once; what a real model
# forgets and how fast; and the bytes.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pictures

from minimtp import layers, memory
from minimtp.backend import ROWS
from minimtp.display import MEMORY
from minimtp.loading import load, published_config

# %% [markdown]
# ## A state that answers
#
# A state S is asked with a *key* k and answers with a *value*: k @ S. If k is a row of the identity, the answer is a
# row of S. One token does three things; the first two change S (below as loops over the rows):
#
# 1. **fade**: all of S is multiplied by the token's *decay*, between 0 and 1;
# 2. **erase and write**: what S now answers to k is moved towards the token's value, by the share *beta*;
# 3. **ask**: the answer to the token's *query* q, q @ S, is the output.
#
# (Capitals at the end of a name are its axes: T tokens, K numbers of a key, V of a value; below also H heads, of which
# G have keys, and C channels.)


# %%
def after_token(state_KV, k_K, v_V, decay, beta):
    """The state after one token, as loops."""
    state_KV = [[decay * number for number in row] for row in state_KV]
    answer_V = [sum(k_K[i] * state_KV[i][j] for i in range(4)) for j in range(4)]
    u_V = [beta * (v_V[j] - answer_V[j]) for j in range(4)]  # the write
    return np.array([[state_KV[i][j] + k_K[i] * u_V[j] for j in range(4)] for i in range(4)])


# %%
k_TK = np.eye(4)[[0, 1, 0, 3, 1]]  # which row each token writes to
v_TV = np.array([[4, 0, 0, 0], [0, 3, 3, 0], [0, 0, 0, 4], [0, 0, 0, 0], [4, 1, 1, 4]], float)
decay_T, beta_T = np.array([1, 1, 1, 0.5, 1]), np.array([1, 1, 1, 0, 0.5])
said = ["write at row 0", "write at row 1", "overwrite row 0", "decay 1/2,\nwrite nothing", "half a write\nat row 1"]

states = [np.zeros((4, 4))]
for token in zip(k_TK, v_TV, decay_T, beta_T):
    states.append(after_token(states[-1], *token))

# %%
figure, axes = plt.subplots(1, 6, figsize=(9, 2.2), sharey=True)
for ax, state_KV, title in zip(axes, states, ["empty", *said]):
    image = ax.imshow(state_KV, vmin=0, vmax=4)
    for i, j in np.argwhere(state_KV):  # zeros are left blank
        colour = "white" if state_KV[i, j] < 3 else "black"
        ax.text(j, i, f"{state_KV[i, j]:.3g}", size=8, ha="center", va="center", color=colour)
    ax.set(title=title, xlabel="column of values", xticks=range(4), yticks=range(4))
axes[0].set_ylabel("row (key)")
figure.colorbar(image, ax=axes, label="number in the state")
plt.show()

# %% [markdown]
# "Overwrite row 0" is the "delta": the row is *replaced*. A state that only adds (linear attention) would answer with
# the sum of both values. And the old value is gone: no one can compute it from this state. That matters in
# `05_un_reading`.
#
# The package's step does the same with matrices, for all heads (`layers.gated_delta_step`).

# %%
state_HKV = np.zeros((1, 4, 4))
for t in range(5):
    token = k_TK[t, None], k_TK[t, None], v_TV[t, None], decay_T[t, None], beta_T[t, None]
    output_HV, u_HV, state_HKV = layers.gated_delta_step(*token, state_HKV)  # query, key, value, decay, beta
print("the package's state is the loop's: ", np.allclose(state_HKV[0], states[-1]))
print("its output is the loop's, asked:    ", np.allclose(output_HV[0], k_TK[4] @ states[-1]))
print("row 0 overwritten, by the delta rule:", states[3][0])
print("the same if the state only adds:     ", v_TV[0] + v_TV[2])

# %% [markdown]
# ## Many tokens at once
#
# A loop over tokens is slow on a long prompt. But only the writes depend on each other: the write of token t is
# corrected by what earlier writes left for its key. How much of the write of s comes back for the key of t > s is
# beta of t × the decays from s to t × (key of t · key of s). Put these numbers in a matrix C, zero on and above the
# diagonal. Then all writes u are the solution of one triangular system, (I + C) u = beta (v − what the old state
# answers). Decays are kept as logarithms: products become sums.

# %%
random, T = np.random.default_rng(3), 12
q_TGK, k_TGK = (layers.l2_norm(random.normal(size=(T, 1, 8))) for _ in range(2))
v_THV, state_HKV = random.normal(size=(T, 1, 4)), random.normal(size=(1, 8, 4))
log_decay_TH, beta_TH = -random.random((T, 1)) / 2, random.random((T, 1))
by_loop = layers.gated_delta(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV)  # (outputs, writes, state)

k_TK, sums_T = k_TGK[:, 0], np.cumsum(log_decay_TH[:, 0])
couplings_TT = np.tril(beta_TH * np.exp(np.subtract.outer(sums_T, sums_T)) * (k_TK @ k_TK.T), -1)
left_T1 = np.exp(sums_T)[:, None]  # of the old state
u_TV = np.linalg.solve(np.eye(T) + couplings_TT, beta_TH * (v_THV[:, 0] - left_T1 * (k_TK @ state_HKV[0])))

# %%
by_chunk = layers.gated_delta_chunk(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV)
print("writes, solved here and by the loop, agree to 1e-12:", np.allclose(u_TV, by_loop[1][:, 0], atol=1e-12))
for what, chunk, loop in zip(("outputs", "writes", "state"), by_chunk, by_loop):
    print(f"{what}, the package's chunk form and its loop, agree to 1e-12:", np.allclose(chunk, loop, atol=1e-12))
figure, ax = plt.subplots(figsize=(3.8, 2.8))
below_TT = np.where(np.tri(T, k=-1, dtype=bool), couplings_TT, np.nan)
image = ax.imshow(below_TT, cmap="cividis", vmin=-0.3, vmax=0.3)
ax.set(xlabel="token s, the earlier write", ylabel="token t, its write corrected", xticks=range(0, T, 2))
figure.colorbar(image, ax=ax, label="share of the earlier write, grey: none")
plt.show()

# %% [markdown]
# The package does so in blocks of `layers.DELTA_BLOCK` tokens. But a pass of at most `backend.ROWS` tokens goes one by
# one: so every token gets the same bits in such a pass as alone (checked below, with both numbers).
#
# ## A short convolution first
#
# Before queries, keys and values go into the rule, each of their numbers (*channels*) is smoothed: a token gets a
# weighted sum of itself and the three tokens before it. So a layer remembers the last three inputs besides its state.

# %%
x_TC, weight_CW = np.array([[1.0], [0], [0], [2], [0], [0]]), np.array([[0.1, 0.2, 0.3, 1.0]])
before = [0.0] * 3 + x_TC[:, 0].tolist()
by_loop_T = [sum(weight_CW[0, j] * before[t + j] for j in range(4)) for t in range(6)]

whole_TC = layers.causal_conv(x_TC, weight_CW, np.zeros((3, 1)))
late_TC = layers.causal_conv(x_TC[4:], weight_CW, x_TC[1:4])  # two tokens, and the window before them
print("a 1 and a 2, smoothed:                    ", np.round(by_loop_T, 3))
print("the package's are equal:                  ", np.allclose(whole_TC[:, 0], by_loop_T))
print("the last two, from the three inputs before:", late_TC[:, 0].round(3))

# %% [markdown]
# ## A real layer
#
# `tiny-qwen35` reads 64 tokens in one pass, by blocks, and once more one by one; then 16 of them in one pass.

# %%
target = load("tiny-qwen35")
ids = target.tokenizer.encode(open("../weights/heldout.txt").read())[:64]
wide, narrow = target.new_cache(), target.new_cache()
linear = [i for i, layer in enumerate(target.config.layers) if layer.kind == "linear"]
out = target.forward(ids, wide, taps=[f"layer.{i}.in" for i in linear])
logits_TV = np.concatenate([target.forward([token], narrow).logits_TV for token in ids])
print(f"linear layers {linear} of {len(target.config.layers)}; states, H K V:", narrow.layers[0].state_HKV.shape)
print(f"blocks of {layers.DELTA_BLOCK}: logits agree to 1e-3:", np.allclose(out.logits_TV, logits_TV, atol=1e-3))
at_once_TV = target.forward(ids[:ROWS], target.new_cache()).logits_TV
print(f"{ROWS} at once: the bits of one by one:", np.array_equal(at_once_TV, logits_TV[:ROWS]))

# %% [markdown]
# Here is the state of one head while it reads. A token writes in one direction: its key's. The *rank* says in how many
# independent directions the state has an answer (counted above a thousandth of the strongest). It cannot exceed 32, the
# number of rows: once there, every write is also an overwrite.

# %%
cache = target.new_cache()
figure, axes = plt.subplots(1, 5, figsize=(7.6, 2.1), sharey=True)
for ax, tokens in zip(axes, (1, 2, 4, 16, 64)):
    target.forward(ids[cache.length : tokens], cache)
    state_KV = cache.layers[6].state_HKV[1]
    image = ax.imshow(np.abs(state_KV), vmin=0, vmax=0.2, interpolation="nearest")
    ax.set(title=f"{tokens} read\nrank {np.linalg.matrix_rank(state_KV, rtol=1e-3)}", xlabel="column of values")
axes[0].set_ylabel("layer 6, head 1: row")
figure.colorbar(image, ax=axes, label="magnitude\n(0.2 and above: yellow)")
plt.show()

# %% [markdown]
# ## How fast does it forget?
#
# The decay is computed from the token, so the text decides how long something is remembered. The product of the
# decays since a write is what is left of it (if nothing overwrites it). In this tiny model most heads forget within a
# few tokens; one head of layer 6 remembers far longer. (In the titles: for how many tokens more than half of the first
# write is left, head by head. The decays are first compared with those of the model's pass.)


# %%
def log_decays(index):
    """Of each token and head of a linear layer -> [T, H], as `layers.delta_rule` computes them."""
    w = target.params.layers[index]
    x_TD = layers.rms_norm(out.taps[f"layer.{index}.in"], w.input_layernorm, target.config.rms_norm_eps)
    return -np.exp(w.A_log) * layers.softplus(x_TD @ w.in_proj_a.T + w.dt_bias)


same = [np.allclose(log_decays(i), wide.layers[i]._readings[-1].log_decay_TH, rtol=1e-3, atol=1e-3) for i in linear]
print("decays as the model's pass left them, layer by layer:", same)


# %%
figure, axes = plt.subplots(2, 3, figsize=(6.6, 3.2), sharex=True, sharey=True)
for ax, index in zip(axes.flat, linear):
    left_TH = np.exp(np.cumsum(log_decays(index)[1:], axis=0))
    for head, line in enumerate(("-", "--", ":", "-.")):
        ax.plot(range(1, 64), left_TH[:, head], line, label=f"head {head}")
    ax.set_title(f"layer {index}, above half:\n{', '.join(map(str, (left_TH > 0.5).sum(axis=0)))} tokens")
axes[0, 0].legend(frameon=False)
figure.supxlabel("tokens since the first was written", fontsize=9)
figure.supylabel("share of its write that is left", fontsize=9)
plt.show()

# %% [markdown]
# ## Bytes
#
# A state costs the same after any number of tokens. The attention layers (*full*, one of four) still grow. Beside them
# the same configuration with attention in every layer, and the length from which on the states pay.

# %%
_, config = published_config("qwen3.6-27b")
attending = replace(config, layers=(config.attention,) * len(config.layers))
contexts = np.arange(1, 6000)
held = [memory.kv_bytes(config, int(n), itemsize=2) for n in contexts]
states, full = (np.array([parts[kind] for parts in held]) / 2**20 for kind in ("linear", "full"))
alone = np.array([memory.kv_bytes(attending, int(n), itemsize=2)["full"] for n in contexts]) / 2**20
pays = contexts[np.argmax(states + full < alone)]
print(f"the states take less from {pays} tokens on")

# %%
figure, ax = plt.subplots(figsize=(6, 2.6))
colours = MEMORY["linear KV"], MEMORY["full KV"]
ax.stackplot(contexts, states, full, colors=colours, labels=("48 linear layers: states", "16 full layers: KV"))
ax.plot(contexts, alone, ":", color="black", label="if all 64 attended: KV")
ax.annotate(f"{pays} tokens", (pays, alone[pays - 1]), (pays - 300, 700), arrowprops={"arrowstyle": "-|>"})
ax.set(xlabel="context, tokens", ylabel="cache, MiB\n(KV bf16, states float32)", title="qwen3.6-27b")
ax.legend(frameon=False)
plt.show()

# %%
print("MiB of            states, ever  KV (bf16) at 32,768 tokens")
for name in ("qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b", "qwen3.5-0.8b"):
    held = memory.kv_bytes(published_config(name)[1], 32768, 2)
    print(f"{name:18} {held['linear'] / 2**20:11.1f} {held['full'] / 2**20:10.1f}")

# %% [markdown]
# So a state of fixed size can replace a cache because it forgets: old writes fade, and a new one takes the place of
# what its key found. What was forgotten cannot be looked up again, and one layer of four keeps attending.
#
# ## Try
#
# - Give two tokens keys that overlap, `[1, 0, 0, 0]` and `[0.8, 0.6, 0, 0]`. What does the second write do to the
#   first?
# - Set `beta_T` to 2 for one step. (The models stay between 0 and 1: `beta` is a sigmoid.)
# - Read another part of `heldout.txt` in the real layer. Do the same heads keep longest?
#
# Code: `minimtp/layers.py` (`gated_delta_step`, `gated_delta_chunk`, `causal_conv`, `delta_rule`),
# `minimtp/qwen35.py` (`delta_net`), `minimtp/delta_state.py`. More in `docs/qwen35.md`.
