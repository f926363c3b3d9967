"""A run as one page: its text by fate, and of the token that is selected what decided it. One file, no network."""

import base64
import hashlib
import json
import math
from pathlib import Path

from .checkpoint import new_file
from .display import DRAFTER, FATES, LINES, TARGET, escaped, visible
from .watch import KEPT, shown

FOLDER = Path(__file__).parent
SOFT = (
    "At temperature 0 the argmax decides; so that there is something to see, the bars show the softmax of the logits."
)


def check_path(path):
    """Raise ValueError where no page can be written, before anything is computed for it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")


def write_page(path, run, command=None):
    """Write the page of a Run; command: what made it, to be shown. The file is whole or not there at all."""
    check_path(path)
    with new_file(Path(path)) as file:
        file.write(page(run, command).encode())


def page(run, command=None):
    """The page of a Run -> HTML. ValueError for a run of no steps."""
    if not run.steps:
        raise ValueError("a run of no steps makes no page")
    record = data(run, command)
    template, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    template = template.replace("{COLOURS}", _colours()).replace("{FATES}", _fates()).replace("{SCRIPT}", script)
    style = template.partition("<style>")[2].partition("</style>")[0]
    template = template.replace("{STYLE_HASH}", _hash(style)).replace("{SCRIPT_HASH}", _hash(script))
    before, _, after = template.partition("{DATA}")
    return before.replace("{TITLE}", escaped(record["title"])) + _as_json(record) + after


def data(run, command=None):
    """All that the page shows, JSON-able."""
    summary, settings = run.summary, dict(run.settings)
    model = settings.pop("model")
    kept = " ".join(f"{share:.0%}" for share in summary["acceptance"])
    prompt = "" if run.tokenizer is None else visible(run.tokenizer.decode(run.prompt, special=True), KEPT)
    tokens = f"{len(run.prompt)} token{'s' if len(run.prompt) != 1 else ''}"
    return {
        "title": f"{model}: a run of multi-token prediction",
        "model": model,
        "made": "A run of minimtp: what was drafted, what was kept, and why",
        "rate": f"{summary['tokens_per_pass']:.2f}",
        "count": f"{summary['tokens']} tokens in {summary['passes']} passes of the target"
        + (f"; accepted by depth {kept}" if kept else ""),
        "settings": [[name, str(value)] for name, value in {**settings, "prompt": tokens}.items()],
        "command": command,
        "prompt": prompt,
        "note": "Select a token to see what decided it." + (f" {SOFT}" if run.argmax else ""),
        "laws": "softmax of the logits" if run.argmax else "largest entries",
        "marks": {name: fate.mark for name, fate in FATES.items()},
        "places": [_place(run, place) for place in run.places],
    }


def _place(run, place):
    """A Place as the page wants it: numbers short, labels of tokens beside their ids."""
    drafted = run.steps[place.round].drafted
    which = f"draft token {place.depth} of {drafted}" if place.depth else f"given by the target, {drafted} drafted"
    text = shown(place)
    return {
        "round": place.round,
        "position": place.position,
        "where": f"round {place.round}, {which} · position {place.position} · id {place.token}",
        "fate": place.fate,
        "id": place.token,
        "shown": text.replace("\n", ""),
        "breaks": text.count("\n"),
        "label": visible(place.label),
        "says": place.says,
        "numbers": [] if run.argmax else _numbers(place),
        "two": place.q is not None,
        "u": None if place.u is None else _short(place.u),
        "kept": None if place.kept is None else [_short(end) for end in place.kept],
        "part": "green: where u keeps it" if place.depth else "green: the part of this token",
        "bars": [[*_named(run, token), _short(p), None if q is None else _short(q)] for token, p, q in place.bars],
        "residual": [[*_named(run, token), _short(chance)] for token, chance in place.drawn_from],
    }


def _named(run, token):
    return visible(run.label(token)), token


def _short(x):
    return float(f"{x:.6g}")


def _numbers(place):
    """[name, text] of what was compared."""
    found = [("p", place.p), ("q", place.q), ("u", place.u)]
    if place.depth:
        found.insert(2, ("p/q", place.p / place.q if place.q else math.inf))
    return [[name, f"{value:.3g}"] for name, value in found if value is not None]


def _as_json(record):
    """JSON that ends no script element, whatever tokens are called."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _colours():
    named = {"p": TARGET, "q": DRAFTER, **{name: fate.colour for name, fate in FATES.items()}}
    return ":root {" + " ".join(f"--{name}: {colour};" for name, colour in named.items()) + "}"


def _fates():
    return "\n".join(f".f-{name}:not(.square) {{ {line} }}" for name, line in LINES.items())


def _hash(text):
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
