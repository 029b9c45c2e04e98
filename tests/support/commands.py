"""Commands as users type them."""

import pytest

from kvloom import cli


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, notes: str = "no notes") -> str:
    """What a command says that does not take its input: one line, beside those that begin as `notes` does."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    (line,) = (line for line in said.err.splitlines() if not line.startswith(notes))
    return line
