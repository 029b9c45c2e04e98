"""`kvloom bench codecs --model`, at its smallest, on the bundled model."""

import json
from pathlib import Path

import pytest

from kvloom import cli
from kvloom.bench.codecs import pretrained
from kvloom.evaluation.environment import BUNDLED_MODEL


@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "codecs.json"
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "codecs", "--model", str(BUNDLED_MODEL), "--device", "cpu", "--quick", "--json", str(out)])
    assert not left.value.code
    metrics = {name: metric["value"] for name, metric in json.loads(out.read_text())["metrics"].items()}
    assert {target.metric for target in pretrained.TARGETS} | {"calibrate_cpu_s"} <= metrics.keys()
    assert (
        3 < metrics["real_bytes_ratio_nuq4"] < metrics["real_bytes_ratio_nuq2"] < metrics["real_bytes_ratio_transform"]
    )
    assert (
        0 < metrics["real_kl_nuq4"] < metrics["real_kl_nuq2"]
        and metrics["real_prefix_kl_nuq2"] < metrics["real_kl_nuq2"]
    )
    assert metrics["real_kl_transform"] > 0 and "real_prefix_kl_transform" not in metrics
    shown = capsys.readouterr().out
    assert "nuq3 in pieces" in shown and "keys alone" in shown and "bytes in the profile: nuq" in shown


@pytest.mark.parametrize("option", ["--device", "--windows"])
def test_options_of_a_pretrained_model_need_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["bench", "codecs", option, "2"])
    assert left.value.code == 2 and "needs --model" in capsys.readouterr().err
