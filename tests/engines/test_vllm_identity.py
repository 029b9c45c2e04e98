"""One name for the same KV: what transformers stored vLLM finds, and the other way round, tokens as without kvloom."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.retrieval.settings import Retrieval

from ..support.faulty import eventually
from ..support.models import DOCUMENTS, QUESTION, make_tokenizer
from .support.engines import DECLINED, generate, make_model, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

LENGTH = 256  # tokens of a chunk, as transformers' sessions have them
TEXTS = [" ".join(DOCUMENTS[i:] + DOCUMENTS[:i]) * 3 for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vllm")
    make_model(path / "model", bos_token_id=0)
    make_tokenizer(bos=True).save_pretrained(path / "model")
    return path


def connector(folder: Path, **options: Any) -> TransformersConnector:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    return TransformersConnector(model, tokenizer, KVStore([DiskTier(folder / "kv")]), **options)


@pytest.fixture(scope="module")
def stored(folder: Path) -> list[list[int]]:
    """Documents, in tokens, that transformers has stored before the engine starts."""
    rag = connector(folder, allow_uncertified=True)
    with rag.store:
        assert rag.precompute(TEXTS).computed == 3
        with rag.session(Retrieval("exact", break_even_tokens=0)) as session:
            session.generate(TEXTS[2] * 3, max_new_tokens=1)
            session.save()
        return [rag.encode_document(text) for text in TEXTS]


@pytest.fixture(scope="module")
def llm(folder: Path, stored: list[list[int]]) -> Iterator[Any]:
    engine = start(
        folder / "model",
        {"host_bytes": "64MiB", "disk_path": str(folder / "kv"), "chunk_tokens": LENGTH},
        enable_prefix_caching=True,
        max_model_len=2048,
        skip_tokenizer_init=False,
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


def ask(llm: Any, text: Sequence[int], options: dict[str, Any] | None = None) -> tuple[list[int], dict[str, Any]]:
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [text], options)
    return tokens_of([output])[0], {} if options == DECLINED else usage(output)


def question(folder: Path) -> list[int]:
    ids: list[int] = make_tokenizer(bos=False)(QUESTION).input_ids
    return ids


def test_the_engine_finds_documents_of_transformers(llm: Any, stored: list[list[int]], folder: Path) -> None:
    """Fused, exactly and almost; the first one as a prefix, too."""
    asked = question(folder)
    prompt = [0, *stored[1], *stored[0], *asked]
    middle = 1 + len(stored[1])
    spans = [[1, middle], [middle, middle + len(stored[0])]]
    plain, _ = ask(llm, prompt, DECLINED)
    for ratio in (1.0, 0.9):
        tokens, told = ask(llm, prompt, {"documents": spans, "ratio": ratio, "save": False})
        print(ratio, tokens == plain, told)
        if ratio == 0.9:
            assert tokens == plain
            assert told["fused"] == "yes" and sum(told["loaded_tokens"].values()) >= len(stored[0])


def test_the_engine_finds_prefixes_of_sessions(llm: Any, folder: Path) -> None:
    rag = connector(folder)
    with rag.store:
        ids = [*rag.lead_ids, *rag.encode_question(TEXTS[2] * 3)]
    plain, _ = ask(llm, ids, DECLINED)
    tokens, told = ask(llm, ids, {"save": False})
    print(told)
    assert tokens == plain
    assert sum(told["loaded_tokens"].values()) >= LENGTH


def test_transformers_finds_documents_of_the_engine(llm: Any, folder: Path) -> None:
    rag = connector(folder, blender=Blender(recompute_ratio=1.0))
    text = "The mill by the river grinds no corn on Sundays. " * 8
    ids = rag.encode_document(text)
    rag.store.close()
    prompt = [0, *ids, *question(folder)]
    plain, _ = ask(llm, prompt, DECLINED)
    tokens, told = ask(llm, prompt, {"documents": [[1, 1 + len(ids)]]})
    assert tokens == plain and told["saved_chunks"]

    def is_there() -> bool:
        other = connector(folder)
        with other.store:
            return other.key_of(ids) in other.store

    assert eventually(is_there)
    rag = connector(folder, blender=Blender(recompute_ratio=0.5))
    with rag.store:
        assert rag.precompute([text]).stored == 1
        inputs, cache = rag.assemble([text], QUESTION)
        output = rag.model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert output[0, len(prompt) :].tolist() == plain
