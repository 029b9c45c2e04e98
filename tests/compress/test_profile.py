"""A model's profile: saved, loaded, recognised and refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvloom.calibration.model_profile import Profile
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.testing import SPEC


def make_profile() -> Profile:
    return Profile(SPEC, {"nuq.keys.levels.4": torch.arange(32.0).view(2, 16)}, {"texts": "two"})


def test_survives_a_file(tmp_path: Path) -> None:
    profile = make_profile()
    profile.save(tmp_path / "profile.safetensors")
    loaded = Profile.load(tmp_path / "profile.safetensors")
    assert loaded.spec == SPEC and loaded.meta == {"texts": "two"}
    assert torch.equal(loaded["nuq.keys.levels.4"], profile["nuq.keys.levels.4"])
    assert loaded.fingerprint == profile.fingerprint


def test_fingerprint_stands_for_every_value() -> None:
    profile = make_profile()
    changed = profile["nuq.keys.levels.4"].clone()
    changed[1, 3] += 1
    others = [
        Profile(SPEC, {"nuq.keys.levels.4": changed}),
        Profile(SPEC, {"nuq.keys.levels.3": profile["nuq.keys.levels.4"]}),
        Profile(replace(SPEC, model_id="other"), profile.tensors),
    ]
    assert len({profile.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert Profile(replace(SPEC, dtype=torch.bfloat16), profile.tensors).fingerprint == profile.fingerprint


def test_serves_its_model_in_any_precision_and_no_other() -> None:
    profile = make_profile()
    profile.check_serves(replace(SPEC, dtype=torch.float16))
    for other in (replace(SPEC, model_id="other"), replace(SPEC, num_kv_heads=7), replace(SPEC, rope=None)):
        with pytest.raises(SpecMismatchError, match="make one for it"):
            profile.check_serves(other)


def test_says_what_is_missing() -> None:
    with pytest.raises(CodecError, match=r"no 'nuq.keys.levels.2'.*kvloom calibrate"):
        make_profile()["nuq.keys.levels.2"]


def test_refuses_what_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with pytest.raises(CodecError, match="cannot be read"):
        Profile.load(path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(CodecError, match="cannot be read"):
        Profile.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CodecError, match="no profile of version 1"):
        Profile.load(path)
    make_profile().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CodecError, match="cannot be read"):
        Profile.load(path)
