"""The store of a worker of an engine, as its settings describe it, and what they bring to justify approximations."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ....blend.correction import Correction
from ....blend.method import FusionMethod, certified_fusion
from ....calibration.certificate import Certificate
from ....calibration.certificate_gate import CertificateGate
from ....calibration.model_profile import Profile
from ....compress.registry import codec_by_name
from ....core import Codec, KVSpec, Tier
from ....errors import UncertifiedError
from ....kvstore.store import KVStore
from ....kvstore.tiers.disk.tier import DiskTier
from ....kvstore.tiers.host import HostTier
from ...tier_url import open_tier
from ..store_settings import StoreSettings


@dataclass(frozen=True, slots=True)
class QualityRecords:
    """A profile and certificates, as they lie in files."""

    profile: Profile | None
    certificates: tuple[Certificate, ...]

    @classmethod
    def of(cls, settings: StoreSettings) -> QualityRecords:
        """Those that the settings name.

        Raises
        ------
        CodecError, UncertifiedError : a file is none.
        """
        profile = None if settings.profile is None else Profile.load(Path(settings.profile))
        return cls(profile, tuple(Certificate.load(Path(path)) for path in settings.certificates))

    def fusion(self, spec: KVSpec, *, select: str | None = None, check_layer: int | None = None) -> FusionMethod:
        """How documents are fused: as is asked for, otherwise as the cheapest certificate says, otherwise by the
        deviation at layer 2, whose fusions all questions share. Its ratio is the certified one, 1 without.
        """
        correction = self.correction(spec)
        at_hand = "" if correction is None else correction.fingerprint
        found = certified_fusion(
            CertificateGate(self.certificates), spec, select=select, check_layer=check_layer, correction=at_hand
        )
        return found or FusionMethod(1.0, select or "deviation", check_layer or 2, at_hand)

    def correction(self, spec: KVSpec) -> Correction | None:
        """That of the profile, for the heads of `spec`; None without one.

        Raises
        ------
        SpecMismatchError : the profile is of another model.
        """
        return None if self.profile is None else Correction.from_profile(self.profile, spec)


def open_store(settings: StoreSettings, spec: KVSpec, papers: QualityRecords, *, ranks: int | None = None) -> KVStore:
    """One rank's store.

    Parameters
    ----------
    ranks : of the engine, which share `host_bytes`; None for those that share the heads.

    Raises
    ------
    ValueError : no codec has that name, or it needs a profile and there is none.
    SpecMismatchError : the profile is of another model.
    TierError : the folder on disk cannot be used.
    UncertifiedError : a codec is lossy, and no certificate covers it for this model.
    """
    if papers.profile is not None:
        papers.profile.check_serves(spec)
    codecs = _codecs(settings, papers)
    store = KVStore(
        open_tiers(settings, shards=ranks or spec.shard[1]),
        tier_codecs=codecs,
        codecs=_readable_codecs(),
        certificates=papers.certificates,
        allow_uncertified=settings.allow_uncertified,
        timeout_s=settings.load_timeout_s,
    )
    try:
        store.check_certificates(spec)
    except UncertifiedError as exc:
        store.close()
        others = sorted({each.model_id for each in papers.certificates} - {spec.model_id})
        there = f"; those that are there are for {', '.join(others)}" if others else ""
        raise UncertifiedError(
            f"{exc}. In an engine: name in certificates the file that `kvloom certify` makes of the served folder, or "
            f"with `--model-id {spec.model_id}`{there}"
        ) from exc
    return store


def open_tiers(settings: StoreSettings, *, shards: int = 1) -> list[Tier]:
    """Tiers of one rank, fastest first.

    Parameters
    ----------
    shards : ranks that share `host_bytes`.

    Raises
    ------
    TierError : the folder on disk cannot be used.
    """
    tiers: list[Tier] = []
    if settings.host_bytes is not None:
        tiers.append(HostTier(settings.host_bytes // shards))
    if settings.disk_path is not None:
        tiers.append(DiskTier(settings.disk_path, settings.disk_bytes))
    if settings.remote_url is not None:
        tiers.append(
            open_tier(
                settings.remote_url,
                token_file=settings.remote_token_file,
                ca_file=settings.remote_ca_file,
                timeout_s=settings.load_timeout_s,
            )
        )
    return tiers


def is_lossy(settings: StoreSettings, papers: QualityRecords) -> bool:
    """Whether some tier's codec loses something."""
    return not all(codec.is_lossless for codec in _codecs(settings, papers).values())


def _readable_codecs() -> list[Codec]:
    """Of chunks that engines with other settings may have stored; those that need neither profile nor certificate."""
    with suppress(ImportError):  # without zstandard
        return [codec_by_name("lossless")]
    return []


def _codecs(settings: StoreSettings, papers: QualityRecords) -> Mapping[str, Codec]:
    names = {"host": settings.host_codec, "disk": settings.disk_codec}
    return {tier: codec_by_name(name, papers.profile) for tier, name in names.items() if name is not None}
