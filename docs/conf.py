"""The pages as a site that needs no network: sphinx-build -W --keep-going -b html docs OUT

What is read is the repository itself, so a link in a page is right on a code host and in the site. A Python or CUDA
source is a page as well, with an anchor for each line: acceptance.py#L41 opens there.
"""

import re
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from sphinx.parsers import Parser

ROOT = Path(__file__).parent.parent

project = "minimtp"
extensions = ["myst_nb"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "minimtp/*.py",
    "minimtp/kernels/*",
    "notebooks/[0-9]*.ipynb",
    "notebooks/*.md",
    "weights/*.md",
    "weights/*.py",
]
exclude_patterns = ["build", "**/.*", "**/__pycache__"]

nb_execution_mode = "off"
myst_heading_anchors = 3
highlight_language = "none"  # a block that names no language is output

html_theme = "furo"
html_title = "minimtp"
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["pages.css"]


class SourceParser(Parser):
    """A source as a page: its path, and its lines with their numbers."""

    supported = ("source",)

    def parse(self, text, document):
        env = document.settings.env
        path = env.doc2path(env.docname)
        name = path.relative_to(ROOT).as_posix()
        lexer = get_lexer_for_filename("x.cu" if path.suffix in (".h", ".cu") else path.name, stripnl=False)
        lines = highlight(text.rstrip("\n"), lexer, HtmlFormatter(nowrap=True)).splitlines()
        numbered = [f'<span id="L{n}"><a href="#L{n}">{n}</a>{line}\n</span>' for n, line in enumerate(lines, 1)]
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title(text=name)
        section += nodes.raw("", f'<div class="highlight source"><pre>{"".join(numbered)}</pre></div>', format="html")
        document += section
        slugs = {f"L{n}": (n, f"L{n}", f"line {n}") for n in range(1, len(lines) + 1)}
        env.metadata[env.docname] |= {"orphan": True, "nosearch": True, "myst_slugs": slugs}


def add_contents(app, docname, source):
    """The index's links, section by section, become the contents; the theme has its own link to the next page."""
    if docname != root_doc:
        source[0] = re.sub(r"\nNext: \[[^\n]*\n*$", "\n", source[0])
        return
    body, seen = source[0].partition("\nNext: ")[0], set()
    source[0] = body
    for section in re.split(r"^##? ", body, flags=re.M)[1:]:
        title = section.partition("\n")[0]
        links = [link for link in re.findall(r"\]\(([\w./-]+\.(?:md|ipynb))\)", section) if link not in seen]
        seen.update(links)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n" + "\n".join(links) + "\n```\n"


def add_entrance(app, exception):
    """The site's own index.html leads to the first page."""
    if exception is None and app.builder.format == "html":
        to = f'url={root_doc}.html"><title>minimtp</title><a href="{root_doc}.html">minimtp</a>'
        (Path(app.outdir) / "index.html").write_text(f'<meta http-equiv="refresh" content="0; {to}\n', encoding="utf-8")


def setup(app):
    app.srcdir = ROOT
    for suffix in (".py", ".cu", ".h"):
        app.add_source_suffix(suffix, "source")
    app.add_source_parser(SourceParser)
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_entrance)
    return {"parallel_read_safe": True}
