"""Fusion without an engine: which tokens go where, slices that equal the whole, and the rotation that is found."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvloom.blend.choosers import deviation_of, kv_deviation, squares
from kvloom.blend.method import FusionMethod
from kvloom.connectors.serving.messages import Advance, Document, Fusion
from kvloom.connectors.serving.worker.arrivals import Fetched
from kvloom.connectors.serving.worker.fuser import Fuser, first_slice, stage
from kvloom.connectors.vllm.fusion.passes import running_model, runs_of
from kvloom.connectors.vllm.fusion.rope import rope_of
from kvloom.core import RopeSpec
from kvloom.errors import EngineError

from ..support.faulty import eventually
from .test_paged_layers import BLOCK, D, H, make_layer

# ---------------------------------------------------------------------------------------------------- positions


@given(st.sets(st.integers(0, 60)), st.integers(1, 20), st.integers(1, 6))
def test_runs_and_slices(chosen: set[int], max_tokens: int, max_runs: int) -> None:
    """Runs hold exactly what was chosen; slices are the longest that fit, and all of them together are the whole."""
    positions = sorted(chosen)
    runs = runs_of(positions)
    assert [p for a, b in runs for p in range(a, b)] == positions
    assert all(b < c for (_, b), (c, _) in pairwise(runs))
    left, taken = torch.tensor(positions, dtype=torch.int64), []
    while len(left):
        count = first_slice(left, max_tokens, max_runs)
        part = left[:count].tolist()
        assert 0 < count <= max_tokens
        assert len(runs_of(part)) <= max_runs
        if count < len(left):
            more = left[: count + 1].tolist()
            assert len(more) > max_tokens or len(runs_of(more)) > max_runs
        taken += part
        left = left[count:]
    assert taken == positions


def fusion_of(start: int, stop: int, inexact: int, spans: Sequence[tuple[int, int]], ratio: float = 0.5) -> Fusion:
    documents = tuple(Document(a, b, (bytes(32),)) for a, b in spans)  # type: ignore[arg-type]
    return Fusion("r", np.arange(stop), start, stop, inexact, documents, ratio, tuple(range(1, 12)))


def test_who_is_computed_and_who_may_be_chosen() -> None:
    """Lead 0 to 2, an exact document, a gap, a document, one that was not found, one that reaches beyond the end."""
    fusion = fusion_of(1, 20, 8, [(2, 6), (8, 11), (11, 14), (15, 25)])
    probed, candidates = stage(fusion, (True, True, False, True))
    assert probed.tolist() == [1, *range(6, 20)]
    assert candidates.tolist() == [8, 9, 10, *range(15, 20)]
    probed, candidates = stage(fusion, (False, False, False, False))
    assert probed.tolist() == list(range(1, 20))
    assert candidates.tolist() == []


def test_squares_add_up() -> None:
    """Over ranks that hold different heads, and over slices of tokens."""
    fresh_k, cached_k, fresh_v, cached_v = (torch.randn(4, 9, D) for _ in range(4))
    whole = kv_deviation(fresh_k, cached_k, fresh_v, cached_v)
    by_rank = sum(squares(*(t[h : h + 2] for t in (fresh_k, cached_k, fresh_v, cached_v))) for h in (0, 2))
    slices = [squares(*(t[:, a : a + 3] for t in (fresh_k, cached_k, fresh_v, cached_v))) for a in (0, 3, 6)]
    assert torch.allclose(deviation_of(torch.as_tensor(by_rank)), whole)
    assert torch.allclose(deviation_of(torch.cat(slices, dim=1)), whole)


# -------------------------------------------------------------------------------------------------------- fuser

LAYERS = 3


class Cache:
    """`PagedLayers` that are plain tensors, `[L, H, slots, D]`."""

    def __init__(self) -> None:
        from kvloom.connectors.vllm.paged_layers import PagedLayers

        self.paged = PagedLayers([make_layer("side by side", blocks=16) for _ in range(LAYERS)], BLOCK)


class Passes:
    """A model whose keys and values are a function of token, position and layer, plus what the fused context adds."""

    max_tokens, max_runs = 64, 64

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.computed: list[list[int]] = []
        self.asked: list[tuple[list[int], int]] = []
        generator = torch.Generator().manual_seed(0)
        self.truth = torch.randn(2, LAYERS, H, 100, D, generator=generator)

    def compute(self, token_ids: Any, positions: Tensor, blocks: Sequence[int]) -> None:
        self.computed.append(positions.tolist())
        self._write(positions, blocks, LAYERS)

    def keys_and_values(self, layer: int, token_ids: Any, positions: Tensor, blocks: Any) -> tuple[Tensor, Tensor]:
        self._write(positions, blocks, layer)
        return self.truth[0, layer][:, positions], self.truth[1, layer][:, positions]

    def question_attention(self, question_ids: Any, first: int, context_tokens: int, blocks: Any) -> Tensor:
        """Attends to multiples of eleven."""
        self.asked.append((question_ids.tolist(), first))
        return (torch.arange(context_tokens) % 11 == 0).float().expand(2, -1)

    def _write(self, positions: Tensor, blocks: Sequence[int], layers: int) -> None:
        from kvloom.connectors.vllm.packings import write_layer

        for layer in range(layers):
            slots = self.cache.slots(blocks, positions)
            keys, values = self.truth[0, layer][:, positions], self.truth[1, layer][:, positions]
            write_layer(self.cache.layers[layer], keys, values, slots)


class Shelves:
    """Transfers that have fetched: the truth with noise that grows with the position, but not in the first layer."""

    def __init__(self, cache: Any, passes: Passes, first_layer_noise: float = 0.0) -> None:
        self.cache, self.passes, self.first_layer_noise = cache, passes, first_layer_noise
        self.counts: dict[str, float] = {}

    def fetch(self, fusion: Fusion) -> "Future[Fetched]":
        for document in fusion.documents:
            first, last = max(document.start, fusion.start), min(document.stop, fusion.stop)
            if first >= last:
                continue
            here = torch.arange(first, last)
            stored = self.passes.truth[:, :, :, here].clone()
            noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(document.start))
            scale = (here % 7)[:, None] / 10.0
            stored[:, 1:] += noise[:, 1:] * scale
            stored[0, 0] += noise[0, 0] * self.first_layer_noise
            self.cache.write(fusion.blocks, int(here[0]), stored[0], stored[1])
        done: Future[Fetched] = Future()
        done.set_result(Fetched((True,) * len(fusion.documents), {"host": 1}))
        return done

    def count(self, counts: dict[str, float]) -> None:
        self.counts |= counts


DEVIATION = FusionMethod(0.15, "deviation", 1)


def fuse(
    fusion: Fusion,
    slice_tokens: int,
    noise: float = 0.0,
    *,
    is_lossy: bool = False,
    method: FusionMethod = DEVIATION,
    early: int = 0,
) -> tuple[Fuser, Passes, Any]:
    cache = Cache().paged
    passes = Passes(cache)
    shelves = Shelves(cache, passes, noise)
    fuser = Fuser(shelves, passes, cache, slice_tokens=slice_tokens, method=method, is_lossy=is_lossy)  # type: ignore[arg-type]
    fuser.begin(fusion)
    for _ in range(early):
        fuser.advance(Advance("r", None))
    assert fuser.fetched() == {"r": (True,) * len(fusion.documents)}
    assert fuser.fetched() == {}, "told of once"
    steps: list[Any] = []

    def is_over() -> bool:
        steps.append(fuser.advance(Advance("r", (True,) * len(fusion.documents))))
        return bool(arrived.extend(fuser.arrivals()) or arrived)

    arrived: list[Any] = []
    assert eventually(is_over)
    (arrival,) = arrived
    assert not arrival.loaded.failed
    assert arrival.loaded.computed_tokens == sum(map(len, passes.computed))
    fuser.advance(Advance("r", (True,) * len(fusion.documents)))  # the scheduler may not have heard yet
    assert fuser.arrivals() == []
    return fuser, passes, cache


@pytest.mark.parametrize("slice_tokens", [1, 5, 13, 64])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 1.0])
def test_slices_choose_and_compute_what_one_piece_does(ratio: float, slice_tokens: int) -> None:
    fusion = fusion_of(3, 60, 8, [(8, 30), (34, 60)], ratio)
    _, passes, cache = fuse(fusion, slice_tokens)
    _, whole, whole_cache = fuse(fusion, 64)
    computed = [p for part in passes.computed for p in part]
    assert computed == [p for part in whole.computed for p in part]
    assert all(len(part) <= slice_tokens for part in passes.computed)
    for mine, other in zip(cache.read(fusion.blocks, 3, 60), whole_cache.read(fusion.blocks, 3, 60), strict=True):
        assert torch.equal(mine, other)
    gap = [*range(3, 8), *range(30, 34)]
    assert set(gap) <= set(computed)
    assert len(computed) == len(gap) + -int(-ratio * 48 // 1)
    keys, _ = cache.read(fusion.blocks, 0, 60)
    assert torch.equal(keys[:, :, computed], passes.truth[0][:, :, computed])


@pytest.mark.parametrize("early", [1, 2, 9])
def test_what_precedes_the_documents_does_not_wait_for_them(early: int) -> None:
    """It is computed first, once, and by nothing but itself; the result is the same."""
    fusion = fusion_of(3, 60, 16, [(16, 30), (34, 60)], 0.25)
    _, passes, cache = fuse(fusion, 5, early=early)
    _, whole, whole_cache = fuse(fusion, 64)
    assert [part for part in passes.computed if part[0] < 16] == [[*range(3, 8)], [*range(8, 13)], [13, 14, 15]]
    assert [p for part in passes.computed for p in part] == [p for part in whole.computed for p in part]
    for mine, other in zip(cache.read(fusion.blocks, 3, 60), whole_cache.read(fusion.blocks, 3, 60), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("early", [0, 3])
def test_a_fusion_may_end_before_its_only_document(early: int) -> None:
    """Whole blocks only are provided: a short document in the last one is left to the engine."""
    fusion = fusion_of(3, 56, 57, [(57, 59)], 0.25)
    _, passes, _ = fuse(fusion, 20, early=early)
    assert [p for part in passes.computed for p in part] == list(range(3, 56))


def test_while_documents_are_fetched_nothing_else_is_computed() -> None:
    cache = Cache().paged
    passes = Passes(cache)
    shelves = Shelves(cache, passes)
    fetched, pending = shelves.fetch, Future[Fetched]()
    shelves.fetch = lambda _: pending  # type: ignore[method-assign]
    fuser = Fuser(shelves, passes, cache, slice_tokens=5, method=DEVIATION)  # type: ignore[arg-type]
    fusion = fusion_of(3, 60, 16, [(16, 30), (34, 60)], 0.25)
    fuser.begin(fusion)
    for _ in range(9):
        fuser.advance(Advance("r", None))
    assert sum(map(len, passes.computed)) == 13 and fuser.fetched() == {} and fuser.arrivals() == []
    pending.set_result(replace(fetched(fusion).result(), documents={"host": 2}))
    assert fuser.fetched() == {"r": (True, True)}
    arrivals: list[Any] = []
    while not arrivals:
        fuser.advance(Advance("r", (True, True)))
        arrivals += fuser.arrivals()
    loaded = arrivals[0].loaded
    assert loaded.computed_tokens == 13 + 4 + 10
    assert loaded.fused.documents == {"host": 2} and loaded.fused.seconds > 0.0
    probed, computed = range(16, 60), [p for part in passes.computed for p in part if p >= 16]
    assert loaded.fused.tokens == pytest.approx(len(probed) * 2 / 3 + len(computed))
    middle = (sum(probed) * 2 / 3 + sum(computed)) / loaded.fused.tokens
    assert loaded.fused.position == pytest.approx(middle)


@pytest.mark.parametrize("ratio", [0.0, 0.04, 0.25, 1.0])
@pytest.mark.parametrize("start", [30, 34])
def test_what_goes_on_ends_as_it_would_have_in_one(ratio: float, start: int) -> None:
    """All layers, the first ones of unchosen tokens included. The choice is that of the whole, not one of the rest."""
    fusion = fusion_of(3, 60, 8, [(8, 30), (34, 60)], ratio)
    _, passes, whole = fuse(fusion, 64)
    chosen = np.array([p for part in passes.computed for p in part], dtype=np.int32)
    _, rest, cache = fuse(replace(fusion, start=start, chosen=chosen), 9)
    assert [p for part in rest.computed for p in part] == [p for p in chosen.tolist() if p >= start]
    for mine, other in zip(cache.read(fusion.blocks, start, 60), whole.read(fusion.blocks, start, 60), strict=True):
        assert torch.equal(mine, other)


def test_those_that_differ_most_are_computed() -> None:
    fusion = fusion_of(0, 56, 0, [(0, 56)], 8 / 56)
    _, passes, _ = fuse(fusion, 64)
    computed = [p for part in passes.computed for p in part]
    assert len(computed) == 8
    assert {p % 7 for p in computed} <= {5, 6}, "noise grows with the position modulo 7"


@pytest.mark.parametrize(("select", "most"), [("question", 8), ("deviation+question", 2)])
def test_the_question_chooses_too(select: str, most: int) -> None:
    """Multiples of eleven and what stands next to them; with the deviation, those that differ most in the other half.
    The first layer is still compared with what was stored."""
    fusion = replace(fusion_of(0, 56, 0, [(0, 56)], 8 / 56), question=np.array([7, 8]))
    fuser, passes, _ = fuse(fusion, 64, method=FusionMethod(0.15, select, 1))
    computed = [p for part in passes.computed for p in part]
    assert len(computed) == 8 and fuser.is_trusted and passes.asked == [([7, 8], 56)]
    near = [p for p in computed if min(p % 11, 11 - p % 11) <= 1]
    assert len(near) >= most
    if select == "question":
        assert near == computed
    else:
        assert sum(p % 7 in (5, 6) for p in computed) >= 6
    fuser, passes, _ = fuse(fusion, 64, noise=0.1, method=FusionMethod(0.15, select, 1))
    assert not fuser.is_trusted and [p for part in passes.computed for p in part] == list(range(56))


def test_without_a_question_deviation_chooses() -> None:
    """A prompt may end with its last document; a choice by the question alone has then looked at layer 0 only."""
    fusion = fusion_of(0, 56, 0, [(0, 56)], 8 / 56)
    _, passes, _ = fuse(fusion, 64, method=FusionMethod(0.15, "deviation+question", 1))
    computed = [p for part in passes.computed for p in part]
    assert len(computed) == 8 and {p % 7 for p in computed} <= {5, 6} and not passes.asked
    _, passes, _ = fuse(fusion, 64, method=FusionMethod(0.15, "question", 1))
    assert len([p for part in passes.computed for p in part]) == 8 and not passes.asked


def test_a_rotation_that_is_not_understood_costs_time_only(caplog: pytest.LogCaptureFixture) -> None:
    fusion = fusion_of(0, 40, 4, [(4, 40)], 0.25)
    fuser, passes, cache = fuse(fusion, 64, noise=0.1)
    assert not fuser.is_trusted
    assert "misunderstands this model's rotation" in caplog.text
    keys, values = cache.read(fusion.blocks, 0, 40)
    assert torch.equal(keys, passes.truth[0][:, :, :40])
    assert torch.equal(values, passes.truth[1][:, :, :40])


def test_a_pass_that_fails_costs_the_fusion_not_the_engine() -> None:
    cache = Cache().paged
    passes = Passes(cache)
    fuser = Fuser(Shelves(cache, passes), passes, cache, slice_tokens=64, method=DEVIATION)  # type: ignore[arg-type]

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    passes.compute = broken  # type: ignore[method-assign]
    fusion = fusion_of(8, 40, 8, [(8, 40)], 0.25)
    fuser.begin(fusion)
    for _ in range(3):
        fuser.advance(Advance("r", (True,)))
    (arrival,) = fuser.arrivals()
    assert arrival.loaded.failed
    assert arrival.bad_blocks == frozenset(fusion.blocks[1:5])


def test_a_cancelled_fusion_is_told_of_and_computes_nothing_more() -> None:
    cache = Cache().paged
    passes = Passes(cache)
    fuser = Fuser(Shelves(cache, passes), passes, cache, slice_tokens=4, method=DEVIATION)  # type: ignore[arg-type]
    fuser.begin(fusion_of(0, 40, 0, [(0, 40)], 0.5))
    fuser.advance(Advance("r", (True,)))
    fuser.cancel("r")
    fuser.cancel("unknown")
    assert fuser.fetched() == {}
    assert [arrival.request_id for arrival in fuser.arrivals()] == ["r"]
    fuser.advance(Advance("r", (True,)))
    assert passes.computed == []


# --------------------------------------------------------------------------------------------------------- rope


class Rotary(nn.Module):
    """As vLLM's: frequencies of one argument, a table of cosines and sines."""

    def __init__(self, pairs: int = 3, *, base: float = 100.0, mscale: float = 1.0, factor: float = 1.0) -> None:
        super().__init__()
        self.base, self.is_neox_style, self.pairs = base, True, pairs
        self.scaling_factor = factor
        angles = torch.outer(torch.arange(64.0), self._compute_inv_freq(base) / factor)
        self.cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * mscale

    def _compute_inv_freq(self, base: float) -> Tensor:
        return base ** -(torch.arange(self.pairs) / self.pairs)


def model_of(*rotaries: nn.Module | None) -> tuple[nn.Module, list[nn.Module]]:
    model, layers = nn.Module(), []
    for index, rotary in enumerate(rotaries):
        block, attention = nn.Module(), nn.Module()
        attention.layer_name = f"layers.{index}"  # type: ignore[assignment]
        block.attn = attention
        if rotary is not None:
            block.rotary_emb = rotary
        model.add_module(f"layer{index}", block)
        layers.append(attention)
    return model, layers


@pytest.mark.parametrize(("mscale", "factor"), [(1.0, 1.0), (1.3, 1.0), (1.0, 4.0)])
def test_the_rotation_is_found(mscale: float, factor: float) -> None:
    rotary = Rotary(mscale=mscale, factor=factor)
    spec = rope_of(*model_of(rotary, rotary), 6)
    assert torch.allclose(torch.tensor(spec.inv_freq), rotary._compute_inv_freq(100.0) / factor)
    assert spec.attention_scaling == pytest.approx(mscale)
    keys = torch.randn(5, 6)
    cos, sin = rotary.cos_sin_cache.chunk(2, dim=-1)

    def rotated(place: int) -> Tensor:
        a, b = keys.chunk(2, dim=-1)
        return torch.cat((a * cos[place] - b * sin[place], b * cos[place] + a * sin[place]), dim=-1)

    assert torch.allclose(spec.shift(rotated(7), 13), rotated(20), atol=1e-5)


def test_a_rotation_of_neighbours_may_be_partial() -> None:
    rotary = Rotary()
    rotary.is_neox_style = False
    spec = rope_of(*model_of(rotary), 8)
    assert spec == RopeSpec((*rope_of(*model_of(rotary), 6).inv_freq, 0.0), 1.0, interleaved=True)
    keys = torch.randn(2, 8)
    assert torch.equal(spec.shift(keys, 5)[:, 6:], keys[:, 6:])


@pytest.mark.parametrize(
    ("rotaries", "head_dim", "complaint"),
    [
        ((Rotary(), None), 6, "has no rotary module"),
        ((Rotary(), Rotary(base=50.0)), 6, "2 different ways"),
        ((Rotary(),), 8, "covers 6 of 8 channels, in halves"),
        ((nn.Linear(2, 2),), 6, "no table"),
    ],
)
def test_what_is_no_known_rotation(rotaries: tuple[Any, ...], head_dim: int, complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint):
        rope_of(*model_of(*rotaries), head_dim)


def test_a_table_of_other_frequencies_is_refused() -> None:
    rotary = Rotary()
    rotary.cos_sin_cache = Rotary(base=1000.0).cos_sin_cache
    with pytest.raises(EngineError, match="not that of its frequencies"):
        rope_of(*model_of(rotary), 6)


def test_the_model_is_found_with_who_calls() -> None:
    model, layers = model_of(None, None)

    class Runner:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def register(self) -> nn.Module:
            return running_model(layers)

    assert Runner(model).register() is model
    with pytest.raises(EngineError, match="not to be found"):
        Runner(model_of(None)[0]).register()


@pytest.mark.parametrize(("noise", "is_trusted"), [(0.1, True), (0.3, True), (2.0, False)])
def test_what_a_codec_loses_is_not_taken_for_a_rotation(noise: float, is_trusted: bool) -> None:
    """Where tiers are lossy; what is far off is not believed even there."""
    fusion = fusion_of(0, 40, 4, [(4, 40)], 0.25)
    fuser, passes, _ = fuse(fusion, 64, noise=noise, is_lossy=True)
    assert fuser.is_trusted is is_trusted
    computed = [p for part in passes.computed for p in part]
    assert len(computed) == (4 + 9 if is_trusted else 40)
