"""Every command that a document shows does what it says there: it is run, and ends well."""

import re
import tomllib

import commands
import engine
import pytest
from commands import PROJECT, documents, lines, prepare, replaced, run, runnable, scripts

from minimtp.cli import _parser

SHOWN = list(dict.fromkeys(line for path in documents() for script in scripts(path.read_text(encoding="utf-8"))
                           for line in lines(script)))  # fmt: skip


@pytest.fixture(scope="session")
def server():
    with engine.running() as address:
        yield address


@pytest.fixture(scope="session")
def scheduler():
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster.scheduler_address


def test_there_are_commands():
    assert len(SHOWN) > 60 and sum(map(runnable, SHOWN)) > 40


@pytest.mark.parametrize("line", list(filter(runnable, SHOWN)))
def test_a_command_runs(line, tmp_path, request):
    needed = re.findall(r"\{(\w+)\}", "".join(new for old, new in commands.REPLACED if re.search(old, line)))
    asked = replaced(line, **{name: request.getfixturevalue(name) for name in needed})
    prepare(tmp_path, asked, PROJECT / "weights")
    status, _, told = run(asked, tmp_path)
    refusal = next((word for option, word in commands.REFUSED.items() if option in line), None)
    if refusal is None:
        assert status == 0, told
    else:
        assert status == 2 and told.startswith("minimtp: ") and refusal in told.lower() and told.count("\n") == 1


def test_a_command_that_is_wrong_is_noticed(tmp_path):
    prepare(tmp_path, "", PROJECT / "weights")
    assert run("minimtp show MODEL --no-such-option", tmp_path)[0] == 2
    assert run("minimtp check --golden nowhere", tmp_path)[0] == 2


def test_commands_are_found_where_documents_show_them():
    text = "`minimtp a b`, `minimtp name`\n```sh\n.venv/bin/minimtp x \\\n  y   # why\n# only a comment\n```\n"
    text += "```\n$ minimtp z\nits output\n```\n```python\nminimtp = 1\n```\n    python f.py\n"
    assert [line for script in scripts(text) for line in lines(script)] == [
        "minimtp x y", "minimtp z", "python f.py", "minimtp a b"]  # fmt: skip
    assert commands.names(text) == ["name"]


def test_installations_ask_for_extras_that_there_are():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = re.findall(r"(?:\.|minimtp)\[([\w,-]+)\]", " ".join(line for line in SHOWN if "pip " in line))
    assert asked and {name for names in asked for name in names.split(",")} <= set(project["optional-dependencies"])


def test_test_commands_name_files_with_tests():
    named = [word for line in SHOWN if line.startswith("pytest") for word in line.split() if "/" in word]
    files = [file for word in named for file in ([PROJECT / word] if word.endswith(".py") else
                                                 (PROJECT / word).glob("test_*.py"))]  # fmt: skip
    assert len(files) > 20 and all("\ndef test_" in file.read_text(encoding="utf-8") for file in files)


def test_the_commands_that_documents_name_are_there():
    known = _parser()._subparsers._group_actions[0].choices
    named = [name for path in documents() for name in commands.names(path.read_text(encoding="utf-8"))]
    assert len(named) > 10 and set(named) <= set(known)
