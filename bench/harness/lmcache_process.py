"""What processes in LMCache's own environment have in common: its storage manager, and answers over pipes.

They run as modules of kvloom, which their environment need not have: `peer.py` shows them where it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version

import torch
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.event_manager import EventManager
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.storage_manager import StorageManager

LAYERS, HIDDEN = 8, 512
GIB = 1 << 30


def storage_manager(config: LMCacheEngineConfig) -> StorageManager:
    """LMCache's storage of chunks of 256 tokens, `[2, LAYERS, 256, HIDDEN]` bfloat16."""
    metadata = LMCacheMetadata(
        model_name="bench",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(LAYERS, 2, 256, 8, HIDDEN // 8),
        role="worker",
        chunk_size=256,
    )
    return StorageManager(config, metadata, EventManager())


def serve(start: Callable[..., tuple[Mapping[str, Callable[..., float]], Callable[[], None]]]) -> None:
    """Answers questions on standard input, one JSON object a line, until it ends.

    The first line out is `{"version": ...}`. Each question `{"do": NAME, ...}` has the answer `{"seconds": ...}` or
    `{"error": ...}`. The last argument of the process is its number of threads.

    Parameters
    ----------
    start : of the other arguments, as text; gives what can be asked for, by name, and what ends it.
    """
    *arguments, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LMCache and its libraries write what they like to standard output
    verbs, close = start(*arguments)
    print(json.dumps({"version": version("lmcache")}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer: dict[str, object] = {"seconds": verbs[question.pop("do")](**question)}
        except Exception as exc:  # noqa: BLE001  every failure goes back to the caller
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
    close()
