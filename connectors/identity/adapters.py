"""Names of adapters that an engine reads from folders, as it has read them and not as they are later."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from blake3 import blake3

from .weights import WEIGHTS, file_digest

_LOG = logging.getLogger("kvloom.identity")
_Stamp: TypeAlias = tuple[tuple[str, int, int, int, int], ...]  # path, inode, bytes, times of change of each file


@dataclass(slots=True)
class _Adapter:
    """What an engine's number for an adapter stands for; `digest` is None for good once that is uncertain."""

    path: str
    stamp: _Stamp
    digest: bytes | None


class AdapterNames:
    """The adapters of one engine, by the number under which it keeps them in memory.

    An engine reads an adapter's files when it first needs them, may drop it and read it again, and never looks whether
    they have changed. So a number is known by what its files held when it was first seen, for as long as they stay
    untouched. Once they are touched, or the number is used for another folder, the engine may have either version, and
    the number has no name any more: its requests are served without kvloom. A new number, or a reload that replaces
    the old version (`reloads`), has one again.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Adapter] = {}
        self._digests: dict[_Stamp, bytes] = {}

    def digest(self, number: int, path: str, *, reloads: bool = False) -> bytes | None:
        """32 bytes that stand for an adapter's weights and configuration; None if it is uncertain what they are.

        Parameters
        ----------
        number : the engine's, not to be reused.
        path : folder of the adapter.
        reloads : the engine reads the files again for this request.
        """
        known, stamp = self._known.get(number), _stamp(path)
        if known is None or reloads:
            known = self._known[number] = _Adapter(path, stamp, self._read(path, stamp))
        elif known.digest is not None and (known.path, known.stamp) != (path, stamp):
            _LOG.warning(
                "adapter %d in %s has changed since the engine read it, or its number stands for two folders: its "
                "requests are served without kvloom; load the new version under a number of its own",
                number,
                path,
            )
            known.digest = None
        return known.digest

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
            if _stamp(path) != stamp:  # it is being written
                return None
            self._digests[stamp] = digest.digest()
        return self._digests[stamp]


def _stamp(path: str) -> _Stamp:
    """Files of an adapter, and what changes when one of them is written; nothing for what is no folder here."""
    try:
        files = sorted(file for file in Path(path).iterdir() if file.suffix in (*WEIGHTS, ".json"))
        known = [(str(file), file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in known)
