"""Measures what codecs cost a model: profiles, losses, and the bits that a number takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...calibration.layer_sample import LayerSample
from ...calibration.model_profile import Profile
from ...certify.calibrate_model import calibrate
from ...certify.method_fits import LAYER_FITS, LayerFit
from ...compress.gram import GramMatrix
from ...compress.grouped import GroupedCodec
from ...compress.lowrank import LowRankCodec
from ...compress.lowrank import fit_layer as fit_basis
from ...compress.nuq.nuq import NuqCodec
from ...compress.nuq.nuq_fit import FitOptions, fit_layer
from ...compress.registry import codec_by_name
from ...compress.rotation import unrotated
from ...core import Codec, EncodedChunk, KVChunk, LayerRopes, RopeSpec
from ...evaluation.forcing import CHUNK_TOKENS, ForcedModel, split, through_codec
from ...evaluation.passages import load_heldout, load_questions
from ...evaluation.quality import KINDS, Limits, Measurement, measure, task_trials
from ...evaluation.windows import token_windows
from ...kvstore.format import to_buffers
from ...kvstore.keys import content_key

WIDTHS = (4, 3, 2)
NAMED = ("int8", "int4", "fp8", *(f"nuq{bits}" for bits in WIDTHS), "transform")
RANK_RATIOS = (0.125, 0.25, 0.375, 0.5)
LOW_RANK, ROTATED_LOW_RANK = "low rank {:.3g}", "low rank after rotation {:.3g}"
FITS: Mapping[str, FitOptions] = {
    "even levels": FitOptions(nonuniform=False),
    "F instead of F s^2": FitOptions(scale_weights=False),
    "no Fisher weights": FitOptions(fisher=False),
}
"""Variants of the fit of level tables, each without one piece."""


@dataclass(frozen=True, slots=True)
class Scope:
    """How much is measured.

    Attributes
    ----------
    calibration, windows : sequences of `window_tokens`, to learn from and to measure on; different text.
    trials : of each kind of task.
    """

    calibration: int
    windows: int
    window_tokens: int
    trials: int
    context_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """Profiles of one model: `whole`, one for each of `FITS`, and the low-rank basis of keys after rotation."""

    whole: Profile
    variants: Mapping[str, Profile]
    rotated: Profile


@dataclass(frozen=True)
class AfterRotation:
    """Keys as they come through a codec that is told that they carry no rotation; for comparison."""

    inner: Codec
    rope: RopeSpec | LayerRopes | None

    name: ClassVar[str] = "after rotation"
    is_lossless: ClassVar[bool] = False

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        return self.inner.encode(replace(chunk, spec=replace(chunk.spec, rope=None)))

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """Where the chunk was computed; raises `ValueError` if it is wanted elsewhere."""
        if positions is not None:
            raise ValueError("keys that were coded after rotation, and as if without one, cannot be moved")
        chunk = self.inner.decode(blob)
        return replace(chunk, spec=replace(chunk.spec, rope=self.rope))


@dataclass(frozen=True, slots=True, eq=False)
class Loss:
    """A codec, what it takes and what it costs.

    Attributes
    ----------
    bits : for each number of keys and values of a chunk of this model in float16, everything that is stored counted.
    figures : each loss with its 95 % interval.
    """

    name: str
    bits: float
    figures: Mapping[str, tuple[float, float, float]]


def learn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scope: Scope,
    *,
    variants: Mapping[str, FitOptions] = FITS,
) -> Learned:
    """Calibrate on the bundled Wikipedia passages and on the first half of the bundled prose."""
    prose = load_heldout()
    passages = [text for question in load_questions() for text in question.passages]
    windows = [
        window
        for texts in ([" ".join(passages)], ["\n".join(prose[: len(prose) // 2])])
        for window in token_windows(
            tokenizer, texts, sequences=-(-scope.calibration // 2), tokens=scope.window_tokens, least_tokens=64
        )
    ]
    of_codecs = {method: fit for method, fit in LAYER_FITS.items() if method != "vq"}  # codebooks are for retrieval
    fits = of_codecs | {name: _renamed(name, options) for name, options in variants.items()}
    profile = calibrate(model, windows, layer_fits=fits)
    own = {name: tensor for name, tensor in profile.tensors.items() if "/" not in name}
    profiles = {
        variant: Profile(
            profile.spec,
            {n.removeprefix(f"{variant}/"): t for n, t in profile.tensors.items() if n.startswith(f"{variant}/")},
        )
        for variant in variants
    }
    grams = _key_grams(ForcedModel(model), windows, rotated=True)
    bases = torch.stack([fit_basis(gram)["lowrank.basis"] for gram in grams])
    rotated = Profile(replace(profile.spec, rope=None), {"lowrank.basis": bases})
    return Learned(Profile(profile.spec, own, profile.meta), profiles, rotated)


def all_codecs(learned: Learned) -> dict[str, Codec]:
    """The codecs that are compared, by the name to show: named codecs, plain integers, and low rank."""
    found = {name: codec_by_name(name, learned.whole) for name in NAMED}
    for bits in WIDTHS:
        found[f"KIVI {bits} bits"] = kivi(bits)
        found[f"uniform {bits} bits"] = uniform(bits)
    spec = learned.whole.spec
    for ratio in RANK_RATIOS:
        rank = round(ratio * spec.num_kv_heads * spec.head_dim)
        found[LOW_RANK.format(ratio)] = LowRankCodec(rank=rank, profile=learned.whole)
        rotated = LowRankCodec(rank=rank, profile=learned.rotated)
        found[ROTATED_LOW_RANK.format(ratio)] = AfterRotation(rotated, spec.rope)
    return found


def ablations(learned: Learned, bits: int) -> dict[str, Codec]:
    """KVQuant in pieces: from integers per token to all of it, and all of it but for one."""
    whole = NuqCodec(learned.whole, bits=bits)
    return {
        "integers, keys per token": uniform(bits),
        "integers, keys per channel after rotation": replace(kivi(bits), rotated=True),
        "integers, keys per channel before rotation": kivi(bits),
        **{f"nuq, {name}": NuqCodec(profile, bits=bits) for name, profile in learned.variants.items()},
        "nuq, no outliers": replace(whole, outlier_ratio=0.0),
        "nuq, no sinks": replace(whole, sink_tokens=0),
        "nuq, with Q-Norm": replace(whole, q_norm=True),
        "nuq": whole,
    }


def kivi(bits: int) -> GroupedCodec:
    """KIVI in groups so large that it takes about as many bits as `nuq`: a quarter of a bit on top."""
    return GroupedCodec(bits=bits, group_tokens=128, group_channels=None)


def uniform(bits: int) -> GroupedCodec:
    """Integers between the least and the greatest number of each token."""
    return GroupedCodec(bits=bits, key_axis="token", group_channels=None)


def losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    codecs: Mapping[str, Codec],
    scope: Scope,
    advance: Callable[[str], object],
) -> list[Loss]:
    """Every codec beside the exact model, on the second half of the bundled prose and on tasks.

    `advance` is called with `windows` or the kind of task after each.
    """
    forced = ForcedModel(model)
    windows = heldout_windows(tokenizer, scope)
    trials = {
        kind: task_trials(tokenizer, kind, count=scope.trials, context_tokens=scope.context_tokens)
        for kind in (KINDS if scope.trials else ())
    }
    found = measure(
        forced, [through_codec(c) for c in codecs.values()], windows=windows, trials=trials, advance=advance
    )
    chunk, _ = forced.prefill(torch.tensor(windows[0]))
    return [
        Loss(name, bits_of(codec, chunk), _figures(one))
        for (name, codec), one in zip(codecs.items(), found, strict=True)
    ]


def _figures(found: Measurement) -> dict[str, tuple[float, float, float]]:
    return {name: (figure.value, figure.low, figure.high) for name, figure in found.figures(Limits()).items()}


def heldout_windows(tokenizer: PreTrainedTokenizerBase, scope: Scope) -> list[list[int]]:
    """Out of the second half of the bundled prose, which no profile has seen."""
    prose = load_heldout()
    text = "\n".join(prose[len(prose) // 2 :])
    return token_windows(tokenizer, [text], sequences=scope.windows, tokens=scope.window_tokens, least_tokens=64)


def bits_of(codec: Codec, context: KVChunk) -> float:
    """Bits for each number of a float16 chunk from the middle of a context, containers counted."""
    chunk = split(context, CHUNK_TOKENS)[1] if len(context) >= 2 * CHUNK_TOKENS else context
    short = half(chunk)
    return 8 * stored_bytes(codec, short) / (short.keys.numel() + short.values.numel())


def stored_bytes(codec: Codec, chunk: KVChunk) -> int:
    """Bytes of the container that a tier writes: header, checksums, token ids and positions included."""
    key = content_key(chunk.spec, [0], salt=b"bench")
    return sum(map(len, to_buffers(key, codec.encode(chunk))))


def key_energy(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> list[tuple[float, float, float]]:
    """Share of the keys' squared norm in their first dimensions, before and after rotation: mean over layers.

    Rows (rank over width, before, after), for each of `RANK_RATIOS`.
    """
    forced = ForcedModel(model)
    width = forced.spec.num_kv_heads * forced.spec.head_dim
    shares = []
    for rotated in (False, True):
        spectra = [gram.spectrum()[0] for gram in _key_grams(forced, windows, rotated=rotated)]
        shares.append(
            [sum(float(s[: round(r * width)].sum() / s.sum()) for s in spectra) / len(spectra) for r in RANK_RATIOS]
        )
    return list(zip(RANK_RATIOS, *shares, strict=True))


def _key_grams(forced: ForcedModel, windows: Sequence[Sequence[int]], *, rotated: bool) -> list[GramMatrix]:
    """Gram matrices of every layer's keys, after or before rotation; without each window's first token, the sink."""
    grams: list[GramMatrix] = []
    for window in windows:
        chunk, _ = forced.prefill(torch.tensor(list(window)))
        keys = chunk.keys.float() if rotated else unrotated(chunk.spec, chunk.keys, chunk.positions, 0)
        of_window = [GramMatrix.from_keys(layer[:, 1:].transpose(0, 1).flatten(1)) for layer in keys]
        grams = [a + b for a, b in zip(grams, of_window, strict=True)] if grams else of_window
    return grams


def half(chunk: KVChunk) -> KVChunk:
    """The chunk in float16, as an engine has it."""
    spec = replace(chunk.spec, dtype=torch.float16)
    return KVChunk(spec, chunk.token_ids, chunk.positions, chunk.keys.half(), chunk.values.half())


def _renamed(variant: str, options: FitOptions) -> LayerFit:
    def fit(sample: LayerSample) -> Mapping[str, torch.Tensor]:
        flat = [t.flatten(1) for t in (sample.keys, sample.key_fisher, sample.values, sample.value_fisher)]
        found = fit_layer(*flat, heads=sample.spec.num_kv_heads, options=options)
        return {f"{variant}/{name}": tensor for name, tensor in found.items()}

    return fit
