"""What several commands share: the model they load, the text they read, how far they are."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from tqdm.utils import disp_len

from .checkpoint import CheckpointError
from .display import FATES, paint
from .drafting import GemmaAssistant
from .kv_storage import NAMES, STORAGES, VALUES_ONLY
from .loading import bundled, find_drafter, load, load_drafter

BUNDLED = "tiny-gemma4"
CHECKPOINT = "checkpoint folder, GGUF file, or a bundled model"
PROMPT = "ROMEO:\n"  # what the bundled model is asked to continue where no prompt is given


def loader_options(draft=True):
    """Options of every command that loads a model and, where `draft`, its drafter."""
    loader = argparse.ArgumentParser(add_help=False)
    if draft:
        loader.add_argument("--draft", default="auto", help="auto, none, lookup (prompt lookup), or a drafter's path")
    loader.add_argument("--backend", choices=("numpy", "cupy"), default="numpy")
    loader.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    loader.add_argument("--keep", choices=("auto", "packed", "dense"), default="auto", help="weights in memory")
    storages = f"keys and values in memory: {', '.join(STORAGES)} (as --dtype); with {VALUES_ONLY}, values only where"
    loader.add_argument("--kv", choices=NAMES, metavar="STORAGE", help=f"{storages} keys can be made of them")
    return loader


def load_target(arguments):
    """The target alone."""
    return load(arguments.model, arguments.backend, arguments.dtype, arguments.keep, kv=arguments.kv)


def load_pair(arguments, soft=False):
    """The target, which must have a tokenizer, and its drafter, or None where there is none.

    soft: drafts are to carry soft laws, if the drafter can.
    """
    target = load_target(arguments)
    if target.tokenizer is None:
        raise CheckpointError(f"{target.folder} has no tokenizer")
    if arguments.draft == "none":
        return target, None
    if arguments.draft == "auto" and find_drafter(target) is None:
        print(f"no drafter in or beside {target.folder} (--draft PATH names one): one token a pass", file=sys.stderr)
        return target, None
    drafter = load_drafter(arguments.draft, target, arguments.keep)
    return target, replace(drafter, soft=True) if soft and isinstance(drafter, GemmaAssistant) else drafter


def read_prompt(arguments):
    prompt = arguments.prompt
    if prompt is None and arguments.model != BUNDLED:
        raise ValueError("no prompt: give one, or - to read standard input")
    if prompt == "-":
        prompt = standard_input().read()
    if prompt == "":
        raise ValueError("the prompt is empty")
    if prompt is None:
        print(f"prompt: {json.dumps(PROMPT)}", file=sys.stderr)
    return PROMPT if prompt is None else checked_text(prompt, "the prompt")


def text_in(path):
    """The text of a file, or the bundled held-out one where none is named."""
    path = Path(path) if path else bundled("heldout.txt")
    return checked_text(path.read_text(encoding="utf-8", errors="surrogateescape"), path)


def standard_input():
    if sys.stdin is None:
        raise ValueError("there is no standard input")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def checked_text(text, name):
    """The text, if all of it was UTF-8 (Python smuggles other bytes through as lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not UTF-8 text") from None
    return text


def has_colours(stream):
    """Whether what is written there may be coloured: to a terminal that has colours, for who has not said no."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns(stream):
    """The width of the terminal that the stream is, None where it is none."""
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:  # what calls itself a terminal and has no size
        return 80


def hang(parts, width, indent):
    """The parts as a line, or where that is wider than `width`, as several of which all but the first are indented."""
    lines = [parts[0]]
    for part in parts[1:]:
        if width is None or disp_len(f"{lines[-1]} {part}") <= width:
            lines[-1] += f" {part}"
        else:
            lines.append(" " * indent + part)
    return "\n".join(lines)


def coloured_lines(text, stream):
    """The text, for a stream with colours each line that begins with the mark of a fate in the colour of that."""
    if not has_colours(stream):
        return text
    fates = {f"{fate.mark} ": name for name, fate in FATES.items()}
    return "\n".join(paint(line, fates[line[:2]]) if line[:2] in fates else line for line in text.split("\n"))


def progress_bar(unit):
    """A bar on standard error, if that is a terminal."""
    return tqdm(unit=unit, unit_scale=True, leave=False, disable=not sys.stderr.isatty(), file=sys.stderr)


def counting(bar):
    def progress(done, total):
        bar.total = total
        bar.update(done - bar.n)

    return progress
