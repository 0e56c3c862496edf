"""The command `logitloss`, run in this process."""

from click.testing import CliRunner, Result

from logitloss.cli import main


def invoke(*arguments: object) -> Result:
    """Return how the command ended, and what it printed."""
    return CliRunner().invoke(main, list(map(str, arguments)))


def printed(*arguments: object) -> str:
    """Return what the command printed; it must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
