"""What several test files use."""

import pytest

from minimtp.cli import main


@pytest.fixture
def cli(capsys):
    """Run a command in this process -> (status, standard output, standard error)."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return run
