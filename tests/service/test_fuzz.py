"""The container parser under a coverage-guided fuzzer. The long form runs 1,000,000 inputs (`-m torture`)."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz_container.py")


def fuzz(corpus: Path, runs: int) -> None:
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    command = [sys.executable, str(SCRIPT), f"-runs={runs}", "-seed=7", f"-artifact_prefix={corpus}/", str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {runs} runs" in done.stderr


@pytest.mark.slow
def test_no_input_breaks_the_container_parser(tmp_path: Path) -> None:
    fuzz(tmp_path, 50_000)


@pytest.mark.torture
def test_a_million_inputs_do_not_break_the_container_parser(tmp_path: Path) -> None:
    fuzz(tmp_path, 1_000_000)
