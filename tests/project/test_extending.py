"""The examples of docs/extending.md pass the contract tests that they show, and a wrong one does not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "extending.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_there_is_an_example_of_every_contract() -> None:
    contracts = {name for code in EXAMPLES for name in re.findall(r"class Test\w+\((\w+)\)", code)}
    assert contracts == {"TierContract", "CodecContract", "PolicyContract", "SelectorContract"}


@pytest.mark.slow
def test_examples_pass_and_a_wrong_one_is_found(tmp_path: Path) -> None:
    """The wrong one is a policy that names pinned chunks; the failed assertion is shown with its values."""
    for number, code in enumerate(EXAMPLES):
        (tmp_path / f"test_example_{number}.py").write_text(code)
        if "class Fifo" in code:
            (tmp_path / "test_wrong.py").write_text(code.replace("if may_go(key)", ""))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    failed = re.findall(r"^FAILED (\S+)\.py", done.stdout, flags=re.MULTILINE)
    assert set(failed) == {"test_wrong"}, done.stdout
    assert "assert policy.victim(lambda _: False) is None" in done.stdout
    assert re.search(r"assert b'.*' is None", done.stdout), done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 45
