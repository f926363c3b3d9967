"""One set of colours and marks, for terminals, pages and pictures alike.

The palette is Okabe and Ito's, whose colours people with any kind of colour vision tell apart; what a colour says is
also said by a mark or a word.
"""

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
