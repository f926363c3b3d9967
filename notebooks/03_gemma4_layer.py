# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # A Gemma 4 layer: what do sliding windows, shared KV and per-layer embeddings save?
#
# Attention looks back at every token read so far, and must keep a *key* and a *value* of each: the *cache*, KV for
# short. Gemma 4 keeps it small by windows, by sharing between layers, and by making keys from values. Its small sizes
# also save reading of weights, by per-layer embeddings.
#
# You will see: masks, a real layer computed by hand, who reads whose cache, and the bytes of published sizes.

# %%
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pictures
from matplotlib.colors import ListedColormap

from minimtp import gemma4, layers, memory, plan
from minimtp.display import BLUE, GREEN, GREY, MEMORY, ORANGE
from minimtp.loading import load, published_config
from minimtp.quant import Plain

# %% [markdown]
# ## Attention over a window, as a loop
#
# Each token asks with a *query* and is found by its *key*; what it then hands over is its *value*. The score of a pair
# is query · key. Softmax turns a token's scores into shares of 1, and the result is the values mixed by these shares.
#
# A *window* of 3 means: a token sees itself and the two before it. (Capitals at the end of a name are its axes: T
# tokens, K numbers of a key or value; below also H heads, S slots of the cache, D the hidden size.)

# %%
WINDOW = 3
q_TK = np.array([[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, 2]], float)
k_TK = np.array([[1, 1], [2, 0], [0, 1], [1, 0], [0, 2], [1, 1]], float)
v_TK = np.array([[1, 0], [2, 0], [3, 0], [0, 1], [0, 2], [0, 3]], float)

by_loop_TK = np.zeros_like(v_TK)
for t in range(6):
    seen = range(max(0, t + 1 - WINDOW), t + 1)
    shares = layers.softmax(np.array([q_TK[t] @ k_TK[s] for s in seen]))
    by_loop_TK[t] = sum(share * v_TK[s] for share, s in zip(shares, seen))
print(by_loop_TK.round(3))

# %% [markdown]
# ## The same as one matrix with a mask
#
# All scores at once, and minus infinity where a token must not look: its share is then exactly 0.
#
# Where few tokens are read at once, the package (`layers.attend`) needs no mask: it is told each query's first slot
# and the end of its slots (`layers.seen`), and takes that slice of the cache.

# %%
query, key = np.mgrid[:6, :6]
mask_TT = (key <= query) & (key > query - WINDOW)
shares_TT = layers.softmax(np.where(mask_TT, q_TK @ k_TK.T, -np.inf))

span = layers.seen(np.arange(6), WINDOW)  # each query's first slot, and the one after its last
packaged_THK = layers.attend(q_TK[:, None], k_TK[None], v_TK[None], *span)
print("mask, against the loop:          ", np.allclose(shares_TT @ v_TK, by_loop_TK, atol=1e-12))
print("layers.attend, against the loop: ", np.allclose(packaged_THK[:, 0], by_loop_TK, atol=1e-12))

# %% [markdown]
# ## Who sees whom
#
# A *full* layer sees everything before. A *sliding* layer sees a band. But layers are stacked: what a token fetched in
# one layer can be fetched from it in the next. With a window of 4 one layer reaches 3 tokens back, two reach 6 (third
# picture).

# %%
full_TT = np.tri(12, dtype=bool)
sliding_TT = full_TT & ~np.tri(12, k=-4, dtype=bool)
masks = {"full layer": full_TT, "sliding layer, window 4": sliding_TT, "two of these in a row": sliding_TT @ sliding_TT}
figure, axes = plt.subplots(1, 3, figsize=(7, 2.7))
for ax, (title, mask) in zip(axes, masks.items()):
    ax.imshow(mask, cmap=ListedColormap(["white", BLUE]), interpolation="nearest")
    ax.set(title=f"{title}\n{mask.sum()} pairs (blue)", xlabel="key position", ylabel="query position")
    ax.set(xticks=range(0, 12, 2), yticks=range(0, 12, 2))
plt.show()

# %% [markdown]
# ## A real layer, computed here
#
# `tiny-gemma4` has five layers: sliding, sliding, full, sliding, full, with windows of 32. Its pass over 80 tokens is
# *tapped*: we keep what went into layers 1 and 2 and what their attention gave. In between, everything is done again.
# Attention runs in several *heads* side by side, each with queries of its own; two heads or four share keys and values.
# Queries are normed (scaled to mean square 1, times a weight) and *rotated* by their position (RoPE); keys and values
# come from the cache, where the pass left them; the output projection `o_proj` mixes the heads.

# %%
target = load("tiny-gemma4")
text = "ROMEO:\nI will not be a minister of your good lord, and I will not be a man of the king.\n\nJULIET:\n" * 4
ids = target.tokenizer.encode(text)[:80]
cache = target.new_cache()
out = target.forward(ids, cache, taps=("layer.1.in", "layer.1.attn", "layer.2.in", "layer.2.attn"))
for i, layer in enumerate(target.config.layers):
    print(i, layer.kind, f"{layer.heads} query heads, {layer.kv_heads} key/value heads of {layer.head_dim}")


# %%
def queries(index):
    """A layer's queries, normed and rotated -> [H, T, K]."""
    layer, w, eps = target.config.layers[index], target.params.layers[index], target.config.rms_norm_eps
    x_TD = layers.rms_norm(out.taps[f"layer.{index}.in"], w.input_layernorm, eps)
    q_THK = (x_TD @ w.q_proj.T).reshape(80, layer.heads, layer.head_dim)
    rope = gemma4.rope_tables(target.config, np.arange(80), x_TD.dtype)[layer.kind]
    return layers.rotate(layers.rms_norm(q_THK, w.q_norm, eps), rope).swapaxes(0, 1)


# %%
def attention_by_mask(index):
    """A layer's (shares [H, T, T], attention's output [T, D])."""
    layer, w = target.config.layers[index], target.params.layers[index]
    k_HSK, v_HSK = (np.repeat(x, layer.heads // layer.kv_heads, axis=0) for x in cache.layers[layer.kv].read())
    back_TT = np.subtract.outer(np.arange(80), np.arange(80))  # how many tokens the key lies back
    mask_TT = (back_TT >= 0) & ((back_TT < target.config.sliding_window) | (layer.kind == "full"))
    shares_HTT = layers.softmax(np.where(mask_TT, queries(index) @ k_HSK.swapaxes(1, 2), -np.inf))
    return shares_HTT, (shares_HTT @ v_HSK).swapaxes(0, 1).reshape(80, -1) @ w.o_proj.T


# %%
figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8))
for ax, index in zip(axes, (1, 2)):
    shares_HTT, output_TD = attention_by_mask(index)
    print(f"layer {index} equals the model's:", np.allclose(output_TD, out.taps[f"layer.{index}.attn"], atol=1e-4))
    mean_TT = np.where(shares_HTT.max(axis=0) > 0, shares_HTT.mean(axis=0), np.nan)  # white where nobody looks
    image = ax.imshow(mean_TT, vmin=0, vmax=0.2, interpolation="nearest")
    kind = target.config.layers[index].kind
    ax.set(title=f"layer {index}, {kind}", xlabel="key position, token", ylabel="query position, token")
figure.colorbar(image, ax=axes, label="share, mean of the heads\n(0.2 and above: yellow)")
plt.show()

# %% [markdown]
# The sliding layer's band of 32 tokens ends in a sharp edge. What left the band is needed by no later token, so it need
# not be kept: the cache of a sliding layer (`SlidingKV`) holds the window and one entry more. (The one more is for a
# *drafter*, a small model that guesses the next token and reads the same cache.) The next cell counts, first.
#
# ## Keys and values from one matrix
#
# The full layers have no matrix for values (`attention_k_eq_v`, in the configuration). One projection is normed. As it
# is then, it is the value; times a learned weight and rotated, it is the key. So a key can be *made* from its value.

# %%
fresh = target.new_cache()
target.forward(ids, fresh)
fresh.commit()  # everything read is final
print("entries kept of 80 tokens, in layers 1 and 2:", [fresh.layers[i].read()[0].shape[1] for i in (1, 2)])

layer, w = target.config.layers[2], target.params.layers[2]
k_GSK, v_GSK = cache.layers[layer.kv].read()
rope = gemma4.rope_tables(target.config, np.arange(80), k_GSK.dtype)["full"]
made_GSK = layers.rotate(v_GSK.swapaxes(0, 1) * w.k_norm, rope).swapaxes(0, 1)
print("a matrix for values, in layers 1 and 2:", [hasattr(target.params.layers[i], "v_proj") for i in (1, 2)])
print("keys made of values are the cached keys, bit for bit:", np.array_equal(made_GSK, k_GSK))

# %% [markdown]
# So the cache of a full layer may hold values alone, half the bytes (`minimtp.load(…, kv="float32-v")`).
#
# ## Whose keys and values does a layer read?
#
# In E4B and E2B the upper layers have queries only. They *borrow* the cache of the last layer of their kind that has
# its own. On the diagonal, a layer reads itself; off it, it borrows. `Layer.kv` is that number.

# %%
SLIDING, FULL = MEMORY["sliding KV"], MEMORY["full KV"]
names = {0: "sliding", 5: "full", 24: "sliding, borrowed", 29: "full, borrowed"}  # E4B's layers to name the marks by
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8))
for ax, size in zip(axes, ("31b", "e4b", "e2b")):
    for i, layer in enumerate(published_config(f"gemma-4-{size}")[1].layers):
        mark, colour = ("o", SLIDING) if layer.kind == "sliding" else ("s", FULL)
        ax.plot(i, layer.kv, mark, mec=colour, color=colour if layer.owns_kv else "white", ms=5, label=names.get(i))
    ax.set(title=size.upper(), xlabel="layer that reads", ylabel="layer whose KV it reads")
axes[1].legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# ## What each device saves
#
# We take a published configuration, undo its devices, and put them back one after the other. `plan.kv_parts` counts the
# cache of a configuration. Two bytes a number (`bf16`); `bf16-v` keeps values only, where keys can be made from them.


# %%
def steps(name):
    """{device: (configuration, storage of the cache)}, the devices added one after the other."""
    config = published_config(name)[1]
    alone = replace(config, layers=tuple(replace(layer, owns_kv=True) for layer in config.layers))
    wide = replace(alone, sliding_window=config.max_position_embeddings)
    found = {"none": (wide, "bf16"), "windows": (alone, "bf16")}
    if config.layers[-1].k_eq_v:
        return found | {"+ values only": (config, "bf16-v")}
    return found | {"+ borrowed KV": (config, "bf16")}


# %%
LOOKS = {"none": (":", GREY), "windows": ("--", SLIDING), "+ borrowed KV": ("-", GREEN), "+ values only": ("-", FULL)}
contexts = np.geomspace(256, 131072, 40).astype(int).tolist()
figure, axes = plt.subplots(1, 3, figsize=(8, 3), sharey=True)
for ax, size in zip(axes, ("31b", "e4b", "e2b")):
    for what, (config, storage) in steps(f"gemma-4-{size}").items():
        gib = [sum(part.bytes for part in plan.kv_parts(config, n, storage)) / 2**30 for n in contexts]
        ax.loglog(contexts, gib, LOOKS[what][0], color=LOOKS[what][1], label=f"{what}: {gib[-1]:.2f}")
    ax.set(title=size.upper(), xlabel="context, tokens", ylabel="cache, GiB in bf16", ylim=(2e-3, 8000))
    ax.legend(frameon=False, fontsize=8, title="devices: GiB at 131,072", title_fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# All but the dotted lines bend where the windows are full: from there on only the full layers grow. For 131,072 tokens
# windows leave a tenth of the 31B's cache, values alone about half of that; borrowing more than halves E2B's.
#
# ## Per-layer embeddings
#
# E4B and E2B give every layer a small vector of its own for each token, from a second, very large table. Below is the
# look-up with three tokens in the vocabulary, two layers, vectors of width 2: as a loop, and as the package does it
# (`gemma4.per_layer_inputs`). That adds a projection of the ordinary embedding, here set to zero, and divides the sum
# of the two by √2.

# %%
table_VI = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], np.float32)  # a row: layer 0's vector, layer 1's
looked_up = np.array([[table_VI[token, 2 * i : 2 * i + 2] for i in range(2)] for token in (2, 0)])

params = SimpleNamespace(
    embed_tokens_per_layer=Plain(table_VI, "F32"), per_layer_projection_norm=np.ones(2, np.float32)
)
params.per_layer_model_projection = Plain(np.zeros((4, 3), np.float32), "F32")
sizes = SimpleNamespace(layers=(0, 1), per_layer_input=2, per_layer_scale=1, hidden_size=3, rms_norm_eps=1e-6)
packaged = gemma4.per_layer_inputs(params, sizes, [2, 0], np.ones((2, 3), np.float32))
print(looked_up.tolist())
print("per_layer_inputs gives the same over √2:", np.allclose(packaged, looked_up / 2**0.5, atol=1e-6))

# %% [markdown]
# What is saved is neither cache nor room on disk: the table is half of E2B's parameters (below). It is *reading*. A
# token multiplies by every other weight, but of this table it reads one row. So the table may lie in slow memory.

# %%
ax = plt.figure(figsize=(8, 1.8)).gca()
for row, size in enumerate(("e4b", "e2b")):
    _, config = published_config(f"gemma-4-{size}")
    in_all, a_row = memory.parameters(gemma4.tensors(config))["total"], len(config.layers) * config.per_layer_input
    table, others = config.vocab_size * a_row / 1e9, (in_all - config.vocab_size * a_row) / 1e9
    bars = ax.barh(row, others, color=BLUE), ax.barh(row, table, left=others, color=ORANGE, hatch="//")
    ax.text(in_all / 1e9, row, f" a token reads {a_row:,} of {table:.2f} billion", va="center")
ax.set(yticks=(0, 1), yticklabels=("E4B", "E2B"), xlabel="parameters, billions", xlim=(0, 12))
ax.legend(bars, ("all other weights", "per-layer table"), frameon=False, ncol=2, loc=(0, 1))
plt.show()

# %% [markdown]
# So: windows stop most layers from growing with the text; shared KV and keys from values shrink what is left; per-layer
# embeddings spare reading. (The bundled tiny model has windows and keys from values only.)
#
# ## Try
#
# - Set `WINDOW = 1` in the loop. What is attention then? How many sliding layers with a window of 4 see 12 tokens back?
# - In `attention_by_mask`, shift the band by one (`<=` for `<`). The comparison says so, in layer 1 only.
# - Count in int8 (`"int8-v"` in `steps`). How much is left of the 31B's cache?
#
# Code: `minimtp/gemma4.py` (`attention`, `decoder_layer`, `_plan`, `per_layer_inputs`), `minimtp/layers.py` (`seen`,
# `attend`), `minimtp/kv.py` (`SlidingKV`), `minimtp/memory.py` (`parameters`), `minimtp/plan.py` (`kv_parts`).
