# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Keeping the law: why does accept/reject leave the distribution untouched?
#
# At temperature 1 a model draws its next token from a *law*, a probability for each token. With drafts, most tokens
# are drawn by somebody else, the drafter, and the target only says yes or no. And yet what comes out has the target's
# law, exactly.
#
# You will see why as areas of bars, take the proof apart into single outcomes, and see which rules in use do not keep
# the law, and what they emit instead.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp import audit, expected
from minimtp.acceptance import RULES
from minimtp.audit import total_variation
from minimtp.display import FATES, GREY, PURPLE

# %%
words = ["the", "a", "my", "thy", "no"]
p = np.array([0.35, 0.30, 0.20, 0.10, 0.05])  # the target's law of the next token
q = np.array([0.20, 0.45, 0.05, 0.20, 0.10])  # the drafter's
accepted, rejected, correction = (FATES[fate].colour for fate in ("accepted", "rejected", "correction"))

# %% [markdown]
# ## Two bar charts
#
# The drafter draws a token d from q. The rule (`rejection`, of 2022 and 2023) keeps it with probability min(1,
# p(d)/q(d)). So token d comes and stays with q(d) · min(1, p(d)/q(d)) = **min(p(d), q(d))**: the green part of both
# charts.
#
# What the drafter gave too much is rejected (left, crossed). What the target is still owed (right, hatched) is as
# much, since both charts sum to 1. So after a rejection the token is drawn from what is owed, the *residual*: p − q
# where that is positive, scaled to sum to 1.

# %%
kept = np.minimum(p, q)
figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.6), sharey=True)
look = {"bottom": kept, "edgecolor": "white"}
axes[0].bar(words, q - kept, color=rejected, hatch="xx", label=f"rejected: {(q - kept).sum():.2f}", **look)
axes[1].bar(words, p - kept, color=correction, hatch="//", label=f"correction: {(p - kept).sum():.2f}", **look)
for ax, name in zip(axes, ("q, the drafter's law", "p, the target's law")):
    ax.bar(words, kept, color=accepted, label=f"accepted, min(p, q): {kept.sum():.2f}")
    ax.set(title=name, xlabel="token", ylabel="probability", ylim=(0, 0.62))
    ax.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Every outcome, one by one
#
# No drawing is needed to know the law of what comes out. There are 5 drafts, and after a rejection 5 corrections: add
# up the chance of every outcome. The result is p, and it is `minimtp.exact_law`.

# %%
owed = np.maximum(p - q, 0) / np.maximum(p - q, 0).sum()  # the residual
outcome = np.zeros((5, 5))  # [draft token, token that comes out]
for d in range(5):
    stands = min(1, p[d] / q[d])
    outcome[d, d] += q[d] * stands
    for t in range(5):
        outcome[d, t] += q[d] * (1 - stands) * owed[t]
law = kept + (q - kept).sum() * owed  # the same, for all tokens at once
assert np.allclose(outcome.sum(0), law) and np.allclose(law, minimtp.exact_law("rejection", p, q))
print("what comes out", law.round(12), "p", p)

# %% [markdown]
# As a picture: each row is a draft token, its cells sum to q; each column is a token that comes out, its cells sum to
# p. The diagonal is acceptance. The rest carries what the drafter has too much of to where the target is owed
# something.

# %%
figure, ax = plt.subplots(figsize=(4.4, 3.2))
image = ax.imshow(outcome, cmap="cividis", vmin=0)
for (d, t), chance in np.ndenumerate(outcome):
    if chance:
        ax.annotate(f"{chance:.3f}", (t, d), ha="center", va="center", color="black" if chance > 0.15 else "white")
ax.set_xticks(range(5), [f"{word}\n{chance:.2f}" for word, chance in zip(words, outcome.sum(0))])
ax.set_yticks(range(5), [f"{word}  {chance:.2f}" for word, chance in zip(words, outcome.sum(1))])
ax.set(xlabel="token that comes out, and its column's sum: p", ylabel="draft token, and its row's sum: q")
figure.colorbar(image, label="probability of the outcome")
plt.show()

# %% [markdown]
# ## With drawn numbers
#
# `accept` takes the laws, a draft, and *uniforms*: numbers between 0 and 1 that decide (test, and last token). Here
# are eight runs of 500 rounds with explicit ones. *Total variation* is half the sum of all differences between two
# laws: 0 for the same law, 1 for laws without a common token.
#
# Beside it a mistake that is easily made: after a rejection, draw from p instead of the residual.

# %%
u = np.random.default_rng(0).random((4000, 3))
right, wrong = np.zeros((2, 4000, 5))  # which token came out
for n, (u_draft, *u_J) in enumerate(u):
    d = minimtp.draw(q, u_draft)
    verdict = minimtp.accept("rejection", np.stack([p, p]), minimtp.Draft([d], q[None]), u_J)
    right[n, d if verdict.accepted else verdict.token] = 1
    wrong[n, d if verdict.accepted else minimtp.draw(p, u_J[1])] = 1
rounds = np.arange(1, 501)  # eight runs of 500, and their mean total variation
shares = (one.reshape(8, 500, 5).cumsum(1) / rounds[:, None] for one in (right, wrong))
apart_right, apart_wrong = (abs(share - p).sum(2).mean(0) / 2 for share in shares)

# %%
floor = total_variation(kept + (q - kept).sum() * p, p)  # the exact law of the mistake
figure, ax = plt.subplots(figsize=(5, 2.5))
ax.loglog(rounds, apart_right, color=accepted, label="corrections from the residual")
ax.loglog(rounds, apart_wrong, "--", color=rejected, label="corrections from p")
ax.axhline(floor, color=rejected, linewidth=0.8)
ax.annotate(f"its exact law: {floor:.3f}", (1.2, floor * 0.9), va="top", color=rejected)
ax.loglog(rounds, rounds**-0.5, ":", color=GREY, label="1 / √rounds")
ax.set(xlabel="rounds", ylabel="total variation of\nfrequencies from p, mean")
ax.legend(frameon=False, loc="lower left")
plt.show()

# %% [markdown]
# ## Nine rules
#
# Engines use different rules. The exact law of each, for a draft drawn from q, against p (outlined). Four are *lossy*
# on purpose: they keep more draft tokens, and pay with the law. `greedy` gives the argmax of p, as at temperature 0.
# `hf-gemma4` is a defect; we come to it.

# %%
settings = {"threshold": {"threshold_acc": 0.5}, "relaxed": {"relaxed_topk": 2, "relaxed_delta": 0.2}}
laws = {rule: minimtp.exact_law(rule, p, q, **settings.get(rule, {})) for rule in RULES}
figure, axes = plt.subplots(3, 3, figsize=(6, 3.3), sharex=True, sharey=True)
figure.supxlabel("token", fontsize=9), figure.supylabel("probability of coming out (outlined: p)", fontsize=9)
for ax, (rule, law) in zip(axes.flat, laws.items()):
    same = total_variation(law, p) < 1e-12
    look = {"color": accepted} if same else {"color": rejected, "hatch": "//"}
    ax.bar(words, law, edgecolor="white", **look)
    ax.bar(words, p, facecolor="none", edgecolor="black")
    ax.set_title(f"{rule}: {'keeps p' if same else f'total var. {total_variation(law, p):.2f}'}", fontsize=8)
# %% [markdown]
# One pair of laws could be luck. Over 200 random pairs, the largest total variation of each rule:

# %%
pairs = np.random.default_rng(0).dirichlet(np.full(5, 0.7), (200, 2))  # of laws p, q
each = {rule: [minimtp.exact_law(rule, *pair, **settings.get(rule, {})) for pair in pairs] for rule in RULES}
worst = {rule: max(map(total_variation, laws, pairs[:, 0])) for rule, laws in each.items()}
figure, ax = plt.subplots(figsize=(6, 2.4))
bars = ax.barh(list(worst), list(worst.values()), color=rejected)
ax.bar_label(bars, ["0: lossless" if value < 1e-12 else f"{value:.2f}" for value in worst.values()], padding=3)
ax.invert_yaxis()
ax.set(xlabel="largest total variation from p, 200 random pairs p, q", xlim=(0, 1.1), ylabel="rule")
plt.show()

# %% [markdown]
# ## A defect that looks like success
#
# Many drafters draft their favourite, the argmax d of q, instead of drawing. Such a draft is a *point mass*: it had
# probability 1, and must be tested as that, with p(d). `hf-gemma4` (transformers 5.8 to 5.23, for Gemma 4) tests it
# as if it had been drawn from q, with min(1, p(d)/q(d)).
#
# Let the drafter get better, from the q above to p itself. Its acceptance climbs to 1. So does the damage: with q = p
# every test passes, and the favourite is all that comes out. (The step near 0.95 is where q's favourite becomes p's.)

# %%
mixes = np.linspace(q, p, 101)  # row by row a better drafter
overlap, best = np.minimum(p, mixes).sum(1), mixes.argmax(1)
plt.figure(figsize=(6, 2.6))
plt.plot(overlap, np.minimum(1, p[best] / mixes.max(1)), "k:", label="hf-gemma4: draft tokens accepted")
for rule, drafts, style, colour in (("hf-gemma4", mixes, "--", rejected), ("rejection", best, "-", accepted)):
    apart = [total_variation(minimtp.exact_law(rule, p, draft), p) for draft in drafts]
    plt.plot(overlap, apart, style, color=colour, label=f"{rule}: total variation from p")
plt.xlabel("how good the drafter is: Σ min(p, q)"), plt.ylabel("share, or total variation")
plt.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.03))
plt.show()

# %% [markdown]
# Live, with a perfect drafter: the target itself, which drafts its favourite four times and says with which law.
# Everything at temperature 1. How many tokens are the target's favourite? (The bonus token after four accepted ones
# is still drawn from p.)


# %%
class Perfect:
    """Drafts the target's own argmax, with the target's own law beside it."""

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        tokens, laws = [new_tokens_N[-1]], []
        for _ in range(num_draft):
            laws.append(warm.law(target.forward(tokens[-1:], cache).logits_TV[0]))
            tokens.append(int(laws[-1].argmax()))
        cache.rollback(num_draft)
        return minimtp.Draft(tokens[1:], soft_KV=np.array(laws))


# %%
target, warm = minimtp.load("tiny-gemma4"), minimtp.Sampling(temperature=1.0)
prompt = target.tokenizer.encode("ROMEO:\n")
for rule in ("rejection", "hf-gemma4"):
    run = minimtp.watch(target, prompt, Perfect(), rule=rule, sampling=warm, max_new_tokens=60, seed=4)
    favourite = np.mean([place.p == max(bar[1] for bar in place.bars) for place in run.places if place.emitted])
    count, of = sum(step.accepted for step in run.steps), sum(step.drafted for step in run.steps)
    print(f"--- {rule}: {count} of {of} accepted, {favourite:.0%} of the tokens are favourites\n{run.text}\n")

# %% [markdown]
# ## More tokens, the same law
#
# A lossless rule can still be better than another. `match` draws from p and keeps the draft if it is equal;
# `rejection` tests each token by itself; `block` tests a draft as a whole, and forgives a token that the target likes
# less for others that it likes more. All three laws of whole rounds are p to the last digit; the tokens a round are
# not the same.

# %%
P, Q, _ = audit.BLOCKS["block of 4"]  # a language of two tokens: prefix -> law
plt.figure(figsize=(5, 2.4))
rules, depths = {"match": ("o", GREY), "rejection": ("s", PURPLE), "block": ("^", accepted)}, [1, 2, 3, 4]
for rule, (marker, colour) in rules.items():
    found = [audit.emitted(rule, P, Q, depth) for depth in depths]
    for depth, law in zip(depths, found):
        assert total_variation(audit.completed(law, P, depth + 1), audit.continuation(P, (), depth + 1)) < 1e-10
    plt.plot(depths, [audit.tokens_per_round(law) for law in found], color=colour, marker=marker, label=rule)
plt.xlabel("draft tokens a round"), plt.ylabel("tokens a round"), plt.xticks(depths), plt.legend(frameon=False)
plt.show()
# %%
drafter = minimtp.load_drafter("auto", target)
text = [token for step in minimtp.generate(target, prompt, sampling=warm, max_new_tokens=80) for token in step.tokens]
report = expected.expected(target, drafter, prompt + text, 4, warm, first=len(prompt))
for rule in rules:
    print(f"{rule:9} {report['rules'][rule]['tokens_per_pass'][-1]:.2f} tokens a pass: tiny-gemma4, four draft tokens")

# %% [markdown]
# ## Try
#
# - `p` and `q` without a common token, or equal: which areas vanish?
# - `"match"` for `"rejection"` in the runs with drawn numbers: the law is the same. How many draft tokens stand?
# - `load_drafter("auto", target, soft=True)` in `Perfect`'s place: how much of the defect does a real drafter show?
#
# The code: `minimtp/acceptance.py` (each rule beside its exact law), `minimtp/audit.py` (`emitted`, `block_law`). In
# a terminal: `minimtp audit`. A dispute settled with it: `docs/oracle.md`.
