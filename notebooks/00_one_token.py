# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # One token, all the way: what happens between a prompt and the next token?
#
# A language model reads a prompt and says, for every token it knows, how likely that one comes next. This notebook
# follows one prompt through a small Gemma 4 that comes with the project: text, ids, vectors, five layers, scores,
# probabilities, one draw. You will see each stage as numbers and as a picture, and check it against the package.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp.display import GREEN, GREY, ORANGE, SKY, TARGET

target = minimtp.load("tiny-gemma4", keep="dense")  # dense: the weights as plain float arrays
prompt = "KATHARINA:\nI know not what you"

# %% [markdown]
# ## Text becomes ids
#
# A *token* is a piece of text from a fixed list, the *vocabulary*. The tokenizer cuts the text into such pieces; the
# model sees only their numbers, the *ids*. `▁` stands for a space, and `<bos>` marks the beginning. Frequent pieces
# are whole words; a rare name is cut into several.


# %%
def piece(id):
    return target.tokenizer.token(int(id)).replace("\n", "\\n")


ids = target.tokenizer.encode(prompt)
fig, ax = plt.subplots(figsize=(8, 1.1))
pictures.boxes(ax, [f"{piece(id)}\n{id}" for id in ids], [SKY, "white"] * len(ids))
ax.set_title(f"{len(prompt)} characters, {len(ids)} tokens: the piece, and its id below it", loc="left", fontsize=9)
print(f"the vocabulary has {target.config.vocab_size:,} tokens")

# %% [markdown]
# ## Ids become vectors
#
# The *embedding* is a table with one row for each token. Looking a row up is the same as multiplying by a row of
# zeros with a single 1. First by hand, with four tokens of width 3; then in the model, whose rows have width 256, and
# which multiplies what it looks up by √256 = 16.

# %%
table_VD = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
looked_up_TD = np.array([table_VD[id] for id in (2, 0, 2)])
one_hot_TV = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
print(looked_up_TD, "\nthe same by a product:", np.array_equal(looked_up_TD, one_hot_TV @ table_VD))

config, params = target.config, target.params
x_TD = params.embed_tokens[ids] * np.sqrt(np.float32(config.hidden_size))
print("the model's table:", params.embed_tokens.shape, " the prompt as vectors:", x_TD.shape)
print("equal to the package's:", np.array_equal(x_TD, target.embed(ids)))

# %% [markdown]
# ## Five layers, one running sum
#
# Each layer takes the vectors (the *residual*), and adds to them twice: first what *attention* makes, which looks at
# the tokens before, then what an *MLP* makes (matrix products with a nonlinear function between them), which looks
# at one position alone. Gemma *norms* both before it adds them: a vector is divided by its root mean square, and each
# of its numbers multiplied by a trained weight. The sum is multiplied by the layer's scale. `taps` names points of
# the pass whose values are to be kept.

# %%
from minimtp.layers import rms_norm

vector = np.array([3.0, -4.0])
by_hand = vector / np.sqrt((3.0**2 + 4.0**2) / 2)
print("norm by hand:", by_hand.round(4), " equal to the package's:", np.allclose(by_hand, rms_norm(vector)))

layers = range(len(config.layers))
taps = [f"layer.{i}.{part}" for i in layers for part in ("in", "attn", "mlp", "out")]
out = target.forward(ids, target.new_cache(), taps=["embed", *taps, "final_norm"])
print("one pass kept", len(out.taps), "values, each", out.taps["layer.0.out"].shape, "= positions × width")
print("logits:", out.logits_TV.shape, "= positions × vocabulary")

# %% [markdown]
# The sum of layer 0, compared with what the layer put out. Then, for every layer, how long the four vectors are at the
# last position. A `sliding` layer attends to the nearest tokens only, a `full` one to all before.


# %%
def parts(i):
    w, eps = params.layers[i], config.rms_norm_eps
    attention_TD = rms_norm(out.taps[f"layer.{i}.attn"], w.post_attention_layernorm, eps)
    mlp_TD = rms_norm(out.taps[f"layer.{i}.mlp"], w.post_feedforward_layernorm, eps)
    return out.taps[f"layer.{i}.in"], attention_TD, mlp_TD, out.taps[f"layer.{i}.out"]


x_TD, attention_TD, mlp_TD, out_TD = parts(0)
scaled_TD = (x_TD + attention_TD + mlp_TD) * params.layers[0].layer_scalar
print("in + attention + MLP, scaled, is out:", np.allclose(scaled_TD, out_TD, rtol=1e-5, atol=1e-5))

lengths_LP = np.array([[np.linalg.norm(part_TD[-1]) for part_TD in parts(i)] for i in layers])
print(f"a sliding layer attends to {config.sliding_window} tokens, its own included")

# %%
looks = {"comes in": (GREY, ""), "attention adds": (SKY, "//"), "MLP adds": (ORANGE, ".."), "goes out": (TARGET, "")}
fig, ax = plt.subplots()
for n, (values, (name, (colour, hatch))) in enumerate(zip(lengths_LP.T, looks.items())):
    ax.bar(np.arange(5) + 0.2 * n - 0.3, values, 0.2, label=name, color=colour, hatch=hatch, edgecolor="white")
names = [f"{i}: {config.layers[i].kind}\n× {float(params.layers[i].layer_scalar[0])}" for i in layers]
ax.set_xticks(layers, names)
ax.set(xlabel="layer, and its scale", ylabel="Euclidean norm", title=f"The last position, {piece(ids[-1])!r}")
legend = ax.legend()
naive, true = lengths_LP[0, :3].sum() * params.layers[0].layer_scalar[0], lengths_LP[0, 3]
print(f"layer 0: the three lengths added and scaled {naive:.0f}, the sum's length {true:.0f}")

# %% [markdown]
# The residual grows from layer to layer. The lengths do not add up as plain numbers, because the parts point in
# different directions.
#
# ## The last vector becomes a law
#
# The last vector is normed and multiplied with every row of the embedding: one score for each token, a *logit*. Gemma
# squashes them smoothly into (−30, 30) (*softcap*). This last step is the model's *head*. The softmax makes
# probabilities of the logits, and such a list is called a *law* here; `p` is the law of the *target*, the model that
# we ask (in later notebooks a second, smaller one guesses for it). In the package, `Sampling` says how logits become
# a law. First by hand, for four tokens.

# %%
logits = [2.0, 0.5, -1.0, 0.5]
total = 0.0
for z in logits:
    total += np.exp(z)
p = [np.exp(z) / total for z in logits]
print(np.round(p, 4), "sum", round(sum(p), 12))
print("equal to the package's:", np.allclose(p, minimtp.Sampling().law(np.array(logits)), rtol=1e-12))

# %%
p_V = minimtp.Sampling().law(out.logits_TV[-1])
best = p_V.argsort()[::-1][:10]
fig, ax = plt.subplots()
marks = ax.bar(range(10), p_V[best], color=TARGET)
ax.bar_label(marks, fmt="%.3f", fontsize=8)
ax.set_xticks(range(10), [piece(id) for id in best])
ax.set(
    xlabel="next token", ylabel="probability p", title=f"After …{prompt[-18:]!r}: the ten most likely of {len(p_V):,}"
)
print(f"these ten have {p_V[best].sum():.0%} of the probability")

# %% [markdown]
# ## How the guess forms
#
# Nothing keeps us from giving the head an earlier layer's vector. This is called the *logit lens*. The model was never
# trained to make sense there, but it shows where the guess changes. On the last layer it must give `p` itself.

# %%
from minimtp.layers import softcap


def lens(x_TD):
    normed_TD = rms_norm(x_TD, params.norm, config.rms_norm_eps)
    logits_TV = softcap(normed_TD @ params.embed_tokens.T, config.final_logit_softcapping)
    return minimtp.Sampling().law(logits_TV[-1])


depths = ["embed", *(f"layer.{i}.out" for i in layers)]
laws = np.array([lens(out.taps[name]) for name in depths])
print("after the last layer it is p:", np.allclose(laws[-1], p_V, atol=1e-6))

# %%
top_LN = laws.argsort(1)[:, ::-1][:, :6]
shares_LN = np.take_along_axis(laws, top_LN, 1)
fig, ax = plt.subplots(figsize=(8, 3.2))
fig.colorbar(ax.imshow(shares_LN, aspect="auto", vmin=0, vmax=1), label="probability")
for (row, column), share in np.ndenumerate(shares_LN):
    text, colour = f"{piece(top_LN[row, column])}  {share:.2f}", "white" if share < 0.6 else "black"
    ax.text(column, row, text, ha="center", va="center", color=colour)
ax.set_yticks(range(6), ["embedding", *(f"layer {i}" for i in layers)])
ax.set(xlabel="the most likely tokens, in order", ylabel="asked after", title="What each depth would say next")
ticks = ax.set_xticks(range(6), [f"{n + 1}." for n in range(6)])

# %% [markdown]
# The embedding can only repeat the token it stands for: `▁you` again. Layers 1 and 2 take it for the beginning of a
# word (`▁you` + `ng`). After layer 3 it is a pronoun with a verb behind it, and the law is spread over many.
#
# ## The law becomes a token
#
# To draw from a law, lay the probabilities end to end on the line from 0 to 1, and see into which piece a *uniform*
# number u falls. This is drawing by *inverse CDF* (the CDF is the running sum). The same u always gives the same
# token.


# %%
def draw_by_hand(p, u):
    running = 0.0
    for token, share in enumerate(p):
        running += share
        if u < running:
            return token


law = np.array([0.5, 0.2, 0.0, 0.3])
print({u: draw_by_hand(law, u) for u in (0.0, 0.49, 0.5, 0.69, 0.7, 0.99)})
uniforms = np.linspace(0, 1, 1000, endpoint=False)
print("equal to minimtp.draw:", all(draw_by_hand(law, u) == minimtp.draw(law, u) for u in uniforms))

# %% [markdown]
# Now from `p`. Its steps are in the order of the ids, so the curve climbs slowly and jumps where a likely token sits.
# *Greedy* means to take the most likely token whatever u is. That is *temperature* 0. The temperature divides the
# logits before the softmax: below 1 the likely tokens gain, and in the limit 0 one token has all the probability.

# %%
chosen = {u: minimtp.draw(p_V, u) for u in (0.2, 0.5, 0.85)}
fig, ax = plt.subplots()
ax.step(range(len(p_V)), p_V.cumsum(), where="post", color=TARGET)
for u, id in chosen.items():
    ax.plot([0, id, id], [u, u, 0], "--o", color=GREEN, markersize=4)
    ax.text(8, u + 0.02, f"u = {u}: {piece(id)} (id {id})")
ax.set(xlabel="token id", ylabel="running sum of p", title="Drawing from p", xlim=(0, 1290), ylim=(0, 1.02))
greedy_V = minimtp.Sampling(temperature=0).law(out.logits_TV[-1])
print("greedy:", {u: piece(minimtp.draw(greedy_V, u)) for u in chosen}, " argmax:", piece(p_V.argmax()))

# %% [markdown]
# ## And again
#
# The token is put behind the prompt, and everything starts over. The *cache* keeps what attention needs of the tokens
# already read, so that the next pass reads one token only. Ten greedy tokens by hand, and by the package:

# %%
cache, read, written = target.new_cache(), ids, []
for _ in range(10):
    logits_TV = target.forward(read, cache, last=1).logits_TV
    read = [int(logits_TV[-1].argmax())]
    written += read
print(prompt + target.tokenizer.decode(written))
steps = minimtp.generate(target, ids, max_new_tokens=10)
print("equal to minimtp.generate:", written == [token for step in steps for token in step.tokens])

# %% [markdown]
# ## Try
#
# - Change `prompt` (`"O, he is dead, my lord of Nor"`, or your name) and run all cells. Where does the guess settle?
# - In `lens`, look at another position: `logits_TV[-2]` in place of `logits_TV[-1]`.
# - Where `p_V` is made, give `minimtp.Sampling(temperature=0.5)`, or `top_k=3`, which keeps the three most likely
#   tokens. Which u now give another token?
#
# After the last two the lens and `p` are no longer about the same law, and the check between them says False.
#
# The code: `minimtp/gemma4.py` (`embed`, `decoder_layer`, `forward`), `minimtp/layers.py` (`rms_norm`, `softcap`),
# `minimtp/sampling.py` (`Sampling.law`, `draw`), `minimtp/generate.py` (`generate`).
