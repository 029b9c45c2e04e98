"""Retrieval attention in stock vLLM: exact with a budget of everything, and never through an index of other keys.

One engine serves most tests: how it decodes is exchanged while it runs, in its one process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from transformers import AutoModelForCausalLM
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from kvloom.bench.vllm import retrieval as vllm_retrieval
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.connectors.break_even import NEVER
from kvloom.connectors.hf.model import TransformersModel
from kvloom.connectors.identity.requests import chunk_salt
from kvloom.connectors.vllm import plugin as vllm_plugin
from kvloom.connectors.vllm.retrieval import backend_cpu as vllm_backend_cpu
from kvloom.connectors.vllm.retrieval import settings as vllm_retrieval_settings
from kvloom.connectors.vllm.retrieval import start as vllm_retrieval_start
from kvloom.connectors.vllm.retrieval.paged_index import PagedRetrieval, RetrievalCounts
from kvloom.connectors.vllm.retrieval.start import Retrieving
from kvloom.errors import UncertifiedError
from kvloom.kvstore.keys import prefix_keys
from kvloom.retrieval.settings import Retrieval

from .support import engines
from .support.engines import BLOCK, CHUNK, DECLINED, generate, prompts, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BREAK_EVEN = 300
SETTINGS = {"method": "exact", "budget_ratio": 0.05, "window_tokens": 32, "break_even_tokens": BREAK_EVEN}
FEW = Retrieval(**SETTINGS)
EVERYTHING = replace(FEW, budget_ratio=1.0)
LENGTHS = (900, 40, 700, 310, 299, 300, 620, 64, 850, 410, 556, 288)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engines.make_model(tmp_path_factory.mktemp("model"))


def asking(**settings: Any) -> dict[str, Any]:
    return {"kvloom": {"retrieval": {**SETTINGS, **settings}}}


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    """Few blocks, so that requests preempt one another; with kvloom's connector, which is asked for nothing."""
    vllm_plugin.register()
    engine = engines.start(
        model,
        {"host_bytes": "64MiB", "model_id": "tiny"},
        additional_config=asking(allow_uncertified=True),
        num_gpu_blocks_override=100,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


def runner_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def layers_of(llm: Any) -> list[PagedRetrieval]:
    context = runner_of(llm).vllm_config.compilation_config.static_forward_context
    return [layer.impl.retrieving for layer in context.values()]


def decode_by(llm: Any, retrieval: Retrieval | None) -> None:
    """From now on, with nothing left of before; None for the backend as vLLM has it."""
    layers = layers_of(llm)
    for layer in layers:
        layer.retrieval = retrieval or FEW
        layer.__post_init__()
        layer.indexes.clear()
        layer._of_row.clear()
        layer.counts, layer.touched_limit = RetrievalCounts(), 0.0  # the chosen tokens and no others
    builder = runner_of(llm).attn_groups[0][0].get_metadata_builder()
    builder.retrieving = Retrieving(tuple(layers), NEVER if retrieval is None else BREAK_EVEN)
    assert llm.reset_prefix_cache()


def metric(llm: Any, name: str) -> float:
    return float(sum(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}"))


def storm(llm: Any, seed: int = 3, *, tokens: int = 70) -> list[list[int]]:
    """All at once, in too few blocks; some begin alike, some are asked again."""
    texts = prompts(seed, LENGTHS)
    texts += [texts[0][:640] + texts[1], texts[0], texts[2][:512] + texts[3]]
    first = tokens_of(generate(llm, texts, DECLINED, tokens=tokens))
    again = [text + answer + [5, 9] for text, answer in zip(texts[:3], first, strict=False)]
    return first + tokens_of(generate(llm, again, DECLINED, tokens=20))


@pytest.fixture(scope="module")
def plain(llm: Any) -> list[list[int]]:
    decode_by(llm, None)
    found = storm(llm)
    assert all(layer.counts == RetrievalCounts() for layer in layers_of(llm))
    return found


@pytest.mark.parametrize("touched_limit", [1e9, 0.0], ids=["whole blocks", "gathered"])
def test_a_budget_of_everything_is_exact(llm: Any, plain: list[list[int]], touched_limit: float) -> None:
    """Batches of all lengths, prompts in pieces beside decoding rows, preemption, shared prefixes."""
    decode_by(llm, EVERYTHING)
    for layer in layers_of(llm):
        layer.touched_limit = touched_limit
    before = metric(llm, "num_preemptions")
    assert storm(llm) == plain
    assert metric(llm, "num_preemptions") > before
    for layer in layers_of(llm):
        assert layer.counts.rows > 500
        assert layer.counts.refused_rows == 0


def test_an_index_that_lasts_is_one_made_anew(
    llm: Any, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a small budget, where an index of other keys would choose other tokens."""
    decode_by(llm, FEW)
    lasting = storm(llm)
    made = [layer.counts.indexes for layer in layers_of(llm)]
    assert max(made) < 60
    assert sum(a != b for a, b in zip(lasting, plain, strict=True)) > 5, "or equal tokens would prove nothing"
    monkeypatch.setattr(PagedRetrieval, "_find", lambda self, row: None)
    decode_by(llm, FEW)
    assert storm(llm) == lasting
    # one for each row, and for each part of a prompt that is long enough
    assert all(layer.counts.indexes >= layer.counts.rows > 500 for layer in layers_of(llm))


def aborted(llm: Any) -> list[list[int]]:
    """Requests that leave in the middle, whose blocks the next ones get."""
    engine, found = llm.llm_engine, []
    for number, text in enumerate(prompts(9, (900, 700, 800, 640, 500, 850))):
        name = f"doomed-{number}"
        engine.add_request(name, {"prompt_token_ids": text}, engines.sampling(DECLINED, tokens=60))
        for _ in range(5 + 4 * number):
            engine.step()
        engine.abort_request([name])
        found += tokens_of(generate(llm, prompts(50 + number, (340 + 90 * number,)), DECLINED, tokens=30))
    return found


def test_aborted_requests_leave_no_index_behind(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_by(llm, FEW)
    lasting = aborted(llm)
    monkeypatch.setattr(PagedRetrieval, "_find", lambda self, row: None)
    decode_by(llm, FEW)
    assert aborted(llm) == lasting


@pytest.mark.parametrize("method", ["landmarks", "factor", "landmarks+factor", "sketch"])
def test_methods(llm: Any, plain: list[list[int]], method: str) -> None:
    if method == "sketch":
        pytest.importorskip("faiss", reason="sketches need it: pip install faiss-cpu")
    parameters: dict[str, Any] = {"sketch": {"rank": 8, "centroids": 16}}.get(method, {})
    decode_by(llm, replace(EVERYTHING, method=method, parameters=parameters))
    texts = prompts(3, LENGTHS)[:4]
    assert tokens_of(generate(llm, texts, DECLINED, tokens=30)) == [answer[:30] for answer in plain[:4]]
    decode_by(llm, replace(FEW, method=method, parameters=parameters))
    generate(llm, texts, DECLINED, tokens=30)
    for layer in layers_of(llm):
        assert layer.counts.rows > 50
        assert layer.counts.refused_rows == 0
        assert layer.counts.read_bytes > 0
    if method == "sketch":
        sketches = [index.selector for layer in layers_of(llm) for index in layer.indexes]
        assert all(sketch._observed >= 300 // 16 for sketch in sketches), "taught by the queries of its prompt"


def test_indexes_are_made_of_what_the_connector_loads(llm: Any) -> None:
    decode_by(llm, FEW)
    (text,) = prompts(21, (700,))
    computed = tokens_of(generate(llm, [text], {"load": False}, tokens=40))
    for _ in range(100):
        assert llm.reset_prefix_cache()
        outputs = generate(llm, [text], {"save": False}, tokens=40)
        if sum(usage(outputs[0])["loaded_tokens"].values()) == 640:
            break
    assert sum(usage(outputs[0])["loaded_tokens"].values()) == 640
    assert tokens_of(outputs) == computed


def test_kv_decoded_through_retrieval_is_not_given_to_exact_engines(llm: Any) -> None:
    """Its keys say how it was decoded: no chunk of it has the key of an exact engine's."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group().worker
    decode_by(llm, None)
    (text,) = prompts(77, (320,))
    generate(llm, [text])
    assert worker.transfers.settle(20.0)
    exact, other = (
        prefix_keys(worker.info.spec, text, chunk_tokens=CHUNK, salt=chunk_salt(decoding=decoding))
        for decoding in (b"", vllm_retrieval_settings.decoding_identity(asking()))
    )
    assert worker.transfers.store.match(exact) == 0
    assert worker.transfers.store.match(other) == 320 // CHUNK


def test_the_break_even_is_measured_beside_the_engines_cache(llm: Any) -> None:
    """On random keys in a cache of its own, by the layer's own kernel; nothing of it is left behind."""
    decode_by(llm, EVERYTHING)
    builder = runner_of(llm).attn_groups[0][0].get_metadata_builder()
    config = runner_of(llm).vllm_config
    layer = next(iter(config.compilation_config.static_forward_context.values()))
    paged, stamps = layer.impl.retrieving, layer.impl.retrieving.writes.of(torch.arange(100)).clone()
    build = partial(CPUAttentionMetadataBuilder.build, builder)
    device, longest = torch.device("cpu"), 32768
    steps = vllm_retrieval_start._steps(build, paged, layer, builder.kv_cache_spec, device, 2048)
    dense, sparse = (step() for step in steps)
    assert torch.allclose(dense, sparse, atol=1e-5), "a budget of everything"
    found = vllm_retrieval_start._measured(build, paged, layer, builder.kv_cache_spec, config, device)
    assert 2048 <= found <= longest or found >= NEVER
    assert layer.impl.retrieving is paged
    assert torch.equal(paged.writes.of(torch.arange(100)), stamps)
    assert paged.counts == RetrievalCounts()


def test_engines_that_do_not_ask_get_the_backends_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = vllm_backend_cpu.KVLoomCPUBackend
    assert backend.get_impl_cls() is CPUAttentionBackendImpl
    assert backend.get_builder_cls() is CPUAttentionMetadataBuilder
    monkeypatch.setattr(vllm_backend_cpu, "asks_for_retrieval", lambda: True)
    assert backend.get_impl_cls() is vllm_backend_cpu.KVLoomCPUImpl
    assert backend.get_builder_cls() is vllm_backend_cpu.KVLoomCPUBuilder


def certificate_of(model: Path, retrieval: Retrieval) -> Certificate:
    """As `kvloom certify` makes it, by the same model in transformers."""
    spec = TransformersModel(AutoModelForCausalLM.from_pretrained(model).eval()).spec
    figures = {"answers": Figure(0.0, 0.0, 0.01, limit=0.05)}
    return Certificate(spec, retrieval.form[0], retrieval.fields, figures)


def in_a_process_of_its_own(model: Path, **options: Any) -> dict[str, Any]:
    """What an engine with these options says to the first of the storm's prompts."""
    job = {"model": str(model), "seed": 3, "lengths": LENGTHS[:4], "options": options}
    script = Path(__file__).parent.joinpath("support", "retrieval_engine.py")
    environment = {**os.environ, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for a function of ours, asked of workers
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(job)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("found "))
    found: dict[str, Any] = json.loads(line.removeprefix("found "))
    return found


def test_without_a_certificate_no_engine_starts(model: Path) -> None:
    found = in_a_process_of_its_own(model, additional_config=asking())
    assert found["error"] == UncertifiedError.__name__
    assert "no certificate that passed covers it" in found["text"]


def test_certified_and_compiled(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    """With a certificate it starts; the budget is below everything by name, and everything by number."""
    all_of_them = {"budget_ratio": 0.9, "budget_tokens": 1000}
    file = tmp_path / "certificate.json"
    file.write_text(certificate_of(model, replace(FEW, **all_of_them)).to_json())
    config = asking(**all_of_them, certificates=[str(file)])
    found = in_a_process_of_its_own(model, additional_config=config, enforce_eager=False)
    assert found.get("tokens") == [answer[:20] for answer in plain[:4]], found
    ((rows, refused),) = found["rows"]
    assert rows > 30
    assert refused == 0


def test_the_benchmark_runs(model: Path, plain: list[list[int]]) -> None:
    """Two engines side by side; a budget of everything answers as vLLM does."""
    (text,) = prompts(3, LENGTHS[:1])
    ways = {vllm_retrieval.PLAIN: None, "all": {**SETTINGS, "budget_ratio": 1.0}}
    given = {len(text): [(text, "random", plain[0][:3])]}
    rows = vllm_retrieval.measure(Path(sys.executable), model, given, ways=ways, new_tokens=4, rounds=2)
    assert [row.way for row in rows] == list(ways)
    for row in rows:
        assert row.right == {"random": [True]}
        assert (row.tokens, len(row.token_s)) == (900, 2)
    assert rows[1].same == [True]
    assert 500 < rows[1].chosen_tokens <= rows[1].touched_tokens < 900
    assert rows[0].chosen_tokens == rows[0].index_bytes == 0


def is_installed() -> bool:
    return any(point.value.startswith("kvloom.") for point in entry_points(group="vllm.general_plugins"))


@pytest.mark.skipif(not is_installed(), reason="workers find kvloom by its entry point, and it is not installed")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks need two cores")
def test_two_ranks(model: Path, plain: list[list[int]]) -> None:
    """Each chooses for its own heads."""
    config = asking(budget_ratio=1.0)
    found = in_a_process_of_its_own(model, additional_config=config, tensor_parallel_size=2)
    assert found.get("tokens") == [answer[:20] for answer in plain[:4]], found
    assert len(found["rows"]) == 2
    assert all(rows > 30 and refused == 0 for rows, refused in found["rows"])


def test_blocks_are_those_of_the_tests() -> None:
    assert BLOCK == 32, "window and lengths are chosen for it"
