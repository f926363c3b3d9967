"""The list of notebooks in docs/index.md, from the notebooks that are there: python docs/lessons.py

Each gives its title and the paragraph below it.
"""

import json
import re
from pathlib import Path

PAGE = Path(__file__).parent / "index.md"
NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
MARKED = re.compile(r"(?<=<!-- notebooks, written by docs/lessons.py -->\n).*?(?=<!-- end -->)", re.S)


def entry(path):
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    title, _, rest = first.partition("\n")
    paragraph = " ".join(rest.strip().split("\n\n")[0].split())
    return f"- [{title.lstrip('# ')}](../notebooks/{path.name}) {paragraph}\n"


def page():
    about = NOTEBOOKS / "README.md"
    entries = f"- [How to run them](../notebooks/{about.name})\n" if about.exists() else ""
    entries += "".join(map(entry, sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))))
    return MARKED.sub(lambda _: f"\n{entries}\n" if entries else "", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
