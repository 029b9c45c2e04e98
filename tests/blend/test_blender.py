"""Fusion against full prefill: what is recomputed, what is reused, and that loading overlaps computing."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvloom.blend.attention import layer_attention
from kvloom.blend.blender import CACHEBLEND, BlendedContext, Blender
from kvloom.blend.choosers import CHOOSERS, by_deviation, first_tokens, no_tokens, random_tokens
from kvloom.blend.method import WITHOUT_DEVIATION
from kvloom.blend.question import question_attention
from kvloom.connectors.hf.model import TransformersModel

from ..support.models import CONFIGS, ROPES, VARIANTS, WINDOW_TOKENS, Prefill, make_model, make_variant, prefill

LENGTHS = (17, 21, 13)  # longer and shorter than the sliding window of the variants
BOS = [0]
QUESTION = torch.tensor([5, 77, 130, 9])


@dataclass
class Placed:
    """`LayerSource` over KV that is in memory, counting what it is asked for."""

    keys: Tensor
    values: Tensor
    asked: list[int] = field(default_factory=list)

    def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.asked.append(layer)
        keys.copy_(self.keys[layer, :, : keys.shape[1]])
        values.copy_(self.values[layer, :, : values.shape[1]])


@dataclass
class Case:
    """A context of chunks that were computed alone, each behind the lead."""

    model: TransformersModel
    token_ids: Tensor
    starts: list[int]
    naive: Placed
    full: Prefill
    exact_tokens: int

    def blend(self, blender: Blender, *, exact_tokens: int | None = None) -> BlendedContext:
        return blender.blend(
            self.model,
            self.token_ids,
            self.starts,
            self.naive,
            exact_tokens=self.exact_tokens if exact_tokens is None else exact_tokens,
            question_ids=QUESTION,
        )

    def error(self, context: BlendedContext) -> float:
        """Distance to full prefill as a share of that of naive reuse."""
        return _distance(context, self.full) / _distance(self.naive, self.full)


def _distance(a: BlendedContext | Placed, b: Prefill) -> float:
    return math.hypot(float((a.keys - b.keys).norm()), float((a.values - b.values).norm()))


def random_chunks(lengths: Sequence[int] = LENGTHS, *, seed: int = 3) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 512, (length,), generator=random).tolist() for length in lengths]


def make_case(
    model: PreTrainedModel, chunks: Sequence[Sequence[int]] | None = None, *, lead: Sequence[int] = BOS
) -> Case:
    chunks = random_chunks() if chunks is None else chunks
    pieces = [lead, *chunks] if lead else list(chunks)
    token_ids = [token for piece in pieces for token in piece]
    starts = list(accumulate(map(len, pieces[:-1]), initial=0))
    layers = TransformersModel(model, model_id="m")
    keys, values = [], []
    for piece, start in zip(pieces, starts, strict=True):
        before = lead if start else []
        alone = prefill(model, [*before, *piece])
        keys.append(layers.spec.rope.shift(alone.keys[:, :, len(before) :], start - len(before)))
        values.append(alone.values[:, :, len(before) :])
    naive = Placed(torch.cat(keys, dim=2), torch.cat(values, dim=2))
    full = prefill(model, token_ids)
    return Case(layers, torch.tensor(token_ids), starts, naive, full, len(lead) + len(chunks[0]))


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(make_model("llama"))


def assert_full(context: BlendedContext, full: Prefill) -> None:
    assert torch.allclose(context.keys, full.keys, atol=1e-5, rtol=1e-5)
    assert torch.allclose(context.values, full.values, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_ratio_one_is_full_prefill(architecture: str, rope: str) -> None:
    case = make_case(make_model(architecture, rope=rope))
    assert _distance(case.naive, case.full) > 1.0
    assert_full(case.blend(Blender(recompute_ratio=1.0)), case.full)


@pytest.mark.parametrize("lead", [BOS, []], ids=["bos", "no lead"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ratio_one_is_full_prefill_in_every_variant(variant: str, lead: list[int]) -> None:
    case = make_case(make_variant(variant), lead=lead)
    assert_full(case.blend(Blender(recompute_ratio=1.0)), case.full)
    assert_full(case.blend(Blender(recompute_ratio=1.0), exact_tokens=0), case.full)


def test_a_window_that_the_attention_does_not_read_is_none() -> None:
    """Checkpoints converted to Llama carry a `sliding_window` over."""
    case = make_case(make_model("llama", sliding_window=WINDOW_TOKENS))
    assert_full(case.blend(Blender(recompute_ratio=1.0)), case.full)


@pytest.mark.parametrize("name", CHOOSERS)
def test_ratio_one_asks_no_chooser(case: Case, name: str) -> None:
    assert_full(case.blend(Blender(recompute_ratio=1.0, chooser=CHOOSERS[name])), case.full)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_layerwise_model_is_the_models_forward(architecture: str) -> None:
    model = make_model(architecture, rope="yarn")
    layers = TransformersModel(model, model_id="m")
    token_ids = torch.tensor(random_chunks()[0])
    positions = torch.arange(len(token_ids))
    with torch.no_grad():
        hidden = layers.embed(token_ids)
        for layer in range(layers.spec.num_layers):
            q, k, v = layers.qkv(layer, hidden, positions)
            hidden = layers.finish(layer, hidden, layer_attention(layers.attention[layer], q, k, v, positions))
        logits = model.lm_head(model.model.norm(hidden))
    assert torch.allclose(logits, prefill(model, token_ids.tolist()).logits, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("blender", [Blender(recompute_ratio=0.0), Blender(chooser=no_tokens)], ids=["zero", "none"])
def test_naive_reuse_places_the_chunks(case: Case, blender: Blender) -> None:
    context = case.blend(blender)
    assert torch.equal(context.keys, case.naive.keys) and torch.equal(context.values, case.naive.values)
    assert context.attended_tokens == (0, 0, 0, 0)
    assert case.naive.asked[-4:] == [0, 1, 2, 3]


@pytest.mark.parametrize("ratio", [0.0, 0.15, 1.0])
def test_one_chunk_at_the_start_is_exact_and_free(ratio: float) -> None:
    case = make_case(make_model("qwen3"), random_chunks([40]))
    context = case.blend(Blender(recompute_ratio=ratio))
    assert_full(context, case.full)
    assert context.candidates == 0 and context.attended_tokens == (0, 0, 0, 0)
    assert torch.equal(context.keys, case.naive.keys)


@pytest.mark.parametrize("name", [name for name in CHOOSERS if name != "none"])
@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0])
def test_the_first_chunk_is_never_recomputed(case: Case, ratio: float, name: str) -> None:
    context = case.blend(Blender(recompute_ratio=ratio, chooser=CHOOSERS[name]))
    exact = case.exact_tokens
    assert torch.equal(context.keys[:, :, :exact], case.naive.keys[:, :, :exact])
    assert torch.equal(context.values[:, :, :exact], case.naive.values[:, :, :exact])
    assert all(int(fresh.min()) >= exact for fresh in context.fresh)
    assert context.candidates == sum(LENGTHS) + 1 - exact


def test_identical_chunks_twice() -> None:
    chunk = random_chunks([20])[0]
    case = make_case(make_model("llama"), [chunk, chunk, chunk])
    assert_full(case.blend(Blender(recompute_ratio=1.0)), case.full)
    naive = case.blend(Blender(recompute_ratio=0.0))
    second, third = slice(21, 41), slice(41, 61)
    assert torch.equal(naive.values[:, :, second], naive.values[:, :, third])
    assert not torch.allclose(naive.keys[:, :, second], naive.keys[:, :, third], atol=0.1)
    assert 0.0 < case.error(case.blend(Blender(recompute_ratio=0.5))) < 1.0


# ----------------------------------------------------------------------------------------------- gradual filter


@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(3, 80))
def test_layer_ratios_fall_and_average_to_the_ratio(ratio: float, spread: float, layers: int) -> None:
    blender = Blender(recompute_ratio=ratio, spread_ratio=spread, check_layer=1)
    shares = [blender.layer_ratio(layer, layers) for layer in range(1, layers - 1)]
    assert math.isclose(sum(shares) / len(shares), ratio, abs_tol=1e-9)
    assert all(later <= earlier for earlier, later in pairwise(shares))
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)


def test_layer_ratios_reach_the_spread() -> None:
    blender = Blender(recompute_ratio=0.2, spread_ratio=0.5, check_layer=1)
    assert [blender.layer_ratio(layer, 6) for layer in range(1, 5)] == pytest.approx([0.3, 7 / 30, 1 / 6, 0.1])


@pytest.mark.parametrize("name", ["deviation", "random", "deviation+first", "deviation+question", "question", "first"])
@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.8])
def test_sets_nest_and_follow_the_ratios(name: str, ratio: float) -> None:
    case = make_case(make_model("llama", num_hidden_layers=7))
    blender = Blender(recompute_ratio=ratio, chooser=CHOOSERS[name], spread_ratio=0.3, check_layer=1)
    context = case.blend(blender)
    everything, layers = context.candidates, 7
    gradual = [math.ceil(blender.layer_ratio(layer, layers) * everything) for layer in range(1, layers - 1)]
    # A chooser without deviations chooses before layer 0.
    first = gradual[0] if name in WITHOUT_DEVIATION else everything
    assert context.attended_tokens == (first, *gradual, 0)
    assert abs(sum(gradual) / len(gradual) / everything - ratio) <= 1 / everything
    sets = [set(fresh.tolist()) for fresh in context.fresh]
    assert [len(fresh) for fresh in sets] == [first, first, *gradual]
    assert all(later <= earlier for earlier, later in pairwise(sets))


@pytest.mark.parametrize("name", ["deviation", "first"])
def test_fresh_rows_are_new_and_the_others_are_not_touched(case: Case, name: str) -> None:
    context = case.blend(Blender(recompute_ratio=0.3, chooser=CHOOSERS[name]))
    for layer, fresh in enumerate(context.fresh):
        kept = torch.ones(len(case.token_ids), dtype=torch.bool)
        kept[fresh] = False
        for ours, naive, full in zip(
            (context.keys[layer], context.values[layer]),
            (case.naive.keys[layer], case.naive.values[layer]),
            (case.full.keys[layer], case.full.values[layer]),
            strict=True,
        ):
            assert torch.equal(ours[:, kept], naive[:, kept])
            if layer == 0:  # depends on the token alone
                assert torch.allclose(ours, full, atol=1e-5)
            else:
                changed = (ours[:, fresh] - naive[:, fresh]).norm(dim=(0, 2))
                assert bool((changed > 1e-3).all())
                towards = (ours[:, fresh] - full[:, fresh]).norm() / (naive[:, fresh] - full[:, fresh]).norm()
                assert float(towards) < 0.9


@pytest.mark.parametrize("check_layer", [1, 2, 3])
def test_the_check_layer_is_exact_after_full_layers(check_layer: int) -> None:
    """All of it has been computed to compare it, so all of it is kept."""
    case = make_case(make_model("llama", num_hidden_layers=6))
    context = case.blend(Blender(recompute_ratio=0.05, chooser=by_deviation, check_layer=check_layer))
    for layer in range(check_layer + 1):
        assert torch.allclose(context.keys[layer], case.full.keys[layer], atol=1e-5)
        assert torch.allclose(context.values[layer], case.full.values[layer], atol=1e-5)
    assert not torch.allclose(context.keys[check_layer + 1], case.full.keys[check_layer + 1], atol=1e-2)
    chosen = math.ceil(0.05 * context.candidates)
    assert context.attended_tokens == (*[context.candidates] * check_layer, *[chosen] * (5 - check_layer), 0)


# -------------------------------------------------------------------------------------------------------- question


def test_the_question_alone_computes_no_full_layer(case: Case) -> None:
    context = case.blend(Blender(recompute_ratio=0.3, chooser=CHOOSERS["question"]))
    chosen = math.ceil(0.3 * context.candidates)
    assert context.attended_tokens == (chosen, chosen, chosen, 0)
    assert context.asked_tokens == len(QUESTION)
    assert context.computed_tokens == chosen * 3 / 4 + len(QUESTION)


def test_the_question_chooses_what_it_attends_to(case: Case) -> None:
    """Against attention by the model itself over the naive cache."""
    model = case.model.model
    model.set_attn_implementation("eager")
    try:
        pairs = zip(case.naive.keys, case.naive.values, strict=True)
        cache = DynamicCache([(k[None].clone(), v[None].clone()) for k, v in pairs])
        with torch.no_grad():
            out = model(QUESTION[None], past_key_values=cache, output_attentions=True)
    finally:
        model.set_attn_implementation("sdpa")
    weights = torch.stack(out.attentions)[:, 0, :, :, : len(case.token_ids)].sum(dim=(0, 1))
    score = weights.mean(0) + weights[-1]
    spread = torch.stack((score, score.roll(1).index_fill(0, torch.tensor([0]), 0.0), score.roll(-1))).amax(0)
    spread[-1] = score[-2:].max()
    found = question_attention(case.model, QUESTION, case.naive.keys, case.naive.values, lambda _: None)
    assert torch.allclose(found, torch.stack((weights.mean(0), weights[-1])), rtol=1e-4, atol=1e-5)
    spread[case.exact_tokens] = score[
        case.exact_tokens : case.exact_tokens + 2
    ].max()  # what may not be chosen lends none
    context = case.blend(Blender(recompute_ratio=0.2, chooser=CHOOSERS["question"]))
    count = math.ceil(0.2 * context.candidates)
    expected = case.exact_tokens + spread[case.exact_tokens :].topk(count).indices
    assert context.fresh[-1].tolist() == expected.sort().values.tolist()


def test_without_a_question(case: Case) -> None:
    def blend(name: str) -> BlendedContext:
        blender = Blender(recompute_ratio=0.3, chooser=CHOOSERS[name])
        return blender.blend(case.model, case.token_ids, case.starts, case.naive, exact_tokens=case.exact_tokens)

    with pytest.raises(ValueError, match="give question_ids"):
        blend("question")
    assert torch.equal(blend("deviation+question").keys, blend("deviation").keys)


def test_nobody_asks_who_does_not_need_the_answer(case: Case) -> None:
    assert case.blend(Blender(recompute_ratio=0.3, chooser=by_deviation)).asked_tokens == 0
    assert case.blend(Blender(recompute_ratio=1.0)).asked_tokens == 0


@pytest.mark.parametrize("question", [[1, 2], torch.tensor([[1]]), torch.tensor([0.5])])
def test_refuses_what_is_no_question(case: Case, question: object) -> None:
    with pytest.raises(TypeError, match="question_ids"):
        Blender().blend(case.model, case.token_ids, case.starts, case.naive, question_ids=question)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_shallow_models(layers: int) -> None:
    case = make_case(make_model("mistral", num_hidden_layers=layers))
    assert_full(case.blend(Blender(recompute_ratio=1.0)), case.full)
    context = case.blend(Blender(recompute_ratio=0.3, chooser=by_deviation))
    assert context.attended_tokens[-1] == 0 and len(context.fresh) == layers
    if layers < 3:  # one full layer is what a choice needs: nothing is left to choose for
        assert_full(context, case.full)
    else:
        assert context.attended_tokens == (context.candidates, math.ceil(0.3 * context.candidates), 0)
        assert 0.0 < case.error(context) < 1.0


# -------------------------------------------------------------------------------------------------------- quality


def test_error_falls_with_the_ratio() -> None:
    case = make_case(make_model("llama", num_hidden_layers=6), random_chunks([40, 40, 40]))
    ratios = [0.0, 0.15, 0.5, 0.8, 1.0]
    errors = [case.error(case.blend(Blender(recompute_ratio=ratio))) for ratio in ratios]
    assert errors[0] == 1.0 and errors[-1] < 1e-4
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.parametrize("seed", range(3))
def test_deviation_mends_what_is_planted_and_random_does_not(seed: int) -> None:
    """A source that is exact but for a few tokens: only who chooses those makes it whole."""
    case = make_case(make_model("qwen2", num_hidden_layers=5, seed=seed), random_chunks(seed=seed))
    random = torch.Generator().manual_seed(seed)
    candidates = len(case.token_ids) - case.exact_tokens
    planted = case.exact_tokens + torch.randperm(candidates, generator=random)[:4]
    keys, values = case.full.keys.clone(), case.full.values.clone()
    for tensor in (keys, values):
        tensor[:, :, planted] += torch.randn(tensor[:, :, planted].shape, generator=random)
    case.naive = Placed(keys, values)
    share = Blender(recompute_ratio=4 / candidates, chooser=by_deviation)
    context = case.blend(share)
    assert context.fresh[-1].tolist() == planted.sort().values.tolist()
    assert_full(context, case.full)
    for chooser in (random_tokens, first_tokens):
        blind = case.blend(Blender(recompute_ratio=4 / candidates, spread_ratio=0.0, chooser=chooser))
        assert case.error(blind) > 0.3


# -------------------------------------------------------------------------------------------------------- overlap


@dataclass
class Watched:
    """A model that tells when it computes, through `on_layer`."""

    inner: TransformersModel
    on_layer: Callable[[int], None]

    def __post_init__(self) -> None:
        self.spec, self.attention = self.inner.spec, self.inner.attention
        self.embed, self.finish = self.inner.embed, self.inner.finish

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.on_layer(layer)
        return self.inner.qkv(layer, hidden, positions)


def test_loading_overlaps_computing(case: Case) -> None:
    """Layer i is computed while layer i + 1 is loaded: each waits for the other to have begun."""
    layers, patience_s = case.model.spec.num_layers, 30.0
    computing, loading = ([threading.Event() for _ in range(layers + 1)] for _ in range(2))
    loading[layers].set()

    class Source(Placed):
        def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
            loading[layer].set()
            if layer and not computing[layer - 1].wait(patience_s):
                raise TimeoutError(f"layer {layer - 1} was not computed while layer {layer} was loaded")
            super().load(layer, keys, values)

    def on_layer(layer: int) -> None:
        computing[layer].set()
        if not loading[layer + 1].wait(patience_s):
            raise TimeoutError(f"layer {layer + 1} was not loaded while layer {layer} was computed")

    source = Source(case.naive.keys, case.naive.values)
    model = Watched(case.model, on_layer)
    context = Blender(recompute_ratio=1.0).blend(
        model, case.token_ids, case.starts, source, exact_tokens=case.exact_tokens
    )
    assert_full(context, case.full)
    assert source.asked == list(range(layers))


def _loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvloom-load")]


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_load_errors_propagate(case: Case, layer: int, ratio: float) -> None:
    class Failing(Placed):
        def load(self, at: int, keys: Tensor, values: Tensor) -> None:
            if at == layer:
                raise OSError("the disk is gone")
            super().load(at, keys, values)

    source = Failing(case.naive.keys, case.naive.values)
    with pytest.raises(OSError, match="the disk is gone"):
        Blender(recompute_ratio=ratio).blend(case.model, case.token_ids, case.starts, source)
    assert layer not in source.asked and _loader_threads() == []


def test_compute_errors_propagate(case: Case) -> None:
    def fail(layer: int) -> None:
        if layer == 1:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Blender().blend(Watched(case.model, fail), case.token_ids, case.starts, case.naive)
    assert _loader_threads() == []


def test_callers_grad_and_inference_modes_do_not_matter(case: Case) -> None:
    """Both modes belong to a thread, and loading has its own."""
    expected = case.blend(Blender(recompute_ratio=0.5))
    with torch.inference_mode():
        inside = case.blend(Blender(recompute_ratio=0.5))
    with torch.enable_grad():
        outside = case.blend(Blender(recompute_ratio=0.5))
    for context in (inside, outside):
        assert torch.equal(context.keys, expected.keys) and torch.equal(context.values, expected.values)
        assert not context.keys.requires_grad and not context.keys.is_inference()


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "starts", [[], [1], [0, 0], [0, 9, 4], [0, 52], [-1, 3]], ids=["none", "late", "twice", "back", "beyond", "below"]
)
def test_refuses_starts_that_do_not_fit(case: Case, starts: list[int]) -> None:
    with pytest.raises(ValueError, match="chunk_starts"):
        Blender().blend(case.model, case.token_ids, starts, case.naive)


@pytest.mark.parametrize("exact_tokens", [-1, 53])
def test_refuses_exact_tokens_that_do_not_fit(case: Case, exact_tokens: int) -> None:
    with pytest.raises(ValueError, match="exact_tokens"):
        case.blend(Blender(), exact_tokens=exact_tokens)


@pytest.mark.parametrize("name", ["recompute_ratio", "spread_ratio"])
@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan])
def test_refuses_shares_outside_one(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Blender(**{name: value})


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_refuses_what_is_no_check_layer(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"check_layer is .*; expected"):
        Blender(check_layer=value)


def test_the_papers_method_is_at_hand() -> None:
    assert Blender(0.15, by_deviation, spread_ratio=0.3, check_layer=1) == CACHEBLEND


@pytest.mark.parametrize("name", ["recompute_ratio", "spread_ratio"])
@pytest.mark.parametrize("value", ["0.15", None, True, torch.tensor(0.1)])
def test_refuses_what_is_no_share(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} is .*; expected a number between 0 and 1"):
        Blender(**{name: value})


def test_refuses_a_chooser_by_name() -> None:
    with pytest.raises(TypeError, match=r"chooser is 'deviation'; expected a function, such as .* deviation, values"):
        Blender(chooser="deviation")


@pytest.mark.parametrize(
    "chosen",
    [
        torch.tensor([3, 1]),
        torch.tensor([1, 1]),
        torch.tensor([-1, 2]),
        torch.tensor([0, 10_000]),
        torch.tensor([0.0, 1.0]),
        torch.ones(4, dtype=torch.bool),
        [0, 1],
    ],
    ids=["descending", "twice", "below", "beyond", "floats", "mask", "list"],
)
def test_refuses_what_a_chooser_must_not_return(case: Case, chosen: object) -> None:
    """Tokens out of order would attend to the wrong keys, without an error."""
    with pytest.raises(ValueError, match=r"the chooser returned .*; expected ascending int64 indices below"):
        case.blend(Blender(recompute_ratio=0.3, chooser=lambda tokens, count: chosen))


@pytest.mark.parametrize("token_ids", [[1, 2, 3], None, torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3)])
def test_refuses_what_are_no_token_ids(case: Case, token_ids: object) -> None:
    with pytest.raises(TypeError, match=r"token_ids is .*; expected a tensor \[S\] of integers"):
        Blender().blend(case.model, token_ids, [0], case.naive)
