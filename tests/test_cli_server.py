"""The command check --server."""

import json

import pytest
from test_server import LENGTH, PROMPT, K, drafter, no_proxy, of_kind  # noqa: F401

from minimtp.cli import main

ARGUMENTS = ["tiny-gemma4", "--prompt", PROMPT, "-n", str(LENGTH), "-k", str(K)]


def output(capsys, *arguments, status=0):
    assert main(["check", *arguments]) == status
    return capsys.readouterr()


def test_a_server_that_is_right_agrees_and_one_that_is_wrong_does_not(capsys):
    with of_kind("chat", drafts="switched") as url, of_kind("legacy", bend=lambda x: x / 1.1) as wrong:
        text = output(capsys, "--server", url, *ARGUMENTS).out
        report = json.loads(output(capsys, "--server", url, *ARGUMENTS, "--precision", "float32", "--json").out)
        differs = output(capsys, "--server", wrong, "--plain-server", url, *ARGUMENTS, status=1).out
    assert "agrees with 11 bits" in text and "speculation: identical" in text and "expected at k = 3" in text
    assert report["passed"] and report["bits"] == 24 and report["drafts"]["passes"] > 0
    assert "differs by more than 11 bits" in differs


@pytest.mark.parametrize(
    "options",
    [["--top", "0"], ["-n", "0"], ["--bits", "nan"], ["--timeout", "0"], ["--bits", "54"], ["--prompt", ""]],
)
def test_numbers_that_make_no_sense_are_one_line(capsys, options):
    with of_kind("chat") as url:
        error = output(capsys, "--server", url, *ARGUMENTS, *options, status=2).err
    assert len(error.splitlines()) == 1


def test_nobody_there_is_one_line(capsys):
    with of_kind("chat") as url:
        pass
    assert "refused" in output(capsys, "--server", url, *ARGUMENTS, status=2).err
    with pytest.raises(SystemExit) as left:
        main(["check", "--server", url, "--golden", "x"])
    assert left.value.code == 2
