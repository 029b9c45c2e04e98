"""Tiers, codecs and certificates as an engine's settings name them; without an engine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.blend.correction import BIASES, PLACES, WEIGHTS
from kvloom.blend.method import EXACT, FUSION, FusionMethod
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.codec_form import parameters_of
from kvloom.calibration.model_profile import Profile
from kvloom.compress.registry import codec_by_name
from kvloom.connectors.serving.settings import ServingSettings
from kvloom.connectors.serving.worker.store_setup import QualityRecords, open_store
from kvloom.core import KVChunk, KVSpec, RopeSpec
from kvloom.errors import SpecMismatchError, UncertifiedError, UncertifiedWarning
from kvloom.kvstore.keys import prefix_keys

from ..support.faulty import leaves_no_threads

ROPE = RopeSpec((1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005))
SPEC = KVSpec("model", 2, 2, 16, torch.float32, ROPE)
PASSED = {"kl": Figure(0.0, 0.0, 0.01, "nats/token", 0.1)}


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def write(folder: Path, name: str, spec: KVSpec, codec: str, parameters: object) -> str:
    path = folder / f"{name}.json"
    path.write_text(Certificate(spec, codec, parameters, PASSED).to_json())  # type: ignore[arg-type]
    return str(path)


def opened(spec: KVSpec, **settings: object) -> str:
    """The codec that a chunk has on disk, after a round through the store."""
    wanted = ServingSettings.of({"host_bytes": 1 << 20, **settings})
    papers = QualityRecords.of(wanted)
    tokens = torch.arange(32)
    (key,) = prefix_keys(spec, tokens.tolist(), chunk_tokens=32)
    chunk = KVChunk(spec, tokens, torch.arange(32), *(torch.randn(2, 2, 32, 16) for _ in range(2)))
    with open_store(wanted, spec, papers) as store:
        store.put(key, chunk)
        held = store.tiers[-1].get(key)
        assert held is not None
        found = store.get(key)
        assert found is not None
        assert torch.allclose(found.keys, chunk.keys, atol=0.3)
        return held.codec


def test_what_an_engine_with_another_setting_has_packed_is_read(tmp_path: Path) -> None:
    """And stays: an engine without that codec would remove it."""
    (key,) = prefix_keys(SPEC, range(32), chunk_tokens=32)
    chunk = KVChunk(SPEC, torch.arange(32), torch.arange(32), *(torch.randn(2, 2, 32, 16) for _ in range(2)))
    settings = {"disk_path": str(tmp_path), "host_bytes": 1 << 20}
    packed, plain = (ServingSettings.of({**settings, **more}) for more in ({"disk_codec": "lossless"}, {}))
    with open_store(packed, SPEC, QualityRecords.of(packed)) as store:
        store.put(key, chunk)
    with open_store(plain, SPEC, QualityRecords.of(plain)) as store:
        found = store.get(key)
        assert found is not None and found.keys.equal(chunk.keys) and found.values.equal(chunk.values)


def test_lossless_codecs_need_no_certificate(tmp_path: Path) -> None:
    assert opened(SPEC, disk_path=str(tmp_path / "a")) == "raw"
    assert opened(SPEC, disk_path=str(tmp_path / "b"), disk_codec="lossless") == "lossless"
    assert opened(SPEC, host_codec="lossless") == "lossless"


def test_lossy_codecs_need_one(tmp_path: Path) -> None:
    int8 = codec_by_name("int8")
    settings = {"host_codec": "int8"}
    with pytest.raises(UncertifiedError, match="--model-id model"):
        opened(SPEC, **settings)
    other = write(tmp_path, "other", replace(SPEC, model_id="another"), int8.name, parameters_of(int8))
    with pytest.raises(UncertifiedError, match="are for another"):
        opened(SPEC, **settings, certificates=[other])
    right = write(tmp_path, "right", SPEC, int8.name, parameters_of(int8))
    assert opened(SPEC, **settings, certificates=[other, right]) == int8.name
    assert opened(replace(SPEC, dtype=torch.float32), **settings, certificates=[right]) == int8.name
    with pytest.raises(UncertifiedError):
        opened(replace(SPEC, shard=(0, 2)), **settings, certificates=[right])
    with pytest.warns(UncertifiedWarning):
        assert opened(SPEC, **settings, allow_uncertified=True) == int8.name
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UncertifiedError, match="cannot be read"):
        opened(SPEC, certificates=[str(tmp_path / "broken.json")])


def test_certificates_are_of_one_rotation(tmp_path: Path) -> None:
    int8 = codec_by_name("int8")
    paper = write(tmp_path, "paper", SPEC, int8.name, parameters_of(int8))
    for rope in (RopeSpec(tuple(f * 1.01 for f in ROPE.inv_freq)), replace(ROPE, interleaved=True), None):
        with pytest.raises(UncertifiedError):
            opened(replace(SPEC, rope=rope), host_codec="int8", certificates=[paper])


def test_profiles_are_of_the_model(tmp_path: Path) -> None:
    Profile(replace(SPEC, model_id="another"), {}).save(tmp_path / "profile")
    with pytest.raises(SpecMismatchError):
        opened(SPEC, host_codec="lossless", profile=str(tmp_path / "profile"))
    with pytest.raises(ValueError, match="expected the path of a file that exists"):
        opened(SPEC, profile=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="needs a profile"):
        opened(SPEC, host_codec="nuq4")


def test_the_certified_fusion(tmp_path: Path) -> None:
    """The cheapest, of this model, for whole models and their shards alike; without any, everything is computed."""
    methods = [FusionMethod(0.3, "deviation"), FusionMethod(0.15, "deviation"), FusionMethod(0.1, "question")]
    files = [write(tmp_path, f"f{i}", SPEC, FUSION, method.parameters) for i, method in enumerate(methods)]
    other = write(tmp_path, "other", replace(SPEC, model_id="another"), FUSION, FusionMethod(0.01).parameters)
    papers = QualityRecords.of(ServingSettings.of({"certificates": [*files, other]}))
    assert papers.fusion(SPEC) == methods[2]
    assert papers.fusion(SPEC, select="deviation") == methods[1]
    assert papers.fusion(replace(SPEC, num_kv_heads=1, shard=(1, 2)), select="deviation") == methods[1]
    assert papers.fusion(SPEC, check_layer=1) == FusionMethod(1.0, "deviation", 1)
    assert papers.fusion(replace(SPEC, head_dim=8)) == EXACT
    assert QualityRecords.of(ServingSettings()).fusion(SPEC) == EXACT


def test_a_fusion_certified_with_a_correction_needs_it(tmp_path: Path) -> None:
    width, heads = SPEC.head_dim + SPEC.value_dim, (SPEC.num_layers, SPEC.num_kv_heads)
    tensors = {WEIGHTS: torch.zeros(*heads, width, width), BIASES: torch.zeros(*heads, PLACES, width)}
    profile = Profile(SPEC, tensors)
    profile.save(tmp_path / "profile.safetensors")
    Profile(SPEC, {}).save(tmp_path / "bare.safetensors")
    corrected = FusionMethod(0.1, correction=profile.fingerprint)
    plain = FusionMethod(0.3)
    files = [write(tmp_path, f"f{one.ratio}", SPEC, FUSION, one.parameters) for one in (corrected, plain)]

    def records(name: str | None, certificates: list[str] = files) -> QualityRecords:
        path = {} if name is None else {"profile": str(tmp_path / name)}
        return QualityRecords.of(ServingSettings.of({"certificates": certificates, **path}))

    assert records("profile.safetensors").fusion(SPEC) == corrected
    assert records("bare.safetensors").fusion(SPEC) == records(None).fusion(SPEC) == plain
    uncertified = records("profile.safetensors", []).fusion(SPEC)
    assert uncertified == FusionMethod(1.0, "deviation", 2, profile.fingerprint), "for whoever sets a ratio"
    half = replace(SPEC, num_kv_heads=1, shard=(1, 2))
    found = records("profile.safetensors").correction(half)
    assert found is not None and found.weights.shape[1] == 1
    with pytest.raises(SpecMismatchError, match="this profile was made for"):
        records("profile.safetensors").correction(replace(SPEC, model_id="other"))
