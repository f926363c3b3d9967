"""How the notebooks' pictures look: import it, and matplotlib draws in the project's colours."""

import matplotlib.pyplot as plt
from cycler import cycler

from minimtp.display import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION

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
