"""Every exception that kvloom raises on purpose. A miss is `None` or a smaller count, never an exception."""


class KVLoomError(Exception):
    """Root of all kvloom errors; `except KVLoomError` catches everything raised on purpose."""


class SpecMismatchError(KVLoomError, ValueError):
    """Shape, dtype, model or rope of a tensor or chunk is not the one that was promised."""


class CodecError(KVLoomError):
    """An encoded chunk cannot be decoded, or a chunk cannot be encoded."""


class ChunkCorruptError(CodecError):
    """Checksum, length, header or identity of stored bytes is wrong; the bytes must not be used."""


class TierError(KVLoomError):
    """A tier cannot do what was asked."""


class TierFullError(TierError):
    """A chunk does not fit.

    Attributes
    ----------
    needed_bytes : what the chunk takes in this tier.
    """

    def __init__(self, message: str, *, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class TierNoSpaceError(TierFullError):
    """The file system under a tier is full, or a quota on it, whatever the capacity of the tier itself."""


class ChunkTooLargeError(TierFullError):
    """A tier takes no chunk of this size, however much room it has."""


class TierReadOnlyError(TierError):
    """A tier that was opened read-only was asked to write or delete a chunk."""


class TierUnavailableError(TierError, ConnectionError):
    """A tier is gone for now: closed, unreachable, locked by another process, or its device fails."""


class TierTimeoutError(TierUnavailableError):
    """A tier did not answer in time, and the call was given up.

    Attributes
    ----------
    begun : the tier may still be at it. A chunk that it was to write or delete is gone from it once it answers.
    """

    def __init__(self, message: str, *, begun: bool) -> None:
        super().__init__(message)
        self.begun = begun


class ChunkUnreachableError(TierError):
    """A tier answers, but not for this chunk: the node that holds it does not, though others do."""


class UncertifiedError(KVLoomError):
    """An approximation may not be used for a model: no certificate covers it, and `allow_uncertified` is False."""


class UncertifiedWarning(UserWarning):
    """An approximation is used for a model without a certificate, because `allow_uncertified` is True."""


class JudgedWithoutTasksWarning(UserWarning):
    """An approximation is used by a certificate that no task was judged for: text alone says that it loses little."""


class EngineError(KVLoomError):
    """The engine (or model) broke its contract with kvloom, or is of a kind that kvloom does not support."""
