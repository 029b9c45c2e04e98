"""Codecs against their contract."""

import pytest
import torch

from kvloom.compress.raw import RawCodec
from kvloom.core import EncodedChunk, KVSpec
from kvloom.errors import CodecError
from kvloom.testing import CodecContract, make_chunk, same_chunk


class TestRawCodec(CodecContract):
    def make_codec(self, spec: KVSpec) -> RawCodec:
        return RawCodec()

    def test_shares_memory_unless_moved(self, codec: RawCodec) -> None:
        chunk = make_chunk(1)
        blob = codec.encode(chunk)
        for decoded in (codec.decode(blob), codec.decode(blob, chunk.positions.clone())):
            assert same_chunk(decoded, chunk)
            assert decoded.keys.data_ptr() == blob.tensors["keys"].data_ptr()
        moved = codec.decode(blob, chunk.positions + 1)
        assert moved.keys.data_ptr() != blob.tensors["keys"].data_ptr()
        assert moved.values.data_ptr() == blob.tensors["values"].data_ptr()
        assert same_chunk(codec.decode(blob), chunk)

    def test_keeps_every_bit(self, codec: RawCodec) -> None:
        chunk = make_chunk(1)
        chunk.keys.view(torch.int32)[0, 0, 0] = torch.tensor(
            [0x7FC00001, 0x7F800000, -0x80000000, 1, 0x7F7FFFFF, -1, 0x00800000, 0], dtype=torch.int64
        ).to(torch.int32)  # NaNs with payload, infinity, -0.0, subnormals
        assert same_chunk(codec.decode(codec.encode(chunk)), chunk)

    @pytest.mark.parametrize("name", ["keys", "values", "token_ids", "positions"])
    def test_refuses_wrong_lengths(self, codec: RawCodec, name: str) -> None:
        blob = codec.encode(make_chunk(1))
        cut = {**blob.tensors, name: blob.tensors[name][..., :-1]}
        with pytest.raises(CodecError, match="contradicts"):
            codec.decode(EncodedChunk(blob.codec, cut, blob.meta, blob.layered))

    @pytest.mark.parametrize("meta", [{"spec": "[]"}, {"spec": "{"}, {"spec": "{}"}, {"first_layer": "one"}])
    def test_refuses_wrong_meta(self, codec: RawCodec, meta: dict[str, str]) -> None:
        blob = codec.encode(make_chunk(1))
        with pytest.raises(CodecError, match="without a readable spec"):
            codec.decode(EncodedChunk(blob.codec, blob.tensors, {**blob.meta, **meta}, blob.layered))
