# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Why train a model for 4 bits, when it can be rounded?
#
# A trained model can be rounded to int4 *afterwards* (PTQ, post-training quantization), or trained on *through* the
# rounding (QAT, quantization-aware training). The project has a small Gemma 4 in both states, before and after QAT.
# You will see what rounding costs and where it begins to hurt, what QAT did to the weights, and how a careless
# conversion undoes it. Where these small models cannot show what QAT is for, the text says so.

# %%
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp.display import BLUE, GREEN, GREY, ORANGE, VERMILLION

before = minimtp.load("tiny-gemma4-float", keep="dense")  # the model before QAT
after = minimtp.load("tiny-gemma4", keep="dense")  # after QAT, as shipped: int4 in groups of 32

# %% [markdown]
# ## Rounding, by hand
#
# At b bits a weight is one of 2^b levels: integers from −2^(b−1) to 2^(b−1) − 1, times the scale of its group. The
# scale is the largest magnitude of the group / (2^(b−1) − ½). Four weights, one group:

# %%
group = [0.9, -0.31, 0.06, -0.52]
for bits in (4, 3, 2):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = max(abs(w) for w in group) / (high + 0.5)
    codes = [max(low, min(high, round(w / scale))) for w in group]
    print(f"{bits} bits, scale {scale:.3f}: codes {codes}, weights {[round(code * scale, 2) for code in codes]}")

# %% [markdown]
# The same for whole matrices, and for any number of bits. At 4 bits the package has it, as `quant.pack`.

# %%
from minimtp.checkpoint import bf16_to_float, float_to_bf16
from minimtp.quant import pack


def rounded(w_OI, bits, size=None):
    # groups of `size` weights along a row (None: the row); the scale is kept in bf16
    w_OGK = w_OI.reshape(len(w_OI), -1, size or w_OI.shape[1])
    limit = 2 ** (bits - 1)
    scale_OG1 = np.abs(w_OGK).max(2, keepdims=True) / np.float32(limit - 0.5)
    scale_OG1 = bf16_to_float(float_to_bf16(scale_OG1))
    return (np.rint(w_OGK / scale_OG1).clip(-limit, limit - 1) * scale_OG1).reshape(w_OI.shape)


print(np.round(rounded(np.float32([group]), 4), 2), "as in the loop")

# %%
w_OI = before.params.layers[0].q_proj
print("equal to the package's:", np.array_equal(rounded(w_OI, 4, 32), pack(w_OI, 32).dequantize("float32")))


def linear(w):  # the names of a layer's linear weights
    return [name for name, weight in vars(w).items() if weight.ndim == 2]


def with_weights(target, change):  # a copy of the target with these changed
    params = deepcopy(target.params)
    for w in params.layers:
        for name in linear(w):
            setattr(w, name, change(getattr(w, name)))
    return replace(target, params=params)


# %% [markdown]
# ## How to tell what was lost
#
# A *law* is the probabilities that a model gives to the next token. Two measures: the *loss* is the mean of
# −log p(next token of a text), how well the model predicts. The *KL divergence* says how far one law has moved from
# another, for better or worse: the sum below. Both are in *nats*, because the logarithm is the natural one.
#
# The text is `heldout.txt`, which no model here was trained on: every third window of 255 tokens, each behind
# `<bos>`. Losses are compared window by window, which gives a *standard error*: how much the mean difference would vary
# with other windows. A difference of less than two standard errors may be chance.

# %%
p, r = np.array([0.5, 0.2, 0.1, 0.2]), np.array([0.4, 0.3, 0.1, 0.2])
loop = 0.0
for p_v, r_v in zip(p, r):
    loop += p_v * np.log(p_v / r_v)
print(f"KL(p, r) as a loop {loop:.4f} nats, at once {np.sum(p * np.log(p / r)):.4f}")

text = minimtp.loading.bundled("heldout.txt").read_text(encoding="utf-8")
ids = before.tokenizer.encode(text, special=False)
bos = before.tokenizer.id("<bos>")
windows_WT = np.reshape(ids[: len(ids) // 255 * 255], (-1, 255))[::3]


# %%
def log_laws(target):
    passes = [target.forward([bos, *window], target.new_cache()).logits_TV for window in windows_WT]
    return np.log(minimtp.Sampling().law(np.concatenate(passes))).reshape(len(windows_WT), 256, -1)


def losses(log_WTV):
    return -np.take_along_axis(log_WTV[:, :-1], windows_WT[..., None], 2).mean((1, 2))


def moved_from(reference_WTV, log_WTV):
    # the change of the loss, its standard error, the KL, how often the argmax is the same
    more_W = losses(log_WTV) - losses(reference_WTV)
    kl = (np.exp(reference_WTV) * (reference_WTV - log_WTV)).sum(2).mean()
    agree = (log_WTV.argmax(2) == reference_WTV.argmax(2)).mean()
    return more_W.mean(), more_W.std(ddof=1) / np.sqrt(len(more_W)), kl, agree


# %% [markdown]
# ## Rounding afterwards
#
# The float model, rounded to 4, 3 and 2 bits, in groups of 32 and with one scale a row.

# %%
from functools import partial

base, sweep = log_laws(before), {}
print(f"float: loss {losses(base).mean():.2f} nats a token, over {windows_WT.size:,} of {len(ids):,} tokens")
for bits, size in ((4, 32), (3, 32), (2, 32), (4, None), (3, None), (2, None)):
    coarse = with_weights(before, partial(rounded, bits=bits, size=size))
    sweep[bits, size] = moved_from(base, log_laws(coarse))
for (bits, size), (more, error, kl, agree) in sweep.items():
    where = f"groups of {size}" if size else "whole rows"
    print(f"{bits} bits, {where:12}: loss {more:+.3f} ± {error:.3f}   KL {kl:.3f}   same argmax {agree:.0%}")

# %%
fig, (left, right) = plt.subplots(1, 2)
for size, colour, mark, name in ((32, BLUE, "o-", "groups of 32"), (None, VERMILLION, "s--", "whole rows")):
    more, error, kl, _ = np.array([sweep[bits, size] for bits in (4, 3, 2)]).T
    left.errorbar((4, 3, 2), more, 2 * error, fmt=mark, color=colour, capsize=3, label=name)
    right.plot((4, 3, 2), kl, mark, color=colour, label=name)
left.axhline(0, color=GREY, lw=0.8)
left.set(xlabel="bits", ylabel="loss − float's (nats)", title="Loss (bars: 2 standard errors)", xticks=(2, 3, 4))
right.set(xlabel="bits", ylabel="KL from the float model (nats)", title="How far the law moved", xticks=(2, 3, 4))
legends = left.legend(), right.legend()

# %% [markdown]
# At 4 bits the law moves a little, and the loss not enough to tell from chance. At 3 bits it depends on the groups:
# with one scale a row the loss rises, in groups of 32 it even falls on this text, although the law has moved. A lower
# loss does not mean the same model. At 2 bits rounding hurts either way.
#
# ## QAT
#
# The float model was trained for 300 steps more, with every linear weight rounded to int4 in the forward pass
# (`weights/README.md`). What came out, beside the rounded float model:

# %%
trained = log_laws(after)
figures = {"rounded afterwards": sweep[4, 32], "QAT": moved_from(base, trained)}
for name, (more, error, kl, agree) in figures.items():
    print(f"{name:18}: loss {more:+.3f} ± {error:.3f}   KL from float {kl:.3f}   same argmax {agree:.0%}")

# %% [markdown]
# Said plainly: **at 4 bits QAT wins back no loss here, because rounding lost none.** It has even moved the law
# further from the float model's than rounding did: 300 steps of training made another model, about as good on this
# text. That QAT saves loss in larger models is what their makers report; these models cannot show it. What they do
# show is what QAT does to weights, and how that can be lost.
#
# ## What QAT weights look like
#
# QAT weights are whole multiples of the scale of their group (its *step*): they lie on a *lattice*. This stays visible
# when they are stored as bf16 (floats of 16 bits), as Google also publishes them. `lattice_report.examine` looks in
# every group of 32 for a step that explains all its weights. The picture shows one matrix of each model (`q_proj`
# of layer 0), divided by QAT's steps.

# %%
import tempfile

from minimtp.convert import convert
from minimtp.lattice import NAIVE
from minimtp.lattice_report import examine

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
report = convert("tiny-gemma4", here / "bf16", "bf16")
for name in (here / "bf16", "tiny-gemma4-float"):
    groups = [row["groups"] for row in examine(name)["tensors"] if row["judged"]]  # judged: the linear weights
    print(f"{Path(name).name:18} groups on a lattice:", {kind: sum(g[kind] for g in groups) for kind in groups[0]})

# %%
released = minimtp.load(here / "bf16", keep="dense")
fig, axes = plt.subplots(1, 2, sharey=True)
shown = {"QAT, as bf16": (released, GREEN), "float": (before, BLUE)}
packed = minimtp.load("tiny-gemma4", keep="packed").params.layers[0].q_proj
steps_OI = np.repeat(packed.scales.dequantize("float32"), 32, axis=1)
for ax, (name, (target, colour)) in zip(axes, shown.items()):
    w_OI = target.params.layers[0].q_proj
    ax.hist((w_OI / steps_OI).ravel(), np.arange(-10.05, 10, 0.1), color=colour)
    ax.set(xlabel="weight / QAT's step", ylabel="number of weights", title=name, xticks=range(-8, 9, 4))
axes[0].set_yscale("log")

# %% [markdown]
# ## The trap
#
# The bf16 weights look like any others, so a converter may round them by its usual rule. The Q4_0 of ggml (the library
# of llama.cpp) takes the largest weight of a group / −8 as its step. Where QAT's largest code is 7, the new step is
# 7/8 of the old one, and the levels no longer meet. One such group:

# %%
row, group = np.argwhere(np.abs(packed.codes().reshape(*packed.scales.shape, 32)).max(2) == 7)[0]
old = packed.dequantize("float32")[row, 32 * group : 32 * group + 32]
new = NAIVE["q4_0"](old[None], "").dequantize("float32")[0]
ax = plt.subplots(figsize=(8, 1.8), subplot_kw={"ymargin": 0.3})[1]
ax.plot([old, new], [1, 0], color=GREY, lw=0.8)
ax.plot(old, np.ones(32), "o", color=GREEN)
ax.plot(new, np.zeros(32), "s", color=VERMILLION)
ax.set(xlabel="weight", ylabel="the group", yticks=(0, 1), yticklabels=("rounded again by Q4_0's rule", "as trained"))
step, new_step = (np.diff(np.unique(weights)).min() for weights in (old, new))
print(f"new step / old step: {new_step / step:.3f}; largest change: {np.abs(new - old).max() / step:.2f} old steps")

# %% [markdown]
# Now the whole model, from its bf16 weights: by ggml's rule; by *minmax*, the rule of `quant.pack` above (largest
# magnitude / 7.5); and by `convert`, which finds the lattice and keeps it.

# %%
report = convert(here / "bf16", here / "kept.gguf", "q4_0")


def by_rule(rule):
    return with_weights(released, lambda w_OI: NAIVE[rule](w_OI, "").dequantize("float32"))


ways = {"ggml's rule (Q4_0)": by_rule("q4_0"), "minmax": by_rule("minmax")}
ways["minimtp convert (Q4_0)"] = minimtp.load(here / "kept.gguf", keep="dense")
print(report.text().splitlines()[1])
print("the embedding in the Q4_0 file:", minimtp.load(here / "kept.gguf", keep="packed").params.embed_tokens.type)


# %%
def linear_weights(target):
    return np.concatenate([getattr(w, name).ravel() for w in target.params.layers for name in linear(w)])


right, moved = linear_weights(after), {}
for name, target in ways.items():
    far = np.linalg.norm(linear_weights(target) - right) / np.linalg.norm(right)
    more, error, kl, agree = moved_from(trained, log_laws(target))
    moved[name], loss = (far, kl), round(more, 3) + 0  # + 0: no minus before a zero
    print(f"{name:22}: weights {far:.4f}  loss {loss:+.3f} ± {error:.3f}  KL {kl:.4f}  same argmax {agree:.1%}")

# %%
fig, axes = plt.subplots(1, 2, sharey=True, figsize=(8, 1.9))
for ax, at, label in zip(axes, (0, 1), ("relative error of linear weights", "KL from the QAT model (nats)")):
    bars = ax.barh(list(moved), [figures[at] for figures in moved.values()], color=(VERMILLION, ORANGE, GREEN))
    ax.bar_label(bars, fmt="%.5f", padding=3)
    ax.set(xlabel=label, ylabel="converted by" if at == 0 else "")
    ax.margins(x=0.25)
folder.cleanup()

# %% [markdown]
# Both rules give back int4 weights, and neither gives back the trained ones: the training went into those integers
# and steps. The law moves, and the argmax changes at about one position in twenty. `convert` leaves a small trace
# too: the Q4_0 file keeps the embedding in Q8_0 (8 bits), and bf16 does not tell a step exactly. In loss, ggml's rule
# costs nothing here that can be told from chance, and minmax a little. In a model that rounding does hurt, the same
# rules may throw away what QAT was for; that, too, is not shown here.
#
# ## What to take from this
#
# - Whether rounding hurts depends on model, bits and group size. Measure it, on text that was not trained on.
# - Equal loss is not an equal law.
# - QAT weights are integers and steps. Keep them, and check with `minimtp lattice PATH --against OTHER`.
# - Not shown here: a gain of QAT in loss. These models are too easy to round at 4 bits, and no QAT at 3 or 2 bits was
#   trained.
#
# ## Try
#
# - Add groups of 64 or 5 bits to the list in the sweep: `(4, 64)`, `(5, 32)`.
# - Round only the MLP: in `linear`, ask for `name in ("gate_proj", "up_proj", "down_proj")`.
# - In the sweep, write `after` in place of `before`, twice: does a model trained for 4 bits fare better at 3 bits?
#   (What is called float from there on is then `after`.)
#
# The code: `minimtp/quant.py` (`pack`), `minimtp/lattice.py` (`find`, `NAIVE`), `minimtp/lattice_report.py`
# (`examine`, `compare`), `minimtp/convert.py`; how the models were trained: `weights/README.md`.
