"""Coverage-guided fuzzing of the container parser: `python tests/service/fuzz_container.py -runs=1000000`.

Whatever bytes come, the parser raises `ChunkCorruptError` or gives a chunk of that many bytes, and allocates at most
a small multiple of what came. Checksums would stop a fuzzer at the first byte, so in most runs they are made right.
"""

import json
import math
import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvloom.kvstore.format"]):
    from kvloom.kvstore import format as container

import torch
import xxhash

from kvloom.core import ChunkKey
from kvloom.errors import ChunkCorruptError
from kvloom.kvstore.encoding.buffer_pool import BufferPool
from kvloom.service.transfer.containers import IncomingContainer
from kvloom.testing.chunks import make_blob, make_key

KEY = ChunkKey(make_key(1))
POOL = BufferPool()
MOST_GROWTH_BYTES = 256 << 20
torch.set_num_threads(1)


def sealed(text: bytes, rest: bytes) -> bytes:
    """A container with this JSON, right as far as its preamble goes."""
    text += b" " * (-(72 + len(text)) % 64)
    header_bytes = 72 + len(text)
    head = b"kvloom\r\n" + (1).to_bytes(4, "little") + header_bytes.to_bytes(4, "little") + KEY
    head += (header_bytes + len(rest)).to_bytes(8, "little")
    body = len(text).to_bytes(8, "little") + text
    return head + xxhash.xxh3_64_intdigest(head + body).to_bytes(8, "little") + body + rest


def structured(given: atheris.FuzzedDataProvider) -> bytes:
    """A container whose header is JSON of the right form, with wrong or right numbers in it."""
    fields: dict[str, object] = {}
    layered, sums, end = [], {}, 0
    rest = given.ConsumeBytes(given.ConsumeIntInRange(0, 256))
    for number in range(given.ConsumeIntInRange(0, 4)):
        name = "abcd"[number] if given.ConsumeBool() else given.ConsumeUnicodeNoSurrogates(4)
        dtype = given.PickValueInList(["U8", "F32", "I64", "BF16", "BOOL", "X"])
        shape = [given.ConsumeIntInRange(0, 9) for _ in range(given.ConsumeIntInRange(0, 4))]
        stop = end + math.prod(shape) * {"U8": 1, "F32": 4, "I64": 8, "BF16": 2, "BOOL": 1}.get(dtype, 1)
        if given.ConsumeIntInRange(0, 7) == 0:
            stop = given.ConsumeInt(8)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
        data = rest[end:stop]
        if given.ConsumeBool() and shape:
            layered.append(name)
            size = len(data) // max(shape[0], 1)
            sums[name] = [xxhash.xxh3_64_hexdigest(data[at * size : (at + 1) * size]) for at in range(shape[0])]
        else:
            sums[name] = [xxhash.xxh3_64_hexdigest(data)]
        end = stop
    if given.ConsumeIntInRange(0, 7) == 0:
        sums = json.loads(given.PickValueInList(["[]", "{}", "7", '{"a": "x"}', '{"a": {"0": 1}}', "null"]))
    metadata = {
        "codec": given.PickValueInList(["raw", "", 7, None]),
        "meta": given.PickValueInList(['{"a": "b"}', "{}", "[]", '{"a": 1}', "[" * 2000]),
        "layered": json.dumps(layered),
        "checksums": json.dumps(sums),
    }
    return sealed(json.dumps({"__metadata__": metadata, **fields}).encode(), rest[: max(end, 0)])


def try_one(data: bytes) -> None:
    mode, data = (data[0], data[1:]) if data else (0, b"")
    if mode % 4 == 3:
        data = structured(atheris.FuzzedDataProvider(data))
    elif mode % 4:
        text, _, rest = data.partition(b"\n\n")
        data = sealed(text, rest)
    incoming = IncomingContainer(POOL.empty, len(data))
    incoming.append(data)
    try:
        blob, header = incoming.chunk(KEY)
    except ChunkCorruptError:
        return
    if blob.nbytes + len(header) != len(data):
        raise AssertionError(f"a chunk of {blob.nbytes} bytes from a container of {len(data)}")


def main() -> None:
    seeds = []
    for seed in range(4):
        whole = container.to_bytes(KEY, make_blob(seed, numbers=seed * 10))
        header_bytes = int.from_bytes(whole[12:16], "little")
        seeds.append(b"\x01" + whole[72:header_bytes].rstrip() + b"\n\n" + whole[header_bytes:])
        seeds.append(b"\x00" + whole)
    for seed in seeds:
        try_one(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if corpus:
        for number, seed in enumerate(seeds):
            Path(corpus[0], f"seed{number}").write_bytes(seed)

    def check_memory() -> None:
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        if growth > MOST_GROWTH_BYTES:
            raise MemoryError(f"memory grew by {growth >> 20} MiB")

    count = 0

    def test_one(data: bytes) -> None:
        nonlocal count
        count += 1
        try_one(data)
        if count % 1000 == 0:
            check_memory()

    atheris.Setup([sys.argv[0], "-max_len=4096", "-rss_limit_mb=3000", *sys.argv[1:]], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
