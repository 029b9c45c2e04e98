"""What the codes of a token's earlier channels say of the next one: contexts for entropy coding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CodecError
from .rans import PROBABILITY_BITS, decode, encode

TABLE_NAMES = ("weights", "bias", "classes", "frequencies")

_SHIFT = 12  # binary places of a prediction, which counts in bins
_EXACT = 1 << 24  # whole numbers below are exact in float32, sums of them in any order, too
_BLOCK_CHANNELS = 64
_SYMBOLS_PER_LANE = 2048  # a lane's state costs as much as ten of them, or half a percent
_MOST_LANES = 64
_SYMBOLS_PER_BYTE = 1 << 15  # the likeliest has a share of 4095 in 4096
_RIDGE = 1e-4
_FINEST, _COARSEST = -5.0, -1.0  # binary logarithms of the deviations that the first and the last class stand for


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """Tables of one layer of one tensor of codes, n = 2 ** bits levels, M channels in S classes, B bins.

    A code counts as the odd number `x = 2 code - (n - 1)`. The prediction of channel c is `bias[c]` plus the sum of
    `weights[c, j] x[j]` over j < c, in bins of `2 (n - 1) / B` times `2 ** 12`; its bin and the channel's class are the
    context of the code. All of it is done in whole numbers below 2 ** 24, in float32: exact in whatever order and on
    whatever machine.

    Attributes
    ----------
    weights : `[M, M]` float32, zero on and above the diagonal; None if nothing is predicted.
    bias : `[M]` float32.
    offsets : `[M]` int32, first context of the channel's class.
    starts : `[S * B, n + 1]` int32, sums of the frequencies.
    """

    weights: NDArray[np.float32] | None
    bias: NDArray[np.float32]
    offsets: NDArray[np.int32]
    starts: NDArray[np.int32]
    bins: int

    @classmethod
    def of(cls, weights: Tensor | None, bias: Tensor, classes: Tensor, frequencies: Tensor) -> Predictor:
        """From tables as they are stored.

        Parameters
        ----------
        weights, bias, classes : `[M, M]` int16 or None, `[M]` int32, `[M]` of a whole dtype.
        frequencies : `[S, B, n]` int16, positive, sums of 4096 over n.

        Raises
        ------
        CodecError : they contradict one another.
        """
        channels = len(bias)
        whole = weights is None or weights.dtype == torch.int16, not classes.is_floating_point()
        if frequencies.dtype != torch.int16 or bias.dtype != torch.int32 or not all(whole):
            raise CodecError(
                f"frequencies are {frequencies.dtype}, bias {bias.dtype}, classes {classes.dtype}, weights "
                f"{weights if weights is None else weights.dtype}; expected int16, int32, whole numbers, int16"
            )
        if (
            frequencies.ndim != 3
            or classes.shape != (channels,)
            or (weights is not None and weights.shape != (channels, channels))
        ):
            raise CodecError(
                f"tables of {channels} channels have classes {list(classes.shape)}, frequencies "
                f"{list(frequencies.shape)} and weights {None if weights is None else list(weights.shape)}"
            )
        groups, bins, count = frequencies.shape
        shares = frequencies.long()
        if (
            not bins
            or count not in (2, 4, 8, 16, 32, 64, 128, 256)
            or bool((shares < 1).any() | (shares.sum(-1) != 1 << PROBABILITY_BITS).any())
            or bool(((classes < 0) | (classes >= groups)).any())
        ):
            raise CodecError(
                f"frequencies {list(frequencies.shape)} are not positive shares of {1 << PROBABILITY_BITS}, or a "
                "channel is of no class that has some"
            )
        wide = None if weights is None else weights.float().tril(-1)
        reach = bias.double().abs() + (0 if wide is None else wide.double().abs().sum(1) * (count - 1))
        if bool((reach >= _EXACT).any()):
            raise CodecError(
                f"weights and bias of an entropy table reach {float(reach.max())}; expected below {_EXACT}"
            )
        starts = torch.cat([torch.zeros(groups, bins, 1, dtype=torch.long), shares.cumsum(-1)], -1)
        return cls(
            None if wide is None else wide.contiguous().numpy(),
            bias.float().numpy(),
            (classes.int() * bins).numpy(),
            starts.reshape(groups * bins, count + 1).int().numpy(),
            bins,
        )

    def contexts(self, codes: NDArray[np.uint8]) -> NDArray[np.int32]:
        """Of codes `[M, T]`."""
        numbers = _numbers(codes, self.starts.shape[1] - 1)
        # numpy's product, as torch's may be set to fewer bits than float32 has.
        predicted = self.bias[:, None] + (0 if self.weights is None else self.weights @ numbers)
        places = np.broadcast_to(predicted, codes.shape).astype(np.int32) >> _SHIFT
        return self.offsets[:, None] + places.clip(0, self.bins - 1).astype(np.int32)

    def encode(self, codes: NDArray[np.uint8]) -> bytes:
        """Codes `[M, T]` as a stream: the lanes' states, then the words, little-endian."""
        states, words = encode(codes, self.contexts(codes), self.starts, _lanes(codes.size))
        return states.astype("<u4").tobytes() + words.astype("<u2").tobytes()

    def decode(self, stream: memoryview, tokens: int) -> NDArray[np.uint8]:
        """The codes `[M, T]` that `encode` got.

        Raises
        ------
        CodecError : the stream is not that of so many codes with these tables.
        """
        channels, count = len(self.bias), self.starts.shape[1] - 1
        if channels * tokens > _SYMBOLS_PER_BYTE * len(stream):
            raise CodecError(f"entropy stream of {len(stream)} bytes cannot hold {channels * tokens} codes")
        lanes = _lanes(channels * tokens)
        head = 4 * lanes
        if len(stream) < head or len(stream) % 2:
            raise CodecError(f"entropy stream of {len(stream)} bytes; expected {head} and an even number more")
        states = np.frombuffer(stream[:head], "<u4").astype(np.uint64)
        words = np.frombuffer(stream[head:], "<u2").astype(np.uint16)
        numbers = np.empty((channels, tokens), np.float32)
        taken = 0
        for start in range(0, channels, _BLOCK_CHANNELS):
            own = slice(start, min(start + _BLOCK_CHANNELS, channels))
            predicted = np.repeat(self.bias[own, None], tokens, 1)
            inside = np.zeros((len(predicted), len(predicted)), np.float32)
            if self.weights is not None:
                predicted += self.weights[own, :start] @ numbers[:start]
                inside = np.ascontiguousarray(self.weights[own, own])
            taken = decode(
                predicted, inside, self.offsets[own], self.starts, self.bins, _SHIFT, numbers[own], states, words, taken
            )
            if taken < 0:
                raise CodecError(f"entropy stream of {len(stream)} bytes ends before channel {own.stop} of {channels}")
        if taken != len(words) or bool((states != 1 << 16).any()):
            raise CodecError(f"entropy stream of {len(stream)} bytes does not end where its codes do")
        codes: NDArray[np.uint8] = ((numbers + (count - 1)) / 2).astype(np.uint8)
        return codes


def to_frequencies(counts: Tensor) -> Tensor:
    """Counts `[..., n]` as int16 shares of 4096, none of them zero."""
    total, count = 1 << PROBABILITY_BITS, counts.shape[-1]
    wide = counts.double() + 1e-9
    shares = 1 + (wide / wide.sum(-1, keepdim=True) * (total - count)).long()
    most = shares.argmax(-1, keepdim=True)
    return shares.scatter_add(-1, most, total - shares.sum(-1, keepdim=True)).to(torch.int16)


@dataclass(frozen=True, slots=True, eq=False)
class CodeMoments:
    """Sums over tokens of the codes of one layer, as the odd numbers of `Predictor`; additive like a Gram matrix."""

    sums: Tensor  # [M] float64
    products: Tensor  # [M, M] float64
    tokens: int

    @classmethod
    def of(cls, codes: Tensor, bits: int) -> CodeMoments:
        """Of codes `[M, T]` uint8."""
        numbers = torch.from_numpy(_numbers(codes.numpy(), 1 << bits)).double()
        return cls(numbers.sum(1), numbers @ numbers.T, codes.shape[1])

    def __add__(self, other: CodeMoments) -> CodeMoments:
        return CodeMoments(self.sums + other.sums, self.products + other.products, self.tokens + other.tokens)


def fit_prediction(moments: CodeMoments, *, bits: int, classes: int = 16, bins: int = 32) -> dict[str, Tensor]:
    """Best linear prediction of each channel from those before: `weights`, `bias` and `classes` of one layer.

    From the Cholesky factor `C` of the covariance: with `U` that factor, each column over its diagonal, `U^-1 x` has
    uncorrelated entries, so that `I - U^-1` holds the weights, and the diagonal the deviations of what is left.
    """
    tokens, levels = max(moments.tokens, 1), (1 << bits) - 1
    mean = moments.sums / tokens
    covariance = moments.products / tokens - mean[:, None] * mean
    ridge = _RIDGE * covariance.diag() + 1e-3
    root = torch.linalg.cholesky(covariance + torch.diag(ridge))
    eye = torch.eye(len(mean), dtype=torch.float64)
    whitening = torch.linalg.solve_triangular(root / root.diag(), eye, upper=False, unitriangular=True)
    unit = bins / (2 * levels) * (1 << _SHIFT)
    weights = ((eye - whitening) * unit).round()
    bias = ((whitening @ mean + levels) * unit).round()
    reach = bias.abs() + weights.abs().sum(1) * levels
    # Channels whose prediction would leave the exact range, or int16, are left without one.
    fits = (reach < _EXACT) & (weights.abs().amax(1) < 1 << 15)
    weights = torch.where(fits[:, None], weights, 0.0)
    bias = torch.where(fits, bias, ((mean + levels) * unit).round())
    deviations = torch.where(fits, root.diag(), (covariance.diag() + ridge).sqrt()) / levels
    scaled = (deviations.log2() - _FINEST) / (_COARSEST - _FINEST) * (classes - 1)
    return {
        "weights": weights.to(torch.int16),
        "bias": bias.to(torch.int32),
        "classes": scaled.round().clamp(0, classes - 1).to(torch.uint8),
    }


def count_codes(predictor: Predictor, codes: NDArray[np.uint8]) -> Tensor:
    """How often each code `[M, T]` stands in each context: `[S * B, n]` int64."""
    contexts, width = predictor.starts.shape[0], predictor.starts.shape[1] - 1
    cells = predictor.contexts(codes).astype(np.int64) * width + codes
    return torch.from_numpy(np.bincount(cells.reshape(-1), minlength=contexts * width)).reshape(contexts, width)


def _numbers(codes: NDArray[np.uint8], count: int) -> NDArray[np.float32]:
    return 2 * codes.astype(np.float32) - np.float32(count - 1)


def _lanes(symbols: int) -> int:
    return max(1, min(_MOST_LANES, symbols // _SYMBOLS_PER_LANE))
