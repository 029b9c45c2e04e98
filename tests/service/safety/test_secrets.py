"""Nothing that runs code comes from data, no route takes a path, and failures tell nothing of the machine."""

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvloom.service.access.credentials import TokenFile

from ...support.patience import eventually
from ..serving import Service, service_in_thread

ROOT = Path(__file__).resolve().parents[3]
RUNS_DATA = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "joblib"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
TRAINING = ROOT / "bench" / "reference"  # trains the bundled model; not in the wheel


def sources() -> list[Path]:
    skipped = {"tests", "build", "dist"}
    files = [path for path in ROOT.rglob("*.py") if not skipped & set(path.relative_to(ROOT).parts)]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def offences(tree: ast.AST) -> list[str]:
    """What could run code that came as data."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in RUNS_DATA]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module] if node.module.partition(".")[0] in RUNS_DATA else []
        elif isinstance(node, ast.Call):
            found += offences_of_call(node)
    return found


def offences_of_call(node: ast.Call) -> list[str]:
    found = [node.func.id] if isinstance(node.func, ast.Name) and node.func.id in RUNS_TEXT else []
    options = {each.arg: each.value for each in node.keywords}
    for name in ("trust_remote_code", "shell", "allow_pickle"):
        value = options.get(name)
        if isinstance(value, ast.Constant) and value.value is True:
            found.append(name)
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        owner, name = node.func.value.id, node.func.attr
        if (owner, name) in {("torch", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}:
            found.append(f"{owner}.{name}")
    return found


def test_no_file_runs_what_comes_as_data() -> None:
    files = sources()
    assert len(files) > 300
    found = {str(path.relative_to(ROOT)): offences(ast.parse(path.read_text())) for path in files}
    guilty = {path: names for path, names in found.items() if names and not (ROOT / path).is_relative_to(TRAINING)}
    assert guilty == {}
    training = {name for path, names in found.items() if names and path not in guilty for name in names}
    assert training <= {"torch.load"}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "Model.from_pretrained(f, trust_remote_code=True)",
        "run('x', shell=True)",
    ],
)
def test_each_of_these_would_be_found(text: str) -> None:
    assert offences(ast.parse(text))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with service_in_thread(tmp_path_factory.mktemp("service")) as service:
        return service.ask("GET", "/openapi.json", token=None).json()


def test_no_route_takes_a_path_or_an_address(document: Any) -> None:
    """By the names of everything that a request may hold, and by the formats that say what it is."""
    names: set[str] = set()

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            names.update(schema.get("properties", ()))
            assert schema.get("format") not in ("uri", "path", "file-path", "directory-path", "hostname"), schema
            for each in schema.values():
                walk(each)
        elif isinstance(schema, list):
            for each in schema:
                walk(each)

    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    schemas = document["components"]["schemas"]
    wanted = {name for operation in operations for name in references(operation.get("requestBody", {}))}
    while more := {each for name in wanted for each in references(schemas[name])} - wanted:
        wanted |= more
    for name in wanted:
        walk(schemas[name])
    for operation in operations:
        names.update(each["name"] for each in operation.get("parameters", ()))
    assert {"keys", "text", "messages", "KVLoom-Namespace"} <= names, "what requests hold was looked at"
    wrong = ("path", "file", "folder", "directory", "dir", "url", "uri", "host", "endpoint", "address", "command")
    assert [name for name in names for word in name.lower().replace("-", "_").split("_") if word in wrong] == []


def references(schema: Any) -> list[str]:
    """Names of the schemas that one speaks of."""
    if isinstance(schema, dict):
        own = [schema["$ref"].rpartition("/")[2]] if isinstance(schema.get("$ref"), str) else []
        return own + [found for each in schema.values() for found in references(each)]
    return [found for each in schema for found in references(each)] if isinstance(schema, list) else []


@pytest.mark.slow
def test_a_model_that_cannot_be_used_is_told_without_its_folder(tmp_path: Path) -> None:
    broken, foreign = tmp_path / "secret-broken", tmp_path / "secret-foreign"
    for folder, config in ((broken, "{"), (foreign, json.dumps({"model_type": "no-such-model"}))):
        folder.mkdir()
        (folder / "config.json").write_text(config)
    models = {"absent": tmp_path / "secret-absent", "broken": broken, "foreign": foreign}
    with service_in_thread(tmp_path / "kv", models=models) as service:
        for name in models:
            for path, body in (
                ("/v1/completions", {"model": name, "prompt": "x"}),
                ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
                ("/v1/compose", {"model": name, "documents": [{"text": "a"}], "question": "b"}),
                ("/v1/documents", {"model": name, "documents": [{"text": "a"}]}),
            ):
                answer = service.ask("POST", path, body)
                assert answer.status in (500, 503), (name, path, answer.body)
                assert b"secret" not in answer.body and str(tmp_path).encode() not in answer.body, answer.body


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
def test_tokens_that_root_makes_belong_to_whoever_runs_the_service(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    TokenFile(tmp_path / "tokens.json").create("default", ["read"])
    for path in (tmp_path / "tokens.json", tmp_path / ".tokens.json.lock"):
        assert path.stat().st_uid == 65534 and path.stat().st_mode & 0o777 == 0o600, path


@pytest.mark.slow
def test_tokens_come_and_go_while_the_service_runs(tmp_path: Path) -> None:
    with service_in_thread(tmp_path) as service:
        other = TokenFile(tmp_path / "tokens.json")  # as another process has it: `kvloom token`
        old = other.create("team", ["read"])
        assert asked(service, old) == 200, "a new token counts at once"
        new = other.create("team", ["read"])
        assert asked(service, new) == 200 == asked(service, old), "while both are there, clients change over"
        assert other.revoke(old.split("_")[1])
        assert eventually(lambda: asked(service, old) == 401) and asked(service, new) == 200
        brief = other.create("team", ["read"], ttl_s=3.0)
        assert asked(service, brief) == 200 and eventually(lambda: asked(service, brief) == 401)


def asked(service: Service, token: str) -> int:
    return service.ask("GET", "/v1/stats", token=token).status
