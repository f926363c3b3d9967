"""The pictures of docs/, drawn from the package's own configurations and functions: python docs/figures.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from minimtp import memory
from minimtp.layers import rope_frequencies
from minimtp.loading import published_config

SIZES = ("31b", "26b-a4b", "12b", "e4b", "e2b")
QWENS = ("qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b", "qwen3.5-0.8b")
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#BBBBBB"  # Okabe and Ito's palette
FOLDER = Path(__file__).parent / "figures"


def config(size):
    return published_config(f"gemma-4-{size}")[1]


def save(figure, name):
    figure.savefig(FOLDER / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def plan():
    """One cell a layer, for the five sizes."""
    figure, axes = plt.subplots(figsize=(9, 2.4))
    for row, size in enumerate(SIZES):
        for i, layer in enumerate(config(size).layers):
            colour = BLUE if layer.kind == "sliding" else ORANGE
            axes.barh(row, 0.86, left=i, height=0.7, color=colour, alpha=1 if layer.owns_kv else 0.35)
    axes.set_yticks(range(len(SIZES)), [size.upper() for size in SIZES])
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    kinds = (
        (BLUE, 1, "sliding"),
        (ORANGE, 1, "full"),
        (BLUE, 0.35, "sliding, borrowed KV"),
        (ORANGE, 0.35, "full, borrowed KV"),
    )
    handles = [Patch(color=colour, alpha=alpha, label=name) for colour, alpha, name in kinds]
    axes.legend(handles=handles, ncol=4, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    save(figure, "gemma4-plan")


def masks():
    """Who sees whom: a full layer, a sliding layer, and the drafter's query after 12 tokens, window 4."""
    tokens, window = 12, 4
    query, key = np.mgrid[:tokens, :tokens]
    seen = {"full layer": key <= query, f"sliding layer, window {window}": (key <= query) & (key > query - window)}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    for ax, (title, mask) in zip(axes, seen.items()):
        ax.imshow(mask, cmap=ListedColormap(["white", BLUE]))
        ax.set(title=title, xlabel="key position", ylabel="query position")
    draft = np.stack([np.arange(tokens) >= 0, np.arange(tokens) >= tokens - 1 - window])
    axes[2].imshow(draft, cmap=ListedColormap(["white", PURPLE]))
    axes[2].set(title=f"drafter, while token {tokens} is unread", xlabel="key position of the target")
    axes[2].set_yticks([0, 1], ["full", "sliding"])
    for ax in axes:
        ax.set_xticks(range(0, tokens, 2))
    figure.tight_layout()
    save(figure, "gemma4-masks")


def rope():
    """How far one position turns each pair of dimensions."""
    figure, axes = plt.subplots(figsize=(6, 3))
    for kind, dim, colour in (("sliding", 256, BLUE), ("full", 512, ORANGE)):
        turns = rope_frequencies(config("31b").ropes[kind], dim)
        axes.semilogy(np.where(turns > 0, turns, np.nan), color=colour, label=f"{kind}, head width {dim}")
        if (still := np.flatnonzero(turns == 0)).size:
            axes.hlines(1e-7, still[0], still[-1], color=colour, linestyle="dotted")
            axes.text(still.mean(), 1.5e-7, "these pairs do not turn", ha="center", color=colour)
    axes.set(xlabel="pair of dimensions (i, i + half the width)", ylabel="radians per position")
    axes.legend(frameon=False)
    save(figure, "gemma4-rope")


def kv():
    """Bytes of keys and values against context."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for size, colour in zip(SIZES, (BLUE, ORANGE, GREEN, PURPLE, "black")):
        model = config(size)
        contexts = np.unique(np.geomspace(256, model.max_position_embeddings, 60).astype(int))
        total = [sum(memory.kv_bytes(model, int(n), itemsize=2).values()) / 2**20 for n in contexts]
        axes.loglog(contexts, total, color=colour, label=size.upper())
    axes.set(xlabel="context, tokens", ylabel="KV cache, MiB in bf16")
    axes.legend(frameon=False)
    save(figure, "gemma4-kv")


def experts():
    """Experts that a pass must read, against its width, if tokens choose independently."""
    moe = config("26b-a4b").experts
    width = np.arange(1, 10)
    expected = moe.count * (1 - (1 - moe.top_k / moe.count) ** width)
    figure, axes = plt.subplots(figsize=(6, 3))
    axes.bar(width, expected, color=BLUE, label="if tokens choose independently")
    axes.plot(width, moe.top_k * width, color=ORANGE, marker="o", label=f"{moe.top_k} for each token")
    axes.set(xlabel="tokens in the pass", ylabel=f"experts read, of {moe.count}", xticks=width)
    axes.legend(frameon=False)
    save(figure, "gemma4-experts")


def assistant():
    """Where a draft comes from."""
    figure, axes = plt.subplots(figsize=(9.5, 4))
    boxes = {
        "token": (0, 2.6, "newest token", "white"),
        "embed": (2.3, 2.6, "target's\nembedding", BLUE),
        "hidden": (2.3, 0.8, "target's hidden state\nafter the final norm", BLUE),
        "pre": (4.9, 1.7, "pre_projection", PURPLE),
        "layers": (7.2, 1.7, "4 layers,\nqueries only", PURPLE),
        "lent": (7.2, 3.6, "target's last sliding\nand last full KV", BLUE),
        "head": (9.6, 2.6, "head", PURPLE),
        "post": (9.6, 0.8, "post_projection", PURPLE),
        "draft": (11.9, 2.6, "draft token", "white"),
    }
    wire(axes, boxes, "token embed, embed pre, hidden pre, pre layers, layers head, layers post, head draft")
    arrow(axes, (7.2, 3.2), (7.2, 2.1))
    arrow(axes, (9.6, 0.4), (2.3, 0.4), bend=-0.12, linestyle="dashed", color=PURPLE)
    arrow(axes, (11.9, 3.0), (0, 3.0), bend=0.2, linestyle="dashed", color=PURPLE)
    axes.text(5.9, -0.75, "fed back for the next draft token", ha="center", color=PURPLE, fontsize=8)
    axes.set(xlim=(-1.1, 13), ylim=(-1, 5.6))
    axes.axis("off")
    save(figure, "gemma4-assistant")


def qwen_plan():
    """One cell a layer, for five sizes."""
    figure, axes = plt.subplots(figsize=(9, 2.4))
    for row, name in enumerate(QWENS):
        for i, layer in enumerate(published_config(name)[1].layers):
            axes.barh(row, 0.86, left=i, height=0.7, color=GREEN if layer.kind == "linear" else ORANGE)
    axes.set_yticks(range(len(QWENS)), [name.removeprefix("qwen").upper() for name in QWENS])
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    handles = [
        Patch(color=colour, label=name) for colour, name in ((GREEN, "Gated DeltaNet"), (ORANGE, "full attention"))
    ]
    axes.legend(handles=handles, ncol=2, loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)
    save(figure, "qwen35-plan")


def qwen_cache():
    """Bytes of states, keys and values against context, beside a model that only attends."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for name, colour in (("gemma-4-31b", BLUE), ("qwen3.6-27b", ORANGE), ("qwen3.6-35b-a3b", GREEN)):
        model = published_config(name)[1]
        contexts = np.unique(np.geomspace(64, model.max_position_embeddings, 60).astype(int))
        total = [sum(memory.kv_bytes(model, int(n), itemsize=2).values()) / 2**20 for n in contexts]
        axes.loglog(contexts, total, color=colour, label=name)
    axes.set(xlabel="context, tokens", ylabel="cache, MiB\n(bf16; states float32)")
    axes.legend(frameon=False)
    save(figure, "qwen35-cache")


def unreading():
    """Two tokens of five are accepted: what each way keeps, and what it does then."""
    figure, rows = plt.subplots(2, 1, figsize=(8, 2.6))
    for axes, kept, title in zip(
        rows, (range(6), (0, 5)), ("every state", "the committed state, the writes, the present state")
    ):
        for t in range(6):
            if t in kept:
                box(axes, 1.5 * t, 0, f"state\n{t}", GREEN, 0.4, 0.3)
            if t and len(kept) == 2:
                axes.plot(1.5 * t - 0.75, 0, marker="s", color=PURPLE, markersize=5)
        axes.set_title(f"kept: {title}", fontsize=9, loc="left")
        axes.set(xlim=(-0.6, 8.2), ylim=(-0.5, 0.95))
        axes.axis("off")
    arrow(rows[0], (3.0, 0.85), (3.0, 0.36), color=ORANGE)
    rows[0].text(3.15, 0.6, "un-read 3: take state 2", color=ORANGE, fontsize=8)
    arrow(rows[1], (0.0, 0.36), (3.0, 0.1), bend=-0.25, color=ORANGE)
    rows[1].text(3.15, 0.45, "un-read 3: from state 0, write twice again", color=ORANGE, fontsize=8)
    save(figure, "qwen35-unreading")


def mtp():
    """Where a draft of the MTP layer comes from."""
    figure, axes = plt.subplots(figsize=(9.5, 4))
    boxes = {
        "token": (0, 2.6, "newest token", "white"),
        "embed": (2.3, 2.6, "target's\nembedding", BLUE),
        "hidden": (2.3, 0.8, "target's hidden state\nafter the final norm", BLUE),
        "fc": (4.9, 1.7, "norm each, fc", PURPLE),
        "layer": (7.2, 1.7, "1 full-attention\nlayer", PURPLE),
        "kv": (7.2, 3.6, "keys and values\nof its own", PURPLE),
        "norm": (9.6, 1.7, "mtp.norm", PURPLE),
        "head": (9.6, 3.0, "target's\nhead", BLUE),
        "draft": (11.9, 3.0, "draft token", "white"),
    }
    wire(axes, boxes, "token embed, embed fc, hidden fc, fc layer, layer norm, head draft")
    arrow(axes, (7.2, 3.2), (7.2, 2.1))
    arrow(axes, (9.6, 2.1), (9.6, 2.6))
    arrow(axes, (9.6, 1.3), (2.3, 0.4), bend=-0.22, linestyle="dashed", color=PURPLE)
    arrow(axes, (11.9, 3.4), (0, 3.0), bend=0.2, linestyle="dashed", color=PURPLE)
    axes.text(5.9, -0.85, "fed back for the next draft token", ha="center", color=PURPLE, fontsize=8)
    axes.set(xlim=(-1.1, 13), ylim=(-1.1, 5.6))
    axes.axis("off")
    save(figure, "qwen35-mtp")


def wire(axes, boxes, pairs):
    """Boxes {name: (x, y, text, colour)}, and arrows from right to left edge: "from to, from to"."""
    for x, y, text, colour in boxes.values():
        box(axes, x, y, text, colour, 0.9, 0.38)
    for pair in pairs.split(", "):
        start, stop = pair.split()
        arrow(axes, (boxes[start][0] + 0.93, boxes[start][1]), (boxes[stop][0] - 0.93, boxes[stop][1]))


def box(axes, x, y, text, colour, width, height):
    style = {"facecolor": "white" if colour == "white" else colour + "40", "edgecolor": "black"}
    corner = x - width, y - height
    axes.add_patch(FancyBboxPatch(corner, 2 * width, 2 * height, boxstyle="round,pad=0.02", **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=7)


def arrow(axes, start, stop, bend=0.0, **style):
    shape = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0, "color": "black"}
    axes.add_patch(FancyArrowPatch(start, stop, connectionstyle=f"arc3,rad={bend}", **{**shape, **style}))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    plt.rcParams |= {
        "svg.hashsalt": "minimtp",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    for draw in (plan, masks, rope, kv, experts, assistant, qwen_plan, qwen_cache, unreading, mtp):
        draw()
