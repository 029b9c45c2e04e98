"""Weights that change in a running engine: every open storage is told, also of an update that failed."""

import pytest

from kvloom.connectors.sglang import weight_updates


class Storage:
    renewals = 0

    def renew(self) -> None:
        self.renewals += 1


def test_storages_are_renewed() -> None:
    one, other = Storage(), Storage()
    weight_updates.watch(one)
    assert weight_updates._renewing(lambda a, b: a + b, 2, b=3) == 5
    assert (one.renewals, other.renewals) == (1, 0)

    def fails() -> None:
        raise RuntimeError("half of it")

    with pytest.raises(RuntimeError, match="half of it"):
        weight_updates._renewing(fails)
    assert one.renewals == 2
