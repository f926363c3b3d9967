"""Links into the code point at the line where a name is defined: python docs/links.py sets their lines, --check looks.

A link names what it points at by its text, [`accept`](../minimtp/acceptance.py#L41), or, where the text says something
else, by its title, [the rule](../minimtp/acceptance.py#L97 "rejection"). A name may be a class's: `FullKV.rollback`.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r'\[(?P<text>[^\[\]]+)\]\((?P<path>[\w./-]+\.py)(?:#L\d+)(?: "(?P<title>[^"]+)")?\)')


def pages():
    """Every page that may link into the code."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "weights" / "README.md"]


@cache
def definitions(path):
    """{name: line} of what a module defines or assigns, and of what its classes do."""
    return dict(_named(ast.parse(path.read_text(encoding="utf-8")).body, ""))


def _named(body, prefix):
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node.lineno
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name):
                    yield prefix + name.id, node.lineno
        if isinstance(node, ast.ClassDef):
            yield from _named(node.body, f"{prefix}{node.name}.")


def corrected(text, page):
    """The text of a page with every line number right; KeyError: a name that its module does not define."""

    def at_its_line(link):
        name = link["title"] or link["text"].strip("`")
        lines = definitions((page.parent / link["path"]).resolve())
        if name not in lines:
            raise KeyError(f"{page.name}: {link['path']} defines no {name}")
        title = f' "{link["title"]}"' if link["title"] else ""
        return f"[{link['text']}]({link['path']}#L{lines[name]}{title})"

    return LINK.sub(at_its_line, text)


def main():
    stale = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := corrected(text, page)) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    print(*(f"{name}: lines have moved" for name in stale), sep="\n")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
