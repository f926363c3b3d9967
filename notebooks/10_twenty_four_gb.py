# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Thirty-one billion on 24 GB: what fits?
#
# Gemma 4 31B has thirty-one billion weights, and many cards have 24 GB of memory. Whether the one goes into the other
# is arithmetic, and it needs no weights: the published configuration says how large everything is.
#
# You will see the memory plan as a picture, format by format and context by context; how 8-bit keys and values, or
# keys made of values, buy context; and which model fits which card. All of it is counted, none measured: the project
# has run none of these models on a card.

# %%
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp import cli_show, gemma4, layers, memory
from minimtp.display import MEMORY
from minimtp.loading import bundled, published_config

# %% [markdown]
# ## Weights times bits
# **Q4_0**, the format of the published int4 files, stores 32 weights as 32 codes of 4 bits and one **scale** of 16
# bits for all of them. So a weight takes a little more than 4 bits. First by hand, block by block, for one small
# matrix; then the whole model at several widths. A card's "24 GB" are 24 GiB, and 1 GiB is 2³⁰ bytes.

# %%
rows, columns = 3, 64
count = 0
for _ in range(rows * columns // 32):  # blocks of 32 weights in a row
    count += 32 * 4 // 8 + 2  # codes, and the scale
print(f"a matrix of {rows} x {columns}: {count} bytes, {8 * count / (rows * columns)} bits a weight")
size, weights, _ = memory.TYPES["Q4_0"]
assert count == rows * columns * size // weights
family, config = published_config("gemma-4-31b")
total = memory.parameters(family.tensors(config))["total"]
print(f"{total:,} weights:", ", ".join(f"{bits} bits {total * bits / 8 / 2**30:.1f} GiB" for bits in (16, 8, 4.5, 4)))

# %% [markdown]
# Files keep some tensors wider than others: the embedding of the published Q4_0 file is of type Q6_K, norms are
# floats. So the same model has a size for each way to store it. bf16 has 16 bits for every weight; q8_0 is as Q4_0
# with 8-bit codes; w4a16-ct has int4 matrices and a bf16 embedding; in int4-int8-embed that is 8 bits. The dashed line
# is the card. bf16 is more than twice too large, and 8 bits do not fit either.

# %%
size, weights, _ = memory.TYPES["Q6_K"]
print(f"Q6_K: {8 * size / weights:.2f} bits a weight")
names = ("bf16", "q8_0", "w4a16-ct", "int4-int8-embed", "q4_0")
sizes = [memory.stored_bytes(family.tensors(config), name) / 2**30 for name in names]
bars = plt.barh(names, sizes, color=MEMORY["weights"])
plt.bar_label(bars, fmt=" %.1f")
plt.axvline(24, color="black", linestyle="--", label="24 GiB")
plt.gca().set(xlabel="GiB", ylabel="format", title="gemma-4-31b, weights alone", ylim=(4.5, -0.5))
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What the text itself takes
# A layer looks back at the tokens read so far, its **context**. It does so in several **heads**, and for each head and
# token it keeps two vectors, a **key** (where to look) and a **value** (what is found there): the **KV**. Most layers
# of Gemma 4 are *sliding*: they look back over a window of so many tokens and forget what is older. A few are *full*
# and keep everything. By a loop over the layers, in bf16, which is 2 bytes a number:

# %%
context, slack = 40_960, 16  # slack: slots beyond the window, for draft tokens that may be un-read
kept = {"sliding": 0, "full": 0}
for layer in config.layers:
    tokens = config.sliding_window + slack if layer.kind == "sliding" else context
    kept[layer.kind] += 2 * layer.kv_heads * layer.head_dim * 2 * tokens  # key and value, numbers, bytes
for kind, size in kept.items():
    count = sum(layer.kind == kind for layer in config.layers)
    print(f"{count} {kind} layers: {size / 2**30:.2f} GiB at {context:,} tokens, {size / count / 2**20:.0f} MiB each")
print(f"window of a sliding layer: {config.sliding_window:,} tokens")

# %% [markdown]
# ## The plan
# `minimtp show --config gemma-4-31b --kv bf16 --context 40960 --memory 24GiB` adds up all of it: weights, the
# **drafter** (a small model that guesses tokens ahead), KV, and **scratch**, what a run over some tokens needs
# meanwhile. 600 MiB are left to the card's driver. The same plan from Python:


# %%
def plan_for(name, format="q4_0", kv="bf16", context=40_960, gib=24, draft=None):
    """The memory plan of a published configuration with its drafter, as the command `show` makes it."""
    options = {"config": name, "format": format, "kv": kv, "context": context, "memory": f"{gib}GiB"}
    options |= {"device": None, "draft": draft, "scratch": None}
    family, config = published_config(name)
    return cli_show.plan_of(SimpleNamespace(**options), name, None, family, config)


plan = plan_for("gemma-4-31b")
print(plan.text())
assert {part.name: part.bytes for part in plan.kv} == kept

# %% [markdown]
# Format by format, at 40,960 tokens. In bf16 the weights alone end far to the right of the line.

# %%
figure, axes = plt.subplots(figsize=(9, 2.9))
pictures.memory_bars(axes, {name: plan_for("gemma-4-31b", format=name) for name in names})
axes.set(ylabel="format of the weights", title="gemma-4-31b at 40,960 tokens, KV in bf16")
plt.show()

# %% [markdown]
# Context by context, in Q4_0. Sliding layers stop growing at their window; the ten full ones take over, and somewhere
# the bar crosses the line. The plan says where: the longest context that fits.

# %%
figure, axes = plt.subplots(figsize=(9, 3.2))
contexts = (8_192, 40_960, plan.max_context, 131_072, 262_144)
pictures.memory_bars(axes, {f"{n:,}": plan.at(n) for n in contexts})
axes.set(ylabel="tokens of context", title=f"gemma-4-31b in Q4_0, KV in bf16: {plan.max_context:,} tokens fit")
plt.show()
assert plan.at(plan.max_context).fits and not plan.at(plan.max_context + 1).fits

# %% [markdown]
# ## Smaller keys and values
# `int8` keeps a key or a value of one head as 8-bit codes and one 16-bit scale: about half of bf16. A storage with
# `-v` keeps **values only**, in layers where keys can be made of them: here the full ones. With both, the longest
# context that this model takes fits on the card.

# %%
storages = ("bf16", "bf16-v", "int8", "int8-v")
longest = {kv: plan_for("gemma-4-31b", kv=kv).max_context for kv in storages}
plt.barh(list(longest), list(longest.values()), color=MEMORY["full KV"])
for row, tokens in enumerate(longest.values()):
    plt.annotate(f" {tokens:,}", (tokens, row), va="center")
plt.axvline(config.max_position_embeddings, color="black", linestyle="--", label="all that the model takes")
plt.gca().set(xlabel="longest context (tokens)", ylabel="KV storage", xlim=(0, 330_000), ylim=(3.5, -0.5))
plt.gca().xaxis.set_major_formatter("{x:,.0f}")
plt.title("gemma-4-31b in Q4_0 on 24 GiB"), plt.legend(frameon=False, loc="upper center")
plt.show()

# %% [markdown]
# ## Keys made of values
# How can a key be made of a value? In these layers one matrix makes both. The **value** is its output, normed (divided
# by its root mean square). The **key** is the same normed output, times a weight for each number, then rotated, pair by
# pair, by angles that grow with the position. So key = rotate(weight · value). One head of four numbers at position
# 5, by a loop over its pairs, then by the package's two functions:

# %%
projected_K, weight_K = np.float32([3, -1, 2, 0.5]), np.float32([1, 2, 0.5, 1.5])
angles_C = 5 * np.array([1.0, 0.1])  # position times frequency, one for each pair of numbers
value_K, key_K = layers.rms_norm(projected_K), np.zeros(4)
for i, angle in enumerate(angles_C):
    a, b = weight_K[i] * value_K[i], weight_K[i + 2] * value_K[i + 2]
    key_K[[i, i + 2]] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
table = [np.float32(turn(angles_C))[None] for turn in (np.cos, np.sin)]
made_K = gemma4.keys_of_values(weight_K, lambda block: table, value_K[None, None], 0)[0, 0]
print("by the loop", key_K.round(3), "  by the package", made_K.round(3))
assert np.allclose(key_K, made_K, atol=1e-6)

# %% [markdown]
# The same on the bundled Gemma, whose full layers share one matrix too. It reads 400 tokens with each storage.
# `float32-v` rebuilds every key to the last bit; its **logits**, the model's scores of every possible next token, are
# within 0.0001. (Not equal: with `-v` sums over the context run in blocks.)


# %%
def after_reading(kv):
    """The bundled Gemma after 400 held-out tokens, keys and values kept as `kv` -> (cache, logits)."""
    target = minimtp.load("tiny-gemma4", kv=kv)
    text, cache = bundled("heldout.txt").read_text(encoding="utf-8"), target.new_cache(400)
    return cache, target.forward(target.tokenizer.encode(text)[:400], cache).logits_TV


runs = {kv: after_reading(kv) for kv in ("float32", "float32-v", *storages)}
(k_GSK, v_GSK), (made, _) = (runs[kv][0].layers[2].read() for kv in ("float32", "float32-v"))
same = all((floats == k_GSK[:, first:last]).all() for first, last, floats in made.each(0, 400))
apart = abs(runs["float32-v"][1] - runs["float32"][1]).max()
print(f"{k_GSK.shape[1]} keys rebuilt, equal to the bit: {same}; logits within 0.0001: {apart < 1e-4}")

# %% [markdown]
# And what narrower storages change: bytes held by the two full layers, and how far the logits are from those with
# float32, as a share of the logits (root mean squares of both). Values only halves the bytes again, and keys made of
# *rounded* values cost nearly nothing more.

# %%
true_TV = runs["float32"][1]
held = [sum(runs[kv][0].layers[i].nbytes for i in (2, 4)) / 400 for kv in runs]  # 2 and 4 are the full layers
error = [100 * (((logits_TV - true_TV) ** 2).mean() / (true_TV**2).mean()) ** 0.5 for _, logits_TV in runs.values()]
figure, panels = plt.subplots(1, 2, figsize=(8, 2.4), sharey=True)
for axes, numbers, form in zip(panels, (held, error), (" {:.0f}", " {:.2f}")):
    bars = axes.barh(list(runs), numbers, color=MEMORY["full KV"])
    axes.bar_label(bars, map(form.format, numbers)), axes.set(xlim=(0, 1.2 * max(numbers)))
panels[0].set(xlabel="bytes a token, two full layers", ylabel="KV storage", ylim=(5.5, -0.5))
panels[1].set(xlabel="logits off by (% of their root mean square)")
plt.show()

# %% [markdown]
# ## Other cards, other models
# The longest context, in thousands of tokens, of each model in Q4_0 with its drafter, on RTX cards of these names. A
# star is all that the model takes; "–" says that not even one token fits. Left KV in bf16, right in int8, values only
# where the model allows it.

# %%
sizes, models = {12: "3060", 16: "4080", 24: "3090", 32: "5090"}, ["31b", "26b-a4b", "12b", "e4b", "e2b"]
models = [*(f"gemma-4-{size}" for size in models), "qwen3.6-27b", "qwen3.6-35b-a3b"]
cards = [f"{gib}\n({card})" for gib, card in sizes.items()]
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, dpi=72)
for axes, kv in zip(panels, ("bf16", "int8-v")):
    image = pictures.context_grid(axes, [[plan_for(name, kv=kv, gib=gib) for gib in sizes] for name in models])
    axes.set(xlabel="memory (GiB)", title=f"KV in {kv}", xticks=range(4), xticklabels=cards)
panels[0].set(ylabel="model", yticks=range(7), yticklabels=models)
figure.colorbar(image, ax=panels, label="longest context (thousands of tokens)")
plt.show()

# %% [markdown]
# So: yes, by this count the 31B fits a 24 GB card in int4, with its drafter, and the storage of keys and values decides
# how much it can read. What the plan does not know: what else the card is doing, and what an engine allocates
# besides. To see that takes a card and the real weights.
#
# ## Try
# - `plan_for("gemma-4-31b", gib=20).max_context`: what is the longest context then? And with `kv="int8"`?
# - The drafter costs context as well: compare `max_context` of `plan_for("gemma-4-31b", draft="none")`.
# - `minimtp show tiny-gemma4 --memory 16GiB --plot plan.png` draws the bars of a checkpoint, here a bundled one.
#
# In the code: `minimtp/plan.py` (`make_plan`, `kv_parts`, `scratch_parts`), `minimtp/memory.py` (`stored_parts`),
# `minimtp/kv_storage.py` (`encode_int8`), `minimtp/gemma4.py` (`keys_of_values`), `minimtp/cli_show.py` (`plan_of`,
# `stack`).
