# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # When is it faster?
#
# Drafting costs time and saves time. In a **round** a **drafter**, a small model, proposes k **draft tokens**. The
# **target**, the model whose text is wanted, checks them all in one **pass** (one run over some tokens) and keeps
# those before the first that it rejects. This notebook weighs both sides: tokens a pass, and what a round costs.
#
# You will see a formula and where it is only a summary, a map of speed-ups with the best k, this machine's own
# measurements on it, and why a model that uses only a part of its weights for each token gains less.

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
# adds one token of its own: a correction there, or, where all stand, a **bonus token**. So a round emits at least one
# token and at most k + 1. Marks: + accepted, x rejected, . not looked at.
#
# Say that each draft token stands with the same chance a, its **acceptance**, whatever came before. Draft token j
# counts only if all before it stand too: chance aʲ. So a round emits 1 + a + a² + … + aᵏ tokens on average, which is
# (1 − aᵏ⁺¹) / (1 − a). Three ways to the same number: many random rounds, the sum, and the package's formula. Then
# the formula for other a and k: each further draft token adds less, and no k gets beyond 1 / (1 − a).


# %%
def tokens_of_round(stands):
    """Tokens of one round; stands: for each draft token, whether the target would accept it."""
    accepted = 0
    while accepted < len(stands) and stands[accepted]:
        accepted += 1
    return accepted + 1


for stands in ([True, True, False, True], [False, True, True, True], [True, True, True, True]):
    accepted = tokens_of_round(stands) - 1
    marks = ("+" * accepted + "x...")[:4]  # the first that is not accepted is rejected, the rest not looked at
    print(marks, "->", accepted + 1, "tokens")

# %%
a, k, random = 0.8, 4, np.random.default_rng(0)
rounds = [tokens_of_round(random.random(k) < a) for _ in range(20_000)]
by_sum = sum(a**j for j in range(k + 1))
formula = audit.expected_tokens(a, k)
print(f"random rounds {np.mean(rounds):.2f}, the sum {by_sum:.4f}, the formula {formula:.4f}")
assert abs(by_sum - formula) < 1e-12 and abs(np.mean(rounds) - formula) < 0.05

# %%
ks = np.arange(16)
plt.figure(figsize=(7, 2.6), dpi=80)
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
# The whole map, for three cost ratios. Black lines are equal speed-ups; left of the line marked 1.0 drafting makes it
# *slower*. White dots are the best k of 1 to 10 for each acceptance, where any pays. The cheaper the drafter, the
# longer the best drafts. With k = 1 drafting pays exactly where a > c; a dear drafter then gains little.


# %%
def speed_up(a, k, c):
    return audit.expected_tokens(a, k) / given_costs(c, k)[-1]


alphas, ks = np.linspace(0.05, 1, 39), np.arange(1, 11)
figure, panels = plt.subplots(1, 3, figsize=(10, 3.3), sharey=True, dpi=72)
for axes, c in zip(panels, (0.05, 0.15, 0.4)):
    image = pictures.surface(axes, alphas, ks, speed_up, (0.5, 1, 1.5, 2, 3, 4), 5, c)
    axes.set(xlabel="acceptance a", ylabel="draft tokens, k", title=f"cost ratio c = {c}", xlim=(0.05, 1.06))
    assert all((speed_up(a, 1, c) > 1) == (a > c) for a in alphas if abs(a - c) > 1e-9)
figure.colorbar(image, ax=panels, label="speed-up (times plain decoding)")
plt.show()

# %% [markdown]
# ## A real pair
# The bundled Gemma with its drafter, called assistant, and the bundled Qwen with its drafter, called MTP layer, on
# text that they were not trained on; **greedy**: always the likeliest token; k = 4. First what does not depend on the
# machine: how many draft tokens a round kept. Grey is what one fixed chance a would give. For a take the share that
# stood of the draft tokens looked at.


# %%
def bundled_pair(name):
    """A bundled target with its drafter and three prompts of 40 tokens."""
    target = minimtp.load(name)
    text = target.tokenizer.encode(bundled("heldout.txt").read_text(encoding="utf-8"))
    prompts = [text[i : i + 40] for i in (0, 500, 1000)]
    return SimpleNamespace(target=target, drafter=minimtp.load_drafter("auto", target), prompts=prompts)


pairs = {"Gemma": bundled_pair("tiny-gemma4"), "Qwen": bundled_pair("tiny-qwen35")}
for pair in pairs.values():
    runs = [list(minimtp.generate(pair.target, ids, pair.drafter, 4, max_new_tokens=65)) for ids in pair.prompts]
    pair.steps = [step for run in runs for step in run[1:]]  # a run's first step only reads the prompt

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, dpi=80)
for axes, (name, pair) in zip(panels, pairs.items()):
    kept = np.array([step.accepted for step in pair.steps if step.drafted == 4])
    a = pair.a = kept.sum() / (kept + (kept < 4)).sum()  # accepted, of all that were accepted or rejected
    axes.bar(np.arange(5) - 0.2, np.bincount(kept, minlength=5) / len(kept), 0.4, color=GREEN, label="counted")
    law = [a**n * (1 - a if n < 4 else 1) for n in range(5)]
    axes.bar(np.arange(5) + 0.2, law, 0.4, color=GREY, hatch="//", label="if each stood with chance a")
    axes.set(xlabel="draft tokens kept in a round", title=f"{name}, {len(kept)} rounds: a = {a:.2f}")
panels[0].set_ylabel("share of the rounds"), panels[0].legend(frameon=False)
plt.show()

# %% [markdown]
# Qwen's counts have more at both ends than one fixed chance gives: its draft tokens tend to stand or fall together. So
# one number a is a summary, and so few rounds make a noisy one. `expected` takes the noise out: it reads a text that
# the target wrote, begins a round at *every* position, and adds up what a run over that text must do. For greedy
# decoding that is exact, so it can be checked: count the passes of real runs.

# %%
for name, pair in pairs.items():
    prompt = pair.prompts[0]
    own = [*prompt, *bench.tokens_of(minimtp.generate(pair.target, prompt, max_new_tokens=49))]
    pair.runs = expected(pair.target, pair.drafter, own, num_draft=6, first=len(prompt))["rules"]["argmax"]["run"]
    for k in (2, 4, 6):
        counted = len(list(minimtp.generate(pair.target, prompt, pair.drafter, num_draft=k, max_new_tokens=49))) - 1
        print(f"{name:6} k = {k}: expected {pair.runs[k - 1]['passes']:.1f} passes, counted {counted}")
        assert abs(pair.runs[k - 1]["passes"] - counted) < 1e-9

# %% [markdown]
# ## This machine
# Now the times, which are this machine's: they differ from run to run. `measured_costs` times draft steps, and passes
# over one token and over more; c is the slope of a straight line through the costs of a round. For models this small
# a draft step costs a good part of a pass of the target, so c is large and little is gained. Beside it real runs,
# drafted and plain in turn, the median of five. Between the last two columns lie the loop's own work and whatever else
# the machine was doing. The picture has the same runs on the map of their own c: a square is a run, the number right
# of it its timed speed-up, to be compared with the lines around the square.

# %% tags=["varies"]
for name, pair in pairs.items():
    costs = measured_costs(pair.target, pair.drafter, pair.prompts[0], 6)
    pair.c = np.polyfit(range(7), [1, *costs], 1)[0]  # slope of the cost over k = 0 … 6
    pair.timed = {}
    print(f"{name}: c = {pair.c:.2f}\n  k  tokens a pass  cost of a round  their quotient  runs, timed")
    for k in (1, 2, 4):
        tokens = pair.runs[k - 1]["tokens_per_pass"]
        pair.timed[k] = bench.rates(pair.target, pair.drafter, pair.prompts[:1] * 5, k, 49)["speedup"]
        print(f"  {k}{tokens:15.2f}{costs[k - 1]:17.2f}{tokens / costs[k - 1]:16.2f}{pair.timed[k]:13.2f}")

# %% tags=["varies"]
figure, panels = plt.subplots(1, 2, figsize=(9, 3.3), sharey=True, dpi=72)
for axes, (name, pair) in zip(panels, pairs.items()):
    image = pictures.surface(axes, alphas, ks, speed_up, (0.4, 0.7, 1, 1.3, 1.6, 2), 2.5, pair.c)
    axes.plot([pair.a] * 3, list(pair.timed), "s", color=ORANGE, mec="black", ms=7, label="runs, timed")
    for k, timed in pair.timed.items():
        axes.annotate(f"{timed:.2f}", (1.03, k), va="center")
    axes.set(xlabel="acceptance a", title=f"{name}: c = {pair.c:.2f}", xlim=(0.05, 1.17), ylim=(0.7, 10.3))
figure.colorbar(image, ax=panels, label="speed-up (times plain decoding)")
panels[0].set_ylabel("draft tokens, k"), panels[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Dense models, and mixtures of experts
# On a GPU a large model mostly waits for its weights to arrive from memory, so count bytes. A **dense** model reads
# all its weights in every pass, over one token or over five. A **mixture of experts** has many feed-forward networks,
# its experts, and a small matrix, the router, that chooses a few for each token: five tokens need the *union* of
# their choices. First by counting, all choices of 3 tokens that take 2 of 6 experts each:

# %%
choices = list(combinations(range(6), 2))
unions = [len(set().union(*tokens)) for tokens in product(choices, repeat=3)]
layer = SimpleNamespace(experts=SimpleNamespace(count=6, top_k=2))
formula = 6 * (1 - (1 - 2 / 6) ** 3)  # an expert is left out by all three with chance (1 - 2/6)³
print(f"{len(unions):,} cases, mean union {np.mean(unions):.4f} experts; formula {formula:.4f}")
assert abs(np.mean(unions) - formula) < 1e-12
assert abs(6 * device_bytes.share_of_experts(layer, 3) - formula) < 1e-12

# %% [markdown]
# That takes every choice as equally likely and tokens as independent: an assumption. A trained router need not do
# either; where neighbours in a text choose alike, the union is smaller. Under this assumption, the bytes of weights
# that a pass reads, from the published configurations in Q4_0, about 4.5 bits a weight. An embedding that is only
# looked up is left out, and so is what a model keeps of the text:


# %%
def pass_bytes(name, width):
    """Bytes of the weights that a pass over `width` tokens reads, in Q4_0."""
    family, config = published_config(name)
    read = dict(family.tensors(config))
    if "lm_head" in read:  # where there is none, the embedding is the head as well, and all of it is read
        del read["embed_tokens"]
    parts = memory.stored_parts(read, "q4_0")
    if config.experts:
        parts["experts", "Q4_0"] *= device_bytes.share_of_experts(config, width)
    return sum(parts.values())


# %%
models = {"gemma-4-31b": TARGET, "qwen3.6-27b": SKY, "gemma-4-26b-a4b": VERMILLION, "qwen3.6-35b-a3b": PURPLE}
plt.figure(figsize=(7, 3), dpi=80)
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
# **First table: by data sheet.** An RTX 3090 is published to read 936 GB a second. That over the bytes of a pass is a
# *ceiling* of passes a second, no measurement: the project has run nothing on one. Draft steps count by their bytes
# too; the 26B's assistant in bf16 (16 bits a weight) is a third of what its target reads for a token. With a = 0.8.
#
# **Second table: measured by others**, none of it by this project. LostRuins/koboldcpp #2262 (June 2026): Gemma 4 12B
# in 4 bits on an RTX 3060 with llama.cpp; its "draft rate" is accepted over drafted. noonghunna/club-3090 #68 (May
# 2026): 31B int4 on two RTX 3090 with vLLM, writing code. Tokens a pass over the speed-up is the cost of a round, and
# from it follows the c that explains it.

# %%
rate, a = device_bytes.CARDS["RTX 3090"][1], 0.8
for name, format in product(("gemma-4-31b", "gemma-4-26b-a4b"), ("bf16", "q8_0")):
    family, config = published_config(f"{name}-assistant")
    step = memory.stored_bytes(family.tensors(config), format)  # bytes of a draft step: all of the assistant
    alone = pass_bytes(name, 1)
    costs = [(pass_bytes(name, k + 1) + k * step) / alone for k in range(9)]
    gains = [audit.expected_tokens(a, k) / cost for k, cost in enumerate(costs)]
    print(f"{name}, assistant in {format}: at most {rate / alone:.0f} plain tokens/s, its step c = {step / alone:.2f}")
    gained = ", ".join(f"k = {k}: {gains[k]:.2f}" for k in (1, 2, 4, 8))
    print(f"    speed-up by bytes at {gained}; best of 1 … 8: k = {np.argmax(gains[1:]) + 1}")

# %%
plain = 36.00  # tokens a second; below: draft tokens k -> (tokens a second, draft rate)
published = {1: (47.77, 0.47), 2: (45.54, 0.30), 3: (44.35, 0.23), 4: (41.86, 0.20), 8: (30.89, 0.11)}
rows = [("koboldcpp #2262", k, rate / plain, 1 + k * accepted) for k, (rate, accepted) in published.items()]
rows.append(("club-3090 #68", 4, 142.25 / 61, 1 + 0.92 + 0.79 + 0.68 + 0.59))  # shares of rounds that kept 1, 2, 3, 4
for source, k, gain, tokens in rows:
    cost = tokens / gain
    print(f"{source:16} k = {k}: {gain:.2f} times as fast, {tokens:.2f} tokens a pass: ", end="")
    print(f"cost {cost:.2f}, c = {(cost - 1) / k:.2f}")

# %% [markdown]
# On the 3060 c stays between 0.11 and 0.15, so a straight line is a fair picture of its costs. With an acceptance near
# a half, one draft token is best, and eight are slower than none. On the two 3090 most drafts stood, so four pay,
# although c is 0.18 where bytes alone say 0.05; what the rest is, these numbers do not tell. So drafting is faster
# where **tokens a pass are more than a round costs: measure a and c, then look at the map.**
#
# ## Try
# - Call `speed_up` with your own engine's acceptance and cost ratio. Which k is best?
# - `measured_costs(pair.target, minimtp.PromptLookup(), pair.prompts[0], 6)`: that drafter has no weights, it looks for
#   the last tokens earlier in the text. What does a draft token cost now, and from which a would one pay?
# - `minimtp acceptance` prints expected acceptance and the best k for a text; `minimtp bench` times passes by width.
#
# In the code: `minimtp/audit.py` (`expected_tokens`), `minimtp/expected.py` (`expected`, `measured_costs`,
# `with_costs`), `minimtp/bench.py` (`rates`, `pass_costs`), `minimtp/device_bytes.py` (`share_of_experts`).
