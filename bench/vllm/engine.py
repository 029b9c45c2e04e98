"""The other side of `vllm_server.py`: an engine of stock vLLM in a process of its own, asked from here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Self

from ...errors import KVLoomError
from .server import Ask, Choose, Expire, Failure, Replay, Reset, Served, Settle, Setup, SlowDown, serve

START_S, ANSWER_S, CLOSE_S = 300.0, 600.0, 30.0

KVLOOM = {
    "kv_connector": "KVLoomConnector",
    "kv_connector_module_path": "kvloom.connectors.vllm.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


class VLLMError(KVLoomError):
    """An engine does not start, has died, or served a request otherwise than its row of the table says."""


class Engine:
    """Stock vLLM, idle until it is asked; every request is greedy.

    Parameters
    ----------
    name : for messages.

    Raises
    ------
    VLLMError : it does not start; the message says why, the log says more.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self._log = setup.log
        self._has_prefixes = setup.prefix_caching
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, setup), name=name, daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive(START_S)
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: Mapping[str, object] | Sequence[Mapping[str, object]] | None = None,
        *,
        new_tokens: int = 1,
    ) -> Served:
        """Token ids to greedy tokens, all at once.

        Parameters
        ----------
        options : kvloom's for every request, or one for each.

        Raises
        ------
        VLLMError : the engine failed.
        """
        every = [options] * len(prompts) if options is None or isinstance(options, Mapping) else list(options)
        return self._served(Ask(prompts, new_tokens, every))

    def replay(self, asked: Replay) -> Served:
        """Requests that come one by one; `Served.seconds` counts from the first, `decode_s` is 0.

        Raises
        ------
        VLLMError : the engine failed.
        """
        return self._served(asked)

    def _served(self, asked: Ask | Replay) -> Served:
        self._pipe.send(asked)
        served = self._receive(ANSWER_S)
        if not isinstance(served, Served):
            raise VLLMError(f"{self.name} answered {served!r}; expected what it served")
        return served

    def reset(self) -> None:
        """Forget vLLM's own prefix cache, so that a hit is one of another cache."""
        if self._has_prefixes:
            self._pipe.send(Reset())
            self._receive(ANSWER_S)

    def settle(self) -> None:
        """Wait until kvloom has stored what it was to store."""
        self._pipe.send(Settle())
        self._receive(ANSWER_S)

    def slow_down(self, latency_s: float, byte_s: float) -> None:
        """Make loads slower from now on, see `Throttle`."""
        self._pipe.send(SlowDown(latency_s, byte_s))
        self._receive(ANSWER_S)

    def expire(self, ttl_s: float | None) -> None:
        """What is stored from now on is too old after so many seconds; None for never."""
        self._pipe.send(Expire(ttl_s))
        self._receive(ANSWER_S)

    def choose(self, load_or_recompute: str) -> None:
        """Decide what is loaded in this way from now on; see `Choose`."""
        self._pipe.send(Choose(load_or_recompute))
        self._receive(ANSWER_S)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(CLOSE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self, timeout_s: float) -> Served | None:
        try:
            if not self._pipe.poll(timeout_s):
                raise VLLMError(f"{self.name} said nothing for {timeout_s:g} s")
            answer: Served | Failure | None = self._pipe.recv()
        except (EOFError, ConnectionResetError) as exc:
            self._process.join(CLOSE_S)
            words = self._log.read_text(errors="replace").strip().splitlines() if self._log.exists() else []
            last = words[-1] if words else "without a word"
            raise VLLMError(f"{self.name} ended with exit code {self._process.exitcode}: {last}") from exc
        if isinstance(answer, Failure):
            raise VLLMError(f"{self.name}: {answer.text}")
        return answer


def expect_vllm() -> None:
    """Raises ImportError where vLLM is not installed, and says what to do."""
    if find_spec("vllm") is None:
        raise ImportError(
            "vLLM is not installed in this environment; engines have one of their own: "
            "make engines, then .venv-engines/vllm/bin/kvloom bench vllm"
        )
