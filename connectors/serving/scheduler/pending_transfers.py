"""Loads and fusions that the engine waits for, until it may know that they are over. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..messages import Loaded, Revocation, both


@dataclass(slots=True)
class _Transfer:
    blocks: frozenset[int]  # into which it writes
    loaded: Loaded | None = None  # outcome on the ranks that have reported it
    is_revoked: bool = False  # the cache was reset since it was planned
    is_acknowledged: bool = False  # the workers have reported its blocks as not loaded
    is_held_back: bool = False  # it is over, but the engine does not know


class PendingTransfers:
    """What is loaded or fused for requests that wait, one transfer for each.

    A reset revokes them all. A revoked transfer that was over on the workers before they learned of that is held back:
    the engine must not learn that it is over before it learns that its blocks were not loaded.

    Parameters
    ----------
    ranks : that load a part of every transfer each.
    block_tokens : of the engine.
    """

    def __init__(self, ranks: int, block_tokens: int) -> None:
        self._ranks, self._block_tokens = ranks, block_tokens
        self._transfers: dict[str, _Transfer] = {}
        self._passed_on: set[str] = set()  # held back before, and over for the engine now

    def __bool__(self) -> bool:
        return bool(self._transfers)

    def begin(
        self, request_id: str, start: int, stop: int, blocks: Sequence[int], *, is_withdrawn: bool = False
    ) -> None:
        """The engine waits for tokens `start` to `stop`, in `blocks` of the request.

        is_withdrawn : the offer was withdrawn before the engine took it, and the workers are told to load nothing.
        """
        size = self._block_tokens
        written = frozenset(blocks[start // size : -(-stop // size)])
        self._transfers[request_id] = _Transfer(written, is_revoked=is_withdrawn, is_acknowledged=is_withdrawn)

    def revoke(self) -> list[Revocation]:
        """Revoke them all: what the workers have to be told, of those that were not revoked before."""
        revoked = []
        for request_id, transfer in self._transfers.items():
            if not transfer.is_revoked:
                transfer.is_revoked = True
                revoked.append(Revocation(request_id, transfer.blocks))
        return revoked

    def add_outcome(self, request_id: str, loaded: Loaded) -> Loaded | None:
        """The outcome on some ranks; returns that on all of them, None as long as some have not reported theirs."""
        transfer = self._transfers.get(request_id) or _Transfer(frozenset())
        transfer.loaded = loaded if transfer.loaded is None else both(transfer.loaded, loaded)
        return transfer.loaded if transfer.loaded.ranks >= self._ranks else None

    def end(self, request_id: str) -> bool:
        """All ranks have reported the outcome; returns whether it counts: it was not revoked."""
        transfer = self._transfers.get(request_id)
        if transfer is not None and transfer.is_revoked and not transfer.is_acknowledged:
            transfer.is_held_back = True
            return False
        self._transfers.pop(request_id, None)
        return transfer is None or not transfer.is_revoked

    def acknowledge(self, request_id: str) -> bool:
        """The workers have reported a revoked transfer's blocks as not loaded; returns whether it was held back."""
        transfer = self._transfers.get(request_id)
        if transfer is None:
            return False
        transfer.is_acknowledged = True
        if transfer.is_held_back:
            del self._transfers[request_id]
        return transfer.is_held_back

    def pass_on(self, request_id: str) -> None:
        """Let the next `over` name a transfer that was held back."""
        self._passed_on.add(request_id)

    def over(self, request_ids: set[str]) -> set[str]:
        """Requests whose transfer is over for the engine, of those for which the workers say so."""
        held_back = {each for each in request_ids if each in self._transfers and self._transfers[each].is_held_back}
        for request_id in request_ids - held_back:
            self._transfers.pop(request_id, None)
        passed_on, self._passed_on = self._passed_on, set()
        return (request_ids - held_back) | passed_on
