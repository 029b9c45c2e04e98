"""Codecs by name: every name makes a codec, and what is missing is said."""

import importlib

import pytest

from kvloom.calibration.codec_form import form_of
from kvloom.calibration.model_profile import Profile
from kvloom.compress import registry as catalog
from kvloom.compress.raw import RawCodec
from kvloom.compress.registry import CODECS, codec_by_name
from kvloom.core import Codec, EncodedChunk
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import SPEC, make_chunk, make_key

PROFILE = Profile(SPEC, {})
LOSSLESS = {"raw", "lossless"}


def made(name: str, profile: Profile | None) -> Codec:
    try:
        return codec_by_name(name, profile)
    except ModuleNotFoundError as missing:
        pytest.skip(f"{name} needs {missing.name}")


@pytest.mark.parametrize("name", CODECS)
def test_every_name_makes_a_codec(name: str) -> None:
    codec = made(name, PROFILE)
    assert isinstance(codec, Codec) and codec.is_lossless == (name in LOSSLESS)
    assert form_of(codec) == form_of(made(name, PROFILE))


def test_no_two_names_are_one_codec() -> None:
    forms = {}
    for name in CODECS:
        try:
            forms[name] = form_of(codec_by_name(name, PROFILE))
        except ModuleNotFoundError as missing:
            assert missing.name is not None
    assert len(set(forms.values())) == len(forms) and "raw" in forms


def test_raw_needs_nothing() -> None:
    assert codec_by_name("raw") == RawCodec()


def test_unknown_names_are_answered_with_the_known() -> None:
    for name in ("nuq5", "", "RAW", "nuq4+raw"):
        with pytest.raises(ValueError, match="unknown codec") as error:
            codec_by_name(name, PROFILE)
        assert all(known in str(error.value) for known in CODECS)


def test_withdrawn_names_are_answered_with_what_is_better() -> None:
    with pytest.raises(ValueError, match=r"'kv4' is withdrawn: .* use int4 or nuq4"):
        codec_by_name("kv4", PROFILE)
    assert not catalog.WITHDRAWN.keys() & CODECS.keys()


def test_a_stored_chunk_of_a_withdrawn_codec_is_a_miss() -> None:
    """What an earlier release wrote as `kv4`: no error of the application, no wrong byte."""
    key, tier = make_key(1), HostTier(1 << 20)
    written = RawCodec().encode(make_chunk(1))
    tier.put(key, EncodedChunk("kv4", written.tensors, written.meta, written.layered))
    with KVStore([tier]) as store:
        assert store.get(key) is None


@pytest.mark.parametrize("name", ["nuq4", "nuq3", "nuq2", "lowrank", "lowrank4+nuq4", "lossless+nuq2"])
def test_a_missing_profile_is_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_class", lambda module, what: lambda *args, **options: None)
    with pytest.raises(ValueError, match="kvloom calibrate MODEL"):
        codec_by_name(name)


def test_the_table_names_modules_that_are_there() -> None:
    """Nothing but what a codec itself needs may be missing."""
    for name in CODECS:
        try:
            codec_by_name(name, PROFILE)
        except ModuleNotFoundError as missing:
            assert importlib.util.find_spec(str(missing.name)) is None
