"""The notebooks keep their form, run from the top, and show what is committed beside their sources."""

import ast
import sys
import time
from pathlib import Path

import jupytext
import nbformat
import pytest

import minimtp

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "notebooks"))
import build  # noqa: E402

SOURCES = build.sources()
NAMES = [path.stem for path in SOURCES]
MODULES = [ast.parse(path.read_text(encoding="utf-8")) for path in Path(minimtp.__file__).parent.glob("*.py")]
DEFINITION = ast.FunctionDef | ast.ClassDef
OURS = {node.name for tree in MODULES for node in tree.body if isinstance(node, DEFINITION)}
PER_NOTEBOOK = pytest.mark.parametrize("source", SOURCES, ids=NAMES)


def code_lines(text):
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def faults(notebook):
    """What is wrong with a notebook's form."""
    cells = notebook.cells
    if not cells[0].source.startswith("# ") or "?" not in cells[0].source.partition("\n")[0]:
        yield "its title asks no question"
    if len(cells) > 25:
        yield f"{len(cells)} cells"
    for number, cell in enumerate(cells):
        if cell.cell_type == "code":
            if len(code_lines(cell.source)) > 10:
                yield f"cell {number} has {len(code_lines(cell.source))} lines of code"
            nodes = ast.walk(ast.parse(plain(cell.source)))
            if redefined := {node.name for node in nodes if isinstance(node, DEFINITION)} & OURS:
                yield f"cell {number} defines {redefined} anew"


def plain(source):
    """Without what only IPython understands."""
    return "\n".join(line for line in source.splitlines() if not line.startswith(("%", "!")))


def test_there_are_notebooks():
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(12)]


@PER_NOTEBOOK
def test_form(source):
    assert not list(faults(jupytext.read(source)))


@PER_NOTEBOOK
def test_it_runs_and_shows_what_is_committed(source):
    start = time.perf_counter()
    found = build.difference(build.execute(source), jupytext.read(source.with_suffix(".ipynb")))
    assert found is None
    assert time.perf_counter() - start < 60


def notebook(*cells):
    kinds = {"#": nbformat.v4.new_markdown_cell}
    return nbformat.v4.new_notebook(cells=[kinds.get(cell[0], nbformat.v4.new_code_cell)(cell) for cell in cells])


def test_faults_of_form_are_found():
    long = "\n".join(f"a{i} = {i}" for i in range(11))
    assert len(list(faults(notebook("# No question", long, "def accept(): pass", *["1"] * 23)))) == 4
    assert not list(faults(notebook("# A question?", "x = 1")))


HEADER = "# ---\n# jupyter:\n#   jupytext:\n#     formats: ipynb,py:percent\n# ---\n\n# %%\n"


def test_an_axis_without_a_name_is_found(tmp_path):
    text = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.xlabel('tokens')"
    (tmp_path / "a.py").write_text(HEADER + text)
    with pytest.raises(ValueError, match="an axis has no name"):
        build.execute(tmp_path / "a.py")
    (tmp_path / "a.py").write_text(HEADER + text + "\nplt.ylabel('bytes')")
    assert build.execute(tmp_path / "a.py").cells


def test_drift_is_found(tmp_path):
    (tmp_path / "a.py").write_text(HEADER + 'print("one")\n\n# %% tags=["varies"]\nprint("now")\n')
    kept = build.execute(tmp_path / "a.py")
    again = build.execute(tmp_path / "a.py")
    again.cells[1].outputs[0].text = "later"
    assert build.difference(again, kept) is None
    again.cells[0].outputs[0].text = "two"
    assert "two" in build.difference(again, kept)
    again.cells[0].source = "print(1)"
    assert "source has changed" in build.difference(again, kept)
