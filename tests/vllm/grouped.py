"""Several KV cache groups without a model: vLLM's real scheduler, and both of kvloom's real halves.

In every group a token has a number in its slot, made of the token and of the numbers, in all groups, of the tokens that
each group's layers attend to. Where layers keep states, a block has one number, which each token makes anew of the last
one. So a block that is missing, stale, or another's shows in the answer, as it would with a model. Needs vLLM and its
own test utilities (`vllm_unit`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kvloom.connectors.serving.groups import GroupShape
from kvloom.connectors.serving.messages import WorkerInfo
from kvloom.connectors.serving.worker.layer_loads import LayerLoads
from kvloom.connectors.serving.worker.pieces import CacheGroup
from kvloom.connectors.serving.worker.steps import Steps, Worker
from kvloom.connectors.serving.worker.transfers import Transfers
from kvloom.core import KVSpec
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from .simulated import VOCABULARY, SimulatedWorker, vllm_unit

_NUMBERS = 1 << 50  # exact in 64-bit floats


def attended(shape: GroupShape, position: int) -> list[int]:
    """Tokens before `position` that it attends to, or goes on from; of a full group some of them."""
    if shape.keeps_state:
        return [position - 1] if position else []
    if shape.window_tokens is not None:
        return list(range(max(position - shape.window_tokens + 1, 0), position))
    if shape.local_tokens is not None:
        return list(range(position - position % shape.local_tokens, position))
    return sorted({each for each in (0, position // 3, position // 2, position - 1) if 0 <= each < position})


def number(group: int, token: int, weights: int, seen: Sequence[Sequence[int]]) -> int:
    return hash((group, token, weights, tuple(map(tuple, seen)))) % _NUMBERS


def plain_numbers(shapes: Sequence[GroupShape], tokens: Sequence[int], weights: int = 0) -> list[list[int]]:
    """By group and token."""
    found: list[list[int]] = [[] for _ in shapes]
    for position, token in enumerate(tokens):
        seen = [[row[q] for q in attended(shape, position)] for shape, row in zip(shapes, found, strict=True)]
        for group, row in enumerate(found):
            row.append(number(group, token, weights, seen))
    return found


def plain_answer(shapes: Sequence[GroupShape], prompt: Sequence[int], count: int, weights: int = 0) -> list[int]:
    answer: list[int] = []
    for _ in range(count):
        rows = plain_numbers(shapes, [*prompt, *answer], weights)
        answer.append(sum(row[-1] for row in rows) % VOCABULARY)
    return answer


class Slots:
    """A group's part of the cache. Blocks that nobody has written hold what is no number of any token."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.rows = torch.full((1, 1, blocks * block_tokens, 1), -1.0, dtype=torch.float64)

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> list[int]:
        size = self.block_tokens
        return [blocks[p // size] * size + p % size for p in range(start, stop)]

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[:, :, self.slots(blocks, start, stop)]
        return rows, rows.clone()

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        raise NotImplementedError

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        assert torch.equal(keys, values)
        self.rows[:, :, self.slots(blocks, start, start + keys.shape[2])] = keys


class States(Slots):
    """A group's states, one for each block: behind the last token of the step that wrote it."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        super().__init__(blocks, 1)
        self.block_tokens = block_tokens

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> list[int]:
        assert stop - start == 1 and stop % self.block_tokens == 0, "no other token of a block has a state"
        return [blocks[start // self.block_tokens]]


class GroupedWorker(SimulatedWorker):
    """Steps a scheduler whose connector has these groups; `bytes` of host memory for pieces."""

    def __init__(
        self, scheduler: Any, *, chunk_tokens: int, store: KVStore | None = None, nbytes: int | None = None
    ) -> None:
        super().__init__(scheduler)
        self.groups = scheduler.connector.scheduler_half._groups
        self.shapes = self.groups.shapes
        self.chunk_tokens = chunk_tokens
        self.ends: set[tuple[int, ...]] = set()  # tokens behind which a step ended, at borders of chunks
        self.caches = [
            (States if shape.keeps_state else Slots)(scheduler.kv_cache_config.num_blocks, shape.block_tokens)
            for shape in self.shapes
        ]
        specs = [KVSpec(f"model {i}", 1, 1, 1, torch.float64, None) for i in range(len(self.shapes))]
        pieces = [CacheGroup(*each) for each in zip(self.caches, specs, self.shapes, strict=True)]
        self.kv_store = store or KVStore([HostTier(nbytes)])
        transfers = Transfers(
            self.kv_store,
            self.caches[0],
            specs[0],
            0,
            chunk_tokens=chunk_tokens,
            load_timeout_s=20.0,
            save_pending_bytes=1 << 30,
            groups=pieces,
        )
        info = WorkerInfo(specs[0], token=self.token, further=tuple(specs[1:]))
        nothing = LayerLoads(
            transfers.reader,
            transfers.offers,
            self.caches[0],
            specs[0],
            0,
            chunk_tokens=chunk_tokens,
            load_timeout_s=20.0,
            count=transfers.count,
        )
        self.worker = Worker(info, transfers, nothing, {}, None, None, fails_whole=True)
        self.steps = Steps(self.worker)
        self.counts: dict[str, float] = {}

    def step(self, meanwhile: Callable[[], object] | None = None) -> Any:
        output = self.scheduler.schedule()
        plan = output.kv_connector_metadata.plan
        sampled = self._forward(output)
        self.steps.begin(plan)
        self.steps.save(plan)
        arrived = self.steps.end(plan, output.finished_req_ids)
        failed, bad_blocks = self.steps.take_failed(), self.steps.take_bad_blocks()
        assert not bad_blocks, "vLLM would raise"
        assert failed <= arrived, "among several ranks, vLLM would wait for that"
        for name, count in self.worker.transfers.take_counts().items():
            self.counts[name] = self.counts.get(name, 0) + count
        weights = self.weights
        if meanwhile is not None:
            meanwhile()
        self.failed_loads = failed
        self._tell(output, sampled, self.steps.take_report(), set(), arrived, weights)
        return output

    def settle(self) -> None:
        assert self.worker.transfers.settle(20.0)

    def is_right(self, name: str, prompt: Sequence[int]) -> bool:
        answer, weights = self.answers[name], self.weights_of[name]
        return all(
            answer[count] == plain_answer(self.shapes, [*prompt, *answer[:count]], 1, by)[0]
            for count, by in enumerate(weights)
        )

    def _forward(self, output: Any) -> dict[str, list[int]]:
        before = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        sampled: dict[str, list[int]] = {}
        for name, count in output.num_scheduled_tokens.items():
            rows = self.groups.in_order(self.scheduler.kv_cache_manager.get_block_ids(name))
            request, start = self.requests[name], before[name]
            stop, total = start + count, 0
            states = {
                group: [] if not start else [int(cache.rows[0, 0, row[(start - 1) // cache.block_tokens], 0])]
                for group, (cache, row) in enumerate(zip(self.caches, rows, strict=True))
                if isinstance(cache, States)
            }
            for position in range(start, stop):
                seen = [
                    states[group]
                    if group in states
                    else [int(cache.rows[0, 0, cache.slots(row, q, q + 1)[0], 0]) for q in attended(shape, position)]
                    for group, (cache, shape, row) in enumerate(zip(self.caches, self.shapes, rows, strict=True))
                ]
                total = 0
                for group, (cache, row) in enumerate(zip(self.caches, rows, strict=True)):
                    made = number(group, request.all_token_ids[position], self.weights, seen)
                    if group in states:
                        states[group] = [made]
                    else:
                        cache.rows[0, 0, cache.slots(row, position, position + 1)[0], 0] = made
                    total += made
            for group, (state,) in states.items():
                self.caches[group].rows[0, 0, rows[group][(stop - 1) // self.caches[group].block_tokens], 0] = state
            if stop % self.chunk_tokens == 0:
                self.ends.add(tuple(request.all_token_ids[:stop]))
            sampled[name] = [total % VOCABULARY] if start + count >= request.num_tokens else []
        return sampled


def finish(worker: GroupedWorker) -> None:
    """All to the end; then nothing is held any more, by vLLM's own account and by kvloom's."""
    worker.run()
    worker.step()
    pool = worker.scheduler.kv_cache_manager.block_pool
    pool.null_block.ref_cnt = 0  # counts what it stands for, and is not looked at
    vllm_unit("utils").assert_scheduler_empty(worker.scheduler)
    managers = worker.scheduler.kv_cache_manager.coordinator.single_type_managers
    assert not any(manager.req_to_blocks or manager.num_cached_block for manager in managers)
    assert worker.scheduler.connector.scheduler_half.is_idle
    assert not len(worker.worker.transfers.offers), "every offer is over"


def specs_of(kinds: Sequence[Mapping[str, int]]) -> list[Any]:
    """vLLM's specs: `{}` for full attention, else `window` or `local` tokens, or `state`; `block` tokens."""
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

    made: list[Any] = []
    for kind in kinds:
        common = {"block_size": kind.get("block", 16), "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
        if "window" in kind:
            made.append(SlidingWindowSpec(**common, sliding_window=kind["window"]))
        elif "state" in kind:
            shapes, dtypes = ((3, 4), (2, 4)), (torch.bfloat16, torch.float32)
            made.append(
                MambaSpec(block_size=common["block_size"], shapes=shapes, dtypes=dtypes, mamba_cache_mode="align")
            )
        elif "local" in kind:
            made.append(ChunkedLocalAttentionSpec(**common, attention_chunk_size=kind["local"]))
        else:
            made.append(FullAttentionSpec(**common))
    return made
