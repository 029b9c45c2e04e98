"""Documents over HTTP, and OpenAI's API over them: the same answers as the connector gives, by official clients."""

import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.models import load_model
from kvloom.evaluation.workload import task_cases
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from .serving import Service, service_in_thread

pytestmark = pytest.mark.slow
ALONE_AND_WITH_WORKERS = pytest.mark.parametrize("service", [1, 2], indirect=True, ids=["alone", "workers"])


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory, workers = tmp_path_factory.mktemp("service"), getattr(request, "param", 1)
    options = {"models": {"tiny": BUNDLED_MODEL}, "recompute_ratio": 1.0, "workers": workers}
    with service_in_thread(directory, **options) as service:
        yield service


@pytest.fixture(scope="module")
def connector() -> TransformersConnector:
    model, tokenizer = load_model(None)
    return TransformersConnector(model, tokenizer, KVStore([HostTier(None)]), Blender(recompute_ratio=1.0))


@pytest.fixture(scope="module")
def case() -> Any:
    return task_cases(
        None, lambda text: len(text.split()), kind="record", count=1, context_tokens=300, num_documents=4
    )[0]


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.token, max_retries=0)


def finished(service: Service, job: dict[str, Any]) -> dict[str, Any]:
    until_s = time.monotonic() + 120
    while job["state"] == "running" and time.monotonic() < until_s:
        time.sleep(0.05)
        job = service.ask("GET", f"/v1/jobs/{job['id']}").json()
    return job


def test_documents_are_precomputed_listed_used_and_deleted(service: Service, case: Any, connector: Any) -> None:
    body = {"documents": [{"text": text, "id": f"d{n}"} for n, text in enumerate(case.documents)]}
    made = service.ask("POST", "/v1/documents", body, headers={"Idempotency-Key": "once"})
    assert made.status == 202 and made.json()["job"]["total"] == len(case.documents)
    again = service.ask("POST", "/v1/documents", body, headers={"Idempotency-Key": "once"}).json()
    assert again["job"]["id"] == made.json()["job"]["id"]
    job = finished(service, made.json()["job"])
    assert job["state"] == "finished" and job["done"] == job["computed"] == len(case.documents)
    listed = service.ask("GET", "/v1/documents?limit=2").json()
    assert [each["id"] for each in listed["documents"]] == ["d0", "d1"] and listed["next"] == "d1"
    assert listed["documents"][0]["state"] == "ready" and listed["documents"][0]["tiers"] == ["host", "disk"]
    assert listed["documents"][0]["tokens"] == len(connector.encode_document(case.documents[0]))

    composition = {"documents": [{"id": f"d{n}"} for n in range(len(case.documents))], "question": case.question}
    answered = service.ask("POST", "/v1/compose", {**composition, "max_tokens": 8}).json()
    assert answered["answer"] == connector.answer(case.documents, case.question, max_new_tokens=8)
    assert answered["usage"]["recomputed_tokens"] > 0 and answered["usage"]["completion_tokens"] <= 8

    load = service.ask("POST", "/v1/compose", {**composition, "answer": False}).json()["load"]
    assert load["kv_transfer_params"]["kvloom"]["documents"] == load["spans"] and len(load["keys"]) == len(
        case.documents
    )
    inputs, _ = connector.assemble(case.documents, case.question)
    assert load["prompt_token_ids"] == inputs["input_ids"][0].tolist()

    assert service.ask("GET", "/v1/documents/d0").json()["uses"] == 2
    other = service.new_token("other-tenant")
    assert service.ask("GET", "/v1/documents/d0", token=other).status == 404
    assert service.ask("POST", "/v1/compose", composition, token=other).status == 404
    assert service.ask("DELETE", "/v1/documents/d0").status == 204
    assert service.ask("GET", "/v1/documents/d0").status == 404
    # An engine with a `RemoteTier` of this tenant finds what was precomputed here, by the keys that it makes itself.
    with service.client() as remote:
        keys = [connector.key_of(connector.encode_document(text)) for text in case.documents]
        assert load["keys"] == [key.hex() for key in keys] and remote.match(keys[1:]) == len(keys) - 1
    assert service.client(other).match(keys[1:]) == 0
    assert service.ask("POST", "/v1/documents", {"documents": [{"text": " "}]}).status == 422


@ALONE_AND_WITH_WORKERS
def test_progress_is_followed_by_events(service: Service) -> None:
    body = {"documents": [{"text": f"Fact number {n} is here.\n" * 5} for n in range(4)]}
    job = service.ask("POST", "/v1/documents", body).json()["job"]
    command = ["curl", "-sN", "--max-time", "60", "-H", f"Authorization: Bearer {service.token}"]
    events = subprocess.run(
        [*command, f"{service.url}/v1/jobs/{job['id']}/events"], capture_output=True, text=True, check=True
    ).stdout
    told = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: ")]
    assert told[-1]["state"] == "finished" and told[-1]["done"] == 4
    assert [each["done"] for each in told] == sorted(each["done"] for each in told)


@ALONE_AND_WITH_WORKERS
def test_the_official_client_completes_over_documents(
    client: openai.OpenAI, case: Any, connector: TransformersConnector
) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    expected = connector.answer(case.documents, case.question, max_new_tokens=8)
    options: dict[str, Any] = {"model": "tiny", "prompt": case.question, "max_tokens": 8}
    done = client.completions.create(**options, extra_body={"documents": list(case.documents)})
    assert done.choices[0].text == expected and done.choices[0].finish_reason in ("stop", "length")
    assert done.usage is not None and done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    stream = client.completions.create(
        **options, extra_body={"documents": list(case.documents)}, stream=True, stream_options={"include_usage": True}
    )
    pieces = list(stream)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == expected
    assert pieces[-1].usage is not None and pieces[-1].usage.prompt_tokens == done.usage.prompt_tokens


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello there"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6)
    text = whole.choices[0].message.content
    streamed = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == text
    assert whole.choices[0].message.role == "assistant" and whole.id.startswith("chatcmpl-")
    sampled = [
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=1.5, seed=7)
        for _ in range(2)
    ]
    assert sampled[0].choices[0].message.content == sampled[1].choices[0].message.content


def test_stop_strings_end_an_answer(client: openai.OpenAI, case: Any) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": case.question,
        "extra_body": {"documents": list(case.documents)},
    }
    whole = client.completions.create(**options, max_tokens=12).choices[0].text
    stop = whole[len(whole) // 2]
    cut = client.completions.create(**options, max_tokens=12, stop=stop)
    assert cut.choices[0].text == whole[: whole.index(stop)] and cut.choices[0].finish_reason == "stop"
    pieces = client.completions.create(**options, max_tokens=12, stop=[stop], stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == cut.choices[0].text


def test_errors_are_what_clients_expect(client: openai.OpenAI, service: Service) -> None:
    with pytest.raises(openai.NotFoundError, match="model"):
        client.completions.create(model="none", prompt="x")
    with pytest.raises(openai.UnprocessableEntityError):
        client.completions.create(model="tiny", prompt="x", n=2)
    with pytest.raises(openai.UnprocessableEntityError, match="tokens"):
        client.completions.create(model="tiny", prompt="word " * 40_000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="no", max_retries=0).models.list()
    pieces = client.completions.create(model="tiny", prompt="word " * 40_000, stream=True)
    with pytest.raises(openai.APIError, match="tokens"):
        list(pieces)


def test_a_client_that_goes_away_frees_the_engine(service: Service) -> None:
    began_s = time.monotonic()
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=service.token, max_retries=0)
    stream = client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=512, stream=True)
    next(iter(stream))
    stream.close()
    client.completions.create(model="tiny", prompt="Hello", max_tokens=1)
    assert time.monotonic() - began_s < 60
