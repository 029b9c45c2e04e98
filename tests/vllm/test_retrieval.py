"""Retrieval in vLLM without vLLM: what users may say, who goes through an index, and who may not."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.connectors.break_even import NEVER
from kvloom.connectors.vllm.retrieval import start as vllm_retrieval_start
from kvloom.connectors.vllm.retrieval.paged_index import PagedRetrieval
from kvloom.connectors.vllm.retrieval.settings import RetrievalSettings, decoding_identity
from kvloom.connectors.vllm.retrieval.start import _expect_usable, why_dense, why_refused
from kvloom.connectors.vllm.retrieval.step_rows import RetrievingImpl, Split, batch_of, sorted_rows
from kvloom.errors import EngineError, UncertifiedError
from kvloom.retrieval.settings import Retrieval

from .test_paged_index import D, G, H, N, paged_of

LANDMARKS = {"method": "landmarks"}


def settings_of(**given: Any) -> RetrievalSettings | None:
    return RetrievalSettings.of_engine({"kvloom": {"retrieval": given}})


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, {"kvloom": {}}, {"kvloom": None}, SimpleNamespace()])
def test_engines_that_do_not_ask(config: object) -> None:
    assert RetrievalSettings.of_engine(config) is None
    assert decoding_identity(config) == b""


def test_settings_have_the_names_of_retrieval(tmp_path: Path) -> None:
    (path := tmp_path / "a.json").touch()
    given = {
        "method": "landmarks",
        "budget_ratio": 0.1,
        "budget_tokens": 64,
        "sink_tokens": 32,
        "window_tokens": 200,
        "dense_layers": 1,
        "pooling": "sum",
        "parameters": {"outlier_chunks": 0},
        "break_even_tokens": 4096,
    }
    found = settings_of(**given, certificates=str(path), allow_uncertified=True, model_id="m")
    assert found is not None
    assert {name: getattr(found.retrieval, name) for name in given} == given
    assert (found.certificates, found.allow_uncertified, found.model_id) == ((path,), True, "m")
    bare = settings_of(**LANDMARKS)
    assert bare is not None
    assert bare.retrieval.fields == Retrieval("landmarks").fields
    assert not bare.allow_uncertified


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"retrieval": {"method": "landmarks", "budget": 3}}, "'budget'; known are method, budget_ratio,"),
        ({"retrieval": {"method": "landmarks", "profile": "p"}}, "'profile'; known are"),
        ({"retrival": LANDMARKS}, "'retrival'; known are retrieval"),
        ({"retrieval": {"method": "landmark"}}, "no retrieval method 'landmark'; known: clusters"),
        ({"retrieval": {"method": "vq"}}, "needs a profile"),
        ({"retrieval": {**LANDMARKS, "budget_ratio": "3%"}}, "budget_ratio is '3%'; expected a number from 0 to 1"),
        ({"retrieval": {**LANDMARKS, "budget_ratio": 3}}, "budget_ratio is 3; expected a number from 0 to 1"),
        ({"retrieval": {**LANDMARKS, "budget_tokens": True}}, "budget_tokens is True; expected an integer from 0"),
        ({"retrieval": {**LANDMARKS, "allow_uncertified": 1}}, "allow_uncertified is 1; expected true or false"),
        (
            {"retrieval": {**LANDMARKS, "certificates": 3}},
            "certificates is 3; expected a list of paths of files",
        ),
        ({"retrieval": "landmarks"}, "expected an object"),
        ("landmarks", "expected an object"),
    ],
)
def test_wrong_settings_say_what_is_known(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalSettings.of_engine({"kvloom": config})


def test_approximate_kv_has_an_identity_of_its_own() -> None:
    """Equal for equal decoding, another for another, none where nothing is approximated."""
    few, more, exact = (
        decoding_identity({"kvloom": {"retrieval": {**LANDMARKS, "budget_ratio": ratio}}}) for ratio in (0.1, 0.2, 1.0)
    )
    assert exact == b""
    assert few
    assert len({few, more, exact}) == 3
    again = {**LANDMARKS, "budget_ratio": 0.1, "break_even_tokens": 7, "allow_uncertified": True}
    assert decoding_identity({"kvloom": {"retrieval": again}}) == few


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Common:
    """vLLM's `CommonAttentionMetadata`, as far as it matters here."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    is_prefilling: Tensor | None
    causal: bool | Tensor = True
    positions: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    logits_indices_padded: Tensor | None = None
    num_logits_indices: int | None = None
    req_idx: Any = None
    _num_computed_tokens_cache: Tensor | None = None
    _token_to_req_indices_cache: Tensor | None = None


def step_of(*rows: tuple[int, int, bool]) -> Common:
    """Rows of (tokens computed in this step, length with them, prompt)."""
    counts, lengths, prompts = (list(each) for each in zip(*rows, strict=True))
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tokens = int(starts[-1])
    return Common(
        starts,
        starts,
        torch.tensor(lengths, dtype=torch.int32),
        len(rows),
        tokens,
        max(counts),
        max(lengths),
        torch.arange(len(rows) * 50, dtype=torch.int32).view(len(rows), 50),
        torch.arange(tokens) + 1000,
        torch.tensor(prompts),
        positions=torch.arange(tokens) + 5000,
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
        req_idx=np.arange(len(rows)),
    )


MIXED = step_of((1, 700, False), (40, 640, True), (1, 900, True), (1, 500, False), (3, 800, False), (1, 1000, False))


def test_rows_that_decode_behind_long_contexts_are_sorted_out() -> None:
    """Not prompts that end in a single token, not drafts, not short contexts."""
    found = sorted_rows(MIXED, [paged_of()], 600)
    assert found is not None
    rows, others, prompt, growing = found
    assert [(row.number, row.token, row.position) for row in rows] == [(0, 0, 699), (5, 46, 999)]
    assert rows[0].blocks.tolist() == list(range(22))
    assert rows[1].blocks.tolist() == list(range(250, 282))
    assert others == [1, 2, 3, 4]
    assert prompt is None, "landmarks and exact search learn nothing from queries"
    assert [(row.number, row.position, len(row.blocks)) for row in growing] == [(1, 639, 20), (2, 899, 29)]


def test_steps_that_are_the_backends_alone() -> None:
    assert sorted_rows(MIXED, [], 600) is None
    assert sorted_rows(MIXED, [paged_of()], 1000) is None
    assert sorted_rows(replace(MIXED, is_prefilling=None), [paged_of()], 600) is None, "passes outside the schedule"
    assert sorted_rows(replace(MIXED, causal=False), [paged_of()], 600) is None
    # an index would have nothing to choose from
    assert sorted_rows(step_of((1, 290, False)), [paged_of()], 0) is None


def test_queries_of_prompts_are_kept_for_those_that_learn() -> None:
    learning = paged_of(method="sketch")
    found = sorted_rows(MIXED, [learning], 600)
    assert found is not None
    prompt = found[2]
    assert prompt is not None
    assert prompt.positions.tolist() == [608, 624]
    assert prompt.tokens.tolist() == [1 + 8, 1 + 24]
    assert prompt.blocks == [50 + 608 // N, 50 + 624 // N]


def test_the_other_rows_are_a_batch_of_their_own() -> None:
    part, tokens = batch_of(MIXED, [1, 2, 3, 4])
    assert tokens.tolist() == list(range(1, 46))
    assert part.query_start_loc.tolist() == [0, 40, 41, 42, 45]
    assert part.seq_lens.tolist() == [640, 900, 500, 800]
    assert (part.num_reqs, part.num_actual_tokens, part.max_query_len, part.max_seq_len) == (4, 45, 40, 900)
    assert torch.equal(part.block_table_tensor, MIXED.block_table_tensor[1:5])
    assert part.slot_mapping.tolist() == list(range(1001, 1046))
    assert part.is_prefilling.tolist() == [True, True, False, False]


class Stock:
    """A backend's implementation: says which tokens it was given, and how."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, int]] = []
        self.wrote = 0

    def do_kv_cache_update(self, *_: Any) -> None:
        self.wrote += 1

    def forward(
        self, _layer: Any, query: Tensor, _k: Any, _v: Any, _cache: Any, metadata: Any, output: Tensor
    ) -> Tensor:
        self.asked.append((metadata, len(query)))
        output[: len(query)] = -query.view(output[: len(query)].shape)
        return output


class Ours(RetrievingImpl, Stock):
    pass


def test_every_token_is_attended_to_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with an index by it, the others by the backend, each in its place; a layer without indexes as ever."""
    rows, others, _, _ = sorted_rows(MIXED, [paged_of()], 600) or ([], [], None, [])
    dense, tokens = batch_of(MIXED, others)
    metadata = SimpleNamespace(kvloom=Split(1, rows, dense, tokens, None))
    query = torch.randn(47, H * G, D)
    monkeypatch.setattr(PagedRetrieval, "attend", lambda self, step, rows, queries, cache, kernel: queries * 10)
    ours, stock = Ours(), Ours()
    ours.retrieving = paged_of()
    expected = -query
    expected[[0, 46]] = 10 * query[[0, 46]]
    for shape in ((47, H * G, D), (47, H * G * D)):
        output = torch.zeros(shape)
        ours.forward(None, query, query, query, torch.zeros(4), metadata, output)
        assert torch.equal(output.view(query.shape), expected)
    assert ours.asked == [(dense, 45)] * 2
    output = torch.zeros_like(query)
    stock.forward(None, query, query, query, torch.zeros(4), metadata, output)
    assert torch.equal(output, -query)
    assert stock.asked == [(metadata, 47)]


def test_writes_are_noted() -> None:
    ours = Ours()
    ours.do_kv_cache_update(None, None, None, torch.zeros(6, H, N, 2 * D), torch.tensor([N]))
    ours.retrieving = paged_of()
    ours.do_kv_cache_update(None, None, None, torch.zeros(6, H, N, 2 * D), torch.tensor([3 * N + 1, -1]))
    assert ours.wrote == 2
    assert (ours.retrieving.writes.of(torch.arange(6)) > 0).tolist() == [i == 3 for i in range(6)]


# ------------------------------------------------------------------------------------------------------ permission


def engine(**changes: Any) -> SimpleNamespace:
    parallel = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{name: changes.get(name, one) for name, one in parallel.items()}),
        kv_transfer_config=changes.get("transfer"),
        speculative_config=changes.get("speculative"),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=changes.get("graphs", "NONE"))),
        device_config=SimpleNamespace(device_type=changes.get("device", "cpu")),
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pipeline_parallel_size": 2}, "stages"),
        ({"decode_context_parallel_size": 2}, "divides the context"),
        ({"speculative": object()}, "drafts"),
        ({"transfer": SimpleNamespace(kv_connector="OffloadingConnector")}, "OffloadingConnector may write"),
        ({"device": "cuda", "graphs": "PIECEWISE"}, "enforce_eager"),
    ],
)
def test_engines_that_cannot_retrieve(changes: dict[str, Any], why: str) -> None:
    assert why in (why_refused(engine(**changes)) or "")


def test_engines_that_can_retrieve() -> None:
    ours = SimpleNamespace(kv_connector="KVLoomConnector")
    assert [why_refused(engine(**c)) for c in ({}, {"transfer": ours}, {"device": "cuda"})] == [None] * 3


@pytest.mark.parametrize(
    ("of_layer", "of_impl", "why"),
    [
        ({}, {}, None),
        ({"sliding_window": 512}, {}, "sliding window"),
        ({}, {"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({}, {"logits_soft_cap": 30.0}, "soft cap"),
        ({}, {"sinks": torch.ones(2)}, "sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, {}, "another layer's"),
        ({"attn_type": "encoder_only"}, {}, "encoder_only"),
        ({"dtype": torch.uint8}, {}, "uint8"),
    ],
)
def test_layers_of_other_kinds_stay_dense(of_layer: dict[str, Any], of_impl: dict[str, Any], why: str | None) -> None:
    impl = SimpleNamespace(retrieving=None, alibi_slopes=None, logits_soft_cap=0, sinks=None)
    layer = SimpleNamespace(sliding_window=None, kv_sharing_target_layer_name=None, attn_type="decoder", impl=impl)
    vars(impl).update(of_impl)
    vars(layer).update(of_layer)
    found = why_dense(layer, SimpleNamespace(dtype=getattr(layer, "dtype", torch.float32)))
    assert found is None if why is None else why in (found or "")


def test_what_a_method_lacks_is_missed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("exact", "landmarks", "factor"):
        _expect_usable(Retrieval(method))
    with pytest.raises(ValueError, match="landmarks"):
        _expect_usable(Retrieval("landmarks", parameters={"outliers": 3}))

    def lack(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'faiss'")

    monkeypatch.setattr(Retrieval, "selector", lambda *_, **__: SimpleNamespace(add=lack))
    with pytest.raises(EngineError, match=r"'sketch' needs a package .* lacks: No module named 'faiss'"):
        _expect_usable(Retrieval("sketch"))


@pytest.mark.parametrize(
    ("dense_s", "sparse_s", "longest", "found"),
    [
        ([2.0], [1.0], 1 << 20, 2048),
        ([1.0], [2.0], 1000, NEVER),
        ([1.0, 4.0], [2.0, 2.0], 1 << 20, 4096),
        ([1.0, 4.0], [2.0, 5.0], 8192, NEVER),
        ([1.0, 4.0, 16.0], [5.0, 6.0, 8.0], 1 << 20, 13312),
    ],
)
def test_where_retrieval_becomes_faster(
    monkeypatch: pytest.MonkeyPatch, dense_s: list[float], sparse_s: list[float], longest: int, found: int
) -> None:
    times = dict(zip((2048, 8192, 32768), zip(dense_s, sparse_s, strict=True), strict=False))
    monkeypatch.setattr(vllm_retrieval_start, "_steps", lambda *given: times[given[-1]])
    monkeypatch.setattr(vllm_retrieval_start, "median_s", lambda step: step)
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=longest))
    paged: Any = None
    assert vllm_retrieval_start._measured(lambda: None, paged, None, None, config, None) == found


def test_certificates_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{")
    found = settings_of(**LANDMARKS, certificates=[str(tmp_path / "none.json")])
    assert found is not None
    with pytest.raises(UncertifiedError, match=r"none\.json cannot be read"):
        found.load_certificates()
