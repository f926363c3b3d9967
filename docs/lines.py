"""How long each module is, in the tables of docs/architecture.md: python docs/lines.py

In a table with a column "lines" and one "module" or "modules", a row's lines are those of the files (or folders of
files) named in it, and those of the row "together" are the sum of the rows above it.
"""

import re
from pathlib import Path

PAGE = Path(__file__).parent / "architecture.md"
PACKAGE = Path(__file__).parent.parent / "minimtp"
TABLE = re.compile(r"(?:^\|.*\n)+", re.M)


def lines_of(name):
    """Lines of a file of the package, or of all files of a folder."""
    path = PACKAGE / name
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def counted(table):
    rows = [[cell.strip() for cell in row.strip("|").split(" |")] for row in table.splitlines()]
    head = rows[0]
    named = [column for column, title in enumerate(head) if title in ("module", "modules")]
    if "lines" not in head or not named:
        return table
    column, total = head.index("lines"), 0
    for row in rows[2:]:
        if "together" in row[0]:
            row[column] = f"{total:,}"
        else:
            count = sum(map(lines_of, re.findall(r"`([\w./]+)`", row[named[0]])))
            row[column], total = f"{count:,}", total + count
    return (
        "\n".join(f"| {' | '.join(row)} |" if i != 1 else "|" + "---|" * len(head) for i, row in enumerate(rows)) + "\n"
    )


def page():
    return TABLE.sub(lambda table: counted(table[0]), PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
