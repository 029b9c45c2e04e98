"""Certificates: bound to what they measured, and without one that passed a store uses nothing lossy."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.calibration.certificate import Certificate, Figure
from kvloom.core import EncodedChunk, RopeSpec
from kvloom.errors import JudgedWithoutTasksWarning, UncertifiedError, UncertifiedWarning
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import SPEC, make_chunk, make_key, same_chunk

from ..support.fakes import assert_adds_up
from ..support.lossy import CoarseCodec, TwinCodec, certify

COARSE = CoarseCodec()


@pytest.mark.parametrize(
    ("figure", "passed"),
    [
        (Figure(0.01, 0.0, 0.02, limit=0.02), True),
        (Figure(0.01, 0.0, 0.021, limit=0.02), False),  # the measurement does not show it
        (Figure(math.nan, 0.0, 0.0, limit=0.02), False),
        (Figure(0.0, math.nan, math.nan, limit=0.02), False),
        (Figure(9.0, 9.0, 9.0), True),
    ],
)
def test_a_figure_passes_by_the_bad_end_of_its_interval(figure: Figure, passed: bool) -> None:
    assert figure.passed is passed


@pytest.mark.parametrize("limit", [math.nan, math.inf])
def test_a_limit_is_a_number(limit: float) -> None:
    with pytest.raises(ValueError, match="limit is"):  # in a file it would be no limit, which everything passes
        Figure(9.0, 9.0, 9.0, limit=limit)


def test_every_limit_must_hold_and_there_must_be_one() -> None:
    good, bad, unjudged = Figure(0, 0, 0, limit=1), Figure(2, 2, 2, limit=1), Figure(0, 0, 0)
    for figures, passed in (
        ({"a": good, "b": unjudged}, True),
        ({"a": good, "b": bad}, False),
        ({"a": unjudged}, False),
        ({}, False),
    ):
        certificate = Certificate(SPEC, "coarse", {"step": COARSE.step}, figures)
        assert certificate.passed is passed and certificate.covers(COARSE, SPEC) is passed


def test_covers_what_was_measured_and_nothing_else() -> None:
    certificate = certify(COARSE, SPEC)
    assert certificate.covers(COARSE, SPEC) and certificate.covers(CoarseCodec(1 / 16), SPEC)
    assert certificate.covers(COARSE, replace(SPEC, dtype=torch.bfloat16))  # the same model in another precision
    assert not certificate.covers(CoarseCodec(1 / 8), SPEC) and not certificate.covers(TwinCodec(), SPEC)
    for other in (
        replace(SPEC, model_id="tiny@2"),
        replace(SPEC, num_layers=4),
        replace(SPEC, rope=RopeSpec((1.0, 0.5, 0.25, 0.1))),
        replace(SPEC, rope=None),
        replace(SPEC, shard=(0, 2)),
    ):
        assert not certificate.covers(COARSE, other)
    assert not certify(COARSE, SPEC, loss=0.04).covers(COARSE, SPEC)


def test_survives_a_file(tmp_path: Path) -> None:
    certificate = replace(
        certify(COARSE, SPEC), date="2026-11-22T19:00:00+00:00", version="0.1.0", conditions={"windows": 3}
    )
    path = tmp_path / "cert.json"
    path.write_text(certificate.to_json())
    assert Certificate.load(path) == certificate
    fields = json.loads(path.read_text())
    assert (fields["model_id"], fields["codec"], fields["passed"]) == ("tiny@1", "coarse", True)
    assert fields["figures"]["perplexity_increase"]["passed"] is True


def test_numbers_that_are_not_finite_survive_as_failures(tmp_path: Path) -> None:
    failed = Certificate(SPEC, "coarse", {}, {"kl": Figure(math.inf, math.nan, math.nan, "nats", 0.1)})
    found = Certificate.from_json(failed.to_json())
    assert not found.passed and math.isnan(found.figures["kl"].value)


def test_a_file_cannot_claim_to_have_passed() -> None:
    fields = json.loads(certify(COARSE, SPEC, loss=0.04).to_json())
    fields["passed"] = True
    assert not Certificate.from_json(json.dumps(fields)).passed


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kvloom_certificate": 2}', '{"kvloom_certificate": 1}', "\xff"])
def test_refuses_what_is_no_certificate(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cert.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UncertifiedError, match=r"cert\.json cannot be read as a certificate"):
        Certificate.load(path)
    with pytest.raises(UncertifiedError, match="missing"):
        Certificate.load(tmp_path / "missing")


# --------------------------------------------------------------------------------------------------- in the store


def test_put_needs_a_certificate() -> None:
    for certificates in ([], [certify(COARSE, SPEC, loss=0.04)], [certify(CoarseCodec(1 / 8), SPEC)]):
        with KVStore([HostTier(None)], codec=COARSE, certificates=certificates) as store:
            with pytest.raises(UncertifiedError, match="kvloom certify MODEL --codec"):
                store.put(make_key(1), make_chunk(1))
            stats = store.stats()
            assert make_key(1) not in store and stats.puts == {"refused": 1} and stats.writes == 0
            assert_adds_up(stats)
    with KVStore([HostTier(None)], codec=COARSE, certificates=[certify(COARSE, SPEC)]) as store:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", JudgedWithoutTasksWarning)  # of this certificate: by its loss on text alone
            store.put(make_key(1), make_chunk(1))
            found = store.get(make_key(1))
        assert found is not None and same_chunk(found, COARSE.decode(COARSE.encode(make_chunk(1))))
        assert not same_chunk(found, make_chunk(1)) and store.stats().uncertified_uses == 0


def test_every_tier_needs_its_certificate() -> None:
    tiers = [HostTier(None, pinned=False), HostTier(None, pinned=False)]
    tiers[1].name = "second"
    with KVStore(tiers, tier_codecs={"second": COARSE}) as store, pytest.raises(UncertifiedError):
        store.put(make_key(1), make_chunk(1))


def test_get_without_a_certificate_is_a_miss_that_stays(tmp_path: Path) -> None:
    good = [certify(COARSE, SPEC)]
    with KVStore([DiskTier(tmp_path)], codec=COARSE, certificates=good) as store:
        store.put(make_key(1), make_chunk(1))
    with KVStore([HostTier(None), DiskTier(tmp_path)], codecs=[COARSE]) as store:
        assert store.get(make_key(1)) is None and store.get(make_key(1), layers=(0, 1)) is None
        stats = store.stats()
        assert stats.misses == {"uncertified": 2} and stats.hits == 0 and stats.tiers[1].chunks == 1
        assert_adds_up(stats)
        assert "miss (uncertified)" in str(store.explain([make_key(1)])[0])
    with KVStore([HostTier(None), DiskTier(tmp_path)], codecs=[COARSE], certificates=good) as store:
        for _ in range(2):  # from the disk, then from the host
            found = store.get(make_key(1))
            assert found is not None and same_chunk(found, COARSE.decode(COARSE.encode(make_chunk(1))))
        assert store.stats().tiers[0].hits == 1


def test_the_parameters_of_the_chunk_count_not_those_of_the_codec(tmp_path: Path) -> None:
    coarser = CoarseCodec(1 / 8)
    with KVStore([DiskTier(tmp_path)], codec=coarser, certificates=[certify(coarser, SPEC)]) as store:
        store.put(make_key(1), make_chunk(1))
    with KVStore([DiskTier(tmp_path)], codec=COARSE, certificates=[certify(COARSE, SPEC)]) as store:
        assert store.get(make_key(1)) is None and store.stats().misses == {"uncertified": 1}
    with KVStore([DiskTier(tmp_path)], codec=COARSE, certificates=[certify(coarser, SPEC)]) as store:
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, coarser.decode(coarser.encode(make_chunk(1))))


def test_a_lossless_codec_does_not_vouch_for_a_lossy_blob(tmp_path: Path) -> None:
    class LossyTwin(TwinCodec):
        is_lossless = False

    with KVStore([DiskTier(tmp_path)], codec=LossyTwin(), certificates=[certify(LossyTwin(), SPEC)]) as store:
        store.put(make_key(1), make_chunk(1))
    with KVStore([DiskTier(tmp_path)], codec=TwinCodec()) as store:
        assert store.get(make_key(1)) is None and store.stats().misses == {"uncertified": 1}


def test_an_exact_copy_in_a_slower_tier_is_found_behind_an_uncertified_one(tmp_path: Path) -> None:
    host, disk = HostTier(None, pinned=False), DiskTier(tmp_path)
    host.put(make_key(1), COARSE.encode(make_chunk(1)))
    disk.put(make_key(1), TwinCodec().encode(make_chunk(1)))
    with KVStore([host, disk], codecs=[COARSE, TwinCodec()]) as store:
        found = store.get(make_key(1), layers=(0, 3))  # which promotes nothing
        assert found is not None and same_chunk(found, make_chunk(1))
        assert store.stats().tiers[1].hits == 1 and store.stats().misses == {}
        assert store.get(make_key(1)) is not None  # and this replaces the uncertified copy
        assert host.get(make_key(1)).codec == "raw" and store.check() == []


def test_the_override_is_loud_once(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path)], codec=COARSE, allow_uncertified=True) as store:
        with pytest.warns(UncertifiedWarning, match="'coarse' is used for tiny@1 without a certificate") as caught:
            store.put(make_key(1), make_chunk(1))
            store.put(make_key(2), make_chunk(2))
            assert store.get(make_key(1)) is not None
        assert len(caught) == 1 and store.stats().uncertified_uses == 3
    again = KVStore([DiskTier(tmp_path)], codecs=[COARSE], allow_uncertified=True)
    with again as store, pytest.warns(UncertifiedWarning):
        assert store.get(make_key(2)) is not None


def test_blobs_of_no_readable_model_are_not_served() -> None:
    blob = COARSE.encode(make_chunk(1))
    host = HostTier(None, pinned=False)
    for number, meta in enumerate(({}, {"spec": "{"}, {"spec": "[]"})):
        host.put(make_key(number), EncodedChunk(blob.codec, blob.tensors, meta, blob.layered))
    with KVStore([host], codec=COARSE, certificates=[certify(COARSE, SPEC)]) as store:
        assert [store.get(make_key(number)) for number in range(3)] == [None] * 3
        assert store.stats().misses == {"uncertified": 3}
