"""`kvloom bench vllm` at its smallest, with real engines: that it ends means that every row was served as named."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.bench.vllm import exact as vllm_exact
from kvloom.bench.vllm import run as vllm
from kvloom.bench.vllm import times as vllm_times
from kvloom.bench.vllm import windows as vllm_windows

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1500)]

FIRST_TOKENS = (
    vllm_times.FULL,
    vllm_times.WARM,
    vllm_times.COPIED,
    vllm_times.COLD,
    vllm_times.HOST,
    vllm_times.DISK,
    vllm_times.SERVICE,
    vllm_times.FUSED,
    vllm_times.EXACT,
)
_BYTES_OF_ALL_TOKENS = 1024 * 6 * 2 * 2 * 64 * 4  # tokens, layers, KV heads, keys and values, numbers of a head, bytes


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without LMCache, whose processes take long to start
    result = vllm.run(quick=True, folder=tmp_path)
    whole = json.loads(result.to_json())
    by_what: dict[str, list[dict[str, object]]] = {}
    for row in whole["rows"]:
        by_what.setdefault(row["what"], []).append(row)

    first = {str(row["way"]): row for row in by_what["time to first token"]}
    assert tuple(first) == FIRST_TOKENS
    assert {row["rounds"] for row in first.values()} == {vllm.QUICK_SIZES.rounds}
    seconds = {way: float(str(row["s_p10"])) for way, row in first.items()}  # others on the machine only add to it
    computing = min(seconds[vllm_times.FULL], seconds[vllm_times.COLD], seconds[vllm_times.EXACT])
    assert all(seconds[way] < computing for way in (vllm_times.WARM, vllm_times.COPIED, vllm_times.HOST))
    decoding = (vllm_times.DECODE, vllm_times.OTHER, vllm_times.IDLE, vllm_times.SAVING)
    assert tuple(row["way"] for row in by_what["decoding"]) == decoding

    assert [row["family"] for row in by_what["family"]] == list(vllm.QUICK_SIZES.families)
    assert by_what["family"][0]["served"] is True, by_what["family"][0]["why"]
    plain, hit = by_what[vllm_windows.WHAT]
    assert (plain["way"], hit["way"]) == (vllm_times.FULL, vllm_times.HOST)
    assert plain["loaded_bytes"] is None and 0 < int(str(hit["loaded_bytes"])) < _BYTES_OF_ALL_TOKENS
    assert 0 < whole["metrics"]["hybrid_hit_ttft_vs_plain"]["low"] < 1
    assert whole["metrics"]["families_served"]["value"] == 1.0

    same = by_what["identical tokens"]
    assert [row["way"] for row in same] == list(vllm_exact.SAME_AS)
    assert all(row["same"] == row["prompts"] == vllm.QUICK_SIZES.texts for row in same)
    assert 0 < int(str(same[0]["loaded"])) < vllm.QUICK_SIZES.texts, "some are long enough to be stored, some are not"
    assert [row["cases"] for row in by_what["records"]] == [vllm.QUICK_SIZES.records] * 3

    metrics = whole["metrics"]
    long = f"retrieval_decode_speedup_{vllm.QUICK_SIZES.long_tokens // 1024}k"
    assert {target.metric for target in vllm.TARGETS} - {"retrieval_decode_speedup_64k"} | {long} <= set(metrics)
    assert metrics["tokens_identical_lossless"]["value"] == 1.0
    for name, why in (
        ("prefix_hit_ttft_vs_native_offload", "not tried"),
        ("prefix_hit_ttft_vs_lmcache", "not installed"),
        ("service_hit_ttft_vs_lmcache", "not installed"),
        ("fusion_ttft_speedup_4k", "shorter than 4,096"),
    ):
        assert metrics[name]["value"] is None
        assert why in metrics[name]["baseline"]
    assert all(math.isfinite(metrics[name]["value"]) for name in ("decode_throughput_idle", "prefix_hit_speedup_host"))
    assert not list(tmp_path.iterdir()), "stores and models are removed"
    result.show()
    printed = capsys.readouterr().out
    assert all(way in printed for way in FIRST_TOKENS)
