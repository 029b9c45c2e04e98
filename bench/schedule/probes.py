"""What a real engine takes: its steps, by prompts that it computes alone, and loads, by those that it has stored."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeAlias

import torch

from ...connectors.serving.messages import LOADERS
from ..vllm.engine import Engine
from ..vllm.inputs import Prompts
from .costs import Costs, LoadCost, PrefillCost, pairs

QUESTION_TOKENS = 32  # behind what is stored, new in every request
_DECODED = 9  # tokens of an answer whose steps are timed

Times: TypeAlias = "dict[tuple[float, ...], list[float]]"
"""Seconds of what is asked again and again, by what it is."""


def probe_prefill(engine: Engine, prompts: Prompts, lengths: Sequence[int], together: int, times: Times) -> None:
    """Add times to the first token of prompts that meet an idle engine, and of the steps behind them.

    Parameters
    ----------
    lengths : of the prompts.
    together : requests whose answers are generated at once, beside one alone.
    times : by terms of a step, see `fitted`.
    """
    for count in (1, together):
        for length in lengths:
            engine.reset()
            asked = prompts.documents(count, length)
            served = engine.generate(asked, {"load": False, "save": False}, new_tokens=_DECODED)
            if count == 1:
                times.setdefault((1.0, length, pairs(length), 0.0), []).append(served.first_s[0])
            behind = length + _DECODED / 2
            step = (1.0, count, count * behind, count * behind)
            times.setdefault(step, []).append(served.decode_s / (_DECODED - 1))


def prefill_of(times: Times) -> PrefillCost:
    """What the medians say."""
    return fitted(list(times), [statistics.median(found) for found in times.values()])


def fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> PrefillCost:
    """Least squares of relative errors without negative costs: the most negative one is left out until there is none.

    Parameters
    ----------
    rows : of steps: 1, tokens, pairs of tokens, and tokens that they stand behind.
    seconds : that they took.
    """
    wanted = torch.tensor(seconds, dtype=torch.float64)
    matrix = torch.tensor(rows, dtype=torch.float64) / wanted[:, None]
    ones = torch.ones_like(wanted)
    scales = matrix.norm(dim=0).clamp_min(1e-300)  # columns differ by six powers of ten
    left = list(range(matrix.shape[1]))
    while True:
        found = torch.linalg.lstsq((matrix / scales)[:, left], ones, driver="gelsd").solution
        if float(found.min()) >= 0.0:
            break
        del left[int(found.argmin())]
    costs = [0.0] * matrix.shape[1]
    for column, value in zip(left, found, strict=True):
        costs[column] = float(value / scales[column])
    fixed_s, token_s, pair_s, behind_s = costs
    return PrefillCost(fixed_s, token_s, pair_s, behind_s=behind_s)


def probe_loads(
    engine: Engine, texts: Sequence[Sequence[int]], prompts: Prompts, chunk_tokens: int, times: Times
) -> None:
    """Add loads of one chunk and of a whole document alone, and of `LOADERS` documents at once; of an engine that loads
    whatever is stored, all of `texts`. One that decides learns from them.

    Parameters
    ----------
    times : of a load, by its chunks, how many run, and 0; of a request's time to the first token, the same with 1.
    """
    whole = len(texts[0]) // chunk_tokens
    for chunks, count in ((1, 1), (whole, 1), (whole, LOADERS)):
        engine.reset()
        asked = [[*text[: chunks * chunk_tokens], *prompts.ids(QUESTION_TOKENS)] for text in texts[:count]]
        served = engine.generate(asked, {"save": False})
        load_s = statistics.fmean(float((usage or {})["load_s"]) for usage in served.usage)
        times.setdefault((chunks, count, 0), []).append(load_s)
        times.setdefault((chunks, count, 1), []).append(served.first_s[0])


def costs_of(
    prefill: PrefillCost, loads: Times, *, tier: str, chunks: int, chunk_tokens: int, chunk_bytes: int
) -> Costs:
    """What a schedule is given; `chunks`: of a whole document."""
    median = {what: statistics.median(found) for what, found in loads.items()}
    one_s, whole_s, crowded_s = (median[what] for what in ((1, 1, 0), (chunks, 1, 0), (chunks, LOADERS, 0)))
    beside_s = [
        median[count, 1, 1] - median[count, 1, 0] - prefill.seconds(QUESTION_TOKENS, count * chunk_tokens)
        for count in (1, chunks)
    ]
    chunk_s = max(whole_s - one_s, 1e-6 * whole_s) / max(chunks - 1, 1)
    lanes = min(max(LOADERS * whole_s / crowded_s, 1.0), float(LOADERS))
    load = LoadCost(read_s=chunk_s, start_s=max(one_s - chunk_s, 0.0))
    return Costs(prefill, chunk_tokens, chunk_bytes, {tier: load}, max(statistics.fmean(beside_s), 0.0), lanes)
