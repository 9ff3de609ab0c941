"""What the tests of commands share."""

import pytest

from gobelin.cli.main import main


@pytest.fixture
def gobelin(capsys):
    """Run the command line in this process; gives back (exit status, standard output, standard error)."""

    def run(*arguments):
        status = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = leaving.code or 0
        output = capsys.readouterr()
        return status, output.out, output.err

    return run
