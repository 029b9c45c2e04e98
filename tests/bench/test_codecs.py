"""`kvloom bench codecs`, at its smallest, and what its figures are made of."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.bench.codecs import run as codecs
from kvloom.bench.codecs.quality import AfterRotation, bits_of, stored_bytes
from kvloom.bench.codecs.samples import SPEC_8B, chunk_8b, profile_8b
from kvloom.compress.lowrank import LowRankCodec
from kvloom.compress.nuq.nuq import NuqCodec
from kvloom.compress.raw import RawCodec
from kvloom.kvstore.format import to_bytes
from kvloom.kvstore.keys import content_key

FIGURES = {
    *(f"bytes_ratio_nuq{bits}_8b" for bits in (4, 3, 2)),
    "bytes_ratio_lowrank4_keys_8b",
    *(f"ppl_increase_nuq{bits}" for bits in (4, 3, 2)),
    *(f"{kind}_delta_nuq{bits}" for kind in ("needle", "record") for bits in (4, 3, 2)),
    "cold_hit_time_nuq4_vs_raw",
    "cold_hit_time_nuq3_vs_raw",
    "factor_time_vs_attention",
}


@pytest.mark.slow
def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "codecs.html"
    result = codecs.run(quick=True, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    result.write_page(page)
    result.show()
    written = json.loads(result.to_json())
    assert set(written["metrics"]) >= FIGURES
    assert all(written["metrics"][name]["value"] is not None for name in FIGURES)
    assert {"bytes", "quality", "ablation", "stress", "key energy"} <= {row["what"] for row in written["rows"]}
    assert page.read_text().count("<svg") == 2
    ranks = {row["codec"] for row in written["rows"] if row["what"] == "quality" and "low rank" in row["codec"]}
    assert ranks == {f"low rank {when}{r}" for when in ("", "after rotation ") for r in (0.125, 0.25, 0.375, 0.5)}
    shown = capsys.readouterr().out
    assert "ablation, 3 bits" in shown and "low-rank keys before and after rotation" in shown and "targets" in shown
    by_bits = [written["metrics"][f"bytes_ratio_nuq{bits}_8b"]["value"] for bits in (4, 3, 2)]
    assert 3 < by_bits[0] < by_bits[1] < by_bits[2] < 8


def test_every_target_is_a_figure() -> None:
    assert {target.metric for target in codecs.TARGETS} == FIGURES


def test_bytes_are_those_of_the_container() -> None:
    chunk = chunk_8b(3, tokens=8)
    key = content_key(chunk.spec, [0], salt=b"bench")
    assert stored_bytes(RawCodec(), chunk) == len(to_bytes(key, RawCodec().encode(chunk)))
    raw_bits = bits_of(RawCodec(), chunk)
    assert 16 < raw_bits < 16.2


@pytest.mark.slow
def test_samples_fit_their_profile() -> None:
    """What is synthetic must not make codecs fall back on exact tokens: then bytes and times would say nothing."""
    profile, chunk = profile_8b(), chunk_8b(0, tokens=16)
    blob = NuqCodec(profile, bits=4).encode(chunk)
    assert blob.tensors["keys.exact"].numel() == 0 and blob.tensors["values.exact"].numel() == 0
    decoded = NuqCodec(profile, bits=4).decode(blob)
    error = (decoded.keys.float() - chunk.keys.float()).norm() / chunk.keys.float().norm()
    assert float(error) < 0.15
    assert chunk.spec == SPEC_8B and torch.equal(chunk.positions, torch.arange(256, 272))


def test_low_rank_after_rotation_is_of_the_keys_as_they_come() -> None:
    chunk = chunk_8b(1, tokens=24, spec=replace(SPEC_8B, num_layers=1))
    rotated = AfterRotation(LowRankCodec(rank=12, sink_tokens=0, max_residual=None), chunk.spec.rope)
    found = rotated.decode(rotated.encode(chunk))
    rows = chunk.keys[0].float().transpose(0, 1).flatten(1)
    values = torch.linalg.svdvals(rows)
    error = (found.keys.float() - chunk.keys.float()).norm()
    assert found.spec == chunk.spec and torch.equal(found.values, chunk.values)
    assert float(error) == pytest.approx(float(values[12:].norm()), rel=0.01)  # the best of that rank, of these keys
    with pytest.raises(ValueError, match="moved"):
        rotated.decode(rotated.encode(chunk), chunk.positions)
