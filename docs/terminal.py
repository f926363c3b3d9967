"""The README's picture of a terminal, from what the command prints on one: python docs/terminal.py [FILE]"""

import os
import pty
import re
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

COMMAND = "run", "ROMEO:", "-n", "48", "--trace"
COLUMNS = 112
PICTURE = Path(__file__).parent / "figures" / "trace.svg"
FONT = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
SVG = """<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: FONT; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<rect width="{terminal_width}" height="{terminal_height}" rx="8" fill="#1d1f21"/>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<g transform="translate(10, 14)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
""".replace("FONT", FONT)


def printed(command, columns=COLUMNS):
    """What a command of ours prints on a terminal of that width, times left out."""
    mine, its = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": ""}
    termios.tcsetwinsize(its, (50, columns))
    words = [sys.executable, "-m", "minimtp", *command]
    with subprocess.Popen(words, stdout=its, stderr=its, env=environment) as running:
        os.close(its)
        text = b"".join(iter(lambda: _read(mine), b""))
    os.close(mine)
    if running.returncode:
        raise RuntimeError(text.decode())
    return re.sub(r"[\d.]+ s,\s+\d+\s+tokens/s", "… s, … tokens/s", text.decode().replace("\r\n", "\n"))


def _read(end):
    try:
        return os.read(end, 1 << 16)
    except OSError:  # the other end was closed
        return b""


def picture(text):
    """Text with a terminal's colours -> SVG."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, legacy_windows=False)
    console.print(Text.from_ansi(text), highlight=False)
    return console.export_svg(theme=DIMMED_MONOKAI, code_format=SVG, unique_id="trace")


def shown(command=COMMAND):
    """A command as it is typed, and what it prints."""
    words = " ".join(f'"{word}"' if word.endswith(":") else word for word in command)
    return f"$ minimtp {words}\n{printed(command)}"


def main(path=PICTURE):
    Path(path).write_text(picture(shown()), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
