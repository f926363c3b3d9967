"""How the notebooks' pictures look: import it, and matplotlib draws in the project's colours."""

import sys

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler

from minimtp.display import BLUE, GREEN, GREY, MEMORY, ORANGE, PURPLE, SKY, VERMILLION

plt.rcParams |= {
    "figure.figsize": (8, 3),
    "figure.dpi": 90,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, GREY]),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "font.size": 9,
    "image.cmap": "viridis",
}


def wiring(ax, boxes, arrows, back=""):
    """Boxes {name: (x, y, text, colour)} and arrows "from to, from to"; those in `back` are dashed and bent."""
    patches = {}
    for name, (x, y, text, colour) in boxes.items():
        style = {"boxstyle": "round", "facecolor": colour + "40", "edgecolor": "black"}
        patches[name] = ax.text(x, y, text, ha="center", va="center", fontsize=8, bbox=style).get_bbox_patch()
    for pairs, style in ((arrows, "solid"), (back, "dashed")):
        for start, stop in (pair.split() for pair in pairs.split(", ") if pair):
            ends = {"patchA": patches[start], "patchB": patches[stop], "shrinkA": 1, "shrinkB": 1}
            bend = f"arc3,rad={0.0 if style == 'solid' else -0.3}"
            shape = {"arrowstyle": "-|>", "color": "black", "linestyle": style, "connectionstyle": bend}
            ax.annotate("", boxes[stop][:2], boxes[start][:2], arrowprops={**ends, **shape})
    ax.axis("off")


def boxes(ax, labels, colours, left=0.0, bottom=0.0, width=1.0, size=9):
    """A row of boxes with a text in each, from left to right; colours: as many, or more."""
    for i, (label, colour) in enumerate(zip(labels, colours)):
        ax.add_patch(plt.Rectangle((left + i * width, bottom), width, 1, facecolor=colour, edgecolor="black", lw=0.6))
        ax.text(left + (i + 0.5) * width, bottom + 0.5, label, ha="center", va="center", fontsize=size)
    ax.autoscale_view()
    ax.set_axis_off()


def surface(axes, xs, ys, gain, levels, vmax, *more):
    """Map of gain(x, y, *more) from 0 to vmax, labelled lines in it; white dots: the best y for an x, if above 1."""
    gain_YX = np.array([[gain(x, y, *more) for x in xs] for y in ys])
    image = axes.contourf(xs, ys, gain_YX, levels=np.linspace(0, vmax, 11), extend="max")
    lines = axes.contour(xs, ys, gain_YX, levels=levels, colors="black", linewidths=0.8)
    axes.clabel(lines, fmt="%.1f", fontsize=8)
    pays = gain_YX.max(axis=0) > 1
    axes.plot(xs[pays], ys[gain_YX.argmax(axis=0)][pays], "o", color="white", mec="black", ms=4, clip_on=False)
    return image


HATCHES = {"drafter": "//", "sliding KV": "..", "full KV": "\\\\", "scratch": "xx"}  # of parts that are thin


def memory_bars(axes, plans):
    """Stacked bars, in GiB, of memory plans {label: Plan}, the first on top; a line where the memory ends."""
    ends = []
    for row, plan in enumerate(plans.values()):
        start = 0
        for name, size in plan.stack().items():
            wide, hatch = size / 2**30, HATCHES.get(name)
            axes.barh(row, wide, left=start, color=MEMORY[name], hatch=hatch, edgecolor="white", lw=0.5, label=name)
            start += wide
        ends.append(start)
        memory, verdict = plan.memory / 2**30, "fits" if plan.fits else "does not fit"
        axes.annotate(f" {start:.1f} {verdict}", (max(start, memory), row), va="center")
        axes.axvline(memory, color="black", linestyle="--", label="memory")
    axes.set(xlabel="GiB", xlim=(0, max(ends) * 1.22), yticks=range(len(plans)), yticklabels=list(plans))
    axes.invert_yaxis()
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), frameon=False)


def context_grid(axes, plans):
    """Map of the longest context of rows of memory plans, in thousands of tokens; *: all that the model takes."""
    longest = np.array([[plan.max_context for plan in row] for row in plans])
    image = axes.imshow(np.where(longest, longest, np.nan) / 1000, cmap="cividis", vmin=0, vmax=262.144, aspect="auto")
    for (row, column), tokens in np.ndenumerate(longest):
        star = "*" if tokens == plans[row][column].config.max_position_embeddings else ""
        said, colour = f"{tokens / 1000:.0f}{star}" if tokens else "–", "white" if 0 < tokens < 130_000 else "black"
        axes.annotate(said, (column, row), ha="center", va="center", color=colour)
    return image


class Stop(Exception):
    """Ends a notebook with a sentence where a traceback would be."""

    def _render_traceback_(self):
        return [str(self)]


def reading_threads(axes, thread_OP, rows):
    """Which thread reads which piece of which row: colour and number; a line between blocks of so many rows."""
    image = axes.imshow(thread_OP, aspect="auto", vmin=0, vmax=127)
    for row in range(0, len(thread_OP), 4):
        for piece in range(0, thread_OP.shape[1], 8):
            first, last = thread_OP[row, piece], thread_OP[row, piece + 7]
            colour = "white" if first < 80 else "black"
            axes.annotate(f"{first}–{last}", (piece + 3.5, row + 1.5), ha="center", va="center", color=colour)
    for row in range(rows, len(thread_OP), rows):
        axes.axhline(row - 0.5, color="white", lw=3)
    return image


def unnamed_axes():
    """Titles of the open figures' axes that lack a name, their own or one that they share."""
    found = []
    for figure in map(plt.figure, plt.get_fignums()):
        for ax in figure.axes:
            shared = {"x": ax.get_shared_x_axes(), "y": ax.get_shared_y_axes()}
            named = [
                any(getattr(one, f"get_{way}label")() for one in group.get_siblings(ax))
                or bool(over and over.get_text())
                for way, group in shared.items()
                for over in [getattr(figure, f"_sup{way}label")]
            ]
            enough = any(named) if hasattr(ax, "_colorbar") else all(named)
            if ax.axison and ax.has_data() and not enough:
                found.append(ax.get_title() or "a figure")
    return found


def insist_on_names(shell):
    """From now on a cell of this IPython shell that draws an axis without a name says so on standard error."""

    def check():
        if found := unnamed_axes():
            print(f"an axis has no name: {', '.join(found)}", file=sys.stderr)

    shell.events.callbacks["post_execute"].insert(0, check)  # before figures are shown and closed
