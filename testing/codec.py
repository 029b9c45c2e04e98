"""What every codec must do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..core import Codec, EncodedChunk, KVChunk, KVSpec
from ..errors import CodecError, SpecMismatchError
from .chunks import ROPE, SPEC, make_chunk, same_bits

SPECS = (
    SPEC,
    KVSpec("half@1", 2, 1, 8, torch.bfloat16, ROPE),
    KVSpec("no-rope@1", 2, 2, 8, torch.float16, None),
    KVSpec("latent@1", 2, 1, 8, torch.float32, ROPE, v_head_dim=0),
)


class CodecContract:
    """Subclasses give `make_codec(spec)`.

    Attributes
    ----------
    tolerance : largest relative error of a decoded layer, in the Frobenius norm; 0 asks for equal bits.
    """

    tolerance = 0.0

    def make_codec(self, spec: KVSpec) -> Codec:
        """A codec for chunks of a model."""
        raise NotImplementedError

    @pytest.fixture
    def codec(self, request: pytest.FixtureRequest) -> Codec:
        """For the model of `chunk` where a test asks for that, too, else for `SPEC`."""
        return self.make_codec(request.getfixturevalue("chunk").spec if "chunk" in request.fixturenames else SPEC)

    @pytest.fixture(params=SPECS, ids=lambda spec: spec.model_id)
    def chunk(self, request: pytest.FixtureRequest) -> KVChunk:
        """Six tokens from position 11 on; a codec of one model only overrides it with a chunk of that model."""
        return make_chunk(7, tokens=6, spec=request.param, start=11)

    def assert_close(self, found: Tensor, true: Tensor) -> None:
        assert found.dtype == true.dtype and found.shape == true.shape
        if self.tolerance == 0.0:
            assert same_bits(found, true)
        for layer in range(len(true)):
            error = (found[layer].float() - true[layer].float()).norm()
            assert error <= self.tolerance * true[layer].float().norm()

    def test_is_a_codec(self, codec: Codec) -> None:
        assert isinstance(codec, Codec)

    def test_round_trip(self, codec: Codec, chunk: KVChunk) -> None:
        decoded = codec.decode(codec.encode(chunk))
        assert decoded.spec == chunk.spec and decoded.first_layer == 0
        assert torch.equal(decoded.token_ids, chunk.token_ids) and torch.equal(decoded.positions, chunk.positions)
        self.assert_close(decoded.keys, chunk.keys)
        self.assert_close(decoded.values, chunk.values)

    def test_blob_can_be_stored(self, codec: Codec, chunk: KVChunk) -> None:
        blob = codec.encode(chunk)
        assert blob.codec == codec.name and blob.layered <= blob.tensors.keys()
        for name, tensor in blob.tensors.items():
            assert tensor.device.type == "cpu" and tensor.is_contiguous()
            assert name not in blob.layered or len(tensor) == chunk.spec.num_layers

    def test_encode_does_not_alias_unless_leased(self, codec: Codec) -> None:
        chunk = make_chunk(7)
        blob = codec.encode(chunk)
        if blob.leased:  # then whoever keeps it copies it
            copies = {name: tensor.clone() for name, tensor in blob.tensors.items()}
            blob = EncodedChunk(blob.codec, copies, blob.meta, blob.layered)
        for tensor in (chunk.token_ids, chunk.positions, chunk.keys, chunk.values):
            tensor.zero_()
        true = make_chunk(7)
        decoded = codec.decode(blob)
        assert torch.equal(decoded.token_ids, true.token_ids) and torch.equal(decoded.positions, true.positions)
        self.assert_close(decoded.keys, true.keys)

    def test_encode_takes_any_strides(self, codec: Codec) -> None:
        chunk = make_chunk(7)
        strided = KVChunk(
            chunk.spec,
            chunk.token_ids.repeat_interleave(2)[::2],
            chunk.positions,
            chunk.keys.transpose(1, 2).contiguous().transpose(1, 2),
            chunk.values.transpose(0, 3).contiguous().transpose(0, 3),
        )
        assert not strided.keys.is_contiguous()
        blob = codec.encode(strided)
        assert all(tensor.is_contiguous() for tensor in blob.tensors.values())
        self.assert_close(codec.decode(blob).keys, chunk.keys)
        self.assert_close(codec.decode(codec.encode(strided)).values, chunk.values)

    def test_moves_keys_to_positions(self, codec: Codec, chunk: KVChunk) -> None:
        positions = torch.tensor([0, 3, 4, 9, 500, 501])
        decoded = codec.decode(codec.encode(chunk), positions)
        assert torch.equal(decoded.positions, positions)
        keys = chunk.keys
        if chunk.spec.rope is not None:
            keys = chunk.spec.shift(keys, positions - chunk.positions, chunk.first_layer)
            assert not torch.allclose(keys.float(), chunk.keys.float(), atol=0.1)
        self.assert_close(decoded.keys, keys)
        self.assert_close(decoded.values, chunk.values)

    def test_decodes_layers_alone(self, codec: Codec, chunk: KVChunk) -> None:
        positions = chunk.positions + 5
        blob = codec.encode(chunk)
        whole, part = codec.decode(blob, positions), codec.decode(blob.layers(1, 2), positions)
        assert part.first_layer == 1
        assert same_bits(part.keys, whole.keys[1:2]) and same_bits(part.values, whole.values[1:2])

    def test_refuses_wrong_positions(self, codec: Codec) -> None:
        blob = codec.encode(make_chunk(7))
        for positions in (torch.arange(4), torch.arange(5.0), torch.arange(1)):
            with pytest.raises(SpecMismatchError):
                codec.decode(blob, positions)

    def test_refuses_foreign_blobs(self, codec: Codec) -> None:
        blob = codec.encode(make_chunk(7))
        some = dict(list(blob.tensors.items())[1:])
        for foreign in (
            EncodedChunk("another", blob.tensors, blob.meta, blob.layered),
            EncodedChunk(blob.codec, some, blob.meta, blob.layered & some.keys()),
            EncodedChunk(blob.codec, blob.tensors, {}, blob.layered),
        ):
            with pytest.raises(CodecError):
                codec.decode(foreign)
