"""What scripts write into the documents is current, every link leads somewhere, and the pages follow one another."""

import json
import re
import sys

import pytest
from commands import PROJECT
from markdown_it import MarkdownIt

sys.path.insert(0, str(PROJECT / "docs"))
import cli
import figures
import lessons
import lines
import links

DOCS, NOTEBOOKS = PROJECT / "docs", sorted((PROJECT / "notebooks").glob("[0-9]*.ipynb"))
PAGES = [*links.pages(), *sorted((PROJECT / "notebooks").glob("*.md"))]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def text_of(path):
    """A page's Markdown, or that of all Markdown cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


def tokens(text):
    for token in MARKDOWN.parse(text):
        yield token
        yield from token.children or ()


def targets(text):
    """What the links and pictures of a text point at, as written."""
    found = [token.attrGet("href") or token.attrGet("src") for token in tokens(text)]
    return [target for target in found if target and "://" not in target]


def anchors(path):
    """What may stand behind # in a link to a file: lines of a source, headings of a page."""
    if path.suffix != ".md":
        return {f"L{n}" for n in range(1, len(path.read_text(encoding="utf-8").splitlines()) + 1)}
    parsed = MARKDOWN.parse(text_of(path))
    titles = [inline.content for token, inline in zip(parsed, parsed[1:]) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead(path, text):
    """The links of a page that lead nowhere."""
    for target in targets(text):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    assert not [*dead(path, text_of(path))]


def test_dead_links_are_noticed():
    text = "[a](gone.md) [b](gemma4.md#gone) [c](../minimtp/kv.py#L99999) [d](gemma4.md#experts-26b-a4b) ![e](gone.svg)"
    assert [*dead(DOCS / "kv.md", text)] == ["gone.md", "gemma4.md#gone", "../minimtp/kv.py#L99999", "gone.svg"]


@pytest.mark.parametrize("path", links.pages(), ids=lambda path: path.name)
def test_links_into_the_code_point_at_the_definition(path):
    assert links.corrected(text_of(path), path) == text_of(path), "python docs/links.py"


def test_a_moved_line_and_a_lost_name_are_noticed():
    page, found = DOCS / "kv.md", links.definitions(PROJECT / "minimtp" / "kv.py")
    right = f"[`FullKV.append`](../minimtp/kv.py#L{found['FullKV.append']})"
    assert links.corrected("[`FullKV.append`](../minimtp/kv.py#L1)", page) == right
    with pytest.raises(KeyError, match="Gone"):
        links.corrected('[it](../minimtp/kv.py#L1 "Gone")', page)


@pytest.mark.parametrize("script", [cli, lessons, lines], ids=lambda script: script.__name__)
def test_what_a_script_writes_is_current(script):
    assert script.page() == script.PAGE.read_text(encoding="utf-8"), f"python docs/{script.__name__}.py"


def test_every_module_is_counted_in_one_part():
    parts = (
        (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## What is how long")[2].partition("## ")[0]
    )
    modules = [path.name for path in (PROJECT / "minimtp").glob("*.py") if not path.name.startswith("__")]
    assert sorted(re.findall(r"`(\w+\.py)`(?=[, ]+[`|])", parts)) == sorted(modules)


def test_the_glossary_is_in_order():
    words = re.findall(r"^\*\*(.+?)\.\*\*", (DOCS / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert words == sorted(words, key=str.lower) and len(words) > 40


def test_each_page_names_the_next_one_of_the_index():
    order = [target for target in targets(text_of(DOCS / "index.md")) if re.fullmatch(r"[\w-]+\.md", target)]
    order = ["index.md", *dict.fromkeys(order)]
    assert {*order} == {path.name for path in DOCS.glob("*.md")}
    for name, following in zip(order, order[1:]):
        assert re.findall(r"^Next: \[.+\]\((.+)\)$", text_of(DOCS / name), re.M) == [following], name


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_a_page_opens_with_its_question(path):
    title, opening, *_ = text_of(path).split("\n\n")
    assert title.startswith("# ") and "\n" not in title
    assert "?" in opening


def test_figures_are_what_their_script_draws(tmp_path):
    figures.draw(tmp_path)
    for path in tmp_path.iterdir():
        new, kept = (folder / path.name for folder in (path.parent, DOCS / "figures"))
        new, kept = new.read_text(encoding="utf-8"), kept.read_text(encoding="utf-8")
        assert new == kept if drawn_by(new) == drawn_by(kept) else labels(new) == labels(kept), path.name


def drawn_by(svg):
    """Matplotlib's version, which may place things a little otherwise."""
    return re.search(r"<dc:title>(Matplotlib .*?)</dc:title>", svg)[1]


def labels(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_every_figure_is_drawn_and_shown():
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w-]+)\.svg", text_of(page))}
    assert shown == {path.stem for path in (DOCS / "figures").iterdir()} == {*figures.FIGURES, "trace"}
