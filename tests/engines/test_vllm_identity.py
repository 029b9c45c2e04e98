"""One name for the same KV: what transformers stored vLLM finds, and the other way round, tokens as without kvloom."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom.blend.blender import Blender
from kvloom.blend.method import FUSION, FusionMethod
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.codec_form import parameters_of
from kvloom.compress.registry import codec_by_name
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.connectors.identity.weights import folder_name
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.workload import task_cases
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.retrieval.settings import Retrieval

from ..support.faulty import eventually
from .support.engines import BLOCK, DECLINED, generate, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

CHUNK = 256  # tokens, as transformers' sessions have them
RATIO = 0.3


def connector(folder: Path, **options: Any) -> TransformersConnector:
    """On the same disk as the engine."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    return TransformersConnector(model, tokenizer, KVStore([DiskTier(folder / "kv")]), **options)


class Case:
    """Documents and a question, in tokens behind the lead, with the answer that the bundled model knows."""

    def __init__(self, rag: TransformersConnector, documents: Sequence[str], question: str, answer: str) -> None:
        self.texts, self.question = list(documents), question
        encoded = [rag.encode_document(text) for text in documents]
        self.prompt, self.spans = list(rag.lead_ids), list[list[int]]()
        for ids in encoded:
            self.spans.append([len(self.prompt), len(self.prompt) + len(ids)])
            self.prompt += ids
        self.document_tokens = len(self.prompt) - len(rag.lead_ids)
        self.prompt += rag.encode_question(question)
        self.answer = rag.encode_question(answer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def cases(folder: Path) -> list[Case]:
    """Precomputed by transformers before the engine starts."""
    rag = connector(folder, allow_uncertified=True)
    with rag.store:
        tokens = lambda text: len(rag.encode_question(text))  # noqa: E731
        found = task_cases(None, tokens, kind="record", count=6, context_tokens=900, seed=1)
        made = [Case(rag, case.documents, case.question, case.answer or "") for case in found]
        for case in made[:4]:
            assert rag.precompute(case.texts).computed == len(case.texts)
        with rag.session(Retrieval("exact", break_even_tokens=0)) as session:
            session.generate(made[4].prompt, max_new_tokens=1)
            session.save()
        return made


@pytest.fixture(scope="module")
def certificates(folder: Path, cases: list[Case]) -> list[str]:
    """As `kvloom certify FOLDER` makes them, without a name of the model."""
    rag, codec = connector(folder), codec_by_name("int8")
    forms = {"fusion": (FUSION, FusionMethod(RATIO).parameters), "codec": (codec.name, parameters_of(codec))}
    paths = []
    with rag.store:
        for name, (kind, parameters) in forms.items():
            figures = {"answers": Figure(0.0, 0.0, 0.01, limit=0.05)}
            paths.append(folder / f"{name}.json")
            paths[-1].write_text(Certificate(rag.spec, kind, parameters, figures).to_json())
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def llm(folder: Path, certificates: list[str]) -> Iterator[Any]:
    engine = start(
        BUNDLED_MODEL,
        {
            "host_bytes": "64MiB",
            "host_codec": "int8",
            "disk_path": str(folder / "kv"),
            "chunk_tokens": CHUNK,
            "certificates": certificates,
        },
        enable_prefix_caching=True,
        max_model_len=2048,
        max_num_batched_tokens=2048,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


def ask(llm: Any, case: Case, options: dict[str, Any] | None = None) -> tuple[list[int], dict[str, Any]]:
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [case.prompt], options, tokens=len(case.answer))
    return tokens_of([output])[0], {} if options == DECLINED else usage(output)


def worker() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker


def test_both_have_one_name(llm: Any, folder: Path) -> None:
    """Certificates without a name of the model are accepted for it, too: the engine would not have started."""
    rag = connector(folder)
    with rag.store:
        assert worker().info.spec == rag.spec
    assert rag.spec.model_id == folder_name(BUNDLED_MODEL)
    assert worker().info.fusion.ratio == RATIO


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_engine_finds_documents_of_transformers(llm: Any, cases: list[Case], number: int) -> None:
    """Fused by the ratio that the certificate permits."""
    case = cases[number]
    plain, _ = ask(llm, case, DECLINED)
    tokens, told = ask(llm, case, {"documents": case.spans, "save": False})
    assert tokens == plain == case.answer
    assert told["fused"] == "yes"
    assert sum(told["loaded_tokens"].values()) >= case.document_tokens - BLOCK
    assert told["computed_tokens"] <= RATIO * case.document_tokens + BLOCK


def test_a_document_at_the_beginning_is_exact(llm: Any, cases: list[Case]) -> None:
    """One document behind the lead is what it is in full prefill; at ratio 1 everything is, whatever is stored."""
    case = cases[3]
    plain, _ = ask(llm, case, DECLINED)
    for options in ({"documents": case.spans[:1], "save": False}, {"documents": case.spans, "ratio": 1.0}):
        tokens, told = ask(llm, case, options)
        assert tokens == plain
        assert not told["failed"]


def test_the_engine_finds_prefixes_of_sessions(llm: Any, cases: list[Case]) -> None:
    case = cases[4]
    plain, _ = ask(llm, case, DECLINED)
    tokens, told = ask(llm, case, {"save": False})
    assert tokens == plain
    assert sum(told["loaded_tokens"].values()) == (len(case.prompt) - 1) // CHUNK * CHUNK > 0


def test_transformers_finds_what_the_engine_stored(llm: Any, folder: Path, cases: list[Case]) -> None:
    """A document at the beginning of a prompt, and chunks of its prefix."""
    case = cases[5]
    plain, _ = ask(llm, case, DECLINED)
    tokens, told = ask(llm, case, {"documents": case.spans[:1]})
    assert tokens == plain and told["saved_chunks"] == 1 + len(case.prompt) // CHUNK
    transfers = worker().transfers
    assert eventually(lambda: transfers._forget_done_saves() or not transfers._saves)
    rag = connector(folder, blender=Blender(recompute_ratio=RATIO), allow_uncertified=True)
    with rag.store:
        done = rag.precompute(case.texts)
        assert (done.stored, done.computed) == (1, len(case.texts) - 1)
        inputs, cache = rag.assemble(case.texts, case.question)
        assert inputs["input_ids"][0].tolist() == case.prompt
        output = rag.model.generate(**inputs, past_key_values=cache, max_new_tokens=len(plain), do_sample=False)
        assert output[0, len(case.prompt) :].tolist() == plain
        with rag.session(Retrieval("exact", break_even_tokens=0)) as session:
            told = session.generate(case.prompt, max_new_tokens=len(plain))
        assert list(told.token_ids[0]) == plain
        assert told.counts[0].reused_tokens == len(case.prompt) // CHUNK * CHUNK
