"""Documents fused by stock vLLM itself: against an independent CacheBlend, and never in the way of exact requests."""

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from transformers import AutoModelForCausalLM

from kvloom.blend.choosers import kv_deviation
from kvloom.blend.correction import PLACES, Correction
from kvloom.connectors.hf.model import TransformersModel

from .support.engines import BLOCK, DECLINED, generate, make_model, prompts, sampling, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCKS = 78  # three of the longest requests fit until they grow
LENGTHS = (170, 203, 331)
DOCUMENTS = prompts(5, LENGTHS)
SYSTEM, QUESTION = prompts(6, (70, 23))
CHECK = 1


class Case:
    """A system prompt, the documents in another order, and a question."""

    def __init__(self, order: Sequence[int] = (2, 0, 1), system: Sequence[int] = SYSTEM) -> None:
        self.tokens = list(system)
        self.spans: list[tuple[int, int]] = []
        for index in order:
            self.spans.append((len(self.tokens), len(self.tokens) + LENGTHS[index]))
            self.tokens += DOCUMENTS[index]
        self.tokens += QUESTION

    def options(self, ratio: float, **more: object) -> dict[str, object]:
        return {"documents": [list(span) for span in self.spans], "ratio": ratio, **more}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine whose store has the documents, each computed alone."""
    model = make_model(tmp_path_factory.mktemp("vllm") / "model")
    engine = start(
        model,
        {"host_bytes": "256MiB", "fusion_slice_tokens": 100, "check_layer": CHECK},
        num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=True,
    )
    engine.reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for document in DOCUMENTS:
        generate(engine, [document], {"documents": [[0, len(document)]], "ratio": 0.0}, tokens=1)
    transfers = connector_of(engine).worker.transfers
    assert transfers.settle(30.0)
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def a_cold_engine(llm: Any) -> Iterator[None]:
    assert llm.reset_prefix_cache()
    yield
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert not scheduler.requests
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1
    assert connector_of(llm).worker.fuser.is_trusted


def connector_of(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def plain(llm: Any, tokens: Sequence[int], count: int = 20) -> list[int]:
    answer = tokens_of(generate(llm, [tokens], DECLINED, tokens=count))[0]
    assert llm.reset_prefix_cache()
    return answer


class Reference:
    """CacheBlend in plain torch, over the layers of the transformers model: chooses once, at one layer."""

    def __init__(self, model: Any, correction: Correction | None = None) -> None:
        self.layers = TransformersModel(model, model_id="reference")
        self.model = model
        self.correction = correction

    @torch.no_grad()
    def answer(self, case: Case, ratio: float, count: int) -> tuple[list[int], list[int]]:
        """The tokens chosen and computed, and the answer."""
        spec, total = self.layers.spec, case.spans[-1][1] // BLOCK * BLOCK  # the engine computes what is no whole block
        size = len(case.tokens) + count
        keys = torch.zeros(spec.num_layers, spec.num_kv_heads, size, spec.head_dim)
        values = torch.zeros_like(keys)
        for begin, stop in case.spans:
            alone = torch.zeros_like(keys), torch.zeros_like(values)
            self._run(case.tokens[begin:stop], torch.arange(stop - begin), *alone)
            assert spec.rope is not None
            count_here = stop - begin
            here = spec.rope.shift(alone[0][:, :, :count_here], begin), alone[1][:, :, :count_here]
            if self.correction is not None:
                here = self.correction.apply(*here, torch.arange(begin, stop), torch.arange(count_here))
            keys[:, :, begin:stop], values[:, :, begin:stop] = here
        old_keys, old_values = keys[CHECK].clone(), values[CHECK].clone()
        everything = torch.arange(total)
        if ratio:
            self._run(case.tokens, everything, keys, values, layers=CHECK + 1)
        in_document = torch.zeros(size, dtype=torch.bool)
        for begin, stop in case.spans:
            in_document[begin:stop] = True
        positions = everything[in_document[:total]]
        pairs = ((keys[CHECK], old_keys), (values[CHECK], old_values))
        deviation = kv_deviation(*(tensor[:, positions] for pair in pairs for tensor in pair))
        chosen = positions[deviation.topk(-int(-ratio * len(positions) // 1)).indices]
        computed = torch.cat((everything[~in_document[:total]], chosen)).sort().values
        self._run(case.tokens, computed, keys, values)
        tokens = list(case.tokens)
        rest = torch.arange(total, len(tokens))
        answer = []
        for _ in range(count):
            hidden = self._run(tokens, rest, keys, values)
            logits = self.model.lm_head(self.model.model.norm(hidden[-1:]))
            answer.append(int(logits.argmax()))
            tokens.append(answer[-1])
            rest = torch.tensor([len(tokens) - 1])
        return computed.tolist(), answer

    def _run(
        self, tokens: Sequence[int], positions: Tensor, keys: Tensor, values: Tensor, layers: int | None = None
    ) -> Tensor:
        """Tokens at `positions` through the layers; writes their KV, attends to all before them."""
        hidden = self.layers.embed(torch.tensor(tokens)[positions])
        for layer in range(layers or self.layers.spec.num_layers):
            q, k, v = self.layers.qkv(layer, hidden, positions)
            keys[layer][:, positions], values[layer][:, positions] = k, v
            groups = q.shape[0] // k.shape[0]
            seen = torch.arange(keys.shape[2]) <= positions[:, None]
            scores = q @ keys[layer].repeat_interleave(groups, 0).transpose(1, 2) * self.layers.attention[layer].scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            hidden = self.layers.finish(layer, hidden, weights @ values[layer].repeat_interleave(groups, 0))
        return hidden


def computed_positions(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions that fusions run through all layers from now on; grows."""
    passes, seen = connector_of(llm).worker.fuser.passes, []
    compute = passes.compute

    def noted(token_ids: Any, positions: Tensor, blocks: Any) -> None:
        seen.extend(positions.tolist())
        compute(token_ids, positions, blocks)

    monkeypatch.setattr(passes, "compute", noted)
    return seen


@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.0])
def test_it_is_cacheblend(llm: Any, monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """The same tokens are computed and the same answer is given as by an implementation that shares no pass with it."""
    case = Case()
    expected_positions, expected = Reference(llm.reference).answer(case, ratio, 12)
    assert expected != plain(llm, case.tokens, 12), "a fusion that loses nothing would prove nothing"
    seen = computed_positions(llm, monkeypatch)
    (output,) = generate(llm, [case.tokens], case.options(ratio), tokens=12)
    assert seen == expected_positions
    assert tokens_of([output]) == [expected]
    told = usage(output)
    loaded = sum(LENGTHS) - case.spans[-1][1] % BLOCK
    assert (told["computed_tokens"], told["loaded_tokens"], told["failed"]) == (len(seen), {"host": loaded}, False)


@pytest.mark.parametrize("ratio", [0.15, 0.0])
def test_documents_are_corrected(llm: Any, monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    """Tokens are chosen beside corrected documents, and what is not computed is corrected."""
    case, worker = Case(), connector_of(llm).worker
    drawn = torch.Generator().manual_seed(9)
    spec = worker.info.spec
    width, shape = spec.head_dim + spec.value_dim, (spec.num_layers, spec.num_kv_heads)
    weights = 0.05 * torch.randn(*shape, width, width, generator=drawn)
    biases = 0.2 * torch.randn(*shape, PLACES, width, generator=drawn)
    weights[0], biases[0] = 0.0, 0.0
    correction = Correction(spec, weights, biases, "drawn")
    monkeypatch.setattr(worker.transfers, "_correction", correction)
    expected_positions, expected = Reference(llm.reference, correction).answer(case, ratio, 12)
    uncorrected = Reference(llm.reference).answer(case, ratio, 12)
    assert (expected_positions, expected) != uncorrected, "a correction that changes nothing would prove nothing"
    seen = computed_positions(llm, monkeypatch)
    (output,) = generate(llm, [case.tokens], case.options(ratio), tokens=12)
    assert seen == expected_positions
    assert tokens_of([output]) == [expected]


@pytest.mark.parametrize("system", [SYSTEM, SYSTEM[:32], []])
def test_computing_everything_is_exact(llm: Any, monkeypatch: pytest.MonkeyPatch, system: list[int]) -> None:
    """Ratio 1 leaves it to the engine; a hair less goes through passes of our own, in slices. Both equal plain vLLM."""
    case = Case(system=system)
    expected = plain(llm, case.tokens)
    seen = computed_positions(llm, monkeypatch)
    assert tokens_of(generate(llm, [case.tokens], case.options(1.0))) == [expected]
    assert not seen
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [case.tokens], case.options(0.9999))
    assert tokens_of([output]) == [expected]
    first = case.spans[0][1] if not system else 0  # behind nothing, the first document is right as it is
    assert seen == list(range(first, case.spans[-1][1] // BLOCK * BLOCK))


def test_a_document_in_its_own_place_is_exact(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(order=(1,), system=[])
    expected = plain(llm, case.tokens)
    (output,) = generate(llm, [case.tokens], case.options(0.0))
    assert tokens_of([output]) == [expected]


def test_plain_requests_never_meet_fused_kv(llm: Any) -> None:
    """Neither in vLLM's cache nor in kvloom's store; fused requests share among themselves."""
    case = Case()
    expected = plain(llm, case.tokens)
    (fused,) = generate(llm, [case.tokens], case.options(0.1))
    assert tokens_of([fused]) != [expected]
    (after,) = generate(llm, [case.tokens], {"load": False})
    assert tokens_of([after]) == [expected]
    assert after.num_cached_tokens == len(SYSTEM) // BLOCK * BLOCK
    (again,) = generate(llm, [case.tokens], case.options(0.1))
    assert tokens_of([again]) == tokens_of([fused])
    assert again.num_cached_tokens == case.spans[-1][1] // BLOCK * BLOCK
    assert usage(again)["computed_tokens"] == 0
    other = Case()
    begin = other.spans[2][0]
    other.tokens[begin : begin + 5] = [9] * 5  # another document of the same length, in the last place
    (sibling,) = generate(llm, [other.tokens], other.options(0.1))
    assert usage(sibling)["loaded_tokens"], "what is computed of the first documents is a matter of the last one, too"
    follow_up = [*case.tokens, *tokens_of([fused])[0]]
    (plain_follow_up,) = generate(llm, [follow_up])
    assert llm.reset_prefix_cache()
    assert tokens_of([plain_follow_up]) == [plain(llm, follow_up)]
    (stored,) = generate(llm, [case.tokens], {"save": False})
    assert tokens_of([stored]) == [expected]


def test_batches_of_fused_and_plain_requests(llm: Any) -> None:
    """Preempting one another: each gets what it gets alone."""
    orders = [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2), (0, 2, 1), (2, 0, 1)]
    cases = [Case(order, SYSTEM[:40]) for order in orders]
    alone = []
    for index, case in enumerate(cases):
        options = case.options(0.2, save=False) if index % 2 else DECLINED
        alone += tokens_of(generate(llm, [case.tokens], options, tokens=150))
        assert llm.reset_prefix_cache()
    before = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    inputs = [{"prompt_token_ids": case.tokens} for case in cases]
    settings = [
        sampling(case.options(0.2, save=False) if index % 2 else {"save": False}, tokens=150)
        for index, case in enumerate(cases)
    ]
    outputs = llm.generate(inputs, settings, use_tqdm=False)
    assert tokens_of(outputs)[::2] == alone[::2]
    assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > before
    assert tokens_of(outputs)[1::2] == alone[1::2], "fused again, or gone on with as it was begun"
    assert {usage(output)["fused"] for output in outputs[1::2]} == {"yes"}


def test_a_lost_document_is_computed(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    store = connector_of(llm).worker.transfers.store
    read = store.read
    lost = LENGTHS[0]

    def lossy(key: Any, positions: Tensor | None = None, **more: Any) -> Any:
        hit = read(key, positions, **more)
        return None if hit is not None and len(hit.chunk) == lost else hit

    monkeypatch.setattr(store, "read", lossy)
    seen = computed_positions(llm, monkeypatch)
    (output,) = generate(llm, [case.tokens], case.options(0.0))
    assert seen == [*range(len(SYSTEM)), *range(*case.spans[1])]
    assert usage(output)["loaded_tokens"] == {"host": sum(LENGTHS) - lost - case.spans[-1][1] % BLOCK}
    monkeypatch.setattr(store, "read", lambda *_, **__: None)
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, [case.tokens], case.options(0.1))) == [plain(llm, case.tokens)]


def test_keys_that_are_not_what_they_should_be_turn_it_off(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that were not moved to where they stand: the first layer's keys give it away, all is computed."""
    case = Case()
    expected = plain(llm, case.tokens)
    store, fuser = connector_of(llm).worker.transfers.store, connector_of(llm).worker.fuser
    read = store.read

    def unmoved(key: Any, positions: Any = None, **more: Any) -> Any:
        hit = read(key, None, **more)
        if hit is None or positions is None:
            return hit
        return hit._replace(chunk=replace(hit.chunk, positions=positions))

    monkeypatch.setattr(store, "read", unmoved)
    monkeypatch.setattr(fuser, "is_trusted", True)
    assert tokens_of(generate(llm, [case.tokens], case.options(0.1))) == [expected]
    assert not fuser.is_trusted
    monkeypatch.undo()


def test_aborted_fusions_leave_nothing(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    fused = tokens_of(generate(llm, [case.tokens], case.options(0.2)))
    store, gate = connector_of(llm).worker.transfers.store, threading.Event()
    read = store.read

    def wait_for_gate(*args: Any, **kwargs: Any) -> Any:
        gate.wait(20)
        return read(*args, **kwargs)

    monkeypatch.setattr(store, "read", wait_for_gate)
    engine = llm.llm_engine
    for steps in range(14):
        assert llm.reset_prefix_cache()
        engine.add_request(f"doomed-{steps}", {"prompt_token_ids": case.tokens}, sampling(case.options(0.2)))
        gate.clear() if steps < 4 else gate.set()
        for _ in range(steps):
            engine.step()
        engine.abort_request([f"doomed-{steps}"])
        gate.set()
        while engine.engine_core.engine_core.scheduler.has_requests():
            engine.engine_core.get_output()
    assert not connector_of(llm).worker.fuser.is_fusing
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, [case.tokens], case.options(0.2))) == fused


def test_five_hundred_aborts(llm: Any) -> None:
    """Fused, loaded and computed requests side by side, each aborted after some steps; then all is as it was."""
    case, rng = Case(), random.Random(0)
    fused = tokens_of(generate(llm, [case.tokens], case.options(0.2)))
    assert llm.reset_prefix_cache()
    engine, alive = llm.llm_engine, []
    for number in range(500):
        cut = rng.randrange(20, 200)
        tokens, options = [(case.tokens, case.options(0.2)), (case.tokens[:cut], {}), (case.tokens, {})][number % 3]
        engine.add_request(f"doomed-{number}", {"prompt_token_ids": tokens}, sampling(options, tokens=30))
        alive.append(f"doomed-{number}")
        for _ in range(rng.randrange(3)):
            engine.step()
        if len(alive) > rng.randrange(12):
            engine.abort_request([alive.pop(rng.randrange(len(alive)))])
    engine.abort_request(alive)
    while engine.engine_core.engine_core.scheduler.has_requests():
        engine.engine_core.get_output()
    assert not connector_of(llm).worker.fuser.is_fusing
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, [case.tokens], case.options(0.2))) == fused
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, [case.tokens])) == [plain(llm, case.tokens)]
