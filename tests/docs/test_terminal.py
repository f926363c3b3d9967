"""The README's picture of a terminal shows what the command prints on one."""

import re
import sys
from html import unescape

from commands import PROJECT

sys.path.insert(0, str(PROJECT / "docs"))
import terminal  # noqa: E402

SHOWN = (PROJECT / "docs" / "figures" / "trace.svg").read_text(encoding="utf-8")


def coloured(svg):
    """[(text, its colour)] of a picture."""
    colours = dict(re.findall(r"\.(trace-r\d+) \{ fill: (#\w+)", svg))
    parts = re.findall(r'<text class="(trace-r\d+)"[^>]*>(.*?)</text>', svg, re.S)
    return [(unescape(text).strip(), colours[name]) for name, text in parts if text.strip()]


def test_the_picture_is_what_the_command_prints():
    found = coloured(terminal.picture(terminal.shown()))
    assert found == coloured(SHOWN) and len({colour for _, colour in found}) == 6


def test_another_run_is_another_picture():
    assert coloured(terminal.picture(terminal.shown(("run", "JULIET:", "-n", "8", "--trace")))) != coloured(SHOWN)
