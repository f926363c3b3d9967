"""minimtp: a readable reference of multi-token prediction, from int4 QAT weights to accepted tokens."""

from .acceptance import Verdict, accept, exact_law
from .drafting import Draft, GemmaAssistant, PromptLookup, Scripted
from .generate import Step, generate
from .loading import load, load_drafter
from .sampling import Sampling, draw
from .watch import watch

__version__ = "0.1.0"
__all__ = [
    "Draft",
    "GemmaAssistant",
    "PromptLookup",
    "Sampling",
    "Scripted",
    "Step",
    "Verdict",
    "accept",
    "draw",
    "exact_law",
    "generate",
    "load",
    "load_drafter",
    "watch",
]
