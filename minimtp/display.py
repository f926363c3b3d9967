"""One set of colours and marks, for terminals, pages and pictures alike.

The palette is Okabe and Ito's, whose colours people with any kind of colour vision tell apart; what a colour says is
also said by a mark or a word.
"""

import html
import unicodedata
from typing import NamedTuple

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILLION, PURPLE, GREY = "#E69F00", "#D55E00", "#CC79A7", "#999999"

TARGET, DRAFTER = BLUE, ORANGE  # p and q, everywhere


class Fate(NamedTuple):
    """What became of a token: the mark that says it without colour, a colour, the nearest of a terminal's 256."""

    mark: str
    colour: str
    terminal: int


# Terminal colours are of middling lightness: they read on a light ground and on a dark one.
FATES = {
    "accepted": Fate("+", GREEN, 35),
    "rejected": Fate("x", VERMILLION, 166),
    "unread": Fate(".", GREY, 245),
    "correction": Fate(">", BLUE, 33),
    "bonus": Fate("*", PURPLE, 133),
}


def paint(text, fate):
    """The text in the colour of a fate, for a terminal."""
    return f"\033[38;5;{FATES[fate].terminal}m{text}\033[0m"


MEMORY = {  # parts of a memory plan
    "driver": GREY,
    "weights": TARGET,
    "drafter": DRAFTER,
    "sliding KV": SKY,
    "full KV": PURPLE,
    "mtp KV": VERMILLION,
    "linear KV": YELLOW,
    "linear, committed KV": "#666666",
    "scratch": GREEN,
}


# Pieces of HTML for notebooks and pages: inline styles alone, in colours that read on a light ground and on a dark one.

LINES = {  # how a token of each fate is underlined, or struck out
    "accepted": f"background:{GREEN}2e;border-bottom:2px solid {GREEN}",
    "rejected": f"background:{VERMILLION}24;text-decoration:line-through {VERMILLION} 1.5px;font-size:85%",
    "unread": f"border-bottom:2px dotted {GREY};text-decoration:line-through {GREY};font-size:85%",
    "correction": f"background:{BLUE}38;border-bottom:4px double {SKY}",
    "bonus": f"background:{PURPLE}38;border-bottom:2px dashed {PURPLE}",
}
SIGNS = {"\n": "\u23ce", "\t": "\u21e5", " ": "\u2423"}
FRAME = "font:14px/1.5 system-ui,sans-serif;max-width:60em"
CODE = "font-family:ui-monospace,monospace"
CELL = "padding:.1em .45em;text-align:right;border:0;background:none"
PALE = "opacity:.75;font-size:90%"


def escaped(text):
    return html.escape(str(text))


def visible(text, keep=""):
    """The text with blanks, line ends, and what would not be seen or would turn it round, as signs; `keep` stays."""
    return "".join(char if char in keep else SIGNS.get(char) or _seen(char) for char in text)


def _seen(char):
    return f"<U+{ord(char):04X}>" if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") else char


def fated(text, fate, title=""):
    """A token's text in the style of its fate."""
    style = f"{LINES[fate]};border-radius:3px;margin:0 1px;unicode-bidi:isolate"
    return f'<span title="{escaped(visible(title, " "))}" style="{style}">{escaped(text)}</span>'


def legend(fates=FATES):
    """What the styles of fates mean."""
    return " ".join(f"<span>{fated(FATES[fate].mark, fate)} {fate}</span>" for fate in fates)


def framed(*parts):
    """One block of a notebook's output."""
    return f'<div style="{FRAME}">{"".join(parts)}</div>'


def pale(text):
    return f'<div style="{PALE}">{text}</div>'


def stacked(parts, whole=None, unit=""):
    """One bar of {name: (size, colour)}, on the width that `whole` takes, and what its parts are."""
    total = sum(size for size, _ in parts.values())
    width = max(total, whole or 0) or 1
    pieces = "".join(
        f'<div title="{escaped(name)}: {size:,.1f}{unit}" style="width:{100 * size / width:.3f}%;background:{colour};'
        'border-right:1px solid #fff8;box-sizing:border-box"></div>'
        for name, (size, colour) in parts.items()
    )
    edge = f"outline:1px dashed {GREY}" if whole else ""
    keys = " ".join(
        f'<span style="white-space:nowrap"><span style="color:{colour}">\u25a0</span> {escaped(name)} '
        f"{size:,.1f}{unit}</span>"
        for name, (size, colour) in parts.items()
    )
    bar = f'<div style="display:flex;height:1.4em;margin:.3em 0;overflow:hidden;{edge}">{pieces}</div>'
    return f'{bar}<div style="{PALE};display:flex;flex-wrap:wrap;gap:0 1em">{keys}</div>'


def table(head, rows):
    """A table of HTML cells, the first of each row to the left."""
    lines = [("th", head), *(("td", row) for row in rows)]
    made = [
        "".join(
            f'<{tag} style="{CELL}{";text-align:left" if at == 0 else ""}">{cell}</{tag}>'
            for at, cell in enumerate(row)
        )
        for tag, row in lines
    ]
    body = "".join(f'<tr style="background:none">{row}</tr>' for row in made)
    style = "border-collapse:collapse;margin:.3em 0;color:inherit;font:inherit"
    return f'<div style="overflow-x:auto"><table style="{style}">{body}</table></div>'


def histogram(counts, names):
    """Small bars, one for each count, with what they count below; how many in the tip of each."""
    most = max(*counts, 1)
    columns = "".join(
        f'<div title="{escaped(name)}: {count:,}" style="display:inline-block;width:1.6em;text-align:center;'
        f'vertical-align:bottom"><div style="height:{40 * count / most:.1f}px;background:{SKY};margin:0 2px"></div>'
        f'<span style="font-size:70%">{escaped(name)}</span></div>'
        for name, count in zip(names, counts)
    )
    return f'<div style="white-space:nowrap;overflow-x:auto;line-height:1.1">{columns}</div>'


def cells(values, most, texts):
    """Numbers in a row, orange below 0 and blue above, stronger the larger."""
    made = []
    for value, text in zip(values, texts):
        colour, share = TARGET if value >= 0 else DRAFTER, min(abs(value) / (most or 1), 1)
        made.append(
            f'<span style="display:inline-block;min-width:1.9em;padding:0 .2em;text-align:center;{CODE};font-size:85%;'
            f'background:{colour}{int(150 * share):02x}">{escaped(text)}</span>'
        )
    return f'<div style="line-height:1.7">{"".join(made)}</div>'
