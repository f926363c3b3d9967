"""What the documents show is what happens: their Python blocks run, and print what stands below them."""

import contextlib
import io
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```\n(.*?)```)?", re.S)


def check_blocks(name):
    names, shown = {}, 0
    for code, below in BLOCK.findall((DOCS / name).read_text(encoding="utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert printed.getvalue() == below
        shown += bool(below)
    assert shown


def test_blocks_print_what_stands_below_them():
    check_blocks("oracle.md")
