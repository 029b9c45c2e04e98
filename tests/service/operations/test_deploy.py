"""What `deploy/` holds is valid, and does what it says: by the schemas and tools that read such files for real."""

import json
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.access.credentials import TokenFile
from kvloom.service.settings import ServiceSettings
from kvloom.testing.chunks import make_blob, make_key

from ..serving import Certificate, Service, service_in_thread

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
POD = MANIFESTS[1]["spec"]["template"]["spec"]


def container_file() -> list[tuple[str, str]]:
    """Instructions and their arguments."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def image_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for name, rest in container_file() if name == "ENV" for pair in shlex.split(rest))


# ---------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", ["1.28", "1.31", "1.34"])
def test_the_manifests_follow_kubernetes_own_schemas(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in MANIFESTS:
        validate.validate(manifest, version, strict=True)
    broken = {**MANIFESTS[0], "spec": {**MANIFESTS[0]["spec"], "prots": []}}
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, version, strict=True)


def test_the_manifests_fit_together_and_fit_the_image() -> None:
    service, stateful = MANIFESTS
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items() and stateful["spec"]["serviceName"] == "kvloom"
    assert stateful["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (container,) = POD["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container[probe]["httpGet"]
        assert get["port"] in ports and get["path"] in ("/readyz", "/healthz") and get["scheme"] == "HTTPS"
    volumes = {each["name"] for each in POD["volumes"]} | {
        each["metadata"]["name"] for each in stateful["spec"]["volumeClaimTemplates"]
    }
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) <= volumes
    environment = {**image_environment(), **{each["name"]: each["value"] for each in container["env"]}}
    for name, folder in (("DIRECTORY", "/data"), ("TLS_CERTIFICATE", "/tls"), ("TLS_KEY", "/tls")):
        assert environment[f"KVLOOM_{name}"].startswith(f"{folder}/") and folder in mounts
    settings = ServiceSettings(**{name.removeprefix("KVLOOM_").lower(): v for name, v in environment.items()})
    assert not settings.is_loopback and settings.uses_tls and settings.port == ports["https"]
    limit = 12 << 30
    assert container["resources"]["limits"]["memory"] == "12Gi"
    assert settings.host_bytes + settings.max_upload_bytes + settings.shared_memory_bytes + (1 << 30) <= limit
    assert settings.disk_bytes <= 0.95 * (100 << 30)
    assert POD["terminationGracePeriodSeconds"] > settings.drain_timeout_s + 5
    assert POD["enableServiceLinks"] is False, "KVLOOM_PORT of a service link would be taken for a setting"


# ------------------------------------------------------------------------------------ the container file, as it runs


def test_the_container_file_has_what_an_image_needs() -> None:
    instructions = container_file()
    names = [name for name, _ in instructions]
    assert set(names) <= {
        *("ARG", "FROM", "RUN", "COPY", "USER", "VOLUME", "EXPOSE", "ENV", "HEALTHCHECK", "STOPSIGNAL", "ENTRYPOINT")
    }
    assert names.index("USER") < names.index("ENTRYPOINT") and dict(instructions)["USER"] == "10001"
    assert json.loads(dict(instructions)["ENTRYPOINT"]) == ["kvloom", "serve"]
    for name, rest in instructions:
        if name == "RUN":  # as a shell reads it
            assert subprocess.run(["sh", "-n", "-c", rest], capture_output=True, check=False).returncode == 0, rest
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    needed = re.findall(r'^"?kvloom\S* = "([^"/]+)', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert not {*needed, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} & set(ignored)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate; it is not installed")
def test_a_pod_starts_serves_and_is_healthy(tmp_path: Path) -> None:
    """The commands of manifest and image in their order, without a container: with their paths moved to a folder."""
    (tmp_path / "data").mkdir(mode=0o2770)
    certificate = Certificate(tmp_path / "tls")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def here(text: str) -> str:
        text = text.replace("/data", f"{tmp_path}/data").replace("/tls/", f"{tmp_path}/tls/")
        return text.replace("8700", str(port))

    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "kvloom").write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from kvloom.cli import main; main()" "$@"\n')
    (tools / "kvloom").chmod(0o755)
    (tools / "python").symlink_to(sys.executable)
    environment = {name: here(value) for name, value in image_environment().items()}
    environment |= {each["name"]: each["value"] for each in POD["containers"][0]["env"]}
    environment |= {"KVLOOM_PORT": str(port), "PATH": f"{tools}:{os.environ['PATH']}", "KVLOOM_DISK_BYTES": "1GiB"}
    environment = {**os.environ, **environment}
    first = POD["initContainers"][0]["command"]
    for _ in range(2):  # a pod that starts again makes no further token
        subprocess.run([here(each) for each in first], env=environment, check=True, timeout=120)
    token_file = tmp_path / "data" / "kvloom" / "operator.token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert len(TokenFile(tmp_path / "data" / "kvloom" / "tokens.json").entries()) == 1
    entry = json.loads(dict(container_file())["ENTRYPOINT"])
    with subprocess.Popen(entry, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and "serves https" in process.stdout.readline()
            context = ssl.create_default_context(cafile=str(certificate.chain))
            until_s = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"https://127.0.0.1:{port}/readyz", context=context) as answer:
                        assert answer.status == 200
                    break
                except OSError:
                    assert time.monotonic() < until_s and process.poll() is None
                    time.sleep(0.2)
            health = json.loads(dict(container_file())["HEALTHCHECK"].removeprefix("CMD "))
            subprocess.run([here(each) for each in health], env=environment, check=True, timeout=60)
            request = urllib.request.Request(f"https://127.0.0.1:{port}/metrics")
            request.add_header("Authorization", f"Bearer {token_file.read_text().strip()}")
            with urllib.request.urlopen(request, context=context) as answer:
                assert b"kvloom_service_ready 1.0" in answer.read()
        finally:
            process.terminate()
        assert process.wait(60) == 0


# ------------------------------------------------------------------------------------------------------- systemd


def test_systemd_takes_the_unit_and_the_command_takes_its_options(tmp_path: Path) -> None:
    unit = (DEPLOY / "kvloom.service").read_text()
    command = shlex.split(re.findall(r"^ExecStart=(.*)$", unit, flags=re.MULTILINE)[0])
    (tmp_path / "service.toml").write_text("port = 8700\n")
    shown = [*command[2:]]
    shown[shown.index("--config") + 1] = str(tmp_path / "service.toml")
    program = [sys.executable, "-c", "from kvloom.cli import main; main()", "config", "show"]
    done = subprocess.run([*program, *shown], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and 'directory = "/var/lib/kvloom"' in done.stdout, done.stderr
    assert "StateDirectory=kvloom" in unit and "StateDirectoryMode=0700" in unit
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    file = tmp_path / "kvloom.service"
    file.write_text(unit.replace(command[0], "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0 and checked.stderr == "", checked.stderr
    file.write_text(unit.replace("DynamicUser", "DynamikUser").replace(command[0], "/bin/true"))
    checked = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    assert "DynamikUser" in checked.stderr, "a wrong name is noticed"


# ------------------------------------------------------------------------------------------ Grafana and Prometheus

DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_dashboard_is_one_that_grafana_reads() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="pip install grafana-foundation-sdk")
    known = models.Dashboard.from_json(DASHBOARD)
    assert known.title == "kvloom service" and len(known.panels) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        spot = panel["gridPos"]
        assert spot["x"] + spot["w"] <= 24 and panel["targets"]
    spots = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(spots) == len(set(spots)) and len({p["id"] for p in DASHBOARD["panels"]}) == len(spots)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    tiers = [HostTier(5 * make_blob(0).nbytes), DiskTier(folder / "disk", 64 << 20)]
    with service_in_thread(folder, tiers) as service:
        yield service


def work(service: Service) -> None:
    """Hits in both tiers, misses, evictions, a pin."""
    with service.client(shared_memory=False) as client:
        client.pin([make_key(1)], 600)
        for number in range(20):
            client.put(make_key(number), make_blob(number))
        for number in range(25):
            client.get(make_key(number))


def test_every_query_names_metrics_and_labels_that_there_are(service: Service) -> None:
    parser = pytest.importorskip("promql_parser", reason="pip install promql-parser")
    work(service)
    text = service.ask("GET", "/metrics").body.decode()
    there = set(re.findall(r"^(kvloom_\w+)[ {]", text, flags=re.MULTILINE))
    labels = {name for found in re.findall(r"^kvloom_\w+\{([^}]*)\}", text, flags=re.MULTILINE)
              for name in re.findall(r"(\w+)=", found)}  # fmt: skip
    for title, query in QUERIES:
        filled = query.replace("$__rate_interval", "5m").replace("$job", "kvloom")
        parser.parse(filled)
        assert set(re.findall(r"kvloom_\w+", query)) <= there, title
        assert {each for by in re.findall(r"by \(([^)]*)\)", query) for each in by.split(", ")} <= labels, title
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels
    with pytest.raises(ValueError, match=r"."):
        parser.parse("rate(kvloom_lookups_total[5m]")


@pytest.mark.slow
def test_prometheus_scrapes_the_service_and_every_query_has_an_answer(service: Service, tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    (tmp_path / "token").write_text(service.new_token("monitoring", ["admin"]))
    scrape = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["scheme"] == "https" and job.pop("tls_config")["ca_file"]
    job |= {"scheme": "http", "scrape_interval": "1s", "scrape_timeout": "1s"}
    job["authorization"]["credentials_file"] = str(tmp_path / "token")
    job["static_configs"][0]["targets"] = [f"127.0.0.1:{service.port}"]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(scrape))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)

    def ask(query: str) -> list[Any]:
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(url, timeout=10) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        return list(told["data"]["result"])

    try:
        waiting = {query: title for title, query in QUERIES}
        until_s = time.monotonic() + 90
        while waiting:
            work(service)
            time.sleep(1.0)
            assert process.poll() is None and time.monotonic() < until_s, (
                waiting,
                (tmp_path / "log").read_text()[-2000:],
            )
            for query in list(waiting):
                try:
                    found = ask(query.replace("$__rate_interval", "1m").replace("$job", "kvloom"))
                except OSError:
                    break
                if any(each["value"][1] != "NaN" for each in found):
                    del waiting[query]
    finally:
        process.kill()
        process.wait()
