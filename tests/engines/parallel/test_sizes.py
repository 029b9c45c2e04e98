"""TP 1 and TP 2 of one model on one folder: what either stores, the other finds, with the tokens of plain vLLM."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.connectors.identity.requests import chunk_salt
from kvloom.kvstore.keys import prefix_keys

from ..support.engines import BLOCK, CHUNK, DECLINED, make_model
from .two_ranks import CONTEXT, DOCUMENTS, ONES, QUESTION, TWOS, ask, opened

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def whole(texts: list[list[int]]) -> list[dict[str, int]]:
    return [{"disk": len(text) // CHUNK * CHUNK} for text in texts]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM wants a core for each rank")
def test_both_ways(tmp_path: Path) -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    make_model(tmp_path / "model", num_key_value_heads=4)
    llm = opened(tmp_path, 1)
    transfers = get_kv_transfer_group().worker.transfers
    plain = ask(llm, [*ONES, *TWOS, CONTEXT], DECLINED)["answers"]
    first = ask(llm, ONES)
    assert first["answers"] == plain[:2] and first["loaded"] == [{}, {}]
    for document in DOCUMENTS:
        ask(llm, [[*document, 9]], {"documents": [[0, len(document)]]})
    assert transfers.settle(60)
    before = {entry.key for entry in transfers.store.tiers[-1].entries()}

    command = [sys.executable, "-m", "tests.engines.parallel.two_ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["plain"]["answers"] == plain, "the sizes agree without kvloom"
    assert told["found"]["answers"] == plain[:2] and told["found"]["loaded"] == whole(ONES)
    assert told["fused"]["answers"] == plain[4:] and told["fused"]["fused"] == ["yes"]
    rest = len(CONTEXT) - len(QUESTION)  # the last whole block ends in the second document
    assert told["fused"]["loaded"] == [{"disk": sum(map(len, DOCUMENTS)) - rest % BLOCK}], "known by their text"
    assert told["own"]["answers"] == plain[2:4] and told["own"]["loaded"] == [{}, {}]
    assert not any(failed for each in told.values() for failed in each["failed"])

    joined = ask(llm, TWOS)
    assert joined["answers"] == plain[2:4] and joined["loaded"] == whole(TWOS) and joined["failed"] == [False, False]
    entries = {entry.key for entry in transfers.store.tiers[-1].entries()}
    assert before < entries and len(entries - before) == 2 * (200 // CHUNK + 70 // CHUNK), "one chunk a rank, no more"

    # That equal tokens prove something: with the heads of both ranks exchanged, they differ.
    parts = [part.spec for part in transfers.reader._splits[0]]
    keys = [prefix_keys(spec, TWOS[0], chunk_tokens=CHUNK, salt=chunk_salt()) for spec in parts]
    for left, right in zip(*keys, strict=True):
        one, other = transfers.store.get(left), transfers.store.get(right)
        assert one is not None and other is not None
        transfers.store.put(left, replace(other, spec=one.spec))
        transfers.store.put(right, replace(one, spec=other.spec))
    exchanged = ask(llm, TWOS[:1])
    assert exchanged["loaded"] == [{"host": 192}] and exchanged["answers"] != plain[2:3]
    llm.llm_engine.engine_core.shutdown()
