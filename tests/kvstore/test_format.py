"""The container: what goes in comes out, and nothing else ever does."""

import json
import struct
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvloom.core import EncodedChunk
from kvloom.errors import ChunkCorruptError, CodecError
from kvloom.kvstore.format import Container, from_bytes, read_header, read_layers, to_buffers, to_bytes
from kvloom.testing import make_blob, make_key, same_bits, same_blob

KEY = make_key(77)
DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn,
)  # fmt: skip

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def blobs(draw: st.DrawFn) -> EncodedChunk:
    tensors, layered = {}, set()
    for name in draw(
        st.lists(st.text(max_size=5).filter(lambda name: name != "__metadata__"), max_size=4, unique=True)
    ):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(shapes)
        random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        data = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=random)
        tensors[name] = data.to(torch.uint8).view(dtype).view(shape)
        if shape and draw(st.booleans()):
            layered.add(name)
    meta = draw(st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    return EncodedChunk(draw(st.text(max_size=5)), tensors, meta, frozenset(layered))


@pytest.mark.slow
@given(blobs())
def test_round_trip(blob: EncodedChunk) -> None:
    data = to_bytes(KEY, blob)
    assert same_blob(from_bytes(KEY, data), blob)
    assert to_bytes(KEY, from_bytes(KEY, data)) == data


@given(blobs())
def test_body_is_safetensors(blob: EncodedChunk) -> None:
    loaded = safetensors.torch.load(to_bytes(KEY, blob)[64:])
    assert loaded.keys() == blob.tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in blob.tensors.items())


@given(blobs(), st.integers(0, 4), st.integers(0, 4))
def test_layers_alone(blob: EncodedChunk, start: int, stop: int) -> None:
    data = memoryview(to_bytes(KEY, blob))
    read = []

    def read_at(buffer: memoryview, offset: int) -> None:
        read.append(len(buffer))
        buffer[:] = data[offset : offset + len(buffer)]

    header = read_header(read_at, len(data), KEY)
    read.clear()
    expected = blob.layers(start, stop)
    assert same_blob(read_layers(read_at, header, start, stop), expected)
    assert sum(read) == expected.nbytes and len(read) <= len(blob.tensors)


def test_buffers_are_not_copies() -> None:
    blob = make_blob(1)
    buffers = to_buffers(KEY, blob)
    blob.tensors["codes"].fill_(9)
    assert len(buffers[0]) % 64 == 0 and bytes(buffers[2]) == b"\x09" * 400


@given(blobs())
def test_a_container_in_memory_is_the_one_of_buffers(blob: EncodedChunk) -> None:
    container = Container(KEY, blob)
    memory = bytearray(b"x" * (container.nbytes + 3))
    container.copy_into(memoryview(memory)[: container.nbytes])
    assert bytes(memory) == b"".join(container.buffers()) + b"xxx"


def test_every_flipped_bit_is_found() -> None:
    data = bytearray(to_bytes(KEY, make_blob(1, numbers=8)))
    for offset in range(len(data)):
        for bit in (1, 1 << offset % 8):
            data[offset] ^= bit
            with pytest.raises(ChunkCorruptError):
                from_bytes(KEY, data)
            data[offset] ^= bit
    assert same_blob(from_bytes(KEY, data), make_blob(1, numbers=8))


def test_every_truncation_and_extension_is_found() -> None:
    data = to_bytes(KEY, make_blob(1, numbers=8))
    for length in range(len(data)):
        with pytest.raises(ChunkCorruptError):
            from_bytes(KEY, data[:length])
    for tail in (b"\0", b" ", data, b"\0" * 4096):
        with pytest.raises(ChunkCorruptError):
            from_bytes(KEY, data + tail)


def test_sections_larger_than_a_piece() -> None:
    tensors = {"layered": torch.arange(3 * 90_000).view(3, -1), "plain": torch.arange(600_000, dtype=torch.int16)}
    blob = EncodedChunk("c", tensors, {}, frozenset({"layered"}))
    data = bytearray(to_bytes(KEY, blob))
    assert same_blob(from_bytes(KEY, data), blob)
    copied = bytearray(len(data))
    Container(KEY, blob).copy_into(memoryview(copied))
    assert copied == data
    for offset in range(1000, len(data), 250_007):
        data[offset] ^= 1
        with pytest.raises(ChunkCorruptError, match="checksum"):
            from_bytes(KEY, data)
        data[offset] ^= 1


def test_another_key_is_found() -> None:
    with pytest.raises(ChunkCorruptError, match=f"asked for {make_key(78).hex()}"):
        from_bytes(make_key(78), to_bytes(KEY, make_blob(1)))


def test_headers_longer_than_the_first_read() -> None:
    blob = EncodedChunk("c", {"t": torch.arange(3)}, {"long": "x" * 100_000}, frozenset())
    data = bytearray(to_bytes(KEY, blob))
    assert same_blob(from_bytes(KEY, data), blob)
    data[90_000] ^= 1
    with pytest.raises(ChunkCorruptError, match="checksum of the header"):
        from_bytes(KEY, data)


def test_what_cannot_be_stored() -> None:
    for tensor in (torch.zeros(2, dtype=torch.complex64), torch.zeros(4, 4).t(), torch.zeros(2, device="meta")):
        with pytest.raises(CodecError):
            to_bytes(KEY, EncodedChunk("c", {"t": tensor}, {}))
    for tensors, layered in (({"__metadata__": torch.zeros(1)}, set()), ({}, {"t"}), ({"t": torch.tensor(1)}, {"t"})):
        with pytest.raises(CodecError):
            to_bytes(KEY, EncodedChunk("c", tensors, {}, frozenset(layered)))
    with pytest.raises(CodecError, match="at most"):
        to_bytes(KEY, EncodedChunk("c", {}, {"long": "x" * (1 << 24)}))


def forge(text: bytes, data: bytes, **preamble: Any) -> bytes:
    """A container with right checksums of the header around any JSON: the format, written a second time."""
    text += b" " * (-(72 + len(text)) % 64)
    body = len(text).to_bytes(8, "little") + text
    fields = {
        "magic": b"kvloom\r\n",
        "version": 1,
        "header": 64 + len(body),
        "key": KEY,
        "total": 64 + len(body + data),
    }
    head = struct.pack("<8sII32sQ", *(fields | preamble).values())
    return head + xxhash.xxh3_64(head + body).digest()[::-1] + body + data


def fields_of(blob: EncodedChunk) -> tuple[dict[str, Any], bytes]:
    data = to_bytes(KEY, blob)
    end = 72 + int.from_bytes(data[64:72], "little")
    return json.loads(data[72:end]), data[end:]


def test_forging_without_a_lie_is_accepted() -> None:
    fields, data = fields_of(make_blob(1))
    assert same_blob(from_bytes(KEY, forge(json.dumps(fields).encode(), data)), make_blob(1))


@pytest.mark.parametrize(
    "lie",
    [{"magic": b"kvloom\n\n"}, {"version": 0}, {"version": 2}, {"header": 71}, {"header": 0}, {"header": 2**32 - 1},
     {"header": 128}, {"key": make_key(1)}, {"total": 0}, {"total": 2**64 - 1}],
)  # fmt: skip
def test_forged_preambles(lie: dict[str, Any]) -> None:
    fields, data = fields_of(make_blob(1))
    with pytest.raises(ChunkCorruptError):
        from_bytes(KEY, forge(json.dumps(fields).encode(), data, **lie))


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [4, 101]},
        {"shape": [2**62, 2**62]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [24, 24]},
        {"shape": [-4, -100]},
        {"shape": [4.0, 100]},
        {"shape": [True] * 2},
        {"shape": 400},
        {"shape": None},
        {"shape": [400] + [1] * 20},
        {"data_offsets": [24, 2**63]},
        {"data_offsets": [-376, 24]},
        {"data_offsets": [0, 400]},
        {"data_offsets": [25, 425]},
        {"data_offsets": [24]},
        {"data_offsets": "ab"},
        {"dtype": "F128"},
        {"dtype": []},
        {"dtype": "I64"},
        {"dtype": "I64", "shape": [4, 100], "data_offsets": [24, 24 + 3200]},
    ],
    ids=str,
)
def test_forged_tensors(entry: dict[str, Any]) -> None:
    fields, data = fields_of(make_blob(1))
    fields["codes"] |= entry
    tracemalloc.start()
    with pytest.raises(ChunkCorruptError):
        from_bytes(KEY, forge(json.dumps(fields).encode(), data))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "metadata",
    [
        {"codec": 1},
        {"meta": "[]"},
        {"meta": '{"a": 1}'},
        {"meta": "{"},
        {"layered": '["other"]'},
        {"layered": "[[]]"},
        {"layered": "1"},
        {"checksums": "{}"},
        {"checksums": '{"codes": [], "scale": []}'},
        {"checksums": '{"codes": 4, "scale": 1}'},
        {"checksums": '{"codes": ["0", "0", "0", "0"], "scale": ["0"]}'},
        {"checksums": '{"codes": "0000", "scale": "0"}'},
    ],
    ids=str,
)
def test_forged_metadata(metadata: dict[str, Any]) -> None:
    fields, data = fields_of(make_blob(1))
    fields["__metadata__"] |= metadata
    with pytest.raises(ChunkCorruptError):
        from_bytes(KEY, forge(json.dumps(fields).encode(), data))


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"__metadata__": 1}', b"1" * 5000], ids=len
)
def test_forged_json(text: bytes) -> None:
    with pytest.raises(ChunkCorruptError):
        from_bytes(KEY, forge(text, b""))


@given(st.binary(max_size=300))
def test_noise(data: bytes) -> None:
    with pytest.raises(ChunkCorruptError):
        from_bytes(KEY, data)
    with pytest.raises(ChunkCorruptError):
        from_bytes(KEY, forge(data, b""))
