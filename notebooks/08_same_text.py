# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Is it really the same text? Why do engines diverge at temperature 0?
#
# At temperature 0 nothing is drawn: the next token is the one with the largest logit. Yet two engines with the same
# weights write different texts, and one engine writes another text with drafts than without. The reason is rounding,
# and a tie that is nearly one.
#
# You will see where the rounding comes from, how large it is, which tokens it can turn, and what makes drafts here
# give the same *bits*.

# %%
from types import SimpleNamespace
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp import backend
from minimtp.bench import tokens_of
from minimtp.checkpoint import bf16_to_float, float_to_bf16
from minimtp.display import FATES, GREY, TARGET

# %% [markdown]
# ## Three numbers
#
# A float32 has 24 significant bits. After every addition the rest is rounded away, so the order of a sum is part of
# its result.

# %%
a, b, c = np.array([1e8, 1, -1e8], np.float32)
print("(a + b) + c =", (a + b) + c, "    a + (b + c) =", a + (b + c), "    (a + c) + b =", (a + c) + b)

# %% [markdown]
# The same with 256 ordinary numbers, as many as one entry of a small model's matrix product adds up: 1,000 orders of
# one sum, from left to right. The unit is the *ulp*, the distance from one float32 to the next.

# %%
terms = np.random.default_rng(0).random(256, np.float32)
exact = terms.astype(np.float64).sum()
orders = [np.random.default_rng(order).permutation(terms) for order in range(1000)]
sums = np.array([np.add.accumulate(one)[-1] for one in orders])  # accumulate adds one after the other
ulps = (sums - exact) / np.spacing(np.float32(exact))
plt.figure(figsize=(6, 2.4))
plt.hist(ulps, bins=np.arange(np.floor(ulps.min()), ulps.max() + 1), color=GREY)
plt.xlabel("error of the sum, ulps"), plt.ylabel("orders, of 1,000")
plt.show()
print(f"{len(set(sums.tolist()))} different sums")

# %% [markdown]
# ## Who shares the pass
#
# A matrix product of many tokens at once (*GEMM*) cuts the work otherwise than a product of one token with the
# matrix. So a token's result can depend on who is read with it. `backend.matmul` has both ways: up to 16 tokens
# (`ROWS`) each is multiplied by itself; a wider pass, such as a prompt, uses GEMM.

# %%
x_TI = np.random.default_rng(1).normal(size=(32, 256)).astype(np.float32)
w_OI = np.random.default_rng(2).normal(size=(320, 256)).astype(np.float32)
with backend.arithmetic():
    alone = np.concatenate([backend.matmul(x_TI[t : t + 1], w_OI) for t in range(32)])
    five, wide = backend.matmul(x_TI[:5], w_OI), backend.matmul(x_TI, w_OI)
print("5 tokens as 5 passes, bit for bit:", five.tobytes() == alone[:5].tobytes())
print("32 tokens as 32 passes, bit for bit:", wide.tobytes() == alone.tobytes())
assert np.allclose(wide, alone, atol=1e-4)  # apart by rounding, no more

# %% [markdown]
# ## In a model
#
# Five greedy texts of 64 tokens are read again in other ways, and every logit is compared: five tokens a pass, as
# drafts are verified; all in one wide pass; and some *engines*, the same model with another precision somewhere.


# %%
def read_again(target, width=5):
    """Logits of all texts, read `width` tokens at a time after their prompts."""
    rows = []
    for prompt, new in texts:
        cache, ids = target.new_cache(), [prompt[-1], *new[:-1]]
        target.forward(prompt[:-1], cache, last=0)
        rows += [target.forward(ids[n : n + width], cache).logits_TV for n in range(0, len(ids), width)]
    return np.concatenate(rows)


# %%
target = minimtp.load("tiny-gemma4")
scenes = minimtp.loading.bundled("heldout.txt").read_text().split("\n\n")[1:6]
prompts = [target.tokenizer.encode(scene)[:24] for scene in scenes]
texts = [(prompt, tokens_of(minimtp.generate(target, prompt, max_new_tokens=64))) for prompt in prompts]
one = read_again(target, width=1)
engines = {"five a pass": read_again(target), "one wide pass": read_again(target, width=64)}
engines["KV in bf16"] = read_again(minimtp.load("tiny-gemma4", kv="bf16"))
engines["KV in int8"] = read_again(minimtp.load("tiny-gemma4", kv="int8"))
engines["logits in bf16"] = bf16_to_float(float_to_bf16(one)).reshape(one.shape)

# %%
chosen = one.argmax(-1)
for name, rows in engines.items():
    largest, turned = abs(rows - one).max(), (rows.argmax(-1) != chosen).sum()
    size = "0, every bit" if largest == 0 else f"{largest:.0e}"
    print(f"{name:15} largest difference of a logit: {size:13} other tokens: {turned} of {len(chosen)}")
assert engines["five a pass"].tobytes() == one.tobytes()

# %% [markdown]
# ## Which tokens can turn?
#
# The *margin* of a position is its largest logit less the second. Rounding turns a token only if it moves the two
# towards each other by at least their margin. So a small margin is a place where texts part, and everything after it
# is another text.

# %%
rows, second = np.arange(len(one)), np.argsort(one, -1)[:, -2]
margin = one[rows, chosen] - one[rows, second]
plt.figure(figsize=(7, 2.6))
plt.hist(margin, bins=np.geomspace(1e-4, 20, 45), color=TARGET, label=f"{len(margin)} positions")
plt.xscale("log"), plt.xlabel("margin between the two largest logits"), plt.ylabel("positions")
for name, style in (("one wide pass", ":"), ("KV in bf16", "--"), ("logits in bf16", "-")):
    plt.axvline(abs(engines[name] - one).max(), linestyle=style, color="black", label=f"largest difference, {name}")
plt.xlim(5e-6, 30), plt.legend(frameon=False, loc="upper left", fontsize=8, bbox_to_anchor=(0.08, 1))
plt.show()

# %% [markdown]
# Position by position: across, the margin; upwards, how far the engine moved the two candidates *towards* each other
# (moves apart stand on the floor). A token turns only on or above the diagonal. On it the two have become equal, and
# the lower id wins.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.9), sharex=True, sharey=True)
for ax, name in zip(axes, ("one wide pass", "KV in int8", "logits in bf16")):
    gap = engines[name][rows, chosen] - engines[name][rows, second]
    turned, closer = engines[name].argmax(-1) != chosen, margin - gap
    assert not (turned & (closer < margin)).any()
    for fate, said, some in (("accepted", "same token", ~turned), ("rejected", "another token", turned)):
        mark, colour, _ = FATES[fate]
        ax.loglog(margin[some], closer[some].clip(1e-7), mark, c=colour, label=f"{said} ({some.sum()})", markersize=4)
    ax.loglog([1e-4, 20], [1e-4, 20], color=GREY, linewidth=1), ax.legend(frameon=False, loc="upper left", fontsize=8)
    ax.set(title=name, xlabel="margin, logits", ylabel="moved closer by, logits", ylim=(5e-8, 3e3))

# %% [markdown]
# ## How long do two texts stay the same?
#
# Add noise of some size to every logit, and look for the first token that turns in each of the five texts. No text
# can part before the first margin smaller than twice the noise.

# %%
sizes, noise = np.geomspace(1e-6, 1, 30), np.random.default_rng(0).uniform(-1, 1, one.shape)
turned = np.array([(one + size * noise).argmax(-1) != chosen for size in sizes])
near = np.array([margin < 2 * size for size in sizes])
plt.figure(figsize=(7, 2.8))
for found, style, label in ((turned, "k-", "first other token"), (near, "k--", "first margin below twice the noise")):
    ended = np.concatenate([found.reshape(30, 5, 64), np.ones((30, 5, 1), bool)], axis=2).argmax(2)
    plt.semilogx(sizes, ended.mean(1), style, label=label)
plt.xlabel("largest noise on a logit"), plt.ylabel("tokens before it, of 64,\nmean of five texts")
plt.legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# ## With drafts, the same bits
#
# Verification reads one token and k draft tokens in a pass. Here each of them gets the bits that it would have got
# alone, so the text cannot part, however small a margin is. Both families, every k from 1 to 7:

# %%
for name in ("tiny-gemma4", "tiny-qwen35"):
    model = minimtp.load(name)
    drafter, ids = minimtp.load_drafter("auto", model), model.tokenizer.encode("ROMEO:\n")
    plain = tokens_of(minimtp.generate(model, ids, max_new_tokens=40))
    runs = [list(minimtp.generate(model, ids, drafter, num_draft=k, max_new_tokens=40)) for k in range(1, 8)]
    assert all(tokens_of(run) == plain for run in runs)
    print(name, "the same 40 tokens; passes for k = 1 to 7:", *map(len, runs))

# %% [markdown]
# ## An engine whose drafts change the text
#
# Now let verification round in another way than decoding, as where an engine has one kernel for one token and another
# for several: passes of more than one token round their logits to bf16. And a milder one: only matrix products take
# the wide way (GEMM) from two tokens on.


# %%
def coarsely(ids, cache, *arguments, **options):
    out = target.forward(ids, cache, *arguments, **options)
    coarse = bf16_to_float(float_to_bf16(out.logits_TV)).reshape(out.logits_TV.shape)
    return out._replace(logits_TV=coarse) if len(ids) > 1 else out


engine = SimpleNamespace(config=target.config, new_cache=target.new_cache, tokenizer=target.tokenizer, forward=coarsely)
drafter = minimtp.load_drafter("auto", target)
with patch.object(backend, "ROWS", 1):
    bits = read_again(target).tobytes() == one.tobytes()
    mild = [tokens_of(minimtp.generate(target, prompt, drafter, max_new_tokens=64)) == new for prompt, new in texts]
print(f"products by GEMM: same bits {bits}, same text {sum(mild)} of 5")

# %%
for number, (prompt, new) in enumerate(texts):
    drafted = tokens_of(minimtp.generate(engine, prompt, drafter, max_new_tokens=64))
    apart = [n for n in range(64) if drafted[n] != new[n]][:1]
    told = f"parts at token {apart[0]}, margin {margin[64 * number + apart[0]]:.4f}" if apart else "the same"
    print(f"logits in bf16 when verified, text {number}: {told}")

# %% [markdown]
# ## What makes it the same bits
#
# - Every token of a narrow pass is multiplied by itself, over the same tiles of the weight (`backend.matmul`,
#   `backend.tiles`).
# - Each query sums over exactly its own keys: masked padding would change the order (`layers.attend`).
# - Inside a pass the matrix library runs on one thread, since how it divides a sum depends on the shape
#   (`backend.arithmetic`).
# - What a cache keeps of a token does not depend on what was read beside it, and un-reading leaves no trace (`kv.py`,
#   `delta_state.py`).
#
# This is promised on one machine, with one thread setting. `minimtp check --self` tries it on yours. An engine that
# orders its sums otherwise is not wrong: it is as near to the model as before. But its text with drafts is then equal
# only where margins are larger than its rounding.
#
# ## Try
#
# - `kv="int8-v"` among the engines, or `minimtp.load("tiny-gemma4-float")`: the model before quantization turns far
#   more.
# - `patch.object(backend, "ROWS", 1)` around the five texts with `max_new_tokens=400`: is a near tie ever met?
# - `plain` and `runs` with `kv="bf16"`: other texts perhaps, but with drafts again the same.
