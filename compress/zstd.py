"""Zstandard frames of known length, of which none is believed."""

from __future__ import annotations

try:
    import zstandard
except ImportError as exc:
    raise ImportError("this codec needs zstandard; install it with `pip install kvloom[compress]`") from exc

from ..errors import CodecError

_LARGEST_RATIO = 1 << 15  # four bytes of zstd stand for a block of 128 KiB at most
_LARGEST_WINDOW_BYTES = 1 << 27


def check_level(level: int) -> None:
    """Raises `ValueError` if zstd has no such level: 1 (fast) to 22 (small)."""
    if not 1 <= level <= 22:
        raise ValueError(f"level is {level}; expected 1 to 22")


def decompress(frame: bytes | memoryview, expected_bytes: int) -> bytes:
    """The bytes of a frame that says it holds so many, and does.

    Raises
    ------
    CodecError : the frame cannot be read, or holds another number of bytes; none makes it allocate more than 32,768
        times the frame's own bytes.
    """
    length = memoryview(frame).nbytes
    try:
        said_bytes = zstandard.get_frame_parameters(frame).content_size
        if said_bytes != expected_bytes or expected_bytes > _LARGEST_RATIO * length:
            raise CodecError(f"zstd stream of {length} bytes says {said_bytes}; expected {expected_bytes}")
        zstd = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        data = zstd.decompress(frame, max_output_size=expected_bytes, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise CodecError(f"zstd stream of {length} bytes cannot be read: {exc}") from exc
    if len(data) != expected_bytes:
        raise CodecError(f"zstd stream gave {len(data)} bytes; expected {expected_bytes}")
    return data
