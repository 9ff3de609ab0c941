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


@pytest.fixture
def refused(gobelin):
    """Run a command line that is refused in one sentence on standard error; gives back (exit status, sentence)."""

    def run(*arguments):
        status, out, err = gobelin(*arguments)
        assert err.startswith("gobelin: ")
        assert (err.count("\n"), err[-1], out) == (1, "\n", "")
        return status, err.removeprefix("gobelin: ").rstrip("\n")

    return run
