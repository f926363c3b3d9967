"""The site builds without a warning, offline; nothing in it comes from elsewhere, and every link leads somewhere."""

import posixpath
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from commands import PROJECT


class Page(HTMLParser):
    """A page's anchors, its links, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors.update(given[key] for key in ("id", "name") if given.get(key))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "img", "link", "iframe"):
            self.loaded += [given[key] for key in ("src", "href") if key in given]


def read(folder):
    """{path in the folder: Page}"""
    return {
        path.relative_to(folder).as_posix(): Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")
    }


def problems(folder):
    """{page: links that lead nowhere, and what it loads from elsewhere}"""
    pages, found = read(folder), defaultdict(list)
    for name, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "") and (parts.netloc or link.startswith("//")):
                if link in page.loaded:
                    found[name].append(link)
                continue
            if parts.scheme:
                continue
            to = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            anchor = unquote(parts.fragment)
            if not (folder / to).is_file() or (anchor and to in pages and anchor not in pages[to].anchors):
                found[name].append(link)
    return dict(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", folder / "doctrees"]
    done = subprocess.run([*command, "docs", folder / "html"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_nothing_is_dead_and_nothing_comes_from_elsewhere(site):
    assert problems(site) == {}


def test_every_page_and_notebook_is_in_the_contents(site):
    contents = read(site)["docs/index.html"].links
    pages = [*(PROJECT / "docs").glob("*.md"), *(PROJECT / "notebooks").glob("[0-9]*.ipynb"), *PROJECT.glob("*.md")]
    links = [path.relative_to(PROJECT).with_suffix(".html").as_posix() for path in pages]
    missing = {posixpath.relpath(link, "docs") for link in links} - {*contents}
    assert missing <= {"index.html"}  # which calls itself #


def test_a_source_opens_at_a_line(site):
    page = read(site)["minimtp/acceptance.html"]
    lines = (PROJECT / "minimtp" / "acceptance.py").read_text(encoding="utf-8").splitlines()
    assert {f"L{n}" for n in range(1, len(lines) + 1)} <= page.anchors
    assert any(link.startswith("../minimtp/acceptance.html#L") for link in read(site)["docs/glossary.html"].links)


def test_what_is_dead_or_from_elsewhere_is_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#x"><a href="#y"><a href="https://e.org"><a href="#x">')
    (tmp_path / "b.html").write_text('<p id="z"><img src="gone.svg"><script src="https://e.org/x.js"></script>')
    assert problems(tmp_path) == {"a.html": ["b.html#x", "#y"], "b.html": ["gone.svg", "https://e.org/x.js"]}
