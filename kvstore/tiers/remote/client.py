"""A client of kvloom's service: chunks and what is known of them. Synchronous, and the same for asyncio."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

from torch import Tensor

from ....core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk
from ....errors import (
    KVLoomError,
    TierFullError,
    TierTimeoutError,
    TierUnavailableError,
)
from ...encoding.buffer_pool import BufferPool
from ...format import read_container, to_buffers
from .http import Answer, HttpPool, ReadAt, TakeBody
from .shared_memory import SharedMemorySession

T = TypeVar("T")

_MEDIA_TYPE = "application/vnd.kvloom.chunk"
_LEASE_MEDIA_TYPE = "application/vnd.kvloom.lease+json"
_THIS_HOST = ("127.0.0.1", "::1", "localhost")
_SHARE_AGAIN_S = 30.0
_SHARE_WITHIN_S = 1.0
_FIRST_RETRY_S = 0.05
_PAGE_CHUNKS = 10_000
_TOKEN_CHECK_S = 1.0


class ServiceError(KVLoomError):
    """The service has refused a request: `status` and `kind` of its problem, and what it says."""

    def __init__(self, status: int, kind: str, detail: str) -> None:
        super().__init__(f"{detail} (status {status}, {kind})")
        self.status = status
        self.kind = kind


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """A chunk that the service lists. `nbytes` is what it counts for there."""

    key: ChunkKey
    nbytes: int
    info: ChunkInfo


@dataclass(frozen=True, slots=True)
class PinnedChunks:
    """A pin that the service holds; `matched` leading chunks were stored when it was made."""

    id: str
    expires_at_s: float
    matched: int


class _Token:
    """A bearer token, given or in a file that may be replaced while the client lives."""

    def __init__(self, token: str | None, file: Path | None) -> None:
        if (token is None) == (file is None):
            raise ValueError("expected one of token and token_file")
        self._lock = threading.Lock()
        self._token = token
        self._file = None if file is None else file.expanduser()
        self._checked_at_s = float("-inf")

    def header(self) -> str:
        """Raises `TierUnavailableError` if there is a file and it cannot be read."""
        with self._lock:
            if self._file is not None and time.monotonic() - self._checked_at_s > _TOKEN_CHECK_S:
                try:
                    self._token = self._file.read_text().strip()
                except OSError as exc:
                    raise TierUnavailableError(f"token file {self._file} cannot be read: {exc}") from exc
                self._checked_at_s = time.monotonic()
            return f"Bearer {self._token}"


class KVLoomClient:
    """Puts and gets chunks of a service. Every method may be called from any thread.

    A chunk is an `EncodedChunk`, as a tier holds it: `KVStore([..., RemoteTier(...)])` encodes and decodes. What comes
    back is verified to the last byte. Requests that change nothing, or may be repeated, are tried again when the
    service is busy or out of reach, until the deadline.

    Parameters
    ----------
    url : `http://host:port` or `https://host:port`.
    token : one that `kvloom token create` has made.
    token_file : a file with one instead, read again when it changes.
    timeout_s : seconds until a request is given up, retries included.
    retries : further tries.
    ca_file : certificates (PEM) to trust instead of the system's: the service's own, or those of whoever signed it.
    tls : everything about TLS instead, such as a certificate of the client's own.
    shared_memory : move chunks through shared memory where the service offers it; None if the URL is of this host.
        Where it cannot be had, chunks go over HTTP.
    max_chunk_bytes : a longer container is refused, so that a service cannot fill this process's memory.

    Raises
    ------
    ValueError : the URL is none, there is not one of `token` and `token_file`, a number is out of range, or `ca_file`
        holds no certificate.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        timeout_s: float = 10.0,
        retries: int = 2,
        ca_file: str | Path | None = None,
        tls: ssl.SSLContext | None = None,
        max_chunk_bytes: int = 1 << 30,
        shared_memory: bool | None = None,
    ) -> None:
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; expected seconds above 0")
        if retries < 0:
            raise ValueError(f"retries is {retries}; expected 0 or more")
        if ca_file is not None and tls is not None:
            raise ValueError("expected at most one of ca_file and tls")
        self.timeout_s = timeout_s
        self.url = url
        self._retries = retries
        self._max_chunk_bytes = max_chunk_bytes
        self._token = _Token(token, None if token_file is None else Path(token_file))
        self._http = HttpPool(url, tls=_trusting(ca_file, url) if tls is None else tls)
        self._buffers = BufferPool()
        if shared_memory is None:
            shared_memory = urlsplit(url).hostname in _THIS_HOST
        self._has_answered = False  # a service that is down costs one deadline, not a second one for its memory
        self._sharing = threading.Lock()  # of the two below
        self._session: SharedMemorySession | None = None
        self._share_after_s = 0.0 if shared_memory else float("inf")

    # ------------------------------------------------------------------------------------------------ chunks

    def put(self, key: ChunkKey, chunk: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        """Stores a chunk; the bytes of its container.

        Raises
        ------
        TierFullError : the service has no room for it.
        TierUnavailableError : the service is out of reach, or answers too late (`TierTimeoutError`).
        ServiceError : the service refuses it.
        """
        buffers = to_buffers(key, chunk)
        nbytes = sum(map(len, buffers))
        headers = {"Content-Type": _MEDIA_TYPE}
        if info.namespace:
            headers["KVLoom-Namespace"] = info.namespace.encode().decode("latin-1")
        if info.after is not None:
            headers["KVLoom-After"] = info.after.hex()
        if info.expires_at_s is not None:
            headers["KVLoom-Expires-At"] = repr(info.expires_at_s)
        if info.recompute_s is not None:
            headers["KVLoom-Recompute-Seconds"] = repr(info.recompute_s)
        answer = self._put_shared(key, headers, buffers, nbytes)
        if answer is None:
            answer = self._ask("PUT", f"/v1/chunks/{key.hex()}", headers=headers, body=buffers, body_bytes=nbytes)
        if answer.status == 507:
            raise TierFullError(f"service {self.url} has no room for {nbytes} bytes", needed_bytes=nbytes)
        self._expect(answer, 201, 204)
        return nbytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        """The chunk, verified, or None.

        Raises
        ------
        ChunkCorruptError : what came is damaged.
        TierUnavailableError, ServiceError : as `put`.
        """
        return self._get(key, {})

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        """Layers `[start, stop)` of the chunk, as many of them as there are, or None; errors as `get`."""
        return self._get(key, {"Range": f"layers={start}-{stop - 1}"})

    def _get(self, key: ChunkKey, headers: Mapping[str, str]) -> EncodedChunk | None:
        session = self._shared()
        if session is not None:
            headers = {**headers, "KVLoom-Shared-Memory": session.id}

        def take(answered: Mapping[str, str], nbytes: int, read_at: ReadAt) -> EncodedChunk | bytes:
            """The chunk, verified as it comes, or what the service says of the memory that it lends."""
            if nbytes > self._max_chunk_bytes:
                raise ServiceError(
                    200, "too-large", f"a chunk of {nbytes} bytes; at most {self._max_chunk_bytes} are taken"
                )
            if session is None or not answered.get("content-type", "").startswith(_LEASE_MEDIA_TYPE):
                return read_container(read_at, nbytes, key, self._buffers.empty)
            told = bytearray(nbytes)
            read_at(memoryview(told), 0)
            return bytes(told)

        try:
            answer = self._ask("GET", f"/v1/chunks/{key.hex()}", headers=headers, take=take)
        except TierUnavailableError:
            if session is not None:
                self._unshare(session)  # it may have lent what this process has not been told
            raise
        if answer.status == 410 and session is not None:
            self._unshare(session)
            return self._get(key, {name: value for name, value in headers.items() if name == "Range"})
        if answer.status == 404:
            return None
        self._expect(answer, 200, 206)
        if session is None or isinstance(answer.taken, EncodedChunk):
            chunk: EncodedChunk = answer.taken
            return chunk
        data = self._lent(session, answer.taken)
        return replace(read_container(_in_place, data.nbytes, key, lambda _: data), leased=True)

    # ---------------------------------------------------------------------------------------- shared memory

    def _shared(self) -> SharedMemorySession | None:
        """The session of shared memory, opened if it is time to try; what nobody reads any more is given back."""
        with self._sharing:
            session = self._session
            if session is None and self._has_answered and time.monotonic() >= self._share_after_s:
                self._share_after_s = time.monotonic() + _SHARE_AGAIN_S
                session = self._session = self._open_session()
        if session is not None:
            try:
                session.give_back()
            except OSError:
                self._unshare(session)
                return None
        return session

    def _open_session(self) -> SharedMemorySession | None:
        try:
            answer = self._ask("POST", "/v1/shared-memory", once_within_s=min(self.timeout_s, _SHARE_WITHIN_S))
            if answer.status != 201:
                return None
            told = json.loads(answer.body)
            ticket = bytes.fromhex(told["ticket"])
            return SharedMemorySession(told["id"], told["socket"], ticket, int(told["nbytes"]), self.timeout_s)
        except (
            OSError,
            LookupError,
            TypeError,
            ValueError,
        ):  # if the service is down, the request will say
            return None

    def _unshare(self, session: SharedMemorySession) -> None:
        with self._sharing:
            if self._session is session:
                self._session = None
        session.close()

    def _put_shared(
        self, key: ChunkKey, headers: Mapping[str, str], buffers: Sequence[memoryview], nbytes: int
    ) -> Answer | None:
        """The answer to a put through shared memory; None if it has to go over HTTP."""
        session = self._shared()
        if session is None:
            return None
        with session.written(buffers, nbytes) as offset:
            if offset is None:
                return None
            shared = {"KVLoom-Shared-Memory": session.id, "KVLoom-Range": f"{offset}-{nbytes}"}
            answer = self._ask("PUT", f"/v1/chunks/{key.hex()}", headers={**headers, **shared}, body_bytes=0)
        if answer.status == 410:
            self._unshare(session)
            return None
        return answer

    def _lent(self, session: SharedMemorySession, told: bytes) -> Tensor:
        try:
            lease = json.loads(told)
            return session.borrowed(
                int(lease["lease"]), int(lease["offset"]), int(lease["nbytes"]), str(lease["memory"])
            )
        except (LookupError, TypeError, ValueError) as exc:
            raise TierUnavailableError(f"service {self.url} lends something that is no range") from exc

    # ------------------------------------------------------------------------------------------------ chunks

    def delete(self, key: ChunkKey) -> bool:
        """Whether the chunk was there; errors as `put`."""
        answer = self._ask("DELETE", f"/v1/chunks/{key.hex()}")
        if answer.status == 404:
            return False
        self._expect(answer, 204)
        return True

    def __contains__(self, key: object) -> bool:
        """Whether the chunk is there; errors as `get`."""
        if not isinstance(key, bytes) or len(key) != 32:
            return False
        answer = self._ask("HEAD", f"/v1/chunks/{key.hex()}")
        if answer.status == 404:
            return False
        self._expect(answer, 200)
        return True

    def entries(self) -> tuple[list[RemoteEntry], str]:
        """All chunks, least recently written first, and where `changes` goes on."""
        found: list[RemoteEntry] = []
        cursor = ""
        while True:
            page = self._json("GET", f"/v1/chunks?limit={_PAGE_CHUNKS}" + (f"&cursor={cursor}" if cursor else ""))
            found += map(_entry, page["chunks"])
            cursor = page["cursor"]
            if page["is_complete"]:
                return found, cursor

    def changes(self, cursor: str) -> tuple[list[RemoteEntry | ChunkKey], str] | None:
        """What was written (an entry) or went away (its key) since, in order; None if the cursor is too old."""
        found: list[RemoteEntry | ChunkKey] = []
        while True:
            answer = self._ask("GET", f"/v1/changes?limit={_PAGE_CHUNKS}&cursor={cursor}")
            if answer.status == 410:
                return None
            self._expect(answer, 200)
            page = json.loads(answer.body)
            found += [
                ChunkKey(bytes.fromhex(each)) if isinstance(each, str) else _entry(each) for each in page["changes"]
            ]
            cursor = page["cursor"]
            if len(page["changes"]) < _PAGE_CHUNKS:
                return found, cursor

    # --------------------------------------------------------------------------------------------- look-ups

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are stored."""
        return int(self._json("POST", "/v1/match", {"keys": [key.hex() for key in keys]})["matched"]) if keys else 0

    def explain(self, keys: Sequence[ChunkKey]) -> list[dict[str, Any]]:
        """What the service knows of chunks, as its `/v1/explain` gives it."""
        found: list[dict[str, Any]] = self._json("POST", "/v1/explain", {"keys": [key.hex() for key in keys]})
        return found

    def stats(self) -> dict[str, Any]:
        """As `/v1/stats` gives it."""
        found: dict[str, Any] = self._json("GET", "/v1/stats")
        return found

    # -------------------------------------------------------------------------------- pins and prefetches

    def pin(self, keys: Iterable[ChunkKey], deadline_s: float) -> PinnedChunks:
        """Keeps chunks from eviction until `unpin`, or for `deadline_s`."""
        body = {"keys": [key.hex() for key in keys], "deadline_s": deadline_s}
        found = self._json("POST", "/v1/pins", body, expected=201)
        return PinnedChunks(found["id"], found["expires_at_s"], found["matched"])

    def unpin(self, pin: PinnedChunks) -> bool:
        """False if it had ended."""
        answer = self._ask("DELETE", f"/v1/pins/{pin.id}")
        if answer.status == 404:
            return False
        self._expect(answer, 204)
        return True

    def prefetch(
        self, keys: Iterable[ChunkKey], *, deadline_s: float | None = None, wait: bool = False
    ) -> dict[str, Any]:
        """Brings chunks to the service's fastest tier: the job, ended if `wait`."""
        body: dict[str, Any] = {"keys": [key.hex() for key in keys]}
        if deadline_s is not None:
            body["deadline_s"] = deadline_s
        job: dict[str, Any] = self._json("POST", "/v1/prefetches", body, expected=202)
        until_s, pause_s = time.monotonic() + self.timeout_s, 0.01
        while wait and job["state"] == "running" and time.monotonic() < until_s:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.5)
            job = self._json("GET", f"/v1/prefetches/{job['id']}")
        return job

    def close(self) -> None:
        """Closes connections; every later call raises `TierUnavailableError`. What was read stays valid."""
        self._http.close()
        with self._sharing:
            session, self._session, self._share_after_s = self._session, None, float("inf")
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- requests

    def _json(self, method: str, path: str, body: object = None, *, expected: int = 200) -> Any:
        answer = self._ask(method, path, json_body=body)
        self._expect(answer, expected)
        try:
            return json.loads(answer.body)
        except ValueError as exc:
            raise TierUnavailableError(f"service {self.url} does not answer in JSON") from exc

    def _ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Sequence[memoryview | bytes] = (),
        body_bytes: int | None = None,
        json_body: object = None,
        take: TakeBody | None = None,
        once_within_s: float | None = None,
    ) -> Answer:
        """The last answer, or the last error, within the deadline. What is busy or out of reach is asked again."""
        sent = {"Authorization": self._token.header(), **(headers or {})}
        if json_body is not None:
            body = (json.dumps(json_body).encode(),)
            body_bytes = len(body[0])
            sent["Content-Type"] = "application/json"
        if method == "POST":
            sent["Idempotency-Key"] = secrets.token_hex(16)  # a request that is sent again is done once
        until_s = time.monotonic() + (self.timeout_s if once_within_s is None else once_within_s)
        pause_s = _FIRST_RETRY_S
        for tries_left in range(self._retries if once_within_s is None else 0, -1, -1):
            try:
                answer = self._http.request(
                    method, path, headers=sent, body=body, body_bytes=body_bytes, take=take, until_s=until_s
                )
                self._has_answered = True
            except TierUnavailableError as exc:
                if isinstance(exc, TierTimeoutError) or not tries_left or time.monotonic() + pause_s >= until_s:
                    raise
            else:
                if answer.status not in (429, 503) or not tries_left or time.monotonic() + pause_s >= until_s:
                    return answer
            time.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  so that clients do not come back together
            pause_s *= 4
        raise TierUnavailableError(f"service {self.url} was not asked")  # not reached: the last try ends it

    def _expect(self, answer: Answer, *statuses: int) -> None:
        if answer.status in statuses:
            return
        try:
            problem = json.loads(answer.body)
            kind, detail = str(problem["type"]).rsplit(":", 1)[-1], str(problem["detail"])
        except (LookupError, TypeError, ValueError):
            kind, detail = "unknown", "no problem document"
        if answer.status in (408, 429, 500, 502, 503, 504):
            raise TierUnavailableError(f"service {self.url} cannot serve now: {detail} (status {answer.status})")
        raise ServiceError(answer.status, kind, f"service {self.url} refuses: {detail}")


class AsyncKVLoomClient:
    """`KVLoomClient` for asyncio: the same requests, made by a few threads. Arguments are those of `KVLoomClient`.

    Bytes are received, verified and given back without the interpreter's lock, so threads cost no throughput.
    """

    def __init__(self, url: str, *, threads: int = 8, **options: Any) -> None:
        self._client = KVLoomClient(url, **options)
        self._threads = ThreadPoolExecutor(threads, "kvloom-client")

    async def put(self, key: ChunkKey, chunk: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        return await self._run(partial(self._client.put, key, chunk, info))

    async def get(self, key: ChunkKey) -> EncodedChunk | None:
        return await self._run(partial(self._client.get, key))

    async def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        return await self._run(partial(self._client.get_layers, key, start, stop))

    async def delete(self, key: ChunkKey) -> bool:
        return await self._run(partial(self._client.delete, key))

    async def contains(self, key: ChunkKey) -> bool:
        return await self._run(partial(self._client.__contains__, key))

    async def match(self, keys: Sequence[ChunkKey]) -> int:
        return await self._run(partial(self._client.match, keys))

    async def explain(self, keys: Sequence[ChunkKey]) -> list[dict[str, Any]]:
        return await self._run(partial(self._client.explain, keys))

    async def stats(self) -> dict[str, Any]:
        return await self._run(self._client.stats)

    async def pin(self, keys: Iterable[ChunkKey], deadline_s: float) -> PinnedChunks:
        return await self._run(partial(self._client.pin, keys, deadline_s))

    async def unpin(self, pin: PinnedChunks) -> bool:
        return await self._run(partial(self._client.unpin, pin))

    async def prefetch(
        self, keys: Iterable[ChunkKey], *, deadline_s: float | None = None, wait: bool = False
    ) -> dict[str, Any]:
        return await self._run(partial(self._client.prefetch, keys, deadline_s=deadline_s, wait=wait))

    async def close(self) -> None:
        self._client.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


def _in_place(_: memoryview, offset: int) -> None:
    """The bytes are there already."""


def _trusting(ca_file: str | Path | None, url: str) -> ssl.SSLContext | None:
    """TLS that trusts the certificates of a file and no others; None for no file."""
    if ca_file is None:
        return None
    if not url.startswith("https://"):
        raise ValueError(f"ca_file is given and url is {url!r}; expected https://host:port with it")
    path = Path(ca_file).expanduser()
    try:
        return ssl.create_default_context(cafile=str(path))
    except OSError as exc:  # a file that is none, or without a certificate
        raise ValueError(f"ca_file {path} holds no certificate that can be read: {exc}") from exc


def _entry(fields: Mapping[str, Any]) -> RemoteEntry:
    try:
        after = fields["after"]
        return RemoteEntry(
            ChunkKey(bytes.fromhex(fields["key"])),
            int(fields["nbytes"]),
            ChunkInfo(
                None if after is None else ChunkKey(bytes.fromhex(after)),
                str(fields["namespace"]),
                fields["expires_at_s"],
                fields["recompute_s"],
            ),
        )
    except (LookupError, TypeError, ValueError) as exc:
        raise TierUnavailableError("the service lists something that is no chunk") from exc
