"""What a real engine takes: its steps, by prompts that it computes alone, and loads, by those that it has stored."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...connectors.serving.messages import LOADERS
from ..vllm.engine import Engine
from ..vllm.inputs import Prompts
from .costs import Costs, LoadCost, PrefillCost, pairs

QUESTION_TOKENS = 32  # behind what is stored, new in every request
_DECODED = 9  # tokens of an answer whose steps are timed
_ROUNDS = 5


def measured_prefill(engine: Engine, prompts: Prompts, lengths: Sequence[int], together: int) -> PrefillCost:
    """From times to the first token of prompts that meet an idle engine, and from the steps behind them.

    Parameters
    ----------
    lengths : of the prompts.
    together : requests whose answers are generated at once, beside one alone.
    """
    rows: dict[tuple[float, ...], list[float]] = {}
    for number in range(_ROUNDS + 1):
        for count in (1, together):
            for length in lengths:
                engine.reset()
                asked = prompts.documents(count, length)
                served = engine.generate(asked, {"load": False, "save": False}, new_tokens=_DECODED)
                if not number:
                    continue
                if count == 1:
                    rows.setdefault((1.0, length, pairs(length), 0.0), []).append(served.first_s[0])
                behind = length + _DECODED / 2
                step = (1.0, count, count * behind, count * behind)
                rows.setdefault(step, []).append(served.decode_s / (_DECODED - 1))
    return fitted(list(rows), [statistics.median(found) for found in rows.values()])


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


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """Seconds of loads, medians.

    Attributes
    ----------
    one_s, whole_s : of a chunk, and of a whole document, alone.
    crowded_s : of a whole document among `LOADERS` at once.
    beside_s : of a request that loads, beside the load and what it computes then.
    """

    one_s: float
    whole_s: float
    crowded_s: float
    beside_s: float


def measured_loads(
    engine: Engine, texts: Sequence[Sequence[int]], prompts: Prompts, prefill: PrefillCost, chunk_tokens: int
) -> LoadTimes:
    """Loads of an engine that loads whatever is stored, all of `texts`; one that decides learns from them."""
    whole = len(texts[0]) // chunk_tokens
    found: dict[tuple[int, int], list[float]] = {(1, 1): [], (whole, 1): [], (whole, LOADERS): []}
    beside: list[float] = []
    for number in range(_ROUNDS + 1):
        for (chunks, count), times in found.items():
            engine.reset()
            asked = [[*text[: chunks * chunk_tokens], *prompts.ids(QUESTION_TOKENS)] for text in texts[:count]]
            served = engine.generate(asked, {"save": False})
            if not number:
                continue
            times.append(statistics.fmean(float((usage or {})["load_s"]) for usage in served.usage))
            if count == 1:
                computed_s = prefill.seconds(QUESTION_TOKENS, chunks * chunk_tokens)
                beside.append(served.first_s[0] - times[-1] - computed_s)
    one_s, whole_s, crowded_s = (statistics.median(times) for times in found.values())
    return LoadTimes(one_s, whole_s, crowded_s, statistics.median(beside))


def costs_of(
    prefill: PrefillCost, loads: LoadTimes, *, tier: str, chunks: int, chunk_tokens: int, chunk_bytes: int
) -> Costs:
    """What a schedule is given; `chunks`: of a whole document."""
    chunk_s = max(loads.whole_s - loads.one_s, 1e-6 * loads.whole_s) / max(chunks - 1, 1)
    lanes = min(max(LOADERS * loads.whole_s / loads.crowded_s, 1.0), float(LOADERS))
    load = LoadCost(read_s=chunk_s, start_s=max(loads.one_s - chunk_s, 0.0))
    return Costs(prefill, chunk_tokens, chunk_bytes, {tier: load}, max(loads.beside_s, 0.0), lanes)
