"""Chunks in an object store that speaks S3, through obstore."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import repeat
from types import MappingProxyType
from typing import TYPE_CHECKING

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, NotSupportedError
    from obstore.store import S3Store
except ImportError as exc:
    raise ImportError("ObjectStoreTier needs obstore: pip install 'kvloom[s3]'") from exc
from ....errors import TierTimeoutError, TierUnavailableError
from ...encoding.buffer_pool import BufferPool
from ...encoding.copies import copy_bytes
from .byte_store import Arriving, Found, Outgoing
from .record import MOST_RECORD_BYTES
from .tier import DistributedTier, Sharing

if TYPE_CHECKING:
    from obstore.store import ObjectStore, S3Config

_PART_BYTES = 8 << 20
_PARTS_AT_A_TIME = 4
_PIECE_BYTES = 1 << 19  # of an answer, verified while the next is under way
_REQUESTS_AT_A_TIME = 8  # of a look-up: a bucket answers one key a request
_HEADER_BYTES = 1 << 14  # compared to tell whether an object is the same
_ABSENT = (NotFoundError, FileNotFoundError)
_NO_COUNTS: Mapping[str, int] = MappingProxyType({})


class ObjectStoreTier(DistributedTier):
    """Chunks in an object store, one object a chunk, shared by all that use the bucket and the prefix.

    An object is visible whole or not at all. One of up to `multipart_bytes` is created on condition that there is none
    of its name; if there is, and it is the same, it is left alone, otherwise replaced. A longer one is uploaded in
    parts, and appears when the last has arrived; parts of an upload that was cut short take space until the bucket's
    lifecycle rule removes them. Nothing is evicted unless `Sharing.capacity_bytes` says so: chunks that expire, or that
    nobody asks for, are for the bucket's lifecycle rules.

    Parameters
    ----------
    store : what obstore opens, `s3_store(...)` for instance; tested with S3, a local folder and memory.
    sharing : None for the defaults.
    multipart_bytes : objects above are uploaded in parts of 8 MiB, four at a time.
    """

    def __init__(self, store: ObjectStore, *, sharing: Sharing | None = None, multipart_bytes: int = 32 << 20) -> None:
        sharing = sharing or Sharing(name="s3", prefix="kvloom/")
        super().__init__(_Objects(store, multipart_bytes, sharing.timeout_s), sharing)


def s3_store(
    bucket: str,
    *,
    endpoint: str | None = None,
    region: str | None = None,
    access_key_id: str | None = None,
    secret_access_key: str | None = None,
    timeout_s: float = 5.0,
) -> S3Store:
    """A bucket of S3, or of what speaks its protocol at `endpoint`, with deadlines that suit a tier.

    Parameters
    ----------
    region : None for `us-east-1`.
    access_key_id, secret_access_key : None leaves them to obstore: the environment, then the machine's own role.
    timeout_s : of one request; a request that failed is tried once more within it.
    """
    config: S3Config = {"region": region or "us-east-1"}
    if access_key_id is not None:
        config["access_key_id"] = access_key_id
    if secret_access_key is not None:
        config["secret_access_key"] = secret_access_key
    if endpoint is not None:
        config |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    return S3Store(
        bucket,
        config=config,
        client_options={
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=min(2.0, timeout_s)),
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
        },
        retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=timeout_s)},
    )


class _Objects:
    """Objects by path, as a `ByteStore`."""

    lends = False
    counts = _NO_COUNTS

    def __init__(self, store: ObjectStore, multipart_bytes: int, timeout_s: float) -> None:
        self._store = store
        self._multipart_bytes = multipart_bytes
        self._timeout_s = timeout_s
        self._creates = True  # on condition; not every store can
        self._buffers = BufferPool()
        self._lock = threading.Lock()  # of the next
        self._threads: ThreadPoolExecutor | None = None

    def put(self, name: str, outgoing: Outgoing, expires_at_s: float | None) -> None:
        try:
            self._put(name, outgoing.parts(), outgoing.nbytes)
        except _ABSENT as exc:
            raise TierUnavailableError(f"there is no bucket: {_first_line(exc)}") from exc

    def _put(self, name: str, parts: Sequence[memoryview], nbytes: int) -> None:
        with self._failures():
            if nbytes > self._multipart_bytes:
                obstore.put(
                    self._store,
                    name,
                    iter(parts),
                    use_multipart=True,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_A_TIME,
                )
                return
            if self._creates:
                try:
                    obstore.put(self._store, name, iter(parts), mode="create", use_multipart=False)
                except AlreadyExistsError:
                    if self._is_same(name, parts, nbytes):
                        return
                except NotSupportedError:
                    self._creates = False
                else:
                    return
            obstore.put(self._store, name, iter(parts), use_multipart=False)

    @contextmanager
    def reading(self, name: str, nbytes: int | None) -> Iterator[Arriving | None]:
        with self._failures():
            try:
                found = obstore.get(self._store, name)
                pieces = iter(found.stream(min_chunk_size=_PIECE_BYTES))
            except _ABSENT:
                found = None
            if found is None:
                yield None
                return
            data = self._buffers.empty(found.meta["size"])
            view: memoryview = data.numpy().data
            filled = 0

            def until(count: int) -> None:
                nonlocal filled
                while filled < count:
                    piece = memoryview(next(pieces, b"")).cast("B")
                    if not piece or filled + len(piece) > len(view):
                        raise TierUnavailableError(
                            f"the object store has sent {filled + len(piece)} bytes of {len(view)}"
                        )
                    copy_bytes(view[filled : filled + len(piece)], piece)
                    filled += len(piece)

            yield Arriving(data, until)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview] | None:
        starts, ends = [start for start, _ in ranges], [stop for _, stop in ranges]
        with self._failures():
            try:
                found = obstore.get_ranges(self._store, name, starts=starts, ends=ends) if ranges else []
            except _ABSENT:
                return None
        return [memoryview(data).cast("B") for data in found]

    def delete(self, name: str) -> bool:
        with self._failures():
            try:
                obstore.head(self._store, name)  # S3 itself does not say whether there was one
                obstore.delete(self._store, name)
            except _ABSENT:
                return False
        return True

    def find(self, names: Sequence[str], head_bytes: int) -> list[Found | None]:
        if len(names) == 1:
            return [self._find(names[0], head_bytes)]
        with self._lock:
            self._threads = self._threads or ThreadPoolExecutor(_REQUESTS_AT_A_TIME, "kvloom-s3")
        return list(self._threads.map(self._find, names, repeat(head_bytes)))

    def close(self) -> None:
        with self._lock:
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

    def _find(self, name: str, head_bytes: int) -> Found | None:
        with self._failures():
            try:
                if not head_bytes:
                    return Found(obstore.head(self._store, name)["size"], b"")
                found = obstore.get(self._store, name, options={"range": (0, head_bytes)})
                return Found(found.meta["size"], bytes(found.bytes()))
            except _ABSENT:
                return None

    def _is_same(self, name: str, parts: Sequence[memoryview], nbytes: int) -> bool:
        """Whether the object has this record and this header, whose checksums are of all the rest."""
        begin = b"".join(parts[:2])
        there = self._find(name, min(len(begin), max(_HEADER_BYTES, MOST_RECORD_BYTES)))
        return there is not None and there.nbytes == nbytes and there.head is not None and there.head == begin

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (AlreadyExistsError, NotSupportedError, *_ABSENT):
            raise
        except (BaseError, OSError) as exc:
            if "timed out" in str(exc) or "TimedOut" in str(exc):
                raise TierTimeoutError(
                    f"the object store has not answered within {self._timeout_s:.3g} s", begun=True
                ) from exc
            raise TierUnavailableError(f"object store: {_first_line(exc)}") from exc


def _first_line(exc: Exception) -> str:
    """Of what obstore says, which goes on for pages."""
    return (str(exc).splitlines() or [type(exc).__name__])[0][:500]
