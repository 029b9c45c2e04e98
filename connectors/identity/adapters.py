"""Names of adapters that an engine reads from folders, as it has read them and not as they are later."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias
from weakref import ref

from blake3 import blake3

from .weights import WEIGHTS, file_digest

_LOG = logging.getLogger("kvloom.identity")
_CLOCKS_S = 2.0  # by which a file system's clock may be behind the machine's
_Stamp: TypeAlias = tuple[tuple[str, int, int, int, int], ...]  # of each file: path, inode, bytes, times of change


class EngineMemory(Protocol):
    """The adapters that an engine has in memory, where it is in this process."""

    def adapter(self, number: int) -> object | None:
        """The adapter under that number; None if the engine has to read it. Another object after another read."""
        ...

    def holds(self, adapter: object, folder: Path) -> bool | None:
        """Whether it is what the folder's files hold; None if that cannot be told."""
        ...


@dataclass(slots=True)
class _Adapter:
    """What a number stands for: `digest` of the files with `stamp`, None if the engine may have others in memory."""

    path: str
    stamp: _Stamp
    digest: bytes | None
    seen: Callable[[], object | None]  # in the engine's memory at that time; what the engine has dropped is None


class AdapterNames:
    """The adapters of one engine, by the number under which it keeps them in memory.

    An engine reads an adapter's files when it first needs them, may drop it and read it again, and never looks whether
    the files have changed. So what a file holds when a request comes proves nothing: a number has a name while the
    files that it was read from stay untouched. Otherwise its requests are served without kvloom, until the engine's
    memory is found to hold what the files hold, or the adapter comes under a number of its own.

    Parameters
    ----------
    memory : None if the engine is in other processes. Adapters that were written after the engine had started have no
        name then: the engine may have read an earlier version.
    clock : seconds since the epoch, as files have them.
    """

    def __init__(self, memory: EngineMemory | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._memory = memory
        self._began_s = clock() - _CLOCKS_S
        self._known: dict[int, _Adapter] = {}
        self._digests: dict[_Stamp, bytes] = {}

    def digest(self, number: int, path: str, *, reloads: bool = False) -> bytes | None:
        """32 bytes that stand for what an adapter computes; None if it is uncertain what the engine has in memory.

        Parameters
        ----------
        number : the engine's.
        path : folder of the adapter.
        reloads : the engine reads the files again for this request.
        """
        stamp, seen = _stamp(path), None if self._memory is None else self._memory.adapter(number)
        known = self._known.get(number)
        if known is not None and known.digest is not None and not reloads:
            is_same = (known.path, known.stamp) == (path, stamp)
            if is_same and (seen is None or seen is known.seen()):
                return known.digest
        digest = None
        if self._is_certain(known, path, stamp, seen, reloads=reloads):
            digest = self._read(path, stamp)
        elif known is None or known.digest is not None:
            _LOG.warning(
                "adapter %d in %s may not be what the engine has in memory: the files are newer, or the number stands "
                "for another folder, too. Its requests are served without kvloom; load every version under a number "
                "and in a folder of its own",
                number,
                path,
            )
        self._known[number] = _Adapter(path, stamp, digest, _nothing if seen is None else ref(seen))
        return digest

    def is_read(self, number: int) -> bool | None:
        """Whether the engine has the adapter in memory; None if that cannot be told."""
        return None if self._memory is None else self._memory.adapter(number) is not None

    def _is_certain(
        self, known: _Adapter | None, path: str, stamp: _Stamp, seen: object | None, *, reloads: bool
    ) -> bool:
        """Whether the files are what the engine computes with: it reads them later, or has just these in memory."""
        if reloads:
            return True
        if self._memory is not None:
            found = True if seen is None else self._memory.holds(seen, Path(path))
            if found is not None:
                return found
        if known is not None:
            return known.digest is not None and (known.path, known.stamp) == (path, stamp)
        return max((max(mtime, ctime) / 1e9 for *_, mtime, ctime in stamp), default=0.0) < self._began_s

    def _read(self, path: str, stamp: _Stamp) -> bytes | None:
        if not any(Path(file[0]).suffix in WEIGHTS for file in stamp):
            return None
        if stamp not in self._digests:
            digest = blake3()
            try:
                for file, *_ in stamp:
                    digest.update(file_digest(Path(file)))
            except OSError:
                return None
            if _stamp(path) != stamp:  # they are being written
                return None
            self._digests[stamp] = digest.digest()
        return self._digests[stamp]


def _nothing() -> None:
    return None


def _stamp(path: str) -> _Stamp:
    """Changes whenever a file of the adapter is written, replaced, added or removed; empty for what is no folder."""
    try:
        files = sorted(file for file in Path(path).iterdir() if file.suffix in (*WEIGHTS, ".json"))
        known = [(str(file), file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in known)
