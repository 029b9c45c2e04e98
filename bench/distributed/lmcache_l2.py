"""LMCache's own benchmark of L2 adapters (`lmcache bench l2`): kvloom's beside LMCache's two for files."""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ..harness.peer import PeerError, environment_with_kvloom
from ..harness.rounds import Comparison

KVLOOM, FS, NATIVE = "kvloom", "fs", "fs_native"
_OPERATIONS = {"store": "LMCache store", "load": "LMCache load"}
_TIMEOUT_S = 600.0
_KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class L2Sizes:
    """How much is measured.

    Attributes
    ----------
    object_bytes, objects : of one submitted task.
    tasks : measured in a process, after one that warms up; the process gives their median.
    rounds : processes of each adapter, which take turns.
    """

    object_bytes: int
    objects: int
    tasks: int
    rounds: int


def compare(python: Path, folder: Path, sizes: L2Sizes, bar: Progress) -> list[Comparison]:
    """Seconds of a store and of a load of each adapter, from the page cache, in files in `folder`.

    Raises
    ------
    PeerError : the benchmark does not run, or what an adapter gave back was not what it was given.
    """
    seconds: dict[str, dict[str, list[float]]] = {what: {} for what in _OPERATIONS}
    task = bar.add_task("LMCache's benchmark", total=sizes.rounds * 3)
    draw = random.Random(0)
    for _ in range(sizes.rounds):
        for way in draw.sample((KVLOOM, FS, NATIVE), 3):
            with tempfile.TemporaryDirectory(dir=folder, prefix="l2-") as place:
                for what, spent_s in _measured(python, _adapter(way, place), sizes).items():
                    seconds[what].setdefault(way, []).append(spent_s)
            bar.advance(task)
    bar.remove_task(task)
    order = (FS, KVLOOM, NATIVE)
    return [
        Comparison(name, sizes.object_bytes, sizes.objects, FS, {way: seconds[what][way] for way in order})
        for what, name in _OPERATIONS.items()
    ]


def _adapter(way: str, place: str) -> dict[str, object]:
    if way != KVLOOM:
        return {"type": way, "base_path": place}
    return {
        "type": "plugin",
        "module_path": "kvloom.connectors.lmcache",
        "class_name": "KVLoomL2Adapter",
        "adapter_params": {"disk_path": place},
    }


def _measured(python: Path, adapter: Mapping[str, object], sizes: L2Sizes) -> dict[str, float]:
    """Median seconds of a store and of a load; LMCache compares what came back with what was stored."""
    command = [
        *(str(python.with_name("lmcache")), "bench", "l2", "--format", "json", "--no-skip-verify"),
        *("--l2-adapter", json.dumps(adapter), "--data-size-kb", str(sizes.object_bytes // _KIB)),
        *("--num-keys", str(sizes.objects), "--rounds", str(sizes.tasks), "--lookup-max-hit-rate", "1.0"),
    ]
    kind = adapter["type"]
    with environment_with_kvloom() as environment:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=environment, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise PeerError(f"LMCache's benchmark of {kind} does not run: {exc}") from exc
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines()
        raise PeerError(f"LMCache's benchmark of {kind} has failed: {words[-1] if words else 'without a word'}")
    return read_output(done.stdout, sizes.objects * sizes.tasks)


def read_output(text: str, objects: int) -> dict[str, float]:
    """Median seconds by operation, of what `lmcache bench l2 --format json` prints.

    Parameters
    ----------
    objects : that each operation was to move.

    Raises
    ------
    PeerError : it is none, or an operation has not moved all of them.
    """
    begin = text.find("\n{")
    try:
        whole = json.JSONDecoder().raw_decode(text[begin + 1 :])[0]
    except ValueError as exc:
        raise PeerError("LMCache's benchmark has printed no JSON") from exc
    found = {}
    for section in _sections(whole):
        what = str(section["operation"]).lower()
        if what in _OPERATIONS:
            if section["total_success"] != objects:
                raise PeerError(f"LMCache's benchmark has moved {section['total_success']} of {objects} by a {what}")
            found[what] = float(section["duration_p50_ms"]) / 1e3
    if found.keys() != _OPERATIONS.keys():
        raise PeerError(f"LMCache's benchmark tells of {sorted(found)}; expected {sorted(_OPERATIONS)}")
    return found


def _sections(whole: Any) -> Iterator[dict[str, Any]]:
    """Those of operations, wherever they stand."""
    if isinstance(whole, dict):
        if "operation" in whole:
            yield whole
        else:
            for each in whole.values():
                yield from _sections(each)
    elif isinstance(whole, list):
        for each in whole:
            yield from _sections(each)
