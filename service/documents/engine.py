"""The embedded engine: transformers models in one thread, which serves questions before it precomputes documents."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..access.tenants import TenantFile, store_namespace
from ..problems import ProblemError, not_found
from ..served_store import ServedStore
from .tenant_store import TenantStore

T = TypeVar("T")

_LOG = logging.getLogger("kvloom.service")
_MOST_WAITING = 256
URGENT, BACKGROUND = 0, 1


@dataclass(frozen=True, slots=True)
class _Work:
    """What the engine's thread is to do, and where the result goes."""

    function: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function())
        except BaseException as exc:  # noqa: BLE001  raised where the result is waited for
            self.future.set_exception(exc)


class EmbeddedEngine:
    """Models by name, loaded when they are first used. All computing is done by one thread, in order of urgency.

    Parameters
    ----------
    models : folder of each.
    recompute_ratio : share of document tokens that fusion recomputes.
    """

    def __init__(
        self, models: Mapping[str, Path], store: ServedStore, tenants: TenantFile, *, recompute_ratio: float
    ) -> None:
        self.models = dict(models)
        self._store = store
        self._tenants = tenants
        self._recompute_ratio = recompute_ratio
        self._loaded: dict[str, tuple[Any, Any]] = {}
        self._connectors: dict[tuple[str, str], Any] = {}
        self._work: queue.PriorityQueue[tuple[int, int, _Work | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._questions = 0  # that wait
        self._thread = threading.Thread(target=self._serve, name="kvloom-engine", daemon=True)
        if self.models:
            self._thread.start()

    def submit(self, function: Callable[[], T], *, urgency: int) -> Future[T]:
        """What the engine's thread makes of `function`. Raises `ProblemError` if too many questions are waiting.

        Documents that wait to be precomputed keep no question out.
        """
        with self._lock:
            if urgency == URGENT and self._questions >= _MOST_WAITING:
                raise ProblemError(503, "busy", "too much is waiting for the model", headers={"Retry-After": "5"})
            self._questions += urgency == URGENT
        work = _Work(function, Future())
        self._work.put((urgency, next(self._numbers), work))
        return work.future

    def name_of(self, model: str | None) -> str:
        """A model's name; None means the only one. Raises `ProblemError` if there is no such model."""
        if model is None and len(self.models) == 1:
            return next(iter(self.models))
        if not self.models:
            raise ProblemError(404, "no-model", "this service has no embedded engine; give it models in its settings")
        if model is None:
            raise ProblemError(422, "invalid", f"there are {len(self.models)} models; say which one")
        if model not in self.models:
            raise not_found(f"model {model[:80]!r}")
        return model

    def connector(self, model: str, pool: str) -> Any:
        """The `TransformersConnector` of a tenant. Only for the engine's thread."""
        found = self._connectors.get((model, pool))
        if found is None:
            from ...blend.blender import Blender
            from ...connectors.hf.connector import TransformersConnector
            from ...connectors.identity.requests import lead_of

            loaded, tokenizer = self._model(model)
            found = self._connectors[model, pool] = TransformersConnector(
                loaded,
                tokenizer,
                TenantStore(self._store, self._tenants.key_space(pool), store_namespace(pool, "documents")),
                Blender(recompute_ratio=self._recompute_ratio),
                lead_ids=lead_of(tokenizer),  # what a chat has before its documents is a part of its own prompt
            )
        return found

    def close(self) -> None:
        """Ends the thread after what it is at; what waits is cancelled."""
        self._work.put((-1, next(self._numbers), None))
        if self._thread.is_alive():
            self._thread.join(10.0)
        while not self._work.empty():
            _, _, work = self._work.get()
            if work is not None:
                work.future.cancel()
                work.future.set_running_or_notify_cancel()

    def _serve(self) -> None:
        while True:
            urgency, _, work = self._work.get()
            if work is None:
                return
            with self._lock:
                self._questions -= urgency == URGENT
            work.run()

    def _model(self, name: str) -> tuple[Any, Any]:
        if name not in self._loaded:
            from ...connectors.hf.loading import load_model

            _LOG.info("loading model %s", name)
            try:
                self._loaded[name] = load_model(self.models[name])
            except ValueError as exc:
                _LOG.error("model %s cannot be loaded: %s", name, exc)
                raise ProblemError(503, "no-model", f"model {name!r} cannot be loaded; the log says why") from exc
        return self._loaded[name]
