"""The pictures of docs/, drawn from the package's own configurations and functions: python docs/figures.py [FOLDER]"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from minimtp import memory
from minimtp.acceptance import exact_law, residual
from minimtp.audit import emitted, tokens_per_round
from minimtp.display import BLUE, DRAFTER, FATES, GREEN, MEMORY, ORANGE, PURPLE, TARGET, VERMILLION
from minimtp.layers import rope_frequencies
from minimtp.loading import published_config

LINES = "solid", "dashed", "dashdot", "dotted", (0, (8, 2))
SIZES = ("31b", "26b-a4b", "12b", "e4b", "e2b")
QWENS = ("qwen3.6-27b", "qwen3.6-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b", "qwen3.5-0.8b")
P_V, Q_V = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.2, 0.5, 0.05, 0.2, 0.05])  # the example of acceptance.md
SLIDING, FULL, LINEAR = MEMORY["sliding KV"], MEMORY["full KV"], MEMORY["linear KV"]


def config(size):
    return published_config(f"gemma-4-{size}")[1]


def plan():
    """One bar a layer, for the five sizes."""
    figure, axes = plt.subplots(figsize=(9, 2.4))
    for row, size in enumerate(SIZES):
        for i, layer in enumerate(config(size).layers):
            axes.barh(row, 0.8, left=i + 0.1, **layer_style(layer.kind, layer.owns_kv))
    kinds = {
        "sliding": ("sliding", True),
        "full": ("full", True),
        "sliding, borrowed KV": ("sliding", False),
        "full, borrowed KV": ("full", False),
    }
    label_plan(axes, [size.upper() for size in SIZES], kinds)
    return figure


def layer_style(kind, owns_kv=True):
    """Full layers are tall, layers with keys and values (or a state) of their own are filled."""
    colour, height = {"sliding": (SLIDING, 0.45), "full": (FULL, 0.85), "linear": (LINEAR, 0.45)}[kind]
    edge = "#666666" if kind == "linear" else colour
    return {"height": height, "edgecolor": edge, "facecolor": colour if owns_kv else "white", "linewidth": 1}


def label_plan(axes, names, kinds):
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("layer")
    styles = {name: layer_style(*kind) for name, kind in kinds.items()}
    handles = [
        Patch(label=name, **{key: value for key, value in style.items() if key != "height"})
        for name, style in styles.items()
    ]
    axes.legend(handles=handles, ncol=len(kinds), loc="upper center", bbox_to_anchor=(0.5, 1.25), frameon=False)


def masks():
    """Who sees whom: a full layer, a sliding layer, and the drafter's query after 12 tokens, window 4."""
    tokens, window = 12, 4
    query, key = np.mgrid[:tokens, :tokens]
    seen = {"full layer": key <= query, f"sliding layer, window {window}": (key <= query) & (key > query - window)}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    for ax, (title, mask) in zip(axes, seen.items()):
        ax.imshow(mask, cmap=ListedColormap(["white", TARGET]))
        ax.set(title=title, xlabel="key position", ylabel="query position")
    draft = np.stack([np.arange(tokens) >= 0, np.arange(tokens) >= tokens - 1 - window])
    axes[2].imshow(draft, cmap=ListedColormap(["white", DRAFTER]))
    axes[2].set(title=f"drafter, while token {tokens} is unread", xlabel="key position of the target")
    axes[2].set_yticks([0, 1], ["full", "sliding"])
    for ax in axes:
        ax.set_xticks(range(0, tokens, 2))
    figure.tight_layout()
    return figure


def rope():
    """How far one position turns each pair of dimensions."""
    figure, axes = plt.subplots(figsize=(6, 3))
    for kind, dim, colour in (("sliding", 256, SLIDING), ("full", 512, FULL)):
        turns = rope_frequencies(config("31b").ropes[kind], dim)
        axes.semilogy(np.where(turns > 0, turns, np.nan), color=colour, label=f"{kind}, head width {dim}")
        if (still := np.flatnonzero(turns == 0)).size:
            axes.hlines(1e-7, still[0], still[-1], color=colour, linestyle="dotted")
            axes.text(still.mean(), 1.5e-7, "these pairs do not turn", ha="center", color=colour)
    axes.set(xlabel="pair of dimensions (i, i + half the width)", ylabel="radians per position")
    axes.legend(frameon=False)
    return figure


def kv():
    """Bytes of keys and values against context."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for size, colour, line in zip(SIZES, (BLUE, ORANGE, GREEN, PURPLE, "black"), LINES):
        model = config(size)
        contexts = np.unique(np.geomspace(256, model.max_position_embeddings, 60).astype(int))
        total = [sum(memory.kv_bytes(model, int(n), itemsize=2).values()) / 2**20 for n in contexts]
        axes.loglog(contexts, total, color=colour, linestyle=line, label=size.upper())
    axes.set(xlabel="context, tokens", ylabel="KV cache, MiB in bf16")
    axes.legend(frameon=False)
    return figure


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
    return figure


def assistant():
    """Where a draft comes from."""
    figure, axes = plt.subplots(figsize=(9.5, 4))
    boxes = {
        "token": (0, 2.6, "newest token", "white"),
        "embed": (2.3, 2.6, "target's\nembedding", TARGET),
        "hidden": (2.3, 0.8, "target's hidden,\nafter the final norm", TARGET),
        "pre": (4.9, 1.7, "pre_projection", DRAFTER),
        "layers": (7.2, 1.7, "4 layers,\nqueries only", DRAFTER),
        "lent": (7.2, 3.6, "target's last sliding\nand last full KV", TARGET),
        "head": (9.6, 2.6, "head", DRAFTER),
        "post": (9.6, 0.8, "post_projection", DRAFTER),
        "draft": (11.9, 2.6, "draft token", "white"),
    }
    wire(axes, boxes, "token embed, embed pre, hidden pre, pre layers, layers head, layers post, head draft")
    arrow(axes, (7.2, 3.2), (7.2, 2.1))
    arrow(axes, (9.6, 0.4), (2.3, 0.4), bend=-0.12, linestyle="dashed", color=DRAFTER)
    arrow(axes, (11.9, 3.0), (0, 3.0), bend=0.2, linestyle="dashed", color=DRAFTER)
    axes.text(5.9, -0.75, "fed back for the next draft token", ha="center", fontsize=8)
    axes.set(xlim=(-1.1, 13), ylim=(-1, 5.6))
    axes.axis("off")
    return figure


def qwen_plan():
    """One bar a layer, for five sizes."""
    figure, axes = plt.subplots(figsize=(9, 2.4))
    for row, name in enumerate(QWENS):
        for i, layer in enumerate(published_config(name)[1].layers):
            axes.barh(row, 0.8, left=i + 0.1, **layer_style(layer.kind))
    kinds = {"Gated DeltaNet": ("linear",), "full attention": ("full",)}
    label_plan(axes, [name.removeprefix("qwen").upper() for name in QWENS], kinds)
    return figure


def qwen_cache():
    """Bytes of states, keys and values against context, beside a model that only attends."""
    figure, axes = plt.subplots(figsize=(6, 3.4))
    names = "gemma-4-31b", "qwen3.6-27b", "qwen3.6-35b-a3b"
    for name, colour, line in zip(names, (BLUE, ORANGE, GREEN), LINES):
        model = published_config(name)[1]
        contexts = np.unique(np.geomspace(64, model.max_position_embeddings, 60).astype(int))
        total = [sum(memory.kv_bytes(model, int(n), itemsize=2).values()) / 2**20 for n in contexts]
        axes.loglog(contexts, total, color=colour, linestyle=line, label=name)
    axes.set(xlabel="context, tokens", ylabel="cache, MiB\n(bf16; states float32)")
    axes.legend(frameon=False)
    return figure


def unreading():
    """Two tokens of five are accepted: what each way keeps, and what it does then."""
    figure, rows = plt.subplots(2, 1, figsize=(8, 2.6))
    for axes, kept, title in zip(
        rows, (range(6), (0, 5)), ("every state", "the committed state, the writes, the present state")
    ):
        for t in range(6):
            if t in kept:
                box(axes, 1.5 * t, 0, f"state\n{t}", LINEAR, 0.4, 0.3)
            if t and len(kept) == 2:
                axes.plot(1.5 * t - 0.75, 0, marker="s", color=BLUE, markersize=5)
        axes.set_title(f"kept: {title}", fontsize=9, loc="left")
        axes.set(xlim=(-0.6, 8.2), ylim=(-0.5, 0.95))
        axes.axis("off")
    arrow(rows[0], (3.0, 0.85), (3.0, 0.36), color=VERMILLION)
    rows[0].text(3.15, 0.6, "un-read 3: take state 2", fontsize=8)
    arrow(rows[1], (0.0, 0.36), (3.0, 0.1), bend=-0.25, color=VERMILLION)
    rows[1].text(3.15, 0.45, "un-read 3: from state 0, write twice again", fontsize=8)
    return figure


def mtp():
    """Where a draft of the MTP layer comes from."""
    figure, axes = plt.subplots(figsize=(9.5, 4))
    boxes = {
        "token": (0, 2.6, "newest token", "white"),
        "embed": (2.3, 2.6, "target's\nembedding", TARGET),
        "hidden": (2.3, 0.8, "target's hidden,\nafter the final norm", TARGET),
        "fc": (4.9, 1.7, "norm each, fc", DRAFTER),
        "layer": (7.2, 1.7, "1 full-attention\nlayer", DRAFTER),
        "kv": (7.2, 3.6, "keys and values\nof its own", DRAFTER),
        "norm": (9.6, 1.7, "mtp.norm", DRAFTER),
        "head": (9.6, 3.0, "target's\nhead", TARGET),
        "draft": (11.9, 3.0, "draft token", "white"),
    }
    wire(axes, boxes, "token embed, embed fc, hidden fc, fc layer, layer norm, head draft")
    arrow(axes, (7.2, 3.2), (7.2, 2.1))
    arrow(axes, (9.6, 2.1), (9.6, 2.6))
    arrow(axes, (9.6, 1.3), (2.3, 0.4), bend=-0.22, linestyle="dashed", color=DRAFTER)
    arrow(axes, (11.9, 3.4), (0, 3.0), bend=0.2, linestyle="dashed", color=DRAFTER)
    axes.text(5.9, -0.85, "fed back for the next draft token", ha="center", fontsize=8)
    axes.set(xlim=(-1.1, 13), ylim=(-1.1, 5.6))
    axes.axis("off")
    return figure


def areas():
    """Where p and q meet, what is left of each, and what the two parts make together."""
    kept_V, tokens = np.minimum(P_V, Q_V), np.arange(len(P_V))
    figure, (laws, parts, made) = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
    laws.bar(tokens - 0.2, P_V, 0.4, color=TARGET, label="p, the target's")
    laws.bar(tokens + 0.2, Q_V, 0.4, color=DRAFTER, hatch="//", edgecolor="white", label="q, the drafter's")
    laws.set(title="two laws", ylabel="probability")
    accepted, rejected, correction = (FATES[fate].colour for fate in ("accepted", "rejected", "correction"))
    parts.bar(tokens, kept_V, 0.7, color=accepted, label=f"min(p, q): accepted, {kept_V.sum():.2f}")
    parts.bar(tokens, Q_V - kept_V, 0.7, kept_V, color="white", edgecolor=rejected, hatch="xx",
              label=f"q − min(p, q): rejected, {(Q_V - kept_V).sum():.2f}")  # fmt: skip
    parts.set(title="what becomes of a draft token")
    rest_V = (1 - kept_V.sum()) * residual(P_V, Q_V)
    made.bar(tokens, kept_V, 0.7, color=accepted, label=f"accepted, {kept_V.sum():.2f}")
    made.bar(tokens, rest_V, 0.7, kept_V, color=correction, hatch="..", edgecolor="white",
             label=f"correction, {rest_V.sum():.2f}")  # fmt: skip
    made.step(np.arange(-0.5, len(P_V) + 0.5), [*P_V, P_V[-1]], where="post", color="black", label="p")
    made.set(title="what is emitted")
    for axes in (laws, parts, made):
        axes.set(xlabel="token", ylim=(0, 0.8), xticks=tokens)
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.tight_layout()
    return figure


LAWS = {  # rules, with the parameters of acceptance.md
    "greedy": {},
    "rejection": {},
    "match": {},
    "block": {},
    "typical": {},
    "ensemble": {"assistant_ensemble_weight": 0.5},
    "threshold": {"threshold_acc": 0.5},
    "relaxed": {"relaxed_topk": 2, "relaxed_delta": 0.2},
    "hf-gemma4": {},
}


def laws():
    """What each rule emits first, against p."""
    figure, grid = plt.subplots(3, 3, figsize=(9, 6), sharex=True, sharey=True)
    tokens = np.arange(len(P_V))
    for axes, (rule, parameters) in zip(grid.flat, LAWS.items()):
        law_V = exact_law(rule, P_V, Q_V, **parameters)
        apart = abs(law_V - P_V).sum() / 2
        axes.bar(tokens, law_V, 0.7, color=GREEN if apart < 1e-12 else VERMILLION, hatch="" if apart < 1e-12 else "//",
                 edgecolor="white")  # fmt: skip
        axes.step(np.arange(-0.5, len(P_V) + 0.5), [*P_V, P_V[-1]], where="post", color="black")
        axes.set_title(f"{rule}: " + ("p itself" if apart < 1e-12 else f"{apart:.2f} away from p"), fontsize=9)
        axes.set_xticks(tokens)
    for axes in grid[:, 0]:
        axes.set_ylabel("probability")
    for axes in grid[-1]:
        axes.set_xlabel("token emitted first (the line: p)")
    figure.tight_layout()
    return figure


def blocks():
    """Tokens a round by `rejection` and by `block`, if every token has the example's laws."""
    figure, axes = plt.subplots(figsize=(6, 3))
    widths = (1, 2, 3)
    for rule, colour, mark in (("rejection", TARGET, "o"), ("block", GREEN, "s")):
        mean = [tokens_per_round(emitted(rule, lambda _: P_V, lambda _: Q_V, K)) for K in widths]
        axes.plot(widths, mean, color=colour, marker=mark, label=rule)
        axes.annotate(f"{mean[-1]:.3f}", (widths[-1], mean[-1]), (6, 0), textcoords="offset points", va="center")
    axes.set(xlabel="draft tokens a round, K", ylabel="tokens a round, mean", xticks=widths)
    axes.legend(frameon=False)
    return figure


def wire(axes, boxes, pairs):
    """Boxes {name: (x, y, text, colour)}, and arrows from right to left edge: "from to, from to"."""
    for x, y, text, colour in boxes.values():
        box(axes, x, y, text, colour, 0.9, 0.38)
    for pair in pairs.split(", "):
        start, stop = pair.split()
        arrow(axes, (boxes[start][0] + 0.93, boxes[start][1]), (boxes[stop][0] - 0.93, boxes[stop][1]))


def box(axes, x, y, text, colour, width, height):
    style = {"facecolor": "white" if colour == "white" else colour + "55", "edgecolor": "black"}
    corner = x - width, y - height
    axes.add_patch(FancyBboxPatch(corner, 2 * width, 2 * height, boxstyle="round,pad=0.02", **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=7)


def arrow(axes, start, stop, bend=0.0, **style):
    shape = {"arrowstyle": "-|>", "mutation_scale": 12, "shrinkA": 0, "shrinkB": 0, "color": "black"}
    axes.add_patch(FancyArrowPatch(start, stop, connectionstyle=f"arc3,rad={bend}", **{**shape, **style}))


FIGURES = {
    "gemma4-plan": plan,
    "gemma4-masks": masks,
    "gemma4-rope": rope,
    "gemma4-kv": kv,
    "gemma4-experts": experts,
    "gemma4-assistant": assistant,
    "qwen35-plan": qwen_plan,
    "qwen35-cache": qwen_cache,
    "qwen35-unreading": unreading,
    "qwen35-mtp": mtp,
    "acceptance-areas": areas,
    "acceptance-laws": laws,
    "acceptance-block": blocks,
}
STYLE = {
    "svg.hashsalt": "minimtp",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "hatch.linewidth": 0.6,
}


def draw(folder):
    """Every figure as a file of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for name, make in FIGURES.items():
            figure = make()
            figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    draw(Path(*sys.argv[1:2] or [Path(__file__).parent / "figures"]))
