# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Un-reading: how do you take back four tokens?
#
# A *drafter*, a small model, guesses four tokens, the *drafts*; the *target*, the large model, reads all of them in one
# pass. Then it turns out that the first was wrong. Four tokens have been read that are not in the text: the *cache*,
# what the target keeps of the tokens read, must be as if they never were.
#
# You will see: a timeline of reading and un-reading; why a sliding window must keep more than its window, and why a
# state cannot be cut; that no bit stays behind; and what is written when a cache forgets to un-read.

# %%
import sys

import matplotlib.pyplot as plt
import numpy as np
import pictures

from minimtp import generate, layers, load, load_drafter
from minimtp.delta_state import DeltaState
from minimtp.display import BLUE, FATES, ORANGE, SKY, VERMILLION
from minimtp.kv import CacheError, FullKV, SlidingKV
from minimtp.loading import published_config

sys.path.append("../docs")

# %% [markdown]
# ## Three words: append, rollback, commit
#
# `append` takes in tokens. `rollback(n)` un-reads the last n. `commit` makes everything read so far *final*: it frees
# what only un-reading needed, and nothing before it can be un-read. Here is `FullKV`, which keeps a key and a value of
# every token, through two rounds. Each key is its token's position, so that we can see which are there.


# %%
def numbered(first, stop):  # keys that are their positions, and values
    keys_TGK = np.arange(first, stop, dtype=np.float32)[:, None, None]
    return keys_TGK, -keys_TGK


kv, events = FullKV(kv_heads=1, head_dim=1), []
do = {"rollback": kv.rollback, "commit": lambda n: kv.commit()}
do["append"] = lambda n: kv.append(*numbered(kv.length, kv.length + n))
acts = ["append", "commit", "append", "rollback", "commit", "append", "rollback"]
for what, n in zip(acts, [3, 0, 5, 3, 0, 5, 1]):
    do[what](n)
    events.append((f"{what} {n}" if n else what, kv.length, kv.committed))

# %%
ax, before = plt.figure(figsize=(7, 2.9)).gca(), 0
for row, (what, length, committed) in enumerate(events):
    labels = ["final"] * committed + ["read"] * (length - committed) + ["x"] * (before - length)
    colours = [BLUE + "90"] * committed + [SKY + "50"] * (length - committed) + [VERMILLION + "90"] * (before - length)
    pictures.boxes(ax, labels, colours, bottom=-1.3 * row, size=8)
    ax.text(-0.2, 0.5 - 1.3 * row, what, ha="right", va="center")
    before = length
pictures.boxes(ax, range(10), ["white"] * 10, bottom=1.3)
ax.text(-0.2, 1.8, "position (x: un-read)", ha="right", va="center")
plt.show()

# %% [markdown]
# ## Keys and values: cut
#
# Entries lie in a buffer in order, so un-reading is a smaller number: the length. Numbers of rejected tokens remain
# in the buffer behind it, but `read` does not show them, and the next append writes over them. Past the commit
# `rollback` refuses (last line).

# %%
never = FullKV(kv_heads=1, head_dim=1)
never.append(*numbered(0, 9))
print("keys read: ", kv.read()[0].ravel())
print("in buffer: ", kv.buffers["k"].ravel()[:10])
print("as a cache that never read the rest:", all(map(np.array_equal, kv.read(), never.read())))
try:
    kv.rollback(5)
except CacheError as error:
    print(error)

# %% [markdown]
# ## A window: keep what may be needed again
#
# A *sliding* layer looks at the last few tokens only, its *window*: 4, say. A *ring*, 4 slots in which the newest entry
# overwrites the oldest, looks enough. But drafts push entries out; after the rollback these are needed again, and gone.
# `SlidingKV` keeps window + 1 committed entries (the drafter looks one farther) and everything not yet final. (Older
# ones may lie in its buffer too, until they are moved out; they are not drawn.)

# %%
kv, window, drafts = SlidingKV(kv_heads=1, head_dim=1, window=4), 4, 4
for position in range(30):
    kv.append(*numbered(position, position + 1))
    kv.commit()
kv.append(*numbered(30, 31 + drafts))  # the token before the drafts, and these
ring = range(kv.length - window, kv.length)
kept = range(kv.committed - kv.keep, kv.length)
kv.rollback(drafts)
needed = range(kv.length - window + 1, kv.length)  # the next query sees these and itself
print("needed after the rollback:", kv.read()[0].ravel()[-3:], " as they were:", list(needed))

# %%
ax = plt.figure(figsize=(7, 2)).gca()
rows = {"a ring of 4 holds": ring, "SlidingKV keeps": kept, "the next token needs": needed}
for row, (what, held) in enumerate(rows.items()):
    lost = [p for p in held if p not in ring] if what == "the next token needs" else []
    labels = [f"{p}\nlost" if p in lost else p if p in held else "" for p in range(24, 35)]
    colours = [VERMILLION + "90" if p in lost else SKY + "90" if p in held else "white" for p in range(24, 35)]
    pictures.boxes(ax, labels, colours, bottom=-1.2 * row, size=8)
    ax.text(-0.2, 0.5 - 1.2 * row, what, ha="right", va="center")
ax.set_title("positions, after 30 final tokens, 5 more, and a rollback of 4 (lost: not in the ring)", fontsize=9)
plt.show()

# %% [markdown]
# ## A state cannot be cut
#
# A Gated DeltaNet layer (see `04_qwen_layer`) keeps one matrix, into which every token is mixed. Below two different
# states read the same token, which overwrites row 0, and become equal. So no formula can find the way back.

# %%
token = np.eye(1, 4), np.eye(1, 4), np.array([[5.0, 5, 5, 5]]), np.ones(1), np.ones(1)  # query, key, value, decay, beta
for first in (1.0, 2.0):
    state_HKV = np.diag([first, 3, 3, 3])[None]
    after_HKV = layers.gated_delta_step(*token, state_HKV)[2]
    print("before:", state_HKV[0].tolist())
    print("after: ", after_HKV[0].tolist())

# %% [markdown]
# There are two honest ways. **Keep every state**: one matrix for each token since the commit. Or **write again**:
# keep the final state and what each token wrote (its key, its write, its decay), and repeat the writes up to the cut.
# Both give the same bits, since the same operations run in the same order. `DeltaState` writes again.
#
# ## No bit stays behind
#
# Both tiny models read 40 tokens, commit, read five more and take four back. A second cache reads only the one.


# %%
def same_bits(one, other):  # two caches, in every layer
    pairs = [(a.state().values(), b.state().values()) for a, b in zip(one.layers, other.layers)]
    return one.tokens == other.tokens and all(all(map(np.array_equal, a, b)) for a, b in pairs)


def after(target, ids, committed, read, taken_back):  # -> a cache with that history
    cache = target.new_cache()
    target.forward(ids[:committed], cache)
    cache.commit()
    target.forward(ids[committed : committed + read], cache)
    cache.rollback(taken_back)
    return cache


# %%
text = open("../weights/heldout.txt").read()
for name in ("tiny-gemma4", "tiny-qwen35"):
    target = load(name)
    ids = target.tokenizer.encode(text)
    for taken_back in (1, 2, 3, 4):
        one, other = after(target, ids, 40, 5, taken_back), after(target, ids, 40, 5 - taken_back, 0)
        print(f"{name}: 5 read, {taken_back} taken back; the same bits as never read:", same_bits(one, other))

# %% [markdown]
# ## What the two ways cost
#
# One layer of the published 27B, its 48 linear layers counted: what is kept until the commit, for k drafts. A
# `DeltaState` is asked for its bytes; keeping every state takes k + 2 of them (one committed, k + 1 read).

# %%
import states  # docs/states.py, which measures both ways

_, config = published_config("qwen3.6-27b")
layer, linear = config.layers[0], sum(layer.kind == "linear" for layer in config.layers)
held = {"every state": [], "write again": []}
for k in range(1, 9):
    (_, k_TGK, v_THV, log_decay_TH, _), state_HKV = states.random_pass(layer, tokens=k + 1)
    memory = DeltaState(layer.key_heads, layer.value_heads, layer.key_dim, layer.value_dim, layer.kernel)
    held["every state"].append((k + 2) * linear * memory.nbytes / 2**20)
    memory.append(np.zeros((k + 1, layer.channels), np.float32), k_TGK, v_THV, log_decay_TH, state_HKV)
    held["write again"].append(linear * memory.nbytes / 2**20)

# %%
ax = plt.figure(figsize=(6, 2.8)).gca()
for (what, mib), colour, mark in zip(held.items(), (ORANGE, BLUE), ("o-", "s-")):
    ax.plot(range(1, 9), mib, mark, color=colour, label=f"{what}: {mib[3]:.0f} MiB at k = 4")
ax.set(xlabel="draft tokens k", ylabel="MiB kept until the commit", ylim=(0, None))
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# And time, on this machine, in one layer (`docs/states.py` measures it). Keeping every state makes *every* pass
# slower; writing again costs only in the rounds that reject.

# %% tags=["varies"]
(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH), state_HKV = states.random_pass(layer, tokens=5)
inputs = q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH
u_THV, planes = layers.gated_delta(*inputs, state_HKV)[1], [np.empty_like(state_HKV) for _ in range(6)]
work = {"a pass of 5 tokens": lambda: layers.gated_delta(*inputs, state_HKV)}
work["the same, keeping every state"] = lambda: states.pass_with_planes(inputs, state_HKV, planes, planes[5])
for n in (1, 4):
    writes = k_TGK[: 5 - n], u_THV[: 5 - n], log_decay_TH[: 5 - n], state_HKV
    work[f"taking back {n} of 5 by writing again"] = lambda writes=writes: layers.delta_writes(*writes)
for what, taken in states.milliseconds(work, rounds=10).items():
    print(f"{what:38} {taken:6.2f} ms")

# %% [markdown]
# ## Let it break
#
# `tiny-qwen35` writes 28 tokens with drafts, three times: as it should, then with states whose `rollback` does
# nothing, then with keys and values whose `rollback` does nothing. Nothing raises an error.


# %%
def written(forgetful=None):
    """[(token, fate)] of a run with drafts; memories of the forgetful kind do not un-read."""
    cache, told = target.new_cache(), []
    for layer in cache.layers:
        if isinstance(layer, forgetful or ()):
            layer.rollback = lambda n: None
    for step in generate(target, prompt, drafter, num_draft=4, max_new_tokens=28, cache=cache):
        last = "bonus" if step.accepted == step.drafted else "correction"
        told += zip(step.tokens, ["accepted"] * step.accepted + [last])
    return told


# %%
drafter, prompt = load_drafter("auto", target), target.tokenizer.encode("ROMEO:\n")
plain = [(token, "unread") for step in generate(target, prompt, max_new_tokens=28) for token in step.tokens]
runs = {"no drafts": plain, "drafts, un-read": written(), "states forget": written(DeltaState)}
runs["KV forgets"] = written(FullKV)
for what, told in runs.items():
    tokens = [token for token, _ in told]
    differs = [i for i, (token, (other, _)) in enumerate(zip(tokens, plain)) if token != other]
    print(f"{what:16} first differing token: {differs[0] if differs else 'none'}")
    print(" " * 16, repr(target.tokenizer.decode(tokens)))

# %%
figure, axes = plt.subplots(4, 1, figsize=(11, 3.8))
for ax, (what, told) in zip(axes, runs.items()):
    labels = [f"{FATES[fate].mark}\n{target.tokenizer.decode([token]).strip() or '⏎'}" for token, fate in told]
    pictures.boxes(ax, labels, [FATES[fate].colour + "60" for _, fate in told], size=7)
    first = next((i for i, (one, other) in enumerate(zip(told, plain)) if one[0] != other[0]), np.nan)
    ax.plot([first, first], [-0.2, 1.2], color="black", lw=3)  # nothing at nan
    ax.set_ylim(-0.2, 1.2)
    ax.set_title(what, loc="left", fontsize=9)
figure.supxlabel("tokens in order; . no draft, + accepted, > correction, * bonus; bar: leaves the text", fontsize=9)
plt.show()

# %% [markdown]
# A *correction* is the target's token where a draft was wrong, a *bonus* the one it adds when all were right. At the
# black bar the text first leaves that of no drafts. A reader who has only the wrong text might not notice: so bits are
# compared.
#
# So, to take back four tokens: cut keys and values, keep more than the window, and write a state again.
#
# ## Try
#
# - Let every memory un-read one token too few: `layer.rollback = lambda n, right=layer.rollback: right(max(0, n -
#   1))`.
# - Break `tiny-gemma4` in the same way. Its keys and values run into an error soon. Why do the states above not?
# - Read 20 tokens in one pass instead of five and take ten back. (A wide pass is un-read to rounding, not to the
#   bit.)
#
# Code: `minimtp/kv.py` (`FullKV`, `SlidingKV`), `minimtp/delta_state.py` (`DeltaState`), `minimtp/cache.py`
# (`Cache.rollback`), `minimtp/generate.py` (where a round rolls back). More in `docs/qwen35.md`;
# `minimtp/oracle_cache.py` tests any engine's cache.
