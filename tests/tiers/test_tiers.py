"""Tiers against their contract, and what is particular to each. For the disk tier see also test_disk*.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.kvstore import format as container
from kvloom.kvstore.capabilities import ReportsChanges
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import TierContract, make_blob, make_key

from ..support.damage import stored_bytes


class TestHostTier(TierContract):
    def make_tier(self, capacity_bytes: int | None) -> HostTier:
        return HostTier(capacity_bytes)

    def test_copies_nothing(self, tier: HostTier) -> None:
        blob = make_blob(1)
        tier.put(make_key(1), blob)
        assert tier.get(make_key(1)) is blob
        part = tier.get_layers(make_key(1), 1, 2)
        assert part is not None and part.tensors["codes"].data_ptr() == blob.tensors["codes"][1].data_ptr()


class TestDiskTier(TierContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.paths: Iterator[Path] = (tmp_path / "deep" / str(n) for n in range(10))

    @pytest.fixture(params=["cache", "batch", "sync"], autouse=True)
    def durability(self, request: pytest.FixtureRequest) -> None:
        self.durability = request.param

    def make_tier(self, capacity_bytes: int | None) -> DiskTier:
        return DiskTier(next(self.paths), capacity_bytes, durability=self.durability)

    def test_reports_changes(self, tier: DiskTier) -> None:
        tier.put(make_key(1), make_blob(1))
        assert isinstance(tier, ReportsChanges) and tier.changes() == []  # its own are none

    def test_used_bytes_are_whole_pages_of_containers(self, tier: DiskTier) -> None:
        tier.put(make_key(1), make_blob(1))
        tier.put(make_key(2), make_blob(2, numbers=7777))
        containers = [
            container.to_bytes(make_key(1), make_blob(1)),
            container.to_bytes(make_key(2), make_blob(2, numbers=7777)),
        ]
        assert [stored_bytes(tier.path, make_key(n)) for n in (1, 2)] == containers
        assert tier.used_bytes == sum(-(-len(data) // 4096) * 4096 for data in containers) and tier.check() == []


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        DiskTier(tmp_path, -1)
    with pytest.raises(ValueError, match="durability is 'never'"):
        DiskTier(tmp_path, durability="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sync_interval_s is nan"):
        DiskTier(tmp_path, sync_interval_s=float("nan"))
    with pytest.raises(ValueError, match="segment_bytes is 0"):
        DiskTier(tmp_path, segment_bytes=0)
    with pytest.raises(ValueError, match="capacity_bytes is -1"):
        HostTier(-1)
    assert list(tmp_path.iterdir()) == []
