"""Run the notebooks' sources: python notebooks/build.py [NAME ...] writes NAME.ipynb; --check compares with it instead.

A cell tagged `varies` shows what is this machine's or this moment's (times): it must run, and may print otherwise.
"""

import argparse
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
TIMEOUT = 60  # seconds, for a cell
FIRST = "%matplotlib inline\nimport pictures\npictures.insist_on_names(get_ipython())"  # runs before a notebook, unseen
PICTURES = "image/png", "image/svg+xml"


def sources():
    """The notebooks' sources, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def execute(source):
    """Run a source from the top -> the notebook with its outputs, without what changes from run to run."""
    notebook = jupytext.read(source)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    options = {"resources": {"metadata": {"path": str(FOLDER)}}, "extra_arguments": ["--log-level=40"]}
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    NotebookClient(notebook, timeout=TIMEOUT, **options).execute()
    del notebook.cells[0]
    outputs = [part for cell in notebook.cells for part in cell.get("outputs", ())]
    if warned := [part.text for part in outputs if part.get("name") == "stderr"]:
        raise ValueError(f"{source.stem} writes to standard error: {''.join(warned)}")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            for counted in [cell, *(part for part in cell.outputs if "execution_count" in part)]:
                counted.execution_count -= 1  # the first was not the notebook's
    return notebook


def difference(new, old):
    """The first thing in which two notebooks differ that should not, in one line; None where nothing does."""
    if len(new.cells) != len(old.cells):
        return f"{len(new.cells)} cells, {len(old.cells)} in the notebook"
    for number, (cell, kept) in enumerate(zip(new.cells, old.cells)):
        if (cell.cell_type, cell.source) != (kept.cell_type, kept.source):
            return f"cell {number}: the source has changed"
        if cell.cell_type == "code":
            varies = "varies" in cell.metadata.get("tags", ())
            told, before = shown(cell, varies), shown(kept, varies)
            if told != before:
                return f"cell {number} shows {told!r}, in the notebook {before!r}"
    return None


def shown(cell, varies):
    """What a cell shows: its text in full unless it varies, of pictures only that they are there."""
    kinds = [kind for part in cell.outputs for kind in PICTURES if kind in part.get("data", ())]
    if varies:
        return kinds
    data = [part.data for part in cell.outputs if "data" in part]
    texts = [entry.get("text/html") or entry["text/plain"] for entry in data if not {*PICTURES} & {*entry}]
    streams = [part.text for part in cell.outputs if part.output_type == "stream"]
    return kinds, "".join(streams), [re.sub(r"0x[0-9a-f]{6,}", "0x…", text) for text in texts]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="notebooks, such as 05 or 05_un_reading (all)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a notebook has drifted")
    arguments = parser.parse_args()
    wanted = [path for path in sources() if not arguments.names or path.stem.startswith(tuple(arguments.names))]
    drifted = False
    for source in wanted:
        notebook, path = execute(source), source.with_suffix(".ipynb")
        if arguments.check:
            found = difference(notebook, jupytext.read(path)) if path.exists() else "there is no notebook"
            print(f"{source.stem}: {found or 'as committed'}")
            drifted |= found is not None
        else:
            jupytext.write(notebook, path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")
    return int(drifted)


if __name__ == "__main__":
    sys.exit(main())
