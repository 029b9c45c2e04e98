"""Two machines in small: network namespaces with a store each and one shared tier; what A has computed, B answers from.

Where namespaces are not permitted, two processes on loopback take their place.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvloom.bench.harness.servers import Server, redis_server

from .servers import expect

pytestmark = pytest.mark.slow

DOCUMENTS = ["A loom holds the warp threads in place.\n", "The code of Alice is 4821.\n"]
QUESTION = "\nQ: What is the code of Alice?\nA:"
PROGRAM = """
import json, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from kvloom import Blender, HostTier, KVStore, TransformersConnector
from kvloom.connectors.tier_url import open_tier
from kvloom.evaluation.environment import BUNDLED_MODEL

url, documents, question, computes = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
with KVStore([HostTier(1 << 28), open_tier(url, name="shared", timeout_s=2.0)], timeout_s=2.0) as store:
    rag = TransformersConnector(model, tokenizer, store, blender=Blender(recompute_ratio=0.15))
    if computes:
        rag.precompute(documents)
    began_s = time.monotonic()
    answer = rag.answer(documents, question, max_new_tokens=5)
    spent_s = time.monotonic() - began_s
    counts = {tier.name: tier for tier in store.stats().tiers}["shared"]
    told = {"answer": answer, "hits": counts.hits, "puts": counts.puts, "failures": counts.errors + counts.timeouts}
    print("told " + json.dumps({**told, "spent_s": spent_s}))
"""


@dataclass
class Machine:
    """Where a program runs, and how it reaches the shared server."""

    command: list[str]
    server_host: str
    link: str | None

    def run(self, url: str, *, computes: bool) -> dict[str, object]:
        given = json.dumps([url, DOCUMENTS, QUESTION, computes])
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*self.command, sys.executable, "-c", PROGRAM, given]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("told ")]
        assert lines, done.stderr[-2000:]
        told: dict[str, object] = json.loads(lines[0].removeprefix("told "))
        return told


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    """Two, each with a link of its own to this one."""
    made: list[Machine] = []
    names = [f"kvl{os.getpid() % 10000}{letter}" for letter in "ab"]
    is_permitted = shutil.which("ip") is not None and all(ip("netns", "add", name) for name in names)
    try:
        for number, name in enumerate(names if is_permitted else []):
            here, there = f"10.213.{number}.1", f"10.213.{number}.2"
            steps = (
                ("link", "add", f"{name}0", "type", "veth", "peer", "name", f"{name}1", "netns", name),
                ("addr", "add", f"{here}/24", "dev", f"{name}0"),
                ("link", "set", f"{name}0", "up"),
                ("-n", name, "addr", "add", f"{there}/24", "dev", f"{name}1"),
                ("-n", name, "link", "set", f"{name}1", "up"),
                ("-n", name, "link", "set", "lo", "up"),
            )
            is_permitted = is_permitted and all(ip(*step) for step in steps)
            made.append(Machine(["ip", "netns", "exec", name], here, f"{name}0"))
        yield made if is_permitted else [Machine([], "127.0.0.1", None) for _ in range(2)]
    finally:
        for name in names:
            ip("link", "del", f"{name}0")
            ip("netns", "del", name)


@pytest.fixture
def shared(machines: list[Machine], tmp_path: Path) -> Iterator[Server]:
    expect("redis")
    others = [machine.server_host for machine in machines if machine.link is not None]
    with redis_server(tmp_path, *(["--bind", "127.0.0.1", *others] if others else [])) as server:
        yield server


def test_what_one_machine_has_computed_the_other_answers_from(machines: list[Machine], shared: Server) -> None:
    a, b = machines
    urls = [f"redis://{machine.server_host}:{shared.port}/0" for machine in machines]
    first = a.run(urls[0], computes=True)
    assert first["puts"] == len(DOCUMENTS) and "4821" in str(first["answer"])
    second = b.run(urls[1], computes=False)
    assert second["answer"] == first["answer"]
    hits = int(str(second["hits"]))  # documents are read layer by layer
    assert hits >= len(DOCUMENTS) and hits % len(DOCUMENTS) == 0
    assert second["puts"] == 0 and second["failures"] == 0
    if b.link is None:
        pytest.skip("network namespaces are not permitted: two processes on loopback took their place, no link was cut")
    assert ip("link", "set", b.link, "down")
    third = b.run(urls[1], computes=False)  # computed anew
    assert third["answer"] == first["answer"] and third["hits"] == 0 and int(str(third["failures"])) > 0
    assert float(str(third["spent_s"])) < 60.0
