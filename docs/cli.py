"""docs/cli.md, from the parsers themselves: python docs/cli.py

The text is each command's --help, 100 columns wide, the same from Python 3.11 on: of an option with a short name,
newer versions of argparse print the argument once (-k, --num-draft K), and so does this.
"""

import argparse
import re
from functools import partial
from pathlib import Path

from minimtp.cli import _parser

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 100


class Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        argument = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {argument}"


def help_text(parser):
    """--help, without the colours and the breaks that depend on who asks."""
    parser.formatter_class = partial(Formatter, width=WIDTH)
    parser.color = False
    usage, _, rest = parser.format_help().partition("\n\n")
    return f"{rewrapped(usage, parser.prog)}\n\n{rest.rstrip()}"


def rewrapped(usage, prog):
    """The usage with its parts on lines of our own: versions of argparse break them at different places."""
    indent = " " * len(f"usage: {prog} ")
    parts = " ".join(usage.split()).removeprefix(f"usage: {prog}")
    lines = [f"usage: {prog}"]
    for word in re.findall(r"\[[^\]]*\]|\([^)]*\)|-\S+ \S+|\S+", parts):
        if len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(indent[:-1])
        lines[-1] += f" {word}"
    return "\n".join(lines)


def page():
    parser = _parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    told = {action.dest: action.help for action in commands._choices_actions}
    rows = "\n".join(f"| [{name}](#{name}) | {told[name]} |" for name in commands.choices)
    parts = [f"## {name}\n\n```text\n{help_text(command)}\n```\n" for name, command in commands.choices.items()]
    return "\n".join([HEAD.format(rows=rows), *parts, TAIL])


HEAD = """\
# The commands

What can be typed, and what does each option do? This page is every command's own `--help`,
written by `python docs/cli.py`.

Text goes to standard output and nothing else does; progress and statistics go to standard error. `--json` prints JSON
instead. Exit status: 0 done, 1 a check found a difference, 2 bad use or bad input with one line that says why, 130
interrupted, 141 the reader has left. `python -m minimtp` is the same as `minimtp`.

| command | what it does |
|---|---|
{rows}
"""
TAIL = "Next: [every claim, and the command that shows it](proof.md)\n"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
