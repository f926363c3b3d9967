# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # A kernel you can read: how does one block of threads multiply by int4?
#
# A **kernel** is a function that a GPU runs in many **threads** at once. This notebook takes one apart:
# `matvec_int4.cu`, which multiplies a few tokens by a matrix of 4-bit weights. It runs on this machine's processor,
# thread by thread, from the very text a GPU would get. For that a **C++ compiler** (g++) must be installed; it was
# tried on Linux only.
#
# You will see which thread reads which bytes, why a token's result has the same bits alone and among others, what
# happens without a barrier, and how few bytes a pass needs. **No GPU has run these kernels yet**: nothing here is a
# GPU's measurement.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pictures

from minimtp import backend, device_bytes, device_layout, kernel_source, loading, quant, shim
from minimtp.device import Gpu, Host
from minimtp.display import BLUE, GREY, ORANGE

try:
    shim.compiled("")  # compiles nothing but the header that stands for a GPU
except shim.KernelError as error:
    raise pictures.Stop(f"This notebook stops here: {error}.") from None

# %% [markdown]
# ## Four rows by hand
# A weight is stored as a **code** from 0 to 15 and means (code − 8) · scale; 32 neighbours in a row share a
# **scale**. Two codes make a byte, the even column in the low half. Four rows of 32 columns, and one token x = 1, 2,
# … 32: first byte by byte, in a loop.

# %%
codes_OI = np.array([range(32), [8] * 32, [9] * 32, range(32)[::-1]]) % 16
scales_O, x_I = np.array([0.5, 1, 1, 0.25]), np.arange(1, 33)
packed_OB = (codes_OI[:, ::2] + 16 * codes_OI[:, 1::2]).astype(np.uint8)
by_loop = [0.0] * 4
for row in range(4):
    for column in range(32):
        code = packed_OB[row, column // 2] >> 4 * (column % 2) & 15
        by_loop[row] += float(x_I[column] * (int(code) - 8) * scales_O[row])
print("first bytes of row 0:", " ".join(f"{byte:02x}" for byte in packed_OB[0, :8]), "\nby the loop:", by_loop)

# %% [markdown]
# The same with NumPy, with the package's weight object, and with the kernel. To start a kernel one says how many
# **blocks** of threads there are and how many threads a block has; here a block has 4 **warps** of 32 threads, and
# each warp makes 4 rows. Compiled in are TOKENS, how many tokens there are; SCALE, how scales are stored; and SPAN, how
# many columns share one for certain.


# %%
def kernel(weight, x_TI, order="forward", change=("", "")):
    """Run matvec_int4 on the processor, its text changed or not, its threads in that order -> [T, O]."""
    layout, (rows, columns) = device_layout.int4(weight), weight.shape
    constants = (("TOKENS", len(x_TI)), ("SCALE", layout.kind), ("SPAN", layout.span))
    text = kernel_source.source("matvec_int4", constants).replace(*change)
    out_TO = np.empty((len(x_TI), rows), np.float32)
    arguments = [out_TO, x_TI, layout.packed, layout.scales, rows, columns, layout.group]
    shim.launch("matvec_int4", "matvec_int4", -(-rows // 16), 128, arguments, order=order, text=text)
    return out_TO


# %%
tiny = quant.Quantized(packed_OB, quant.Plain(scales_O.astype(np.float16)[:, None], "F16"))
x_TI = x_I.astype(np.float32)[None]
by_numpy = x_TI @ ((codes_OI - 8) * scales_O[:, None]).T
print("NumPy ", by_numpy[0], "\nweight", backend.matmul(x_TI, tiny)[0], "\nkernel", kernel(tiny, x_TI)[0])
assert (by_numpy == by_loop).all() and (kernel(tiny, x_TI) == by_numpy).all()

# %% [markdown]
# ## Who reads what
# A **lane** is a thread of a warp. Here is what a lane does, from the file: the loop over **tiles** of 1,024 columns.
# It takes 32 of them, so 16 bytes of each of its 4 rows. In the text r counts rows, t tokens, q fours of columns;
# `piece_R` is what the lane works on, `next_R` what it loads meanwhile for the next tile, `tile_TQL` the tokens.

# %%
text = kernel_source.source("matvec_int4")
print(text[text.index("    for (int start = 0") : text.index("// A warp's row beyond")])

# %% [markdown]
# Instead of believing it, let every thread sign its work. In a changed copy of the text a thread multiplies its
# products by its number plus 1. All weights are 1, and each token is 1 in one **piece** of 32 columns and 0
# elsewhere: so what comes out of a row is who read that piece. The unchanged kernel gives 1 everywhere, so each piece
# is used once, by one thread.

# %%
ones = quant.Quantized(np.full((32, 1024), 0x99, np.uint8), quant.Plain(np.ones((32, 64), np.float16), "F16"))
x_PI = np.zeros((64, 2048), np.float32)
x_PI[np.arange(64), 32 * np.arange(64)] = 1  # token p: the first column of piece p
scale = "widen(piece_R[r].scale_S[s])"


def coming_out(change):
    return np.concatenate([kernel(ones, x_PI[at : at + 8], change=change) for at in range(0, 64, 8)]).T.astype(int)


thread_OP = coming_out((scale, scale + " * (threadIdx.x + 1)")) - 1
print("pieces that were not used exactly once:", (coming_out(("", "")) != 1).sum())

# %%
figure, axes = plt.subplots(figsize=(9, 3.8))
image = pictures.reading_threads(axes, thread_OP, 16)
axes.set(xlabel="piece of the row: 16 bytes, 32 columns", ylabel="row", xticks=range(0, 64, 8), yticks=range(0, 32, 4))
figure.colorbar(image, label="thread of its block")
axes.set_title("which thread reads which piece: 4 rows a warp, 32 pieces a tile, 16 rows a block (white line)")
plt.show()

# %% [markdown]
# Neighbouring lanes read neighbouring 16 bytes, so a warp's load of a row is one run of 32 · 16 = 512 bytes, which a
# GPU's memory likes. Piece 32 begins the second tile, and lane 0 is there again. The lower half is another block,
# whose threads have the same numbers and rows of their own.
#
# ## One order of sums
# Floating-point sums depend on their order. The kernel's is fixed: a lane's 32 products of codes one after the other,
# then its scale, then the next tile; last the 32 lanes meet in a tree, at distances 16, 8, 4, 2, 1. NumPy in the same
# order must give the same bits. (A product and a sum are rounded once together; through float64 that is imitated.)


# %%
def in_the_kernels_order(w_I, scales_G, x_I):  # of one row; w_I: codes less 8
    lanes, tiles = np.zeros(32, np.float32), len(x_I) // 1024
    for w_LC, scale_L, x_LC in zip(*(a.reshape(tiles, 32, -1) for a in (w_I, scales_G, x_I))):
        part = np.zeros(32, np.float32)
        for c in range(32):
            part = np.float32(np.float64(x_LC[:, c]) * w_LC[:, c] + part)
        lanes = np.float32(np.float64(part) * scale_L[:, 0] + lanes)
    for distance in (16, 8, 4, 2, 1):
        lanes = lanes + lanes[np.arange(32) ^ distance]
    return lanes[0]


# %%
random = np.random.default_rng(0)
scales_OG = (random.normal(size=(32, 64)) / 64).astype(np.float16)
weight = quant.Quantized(random.integers(0, 256, (32, 1024), np.uint8), quant.Plain(scales_OG, "F16"))
w_OI = weight.dequantize(np.float64) / np.repeat(scales_OG, 32, axis=1).astype(np.float64)  # codes less 8, exact
x_TI = random.normal(size=(5, 2048)).astype(np.float32)
followed = [[in_the_kernels_order(w, scales, x) for w, scales in zip(w_OI, scales_OG)] for x in x_TI]
together_TO, plain_TO = kernel(weight, x_TI), backend.matmul(x_TI, weight)
print("NumPy in the kernel's order, the same bits:", (together_TO == followed).all())
close = abs(together_TO - plain_TO).max() < 1e-5 * abs(plain_TO).max()
print("NumPy in its own order, within 0.00001 of the largest:", close)

# %% [markdown]
# The number of tokens is not in that order. So a token has the same bits alone and among five. That is why text made
# with **drafts** (guesses that are checked several in one pass) can be exactly the text made one token at a time. Nor
# is the order in which threads happen to run: a GPU promises none, so here they run forward, backward, shuffled.

# %%
for tokens in range(1, 6):
    same = (kernel(weight, x_TI[:tokens]) == together_TO[:tokens]).all()
    print(f"{tokens} of the five tokens: the same bits: {same}")
for order in shim.ORDERS:
    print(f"threads {order}: the same bits:", (kernel(weight, x_TI, order) == together_TO).all())

# %% [markdown]
# ## What a barrier is for
# The threads of a block copy a tile of x into **shared memory**, then all of them use all of it. `__syncthreads()`
# makes each wait until the others are there too. Take the first one out: the first thread uses what nobody has
# written yet. Here such memory holds NaN ("not a number"), so that nothing looks right by chance.

# %%
barrier = "__syncthreads();\n        if (column + TILE"
without = (barrier, barrier.replace("__syncthreads();", ""))
assert kernel_source.source("matvec_int4").count(barrier) == 1
broken_TO = kernel(weight, x_TI, change=without)
print(f"without the barrier {np.isnan(broken_TO).mean():.0%} of the results are not a number")

# %% [markdown]
# ## Bytes
# How much must be read? `launch_bytes` counts the arrays of a **launch**, one start of a kernel. For `q_proj`, the
# first matrix of a sliding layer of Gemma 4 31B, weights are nearly all of it: five tokens cost few bytes more than
# one. That is why drafts can pay (left picture).
#
# Reading is not all. A code takes 2 instructions to become a float (`code_to_float` in `common.cuh`), and 1 a token to
# be used. A card has time for so many instructions while a weight's 0.5625 bytes arrive, by its data sheet: the lines
# on the right, published rates and no measurements. Where a bar rises above a line, that card would wait for its
# arithmetic, not for its memory.

# %%
family, config = loading.published_config("gemma-4-31b")
rows, columns = family.tensors(config)["layers.0.q_proj"][1]
device, widths, per_token = Host(), np.arange(1, 9), []
weights = [device.empty((rows, columns // 2), "u1"), device.empty((rows, columns // 32), "f2")]
for tokens in range(1, 9):
    vectors = [device.empty((tokens, size), "f4") for size in (rows, columns)]
    per_token.append(device_bytes.launch_bytes("matvec_int4", [*vectors, *weights], {}) / tokens / 1e6)
print(f"{rows:,} rows of {columns:,} columns: {sum(array.nbytes for array in weights):,} bytes of weights")
print(f"a launch with 1 token: {per_token[0] * 1e6:,.0f}, with 5 tokens: {per_token[4] * 5e6:,.0f}")
# Data sheets count two operations an instruction; a weight takes 18 bytes / 32.
room = {card: rate / 2 / (bandwidth / (18 / 32)) for card, (rate, bandwidth) in device_bytes.CARDS.items()}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
left.bar(widths, per_token, color=BLUE, label="counted: codes, scales, x, out")
left.plot(widths, rows * columns * 4.5 / 8e6 / widths, "o--", color=ORANGE, label="ideal: each weight once, 4.5 bits")
left.plot(widths, rows * columns * 2 / 1e6 / widths, "s:", color=GREY, label="the same weights in bf16")
right.bar(widths, 2 + widths, color=BLUE, label="needed")
for (card, count), style in zip(room.items(), ("--", ":", "-.")):
    right.axhline(count, color="black", linestyle=style, label=f"{card}, by data sheet: {count:.1f}")
for axes, label, top in ((left, "MB a token", 100), (right, "instructions a weight", 36)):
    axes.set(xlabel="tokens in the pass", ylabel=label, ylim=(0, top)), axes.legend(frameon=False, loc="upper right")
plt.show()

# %% [markdown]
# ## On a GPU, if there is one
# The same source, compiled by NVIDIA's compiler and started through CuPy. If you have a card, this cell would be
# among the first to tell whether it gives the same bits.


# %% tags=["varies"]
def on(device):
    layout, out = device_layout.int4(weight), device.empty((5, 32), np.float32)
    arguments = [out, *map(device.array, (x_TI, layout.packed, layout.scales)), 32, 2048, layout.group]
    constants = (("TOKENS", 5), ("SCALE", layout.kind), ("SPAN", layout.span))
    device.launch("matvec_int4", "matvec_int4", 2, 128, arguments, constants)
    return out.get()


try:
    print("on a GPU, the same bits as on the processor:", (on(Gpu()) == on(Host())).all())
except backend.BackendError:
    print("there is no GPU here, or no CuPy: nothing was run on one")

# %% [markdown]
# ## Try
# - Where `weight` is made, give `quant.Quantized` also `group=16` and `scales_OG` 128 columns (`layout.kind` and
#   `layout.span` follow): is `kernel(weight, x_TI)` still near `backend.matmul`, and what does a weight take now?
# - Plant another defect, `change=("distance > 0", "distance > 1")` in `warp_sum`: which checks above find it?
# - Take the *second* barrier out, `change=("__syncthreads();  // before", "// before")`: what is overwritten too early?
#
# In the code: `minimtp/kernels/matvec_int4.cu` and `common.cuh`; `minimtp/shim.py` (`launch`),
# `minimtp/kernels/host.h`; `minimtp/device_layout.py` (`int4`); `docs/gpu.md`, "One kernel, line by line".
