"""Whether a server answers under a URL, and takes what the URL says.

A tier is asked in a process of its own: clients of others write where they like and wait for longer than they are told,
and none of them shall be imported here.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import SplitResult, parse_qsl, urlsplit

from ...connectors.tier_url import check_url, open_tier, shown
from ...core import ChunkKey
from ...evaluation.environment import ROOT

TIMEOUT_S = 5.0
_CONNECT_S = 2.0
_START_S = 20.0  # of the other process, which imports torch
_MARK = "ANSWER "
_PORTS = {"redis": 6379, "rediss": 6379, "mooncake": 50051, "http": 80, "https": 443}
_KNOWN = (  # a path that only this server has, and a field of its answer
    ("kvloom service", "/healthz", "status"),
    ("SGLang", "/server_info", "version"),
    ("LMCache", "/status", "is_healthy"),
    ("vLLM", "/version", "version"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a URL.

    Attributes
    ----------
    where : the URL without user, password and options.
    is_usable : a server answers there, and takes credentials, bucket and so on as the URL gives them.
    text : what was found.
    command : that starts a server there, if none answers; otherwise empty.
    """

    where: str
    is_usable: bool
    text: str
    command: str = ""


def reach(url: str, *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Ask the server of a URL; takes at most some ten seconds more than `timeout_s`.

    Parameters
    ----------
    url : of a tier, as for `open_tier`; or `http://` of a kvloom service, vLLM, SGLang or LMCache without options,
        which is only asked whether it is well.

    Raises
    ------
    ValueError : it is no such URL. The message never shows a password.
    """
    check_url(url)
    parts, where = urlsplit(url), shown(url)
    address = _address(parts)
    if address is not None and (problem := _refused(address)):
        return Answer(where, False, problem, _start(parts.scheme, address))
    if parts.scheme in ("http", "https") and not parts.query:
        return _ask_http(where)
    problem = _ask_tier(url, timeout_s)
    return Answer(where, not problem, problem or "answers, and takes what the URL says")


def _address(parts: SplitResult) -> tuple[str, int] | str | None:
    """Host and port, or the path of a socket; None where only the client knows."""
    if parts.scheme == "unix":
        return parts.path
    if parts.scheme == "s3":
        endpoint = dict(parse_qsl(parts.query)).get("endpoint")
        return None if endpoint is None else _address(urlsplit(endpoint))
    return (parts.hostname or "", parts.port or _PORTS[parts.scheme])


def _refused(address: tuple[str, int] | str) -> str:
    """Why nobody can be reached there; empty if somebody is."""
    try:
        if isinstance(address, str):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_CONNECT_S)
                connection.connect(address)
        else:
            socket.create_connection(address, _CONNECT_S).close()
    except OSError as exc:
        return f"nobody answers: {exc.strerror or exc}"
    return ""


def _start(scheme: str, address: tuple[str, int] | str) -> str:
    """The command that starts a server where none answers."""
    if isinstance(address, str):
        return f"redis-server --port 0 --unixsocket {address} --maxmemory 4gb --maxmemory-policy allkeys-lru"
    host, port = address
    return {
        "redis": f"redis-server --bind {host} --port {port} --maxmemory 4gb --maxmemory-policy allkeys-lru",
        "s3": f"moto_server -H {host} -p {port}",
        "mooncake": f"mooncake_master -rpc_address={host} -rpc_port={port}",
        "http": f"kvloom serve --directory ./kv --host {host} --port {port}",
    }.get(scheme, "")


def _ask_http(where: str) -> Answer:
    for name, path, field in _KNOWN:
        try:
            with urllib.request.urlopen(where.rstrip("/") + path, timeout=_CONNECT_S) as response:  # noqa: S310
                answer = json.load(response)
        except (urllib.error.HTTPError, ValueError):
            continue
        except (OSError, HTTPException) as exc:
            return Answer(where, False, f"takes connections and does not answer: {getattr(exc, 'reason', exc)}")
        if isinstance(answer, dict) and field in answer:
            text = " ".join(filter(None, (name, str(answer.get("version", "")), "answers")))
            hint = "; add ?token_file=PATH to try a token" if name == "kvloom service" else ""
            return Answer(where, True, text + hint)
    return Answer(where, False, "something answers that is no kvloom service, vLLM, SGLang or LMCache")


def _ask_tier(url: str, timeout_s: float) -> str:
    """Why the tier cannot be used; empty if it can."""
    with TemporaryDirectory(prefix="kvloom-doctor-") as folder:  # an environment need not have kvloom
        (Path(folder) / "kvloom").symlink_to(ROOT, target_is_directory=True)
        paths = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "kvloom.bench.doctor.reachable"],
                input=json.dumps({"url": url, "timeout_s": timeout_s}),  # no password among the arguments
                capture_output=True,
                text=True,
                timeout=timeout_s + _START_S,
                env={**os.environ, "PYTHONPATH": paths},
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"has taken the connection and not answered within {timeout_s:g} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not lines:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return f"the process that asked has ended with exit code {done.returncode}: {last}"
    return str(json.loads(lines[-1].removeprefix(_MARK))["problem"])


def _problem(url: str, timeout_s: float) -> str:
    """Asks the tier for a chunk that is not there; why it cannot be asked, or nothing. In the other process."""
    try:
        tier = open_tier(url, name="doctor", timeout_s=timeout_s)
        _ = ChunkKey(bytes(32)) in tier
    except Exception as exc:  # noqa: BLE001  whatever it is, it is the answer
        return " ".join(str(exc).split()) or type(exc).__name__
    return ""


if __name__ == "__main__":
    question = json.load(sys.stdin)
    sys.stdout.write(f"\n{_MARK}{json.dumps({'problem': _problem(**question)})}\n")
    sys.stdout.flush()
    os._exit(0)  # clients' own threads may not let go
