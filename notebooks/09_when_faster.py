# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # When is it faster?
#
# Drafting costs time and saves time. A **drafter** proposes k **draft tokens**, the **target** verifies all of them
# in one **pass**, and keeps the first ones up to the first that it rejects. This notebook weighs both sides: tokens a
# pass, and what a pass with drafts costs.
#
# You will see a formula and where it stops being true, a speed-up surface with its best k, this machine's own
# measurements on it, and why a mixture of experts gains less than a dense model.

# %%
from itertools import combinations, product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp import audit, bench, device_bytes, memory
from minimtp.display import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, TARGET, VERMILLION
from minimtp.expected import expected, given_costs, measured_costs
from minimtp.loading import bundled, published_config

# %% [markdown]
# ## Tokens a pass
# One round with k = 4. The target accepts draft tokens from the first on and stops at the first it rejects. Then it
# adds one token of its own: a correction there, or, where all stand, a bonus token. So a round emits at least one
# token and at most k + 1. Marks: + accepted, x rejected, . not looked at.
#
# Say that each draft token stands with the same chance a, its **acceptance**, whatever came before. Draft token j
# counts only if all before it stand too: chance aʲ. So a round emits 1 + a + a² + … + aᵏ tokens on average, which is
# (1 − aᵏ⁺¹) / (1 − a). Three ways to the same number: many random rounds, the sum, and the package's formula.


# %%
def emitted(stands):
    """Tokens of one round, told of each draft token whether the target would accept it."""
    return next((place for place, kept in enumerate(stands) if not kept), len(stands)) + 1


for stands in ([True, True, False, True], [False, True, True, True], [True, True, True, True]):
    accepted, rest = emitted(stands) - 1, len(stands) - emitted(stands)  # rest: after the first rejected one
    print("+" * accepted + "x" * (rest >= 0) + "." * rest, "->", accepted + 1, "tokens")
a, k, random = 0.8, 4, np.random.default_rng(0)
rounds, by_sum = [emitted(random.random(k) < a) for _ in range(20_000)], 1 + sum(a**j for j in range(1, k + 1))
print(f"random rounds {np.mean(rounds):.2f}, the sum {by_sum:.4f}, the formula {audit.expected_tokens(a, k):.4f}")
assert abs(by_sum - audit.expected_tokens(a, k)) < 1e-12 and abs(np.mean(rounds) - by_sum) < 0.05

# %% [markdown]
# More draft tokens always mean more tokens a pass, and each one adds less than the one before. No k gets beyond 1 /
# (1 − a).

# %%
ks = np.arange(16)
plt.figure(figsize=(7, 2.6))
for a, colour, mark in zip((0.5, 0.7, 0.8, 0.9), (VERMILLION, ORANGE, GREEN, BLUE), "osD^"):
    plt.plot(ks, [audit.expected_tokens(a, k) for k in ks], mark + "-", color=colour, ms=4)
    plt.annotate(f"a = {a}, at most {1 / (1 - a):.1f}", (15.2, audit.expected_tokens(a, 15)), va="center", color=colour)
plt.gca().set(xlabel="draft tokens a round, k", ylabel="tokens a pass", xlim=(0, 19), xticks=ks[::3])
plt.title("tokens a pass, each draft token accepted with chance a")
plt.show()

# %% [markdown]
# ## What a round costs
# Count time in plain passes: a pass over one token costs 1. Each draft token costs twice: the drafter's step, and one
# more token in the verification pass. Call the sum of both the **cost ratio** c. Then a round costs 1 + c k, and the
# speed-up is tokens over cost.
#
# The whole surface, for three cost ratios. Black lines are equal speed-ups; left of the line marked 1.0 drafting
# makes it *slower*. White dots are the best k for each acceptance. A cheap drafter allows long drafts; a dear one
# pays only where nearly all is accepted. With k = 1 drafting pays exactly where a > c.


# %%
def speed_up(a, k, c):
    return audit.expected_tokens(a, k) / given_costs(c, k)[-1]


alphas, ks = np.linspace(0.05, 0.95, 37), np.arange(1, 11)
figure, panels = plt.subplots(1, 3, figsize=(10, 3.3), sharey=True, dpi=72)
for axes, c in zip(panels, (0.05, 0.15, 0.4)):
    image = pictures.surface(axes, alphas, ks, speed_up, (0.5, 1, 1.5, 2, 3, 4), 5, c)
    axes.set(xlabel="acceptance a", ylabel="draft tokens, k", title=f"cost ratio c = {c}", ylim=(0.5, 10))
    assert all((speed_up(a, 1, c) > 1) == (a > c) for a in alphas if abs(a - c) > 1e-9)
figure.colorbar(image, ax=panels, label="speed-up (times plain decoding)")
plt.show()

# %% [markdown]
# ## A real pair
# The bundled Gemma and its assistant, the bundled Qwen and its MTP layer, greedy, k = 4, on held-out text. First what
# does not depend on the machine: how many draft tokens a round kept. Grey is what one fixed chance a would give, a
# being the share of tests passed.


# %%
def load_pair(name):
    """A bundled target with its drafter, three held-out prompts, and the steps of greedy runs from them with k = 4."""
    target = minimtp.load(name)
    text = target.tokenizer.encode(bundled("heldout.txt").read_text(encoding="utf-8"))
    drafter, prompts = minimtp.load_drafter("auto", target), [text[i : i + 40] for i in (0, 500, 1000)]
    runs = [list(minimtp.generate(target, ids, drafter, num_draft=4, max_new_tokens=65))[1:] for ids in prompts]
    return SimpleNamespace(
        target=target, drafter=drafter, prompts=prompts, steps=[step for run in runs for step in run]
    )


pairs = {"Gemma": load_pair("tiny-gemma4"), "Qwen": load_pair("tiny-qwen35")}

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True)
for axes, (name, pair) in zip(panels, pairs.items()):
    kept = np.array([step.accepted for step in pair.steps if step.drafted == 4])
    a = pair.a = kept.sum() / (kept + (kept < 4)).sum()  # passed, of all tests made
    axes.bar(np.arange(5) - 0.2, np.bincount(kept, minlength=5) / len(kept), 0.4, color=GREEN, label="counted")
    law = [a**n * (1 - a if n < 4 else 1) for n in range(5)]
    axes.bar(np.arange(5) + 0.2, law, 0.4, color=GREY, hatch="//", label="if every test passed with chance a")
    axes.set(xlabel="draft tokens kept", title=f"{name}: a = {a:.2f}, {np.mean(kept) + 1:.2f} tokens a pass")
panels[0].set_ylabel("share of the rounds"), panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Qwen's counts have more at both ends: some places are easy and all four stand, some are hard and none does. So one
# number a is a summary, and a short run is a noisy one. `expected` takes the noise out: it reads a text that the
# target wrote, begins a round at *every* position, and sums up from the laws what a run must do. For greedy decoding
# that is exact, so it can be checked: count the passes of real runs.

# %%
for name, pair in pairs.items():
    prompt = pair.prompts[0]
    own = [*prompt, *bench.tokens_of(minimtp.generate(pair.target, prompt, max_new_tokens=49))]
    pair.runs = expected(pair.target, pair.drafter, own, num_draft=6, first=len(prompt))["rules"]["argmax"]["run"]
    for k in (2, 4, 6):
        counted = len(list(minimtp.generate(pair.target, prompt, pair.drafter, num_draft=k, max_new_tokens=49))) - 1
        print(f"{name:6} k = {k}: expected {pair.runs[k - 1]['passes']:.1f} passes, counted {counted}", flush=True)
        assert abs(pair.runs[k - 1]["passes"] - counted) < 1e-9

# %% [markdown]
# ## This machine
# Now the times, which are yours: they differ from run to run. `measured_costs` times draft steps, and passes of each
# width. For models this small a draft step costs a good part of a pass of the target, so c is large, and little can
# be gained whatever is accepted. Beside it real runs, drafted and plain in turn. Between the two columns lie the
# loop's own work and whatever else the machine was doing. The picture has the same runs on the surface of their own
# c: each number is a timed speed-up, to be compared with the lines around it.

# %% tags=["varies"]
for name, pair in pairs.items():
    costs = measured_costs(pair.target, pair.drafter, pair.prompts[0], 6, repeats=6)
    pair.c, pair.timed = np.polyfit(range(7), [1, *costs], 1)[0], {}
    print(f"{name}: c = {pair.c:.2f}\n  k  tokens a pass  cost of a round  their quotient  runs, timed")
    for k in (1, 2, 4):
        tokens = pair.runs[k - 1]["tokens_per_pass"]
        pair.timed[k] = bench.rates(pair.target, pair.drafter, pair.prompts[:1], k, 49)["speedup"]
        print(f"  {k}{tokens:15.2f}{costs[k - 1]:17.2f}{tokens / costs[k - 1]:16.2f}{pair.timed[k]:13.2f}")

# %% tags=["varies"]
figure, panels = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True, dpi=72)
label = {"color": "black", "ha": "right", "va": "center", "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
for axes, (name, pair) in zip(panels, pairs.items()):
    image = pictures.surface(axes, alphas, ks, speed_up, (0.4, 0.7, 1, 1.3, 1.6, 2), 5, pair.c)
    axes.plot([pair.a] * 3, list(pair.timed), "s", color=ORANGE, mec="black", ms=7, label="runs, timed")
    for k, timed in pair.timed.items():
        axes.annotate(f"{timed:.2f}", (pair.a - 0.04, k), **label)
    axes.set(xlabel="acceptance a", ylabel="draft tokens, k", title=f"{name}: c = {pair.c:.2f}", ylim=(0.5, 10))
figure.colorbar(image, ax=panels, label="speed-up (times plain)"), panels[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Dense models, and mixtures of experts
# A large model on a GPU waits for its weights to arrive from memory. A dense pass over five tokens reads the same
# weights as a pass over one, so its tokens are nearly free. A **mixture of experts** has many feed-forward networks,
# its experts, and each token uses a few: five tokens need the *union* of their choices. First by counting, all
# choices of 3 tokens that take 2 of 6 experts each:

# %%
choices = list(combinations(range(6), 2))
unions = [len(set().union(*tokens)) for tokens in product(choices, repeat=3)]
layer = SimpleNamespace(experts=SimpleNamespace(count=6, top_k=2))
formula = 6 * (1 - (1 - 2 / 6) ** 3)  # an expert is left out by all three with chance (1 - 2/6)³
print(f"{len(unions):,} cases, mean union {np.mean(unions):.4f} experts; formula {formula:.4f}")
assert abs(np.mean(unions) - formula) < 1e-12
assert abs(6 * device_bytes.share_of_experts(layer, 3) - formula) < 1e-12

# %% [markdown]
# That takes every choice as equally likely and tokens as independent: an assumption. A trained router need not be
# either; where neighbours in a text choose alike, the union is smaller. Under this assumption, the bytes of weights
# that a pass reads, from the published configurations in Q4_0 (an embedding that is only looked up is left out, and
# so are keys and values):


# %%
def pass_bytes(name, width):
    family, config = published_config(name)
    table = family.tensors(config)
    read = {place: entry for place, entry in table.items() if place != "embed_tokens" or "lm_head" not in table}
    parts = memory.stored_parts(read, "q4_0")
    share = device_bytes.share_of_experts(config, width) if config.experts else 1
    return sum(size * (share if key == ("experts", "Q4_0") else 1) for key, size in parts.items())


models = {"gemma-4-31b": TARGET, "qwen3.6-27b": SKY, "gemma-4-26b-a4b": VERMILLION, "qwen3.6-35b-a3b": PURPLE}

# %%
plt.figure(figsize=(7, 2.6))
for (name, colour), mark in zip(models.items(), "osD^"):
    sizes = np.array([pass_bytes(name, width) for width in range(1, 10)]) / 1e9
    plt.plot(range(1, 10), sizes, mark + "-", color=colour, ms=4)
    plt.annotate(name, (9.2, sizes[-1]), va="center", color=colour)
    print(f"{name:16} 1 token {sizes[0]:6.2f} GB   5 tokens {sizes[4]:6.2f} GB, {sizes[4] / sizes[0]:.2f} times")
plt.gca().set(xlabel="tokens in the pass", ylabel="weights (GB)", xlim=(1, 11.5), ylim=(0, 19), xticks=range(1, 10))
plt.title("bytes of weights a pass (experts: even, independent choices)")
plt.show()

# %% [markdown]
# ## Cards
# **By data sheet.** An RTX 3090 is published to read 936 GB a second. That over the bytes of a pass is a *ceiling* of
# passes a second, no measurement: the project has run nothing on one. Draft steps count by their bytes too; the 26B's
# assistant in bf16 is a third of what its target reads for a token. With a = 0.8:
#
# **Measured by others**, none of it by this project. LostRuins/koboldcpp #2262 (June 2026): Gemma 4 12B QAT on an RTX
# 3060 with llama.cpp; its "draft rate" is accepted over drafted. noonghunna/club-3090 #68 (May 2026): 31B int4 on two
# RTX 3090 with vLLM, code. Tokens a pass over the speed-up is the cost of a round, and from it follows the c that
# explains it.

# %%
rate, a = device_bytes.CARDS["RTX 3090"][1], 0.8
for name, format in product(("gemma-4-31b", "gemma-4-26b-a4b"), ("bf16", "q8_0")):
    family, config = published_config(f"{name}-assistant")
    step, alone = memory.stored_bytes(family.tensors(config), format), pass_bytes(name, 1)
    costs = [(pass_bytes(name, k + 1) + k * step) / alone for k in range(9)]
    gains = [audit.expected_tokens(a, k) / cost for k, cost in enumerate(costs)]
    print(f"{name}, assistant in {format}: at most {rate / alone:.0f} plain tokens/s, its step c = {step / alone:.2f}")
    gained = ", ".join(f"k = {k}: {gains[k]:.2f}" for k in (1, 2, 4, 8))
    print(f"    speed-up by bytes at {gained}; best of 1 … 8: k = {np.argmax(gains[1:]) + 1}")

# %%
plain, published = 36.00, {1: (47.77, 0.47), 2: (45.54, 0.30), 3: (44.35, 0.23), 4: (41.86, 0.20), 8: (30.89, 0.11)}
rows = [("koboldcpp #2262", k, rate / plain, 1 + k * accepted) for k, (rate, accepted) in published.items()]
rows.append(("club-3090 #68", 4, 142.25 / 61, 1 + 0.92 + 0.79 + 0.68 + 0.59))  # shares of rounds that kept 1, 2, 3, 4
for source, k, gain, tokens in rows:
    cost = tokens / gain
    print(f"{source:16} k = {k}: {gain:.2f} times as fast, {tokens:.2f} tokens a pass: ", end="")
    print(f"cost {cost:.2f}, c = {(cost - 1) / k:.2f}")

# %% [markdown]
# On the 3060 one c of 0.11 to 0.15 explains all five rows. With an acceptance near a half, one draft token is best,
# and eight are slower than none. On the two 3090 most drafts stood, so four pay, although c is larger than the bytes
# say; what the rest is, these numbers do not tell. That is the answer: **measure a and c, then look at the surface.**
#
# ## Try
# - Call `speed_up` with your own engine's acceptance and cost ratio. Which k is best?
# - Take the drafter `minimtp.PromptLookup()` for a pair: its steps cost almost nothing. What does its acceptance have
#   to be?
# - `minimtp acceptance` prints expected acceptance and the best k for a text; `minimtp bench` times passes by width.
#
# In the code: `minimtp/audit.py` (`expected_tokens`), `minimtp/expected.py` (`expected`, `measured_costs`,
# `with_costs`), `minimtp/bench.py` (`rates`, `pass_costs`), `minimtp/device_bytes.py` (`share_of_experts`).
