# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Guessing ahead: where do the drafts come from?
#
# A large model, the *target*, writes one token a pass. A small one, the *drafter*, guesses the next few, and the
# target checks all of them in one pass. The guesses are called *draft tokens*.
#
# You will see what two drafters are wired to, make a draft by hand, and see where on a text the guesses are right.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp.display import DRAFTER, FATES, GREEN, GREY, PURPLE, TARGET
from minimtp.expected import read
from minimtp.generate import GREEDY

target = minimtp.load("tiny-gemma4")
drafter = minimtp.load_drafter("auto", target)
tokenizer = target.tokenizer

# %% [markdown]
# ## Two drafters, wired side by side
#
# Blue is the target's, orange the drafter's. **Gemma 4's assistant** is a small model of its own. It keeps no keys or
# values: its queries look into the *target's* KV cache (what the target's attention keeps of the tokens it has read).
# **Qwen's MTP layer** (multi-token prediction) is one more layer at the end of the target. It keeps keys and values
# of its own, so it must read every token; the embedding and the head (the matrix that makes logits) are the target's.
#
# What they share: each is told the newest token *and* the target's hidden state from which that token came. The
# dashed arrow is the next step, in which the drafter's own output stands in for the target's.

# %%
same = {"token": (0, 2, "newest\ntoken", GREY), "embed": (1, 2, "embedding", TARGET)}
same |= {"hidden": (0.6, 0, "target's\nhidden state", TARGET), "draft": (5, 2, "draft\ntoken", GREY)}
gemma = same | {"join": (2, 1, "join", DRAFTER), "layers": (3, 1, "4 layers,\nqueries only", DRAFTER)}
gemma |= {"kv": (3, 2.4, "target's KV", TARGET), "head": (4, 2, "own head", DRAFTER), "out": (4, 0, "project", DRAFTER)}
qwen = same | {"join": (2, 1, "join", DRAFTER), "layers": (3, 1, "1 layer", DRAFTER)}
qwen |= {"kv": (3, 2.4, "own KV", DRAFTER), "head": (4, 2, "target's\nhead", TARGET), "out": (4, 0, "norm", DRAFTER)}
to_head = {"Gemma 4's assistant": (gemma, "layers head"), "Qwen's MTP layer": (qwen, "out head")}

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3))
for ax, (title, (boxes, last)) in zip(axes, to_head.items()):
    forward = "token embed, embed join, hidden join, join layers, kv layers, layers out, head draft, " + last
    pictures.wiring(ax, boxes, forward, back="out hidden")
    ax.text(2.3, -0.85, "the next step of the same draft", ha="center", fontsize=8)
    ax.set(title=title, xlim=(-0.5, 5.4), ylim=(-1, 2.8))
plt.show()

# %% [markdown]
# ## A draft by hand
#
# The target reads a prompt. Its newest token is known, and nobody has read it yet. One step of the assistant takes
# that token and a hidden state, and gives logits and the next hidden state.

# %%
cache = target.new_cache()
out = target.forward(tokenizer.encode("ROMEO:\nI am"), cache)
newest = int(out.logits_TV[-1].argmax())
token, hidden_D, guesses = newest, out.hidden_TD[-1], []
for _ in range(4):
    logits_V, hidden_D = drafter.forward(token, hidden_D, cache)
    token = int(logits_V.argmax())
    guesses.append(token)
print(f"newest {tokenizer.decode([newest])!r}, draft {[tokenizer.decode([guess]) for guess in guesses]}")

# %% [markdown]
# `drafter.propose` is that loop. The target then reads the newest token and the draft in **one** pass (it *verifies*
# them), and each row of logits says what the target would have put in that place. Draft tokens stand up to the first
# that differs.

# %%
draft = drafter.propose([newest], out.hidden_TD[-1:], cache, 4, GREEDY, ())
assert list(draft.tokens) == guesses
verified = target.forward([newest, *draft.tokens], cache).logits_TV.argmax(-1).tolist()
for guess, own in zip(draft.tokens, verified):
    words = [repr(tokenizer.decode([token])) for token in (guess, own)]
    print(f"draft {words[0]:8} target {words[1]:8} {'equal' if guess == own else 'differs'}")

# %% [markdown]
# ## What does each input bring?
#
# Take one input away, at 120 places of a play that no model has seen: the hidden state becomes zeros, the token
# another token, the KV cache that of another text. How often is the first draft token still the target's own choice?

# %%
play = minimtp.loading.bundled("heldout.txt").read_text()
ids, other = tokenizer.encode(play)[:121], tokenizer.encode(play)[2000:2120]
cache, elsewhere, hits = target.new_cache(), target.new_cache(), np.zeros(4)
for n, token in enumerate(ids[1:]):
    hidden_D = target.forward([ids[n]], cache).hidden_TD[-1]
    target.forward([other[n]], elsewhere)
    kinds = (token, hidden_D, cache), (token, 0 * hidden_D, cache), (other[n], hidden_D, cache)
    firsts = [drafter.forward(*three)[0].argmax() for three in (*kinds, (token, hidden_D, elsewhere))]
    hits += firsts == target.forward([token], cache).logits_TV[-1].argmax()
    cache.rollback(1)

# %%
names = "all three", "hidden state: zeros", "token: another", "KV cache: another text's"
figure, ax = plt.subplots(figsize=(7, 2))
bars = ax.barh(names, hits / 120, color=[DRAFTER, GREY, GREY, GREY])
ax.bar_label(bars, [f"{hit:.0%}" for hit in hits / 120], padding=3)
ax.invert_yaxis()
ax.set(xlabel="share of 120 first draft tokens that are the target's choice", ylabel="given", xlim=(0, 1))
plt.show()

# %% [markdown]
# ## How deep do the guesses hold?
#
# Drafts of four are made after three prompts with each drafter, greedily (always the likeliest token), and by drawing
# at temperature 1. *Accepted* draft tokens are those that stand. Each point is the share of draft tokens accepted,
# among those whose predecessors all were. The rounds are few, so the lines wobble.

# %%
scenes = play.split("\n\n")[:3]


def accepted_by_depth(name, temperature, marker, colour):
    target = minimtp.load(name)
    drafter, sampling = minimtp.load_drafter("auto", target), minimtp.Sampling(temperature=temperature)
    prompts = [target.tokenizer.encode(scene)[:32] for scene in scenes]
    runs = [minimtp.generate(target, prompt, drafter, sampling=sampling, max_new_tokens=56) for prompt in prompts]
    accepted = np.array([step.accepted for run in runs for step in run if step.drafted == 4])
    share = [(accepted > j).sum() / (accepted >= j).sum() for j in range(4)]
    label = f"{name}, temperature {temperature} ({len(accepted)} rounds)"
    plt.plot([1, 2, 3, 4], share, "--" if temperature else "-", color=colour, marker=marker, label=label)


# %%
plt.figure(figsize=(7, 3))
for name, marker, colour in (("tiny-gemma4", "o", GREEN), ("tiny-qwen35", "s", PURPLE)):
    for temperature in (0, 1):
        accepted_by_depth(name, temperature, marker, colour)
plt.xlabel("depth: first to fourth draft token")
plt.ylabel("share accepted, given\nthe ones before stood")
plt.xticks([1, 2, 3, 4])
plt.ylim(0, 1.05)
plt.legend(loc="lower right", ncol=2, frameon=False)
plt.show()

# %% [markdown]
# ## Does the drafter know when it knows?
#
# Call q(d) the probability that the drafter gives its own draft token d, and p(d) the one that the target gives it.
# Points on the diagonal agree; below it the drafter is surer than the target. This one is much surer: it was trained
# half on the target's law and half on the target's favourite alone. Here a draft token is accepted if it *is* that
# favourite.

# %%
points, law = [], minimtp.Sampling(temperature=1.0).law
for _, tokens, q_logits, p_logits in read(target, drafter, ids, 16, 4, GREEDY):
    p_JV, best = law(p_logits), p_logits.argmax(-1)
    for j, token in enumerate(tokens):
        if (best[:j] == tokens[:j]).all():  # the ones before it stand
            points.append((law(q_logits[j])[token], p_JV[j, token], best[j] == token))
q, p, stands = np.array(points).T

# %%
figure, ax = plt.subplots(figsize=(4.5, 4))
for fate, chosen in (("accepted", stands == 1), ("rejected", stands == 0)):
    mark, colour, _ = FATES[fate]
    ax.scatter(q[chosen], p[chosen], marker=mark, color=colour, label=f"{fate} ({chosen.sum()})", linewidths=1)
ax.plot([0, 1], [0, 1], color=GREY, linewidth=1)
ax.set(xlabel="q(d): what the drafter gives its draft token", ylabel="p(d): what the target gives it")
ax.legend(loc="upper left", frameon=False)
plt.show()
print(f"means: q(d) {q.mean():.2f}, p(d) {p.mean():.2f}; accepted where q(d) > 0.5: {stands[q > 0.5].mean():.0%}")

# %% [markdown]
# ## Where on the text?
#
# A run at temperature 1. Every token says by mark and colour what became of it, in the order in which it was drafted.
# Rejected tokens and those behind them (drafted in vain, and not looked at) are no part of the text. Point at a token
# to see why it fell or stood.

# %%
prompt, warm = tokenizer.encode("JULIET:\nO Romeo,"), minimtp.Sampling(temperature=1.0)
minimtp.watch(target, prompt, drafter, sampling=warm, max_new_tokens=60, seed=1)

# %% [markdown]
# ## A drafter without weights
#
# *Prompt lookup* searches the text so far for the newest few tokens, and drafts what followed them the last time.
# First on a literal text: the newest tokens are 7 8, they stood there before, and 9 1 2 came next.


# %%
class Read:
    """What prompt lookup asks of a cache: the tokens it has read."""

    tokens = [7, 8, 9, 1, 2, 3, 7]
    length = len(tokens)


lookup = minimtp.PromptLookup(max_ngram=3)
print(lookup.propose([8], np.zeros((1, 0)), Read, 3, GREEDY, ()).tokens)

# %% [markdown]
# On real text its worth depends on how often the text repeats itself. Greedy text of a tiny model repeats itself a
# lot; drawn text does not.

# %%
ids = tokenizer.encode("ROMEO:\nI")
for temperature in (0, 1):
    for name, each in (("assistant", drafter), ("prompt lookup", lookup)):
        sampling = minimtp.Sampling(temperature=temperature)
        steps = list(minimtp.generate(target, ids, each, sampling=sampling, max_new_tokens=96))
        drafted, accepted = sum(step.drafted for step in steps), sum(step.accepted for step in steps)
        print(f"temperature {temperature}, {name:13}: {drafted} drafted, {96 / len(steps):.2f} tokens a pass")

# %% [markdown]
# ## Try
#
# - `num_draft=8` in the run with coloured fates: do the deep guesses stand?
# - another seed, and `temperature=0.5`: which marks become more frequent?
# - `max_ngram=1` for prompt lookup: it drafts more often. Is it right more often?
#
# The code: `minimtp/drafting.py` (`GemmaAssistant`, `MtpLayer`, `PromptLookup`), and one draft step each in
# `minimtp/gemma4_assistant.py` (`step`) and `minimtp/qwen35_mtp.py` (`read`).
