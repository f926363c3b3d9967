# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # What is a 4-bit weight?
#
# A matrix of a language model can be stored in 4 bits a number: each weight is one of 16 integers, the *code*, and 32
# neighbours share one float, the *scale* (or *step*). You will see the bytes of two file formats, unpack them by
# hand, find the same matrix in three files, and see what rounding costs.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pictures

import minimtp
from minimtp.convert import convert
from minimtp.display import BLUE, GREY, ORANGE, SKY, VERMILLION, YELLOW

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)

# %% [markdown]
# ## Two codes in a byte
#
# A code is an integer from −8 to 7. It is stored as n = code + 8, which is never negative: 4 bits, half a byte (a
# *nibble*). The weight is code · step.

# %%
codes, step = [-3, 7], 0.5
n_low, n_high = [code + 8 for code in codes]
byte = n_high * 16 + n_low
print(f"n = {n_low} and {n_high}: one byte, {byte:08b} in binary, {byte:02x} in hexadecimal")
n_again = [byte & 15, byte >> 4]  # the low four bits, the high four
print("weights:", [(n - 8) * step for n in n_again])

# %% [markdown]
# ## A block of Q4_0
#
# The bundled Gemma is stored as int4. `convert` writes it as a GGUF file, the format of llama.cpp, in the type Q4_0:
# 32 weights of a row are a *block* of 18 bytes. The first two are the step d, a float16; each of the other 16 holds
# two n: that of one of the first 16 weights in its low half, that of one of the last 16 in its high half.

# %%
report = convert("tiny-gemma4", here / "tiny.gguf", "q4_0")
model = minimtp.load(here / "tiny.gguf", keep="packed")  # packed: the bytes as stored
gguf = model.params.layers[0].q_proj
block_B = gguf.data[0, :18]
print(gguf, "\nfirst block:", block_B.tobytes().hex(" "))

# %%
fig, ax = plt.subplots(figsize=(10, 1.6))
pictures.boxes(ax, [f"{byte:02x}" for byte in block_B], [ORANGE] * 2 + [GREY] * 16, bottom=1.3, width=2)
pictures.boxes(ax, [f"d = {block_B[:2].view('<f2')[0]:.5f}"], [ORANGE], width=4, size=8)
nibbles = []
for j, byte in enumerate(block_B[2:]):
    nibbles += [f"{byte >> 4}\nw{j + 16}", f"{byte & 15}\nw{j}"]
pictures.boxes(ax, nibbles, [SKY, YELLOW] * 16, left=4, size=7)
title = "Above: 18 bytes (hex). Below: the step d, then n and its weight; high halves (w16 … w31) blue, low ones yellow"
ax.set_title(title, loc="left", fontsize=8)
print("18 bytes for 32 weights:", 18 * 8 / 32, "bits a weight")

# %% [markdown]
# ## A word of compressed-tensors
#
# The bundled file itself is in the format compressed-tensors: an int32 (a *word* here) holds eight n, neighbours side
# by side, the first in the lowest bits. The scales are a tensor of their own. The picture shows the weights w0 … w7
# from above: the same n in another order.

# %%
from minimtp.checkpoint import open_checkpoint
from minimtp.loading import bundled

name = "model.language_model.layers.0.self_attn.q_proj.weight"
tensors = open_checkpoint(bundled("tiny-gemma4")).tensors
words_OW, scales_OG = tensors[f"{name}_packed"].stored(), tensors[f"{name}_scale"].to("float32")
word = int(words_OW[0, 0]) & 0xFFFFFFFF  # as an unsigned number
n_8 = [(word >> 4 * i) & 15 for i in range(8)]
print(f"first word: {word:08x}, first scale: {scales_OG[0, 0]:.5f}")
print("words:", words_OW.shape, " scales:", scales_OG.shape, " for", 8 * words_OW.shape[1], "weights a row")

# %%
fig, ax = plt.subplots(figsize=(8, 1.6))
pictures.boxes(ax, [f"byte {i}: {(word >> 8 * i) & 255:02x}" for i in range(4)], [GREY] * 4, bottom=1.3, width=2)
order = [1, 0, 3, 2, 5, 4, 7, 6]  # the high half of a byte is written first
pictures.boxes(ax, [f"{n_8[i]:04b} = {n_8[i]}\nw{i}" for i in order], [SKY, YELLOW] * 4)
ax.set_title("Above: the four bytes of a word. Below: n and its weight, high halves blue, low ones yellow", fontsize=9)
print("n of w0 … w7 here:", n_8, " in the Q4_0 block:", [int(byte & 15) for byte in block_B[2:10]])

# %% [markdown]
# ## Unpacking
#
# A weight is (n − 8) · step. First weight by weight, then the 32 at once, then the package.


# %%
def unpack_by_hand(block_B):
    step = np.float32(block_B[:2].view("<f2")[0])
    weights = [0.0] * 32
    for j, byte in enumerate(block_B[2:].tolist()):
        weights[j] = ((byte & 15) - 8) * step
        weights[j + 16] = ((byte >> 4) - 8) * step
    return weights


by_hand = unpack_by_hand(block_B)

# %%
n_32 = np.concatenate([block_B[2:] & 15, block_B[2:] >> 4])
at_once = (n_32.astype(np.int8) - 8) * np.float32(block_B[:2].view("<f2")[0])
print("loop = vector:", np.array_equal(by_hand, at_once))
print("vector = package:", np.array_equal(at_once, gguf.rows(0, 1, "float32")[0, :32]))
shifts_8 = np.arange(0, 32, 4, dtype=np.uint32)
n_OI = ((words_OW.view(np.uint32)[..., None] >> shifts_8) & 15).reshape(len(words_OW), -1)
w_OI = (n_OI.astype(np.int8) - 8) * np.repeat(scales_OG, 32, axis=1)
print("all words of compressed-tensors = package's Q4_0:", np.array_equal(w_OI, gguf.dequantize("float32")))

# %% [markdown]
# ## One object, three files
#
# The third file holds the same model in bf16, a float of 16 bits. It keeps no codes: each product code · scale is
# rounded to bf16. Yet the package finds the codes again (`lattice.find`), because 32 weights that are all whole
# multiples of one step give it away. Such a group is said to lie on a *lattice*.

# %%
from minimtp.lattice import ON, find

report = convert("tiny-gemma4", here / "bf16", "bf16")
packed = minimtp.load("tiny-gemma4", keep="packed").params.layers[0].q_proj
plain = minimtp.load(here / "bf16", keep="packed").params.layers[0].q_proj
found, as_int4 = find(plain.stored), gguf.as_quantized()
print("Q4_0 as Quantized: codes equal", np.array_equal(packed.codes(), as_int4.codes()), end=", ")
print("scales equal", np.array_equal(packed.scales.dequantize("f4"), as_int4.scales.dequantize("f4")))
print(f"bf16: {(found.status_OG == ON).mean():.1%} of the groups on a lattice", end=", ")
print("codes equal", np.array_equal(found.levels_OI, packed.codes()))

# %% [markdown]
# In this matrix every code is found again, and yet the bf16 weights themselves are a little off. What the three
# formats spend, and how far their weights lie from the first one's, in parts of the largest weight:

# %%
sizes = {"compressed-tensors": packed.packed.nbytes + packed.scales.stored.nbytes}
sizes |= {"GGUF Q4_0": gguf.data.nbytes, "bf16": plain.stored.nbytes}
reference_OI = packed.dequantize("float64")
for (format, size), weight in zip(sizes.items(), (packed, gguf, plain)):
    far = np.abs(weight.dequantize("float64") - reference_OI).max() / np.abs(reference_OI).max()
    print(f"{format:20} {size:6,} bytes  {8 * size / reference_OI.size:4.1f} bits a weight  largest change {far:.1e}")
folder.cleanup()

# %% [markdown]
# ## Rounding a float matrix
#
# Where do codes come from? `quant.pack` takes, in each group of 32, the largest magnitude / 7.5 as the scale, and
# rounds every weight to the nearest of the 16 levels −8 … 7. Below is the same matrix of the model before it was
# trained for 4 bits (a float model), in units of its own scales: every weight is rounded to the nearest line.

# %%
from minimtp.quant import pack

float_OI = minimtp.load("tiny-gemma4-float", keep="dense").params.layers[0].q_proj
rounded = pack(float_OI)
in_steps_OI = float_OI / np.repeat(rounded.scales.dequantize("f4"), 32, axis=1)
fig, ax = plt.subplots()
ax.hist(in_steps_OI.ravel(), 160, color=BLUE, label="float weights")
ax.vlines(range(-8, 8), 0, 600, color=VERMILLION, lw=0.8, ls="--", label="the 16 levels")
ax.set(xlabel="weight / scale of its group (steps)", ylabel="number of weights", xticks=range(-8, 8))
legend = ax.legend(loc="upper left", bbox_to_anchor=(1, 1))

# %% [markdown]
# The two spikes are the largest weights of all groups: their scale puts them at ±7.5, between two levels or beyond
# the last one.
#
# Half of a step is the most that rounding can move a weight (apart from a scale that bf16 rounds itself, and the top,
# which is cut to 7). So the error of a group follows its scale, that is its largest weight: in the map, whole groups
# of 32 (between two white lines) are light or dark.

# %%
error_OI = np.abs(rounded.dequantize("float32") - float_OI)
fig, ax = plt.subplots(figsize=(8, 3.2))
image = ax.imshow(error_OI[:48, :192], aspect="auto", cmap="cividis", interpolation="nearest")
fig.colorbar(image, label="|rounded − float weight|")
ax.vlines(np.arange(32, 192, 32) - 0.5, -0.5, 47.5, color="white", lw=0.8)
ax.set(xlabel="input feature (a group is 32 of them)", ylabel="output feature")
ticks = ax.set_xticks(range(0, 193, 32))

# %%
scales_OG = rounded.scales.dequantize("float32")
error_OGK = error_OI.reshape(*scales_OG.shape, 32)
together = np.corrcoef(scales_OG.ravel(), error_OGK.mean(2).ravel())[0, 1]
print(f"correlation of a group's scale with its mean error: {together:.2f}")
print(f"largest error: {(error_OGK / scales_OG[..., None]).max():.2f} steps")
print(f"relative error of the matrix: {np.linalg.norm(error_OI) / np.linalg.norm(float_OI):.3f}")

# %% [markdown]
# ## Group size
#
# A smaller group has a scale that fits better, and more scales to store: with 16 bits each, a weight costs 4 + 16 /
# group bits.

# %%
groups = [8, 16, 32, 64, 128, 256]
errors = [np.linalg.norm(pack(float_OI, g).dequantize("f4") - float_OI) / np.linalg.norm(float_OI) for g in groups]
bits = [4 + 16 / g for g in groups]
fig, ax = plt.subplots()
ax.plot(bits, errors, "o-", color=BLUE)
for g, x, y in zip(groups, bits, errors):
    ax.annotate(f"{g}" + " (a whole row)" * (g == 256), (x, y), (6, 4), textcoords="offset points")
ax.set(xlabel="bits a weight, scales included", ylabel="relative error of the matrix", ylim=(0, 0.15))
ax.set_title("The number is the group size")
print({g: round(float(error), 3) for g, error in zip(groups, errors)})

# %% [markdown]
# ## Try
#
# - Round another matrix: `float_OI` of `down_proj` of layer 4 has rows of 320, so take groups of 8, 16, 32, 64, 320.
# - Write `float_OI[3, 40] = 1.0` before `pack` and run on to the error map. How far does an outlier reach?
# - One scale a row is how Google's mobile files store int4 (`minimtp/mobile.py`). Read its cost off the last figure.
#
# The code: `minimtp/quant.py` (`Quantized`, `pack`), `minimtp/ggml.py` (`TYPES`, `Blocks`, `quantize`),
# `minimtp/formats.py` (`read_pack_quantized`), `minimtp/lattice.py` (`find`). Every layout byte by byte:
# `docs/formats.md`.
