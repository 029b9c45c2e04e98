"""Indexes over blocks that are shared, freed and written again: what is attended to is always what the blocks hold."""

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.connectors.vllm.packings import GATHERS, PACKINGS, find_packing, unpacked
from kvloom.connectors.vllm.retrieval import in_place
from kvloom.connectors.vllm.retrieval.paged_index import PagedRetrieval
from kvloom.connectors.vllm.retrieval.rows import DecodeRow, PromptPart, kept_queries, window_grid
from kvloom.retrieval.attention import attend, attend_at, attend_selected
from kvloom.retrieval.coverage import covering
from kvloom.retrieval.selector import LayerShape, choose
from kvloom.retrieval.settings import CHUNK_TOKENS, Retrieval

from .test_paged_layers import Backend

H, G, D, N = 2, 2, 8, 32
SHAPE = LayerShape(H, G, D, D**-0.5)
SINKS, WINDOW = 16, 40


def paged_of(packing: str = "side by side", *, method: str = "exact", **settings: Any) -> PagedRetrieval:
    settings = {"budget_ratio": 0.05, "sink_tokens": SINKS, "window_tokens": WINDOW, **settings}
    return PagedRetrieval(Retrieval(method, **settings), SHAPE, 0, D, PACKINGS[packing], N)


def attended(
    paged: PagedRetrieval, step: int, row: DecodeRow, query: Tensor, cache: Tensor, kernel: Any = None
) -> Tensor:
    return paged.attend(step, [row], query[None], cache, kernel)[0]


def kernel_of(packing: str) -> Any:
    """What an engine's kernel does with rows of blocks of one head."""

    def attend_to_blocks(queries: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        blocks = cache.view(-1, 1, *cache.shape[2:])
        out = torch.empty_like(queries)
        for place, (row, length) in enumerate(zip(table.long(), lengths.tolist(), strict=True)):
            keys, values = unpacked(PACKINGS[packing], blocks[row[: -(-length // N)]], D, D)
            out[place] = attend(queries[place], keys[:, :length], values[:, :length], scale=SHAPE.scale)[0]
        return out

    return attend_to_blocks


def write(paged: PagedRetrieval, cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Side by side; keys and values `[T, H, D]`."""
    cache[slots // N, :, slots % N] = torch.cat((keys, values), -1)
    paged.wrote(slots, len(cache))


def expected(paged: PagedRetrieval, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Of the last of tokens `[H, T, D]`, from nothing but them: sinks, window, and the best of the rest."""
    position = keys.shape[1] - 1
    stop = paged.stop(position)
    selector = paged.retrieval.selector(SHAPE, 0)
    selector.add(keys[:, SINKS:stop], values[:, SINKS:stop])
    ids = selector.select(query, position, paged.retrieval.budget(len(selector))).ids
    near = torch.cat((torch.arange(SINKS), torch.arange(stop, position + 1)))
    ids = torch.cat((near.expand(H, -1), ids), 1)[..., None].expand(-1, -1, D)
    return attend(query, keys.gather(1, ids), values.gather(1, ids), scale=SHAPE.scale)[0]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_attention_is_over_sinks_window_and_what_is_chosen(packing: str, dtype: torch.dtype, near: float) -> None:
    """Blocks in any order, both packings, contexts that end anywhere; a budget of everything is dense attention."""
    torch.manual_seed(0)
    for tokens in (CHUNK_TOKENS + WINDOW + 1, 700, 1000):
        keys, values, query = (torch.randn(heads, n, D).to(dtype) for heads, n in ((H, tokens), (H, tokens), (H, G)))
        query = query.flatten(0, 1)
        count = -(-tokens // N)
        blocks = torch.randperm(count + 5)[:count]
        cache = torch.randn(count + 5, H, N, 2 * D).to(dtype)
        positions = torch.arange(tokens)
        slots = blocks[positions // N] * N + positions % N
        Backend(packing).do_kv_cache_update(None, keys.transpose(0, 1), values.transpose(0, 1), cache, slots)
        row = DecodeRow(0, 0, tokens - 1, blocks)
        for ratio in (0.05, 1.0):
            paged = paged_of(packing, budget_ratio=ratio)
            paged.wrote(slots, len(cache))
            found = attended(paged, 0, row, query, cache)
            assert found.dtype == dtype
            assert torch.allclose(found.float(), expected(paged, query, keys, values), atol=near)
            assert paged.counts.rows == 1
        dense = attend(query, keys, values, scale=SHAPE.scale)[0]
        assert torch.allclose(found.float(), dense, atol=near)
        few = paged_of(packing)
        few.wrote(slots, len(cache))
        assert not torch.allclose(attended(few, 0, row, query, cache).float(), dense, atol=0.1), (
            "it is an approximation"
        )


@pytest.mark.parametrize("is_in_place", [True, False])
@pytest.mark.parametrize("coverage", [None, 0.4])
@pytest.mark.parametrize("packing", PACKINGS)
def test_the_default_method_counts_what_it_does_not_choose(
    packing: str, coverage: float | None, is_in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned tokens are among it. The engine's kernel, which attends to whole blocks, is not asked."""
    if not is_in_place:
        monkeypatch.setattr(in_place, "compiled_for_cpu", lambda: None)
    torch.manual_seed(3)
    tokens, rows = 900, []
    keys, values, query = torch.randn(H, tokens, D), torch.randn(H, tokens, D) + 1, torch.randn(H * G, D)
    count, positions = -(-tokens // N), torch.arange(tokens)
    blocks = torch.randperm(count)
    cache, slots = torch.randn(count, H, N, 2 * D), blocks[positions // N] * N + positions % N
    Backend(packing).do_kv_cache_update(None, keys.transpose(0, 1), values.transpose(0, 1), cache, slots)
    for value_bits in (0, 1):
        paged = paged_of(packing, method="quantized", coverage=coverage, parameters={"value_bits": value_bits})
        paged.wrote(slots, len(cache))
        found = attended(paged, 0, DecodeRow(0, 0, tokens - 1, blocks), query, cache, kernel_of(packing))
        if not value_bits:
            rows.append(found)
            continue
        stop = paged.stop(tokens - 1)
        selector = paged.retrieval.selector(SHAPE, 0)
        selector.add(keys[:, SINKS:stop], values[:, SINKS:stop])
        seen = torch.cat((torch.arange(SINKS), torch.arange(stop, tokens)))
        near = attend(query, keys[:, seen], values[:, seen], scale=SHAPE.scale)
        chosen = choose(selector, query, tokens - 1, paged.retrieval.budget(len(selector)), near[1])
        if coverage is not None:
            of_chosen = keys.gather(1, chosen.ids[..., None].expand(-1, -1, D))
            chosen = covering(chosen, of_chosen, query, near[1], coverage=coverage, scale=SHAPE.scale)
            assert int((chosen.ids >= 0).sum()) < H * paged.retrieval.budget(len(selector))
        whole = attend_selected(near, chosen, partial(attend_at, query, keys, values, scale=SHAPE.scale))[0]
        assert torch.allclose(found, whole, atol=1e-4)
        dense = attend(query, keys, values, scale=SHAPE.scale)[0]
        assert float((found - dense).norm()) < 0.5 * float((rows[0] - dense).norm())


@pytest.mark.parametrize("packing", PACKINGS)
def test_single_tokens_are_read_as_packed(packing: str) -> None:
    layer = SimpleNamespace(layer_name="0", impl=Backend(packing))
    cache = torch.randn(6, H, N, D + 3)
    assert find_packing(layer, cache, D, 3) == (PACKINGS[packing], True)
    keys, values = unpacked(PACKINGS[packing], cache, D, 3)
    ids = torch.randint(0, 6 * N, (H, 50))
    k, v = GATHERS[PACKINGS[packing]](cache, D, ids // N, ids % N)
    for found, all_rows in ((k, keys), (v, values)):
        assert torch.equal(found, all_rows.gather(1, ids[..., None].expand(-1, -1, all_rows.shape[2])))


def of_whole_blocks(paged: PagedRetrieval, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As `expected`, of all tokens in the blocks of those."""
    position, out = keys.shape[1] - 1, []
    stop = paged.stop(position)
    selector = paged.retrieval.selector(SHAPE, 0)
    selector.add(keys[:, SINKS:stop], values[:, SINKS:stop])
    ids = selector.select(query, position, paged.retrieval.budget(len(selector))).ids
    for head in range(H):
        touched = {token // N for token in ids[head].tolist()} | {0} | set(range(stop // N, position // N + 1))
        tokens = torch.tensor([t for t in range(position + 1) if t // N in touched])
        here = query[head * G : (head + 1) * G]
        out.append(attend(here, keys[head : head + 1, tokens], values[head : head + 1, tokens], scale=SHAPE.scale)[0])
    return torch.cat(out)


@pytest.mark.parametrize("packing", PACKINGS)
def test_with_a_kernel_whole_blocks_are_attended_to(packing: str) -> None:
    """Rows of several lengths at once; those whose tokens are scattered too widely are gathered."""
    torch.manual_seed(1)
    lengths = (1000, 1500, 600, 250)
    total = sum(-(-tokens // N) for tokens in lengths)
    cache, order = torch.randn(total, H, N, 2 * D), torch.randperm(total)
    paged = paged_of(packing, budget_ratio=0.02)
    rows, contents, first = [], [], 0
    for number, tokens in enumerate(lengths):
        blocks = order[first : first + -(-tokens // N)]
        first += len(blocks)
        keys, values, positions = torch.randn(H, tokens, D), torch.randn(H, tokens, D), torch.arange(tokens)
        slots = blocks[positions // N] * N + positions % N
        Backend(packing).do_kv_cache_update(None, keys.transpose(0, 1), values.transpose(0, 1), cache, slots)
        paged.wrote(slots, total)
        rows.append(DecodeRow(number, number, tokens - 1, blocks))
        contents.append((keys, values))
    queries = torch.randn(len(rows), H * G, D)
    whole = [of_whole_blocks(paged, q, *kv) for q, kv in zip(queries[:3], contents, strict=False)]
    exactly = [expected(paged, q, *kv) for q, kv in zip(queries[:3], contents, strict=False)]
    dense = attend(queries[3], *contents[3], scale=SHAPE.scale)[0]
    for limit, found in ((1e9, whole), (0.0, exactly)):
        paged.touched_limit = limit
        out = paged.attend(int(limit), rows, queries, cache, kernel_of(packing))
        assert torch.allclose(out, torch.stack([*found, dense]), atol=1e-5)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(whole, exactly, strict=True)), "these are not the same"


class Requests:
    """An engine's blocks: requests come, share blocks, decode, are preempted and go; freed blocks are soon used again.

    Attributes
    ----------
    live : by name, keys and values `[T, H, 2 D]` and blocks.
    waiting : what preempted requests had.
    """

    def __init__(self, paged: PagedRetrieval, seed: int) -> None:
        self.paged, self.rng = paged, random.Random(seed)
        torch.manual_seed(seed)
        self.cache = torch.randn(130, H, N, 2 * D)
        self.free = list(range(1, 130))
        self.users = dict.fromkeys(range(130), 0)
        self.live: dict[int, tuple[Tensor, list[int]]] = {}
        self.waiting: list[Tensor] = []
        self.step = self.names = 0

    def admit(self, content: Tensor, shared: list[int]) -> None:
        """Computes a prompt, or what was preempted, behind blocks that hold its beginning already."""
        count = -(-len(content) // N)
        if count - len(shared) > len(self.free):
            return
        for block in shared:
            self.users[block] += 1
        blocks = shared + [self.free.pop() for _ in range(count - len(shared))]
        for block in blocks[len(shared) :]:
            self.users[block] += 1
        self.names += 1
        self.live[self.names] = content, blocks
        self._write(content, blocks, len(shared) * N, len(content))

    def _write(self, content: Tensor, blocks: list[int], first: int, stop: int) -> None:
        positions = torch.arange(first, stop)
        slots = torch.tensor(blocks)[positions // N] * N + positions % N
        write(self.paged, self.cache, slots, content[first:stop, :, :D], content[first:stop, :, D:])

    def leave(self, name: int) -> Tensor:
        content, blocks = self.live.pop(name)
        for block in blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        return content

    def begin(self) -> None:
        """A new request, or one that had to wait; a few begin like another one, in the same blocks."""
        if self.waiting and self.rng.random() < 0.5:
            self.admit(self.waiting.pop(), [])
            return
        tail = torch.randn(self.rng.randrange(20, 700), H, 2 * D)
        if self.live and self.rng.random() < 0.4:
            content, blocks = self.live[self.rng.choice(list(self.live))]
            count = self.rng.randrange(len(content) // N + 1)
            self.admit(torch.cat((content[: count * N], tail)), blocks[:count])
        else:
            self.admit(tail, [])

    def decode(self, name: int) -> None:
        """One more token, in a block of its own if need be; its attention is what the blocks say."""
        content, blocks = self.live[name]
        if len(content) % N == 0:
            if not self.free:
                self.waiting.append(self.leave(name))
                return
            blocks = [*blocks, self.free.pop()]
            self.users[blocks[-1]] += 1
        content = torch.cat((content, torch.randn(1, H, 2 * D)))
        self.live[name] = content, blocks
        self._write(content, blocks, len(content) - 1, len(content))
        if not self.paged.stop(len(content) - 1):
            return
        number = list(self.live).index(name)
        query = torch.randn(H * G, D)
        row = DecodeRow(number, number, len(content) - 1, torch.tensor(blocks))
        found = attended(self.paged, self.step, row, query, self.cache)
        keys, values = content.transpose(0, 1).split(D, -1)
        assert torch.allclose(found, expected(self.paged, query, keys, values), atol=1e-5)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            if self.rng.random() < 0.2 or not self.live:
                self.begin()
            if self.live and self.rng.random() < 0.1:
                name = self.rng.choice(list(self.live))
                content = self.leave(name)
                if self.rng.random() < 0.5:
                    self.waiting.append(content)
            for name in list(self.live):
                if self.rng.random() < 0.9:  # not every one in every step
                    self.decode(name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_blocks_go_from_one_request_to_another(seed: int) -> None:
    paged = paged_of()
    Requests(paged, seed).run(250)
    assert paged.counts.refused_rows == 0
    assert paged.counts.rows > 4 * paged.counts.indexes > 8, "indexes last"


@pytest.mark.slow
def test_an_index_of_written_blocks_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: were writes not noted, the same run would attend to what is not there any more."""
    paged = paged_of()
    requests = Requests(paged, 0)
    paged.writes.note(torch.arange(130 * N), N, 130)
    monkeypatch.setattr(paged.writes, "note", lambda *_: None)
    with pytest.raises(AssertionError):
        for _ in range(10):
            requests.run(100)


def filled(paged: PagedRetrieval, tokens: int = 600) -> tuple[DecodeRow, Tensor, Tensor, Tensor]:
    count = -(-tokens // N)
    cache, content = torch.zeros(count + 1, H, N, 2 * D), torch.randn(tokens, H, 2 * D)
    slots = torch.arange(N, N + tokens)
    write(paged, cache, slots, content[..., :D], content[..., D:])
    row = DecodeRow(0, 0, tokens - 1, torch.arange(1, count + 1))
    return row, cache, content.transpose(0, 1)[..., :D], content.transpose(0, 1)[..., D:]


def test_what_was_filled_unseen_is_attended_to_densely() -> None:
    paged = paged_of()
    row, cache, keys, values = filled(paged)
    unseen = paged_of()
    unseen.wrote(torch.arange(4 * N, len(cache) * N), len(cache))
    query = torch.randn(H * G, D)
    found = attended(unseen, 0, row, query, cache)
    assert torch.allclose(found, attend(query, keys, values, scale=SHAPE.scale)[0], atol=1e-5)
    assert (unseen.counts.refused_rows, unseen.counts.rows) == (1, 0)


def test_a_context_that_cannot_be_searched_stays_dense_and_others_do_not() -> None:
    paged = paged_of()
    row, cache, *_ = filled(paged)
    cache[4, 0, 3, 2] = torch.inf
    query = torch.randn(H * G, D)
    for step in range(3):
        attended(paged, step, row, query, cache)
    assert (paged.counts.refused_rows, paged.counts.indexes) == (3, 1), "it is not tried again"
    cache[4, 0, 3, 2] = 0.0
    paged.wrote(torch.tensor([4 * N + 3]), len(cache))
    attended(paged, 3, row, query, cache)
    assert (paged.counts.refused_rows, paged.counts.rows) == (3, 1), "other keys, another index"


def test_two_rows_of_one_step_never_share_an_index() -> None:
    """They begin alike and will go on differently."""
    paged = paged_of()
    row, cache, *_ = filled(paged)
    other = DecodeRow(1, 1, row.position, row.blocks)
    for step in range(3):
        for each in (row, other):
            attended(paged, step, each, torch.randn(H * G, D), cache)
    assert paged.counts.indexes == 2


def testindexes_nobody_asks_for_are_dropped() -> None:
    paged = paged_of()
    row, cache, *_ = filled(paged)
    query = torch.randn(H * G, D)
    attended(paged, 0, row, query, cache)
    short = DecodeRow(0, 0, 300, row.blocks[:10])
    for step in range(1, 70):
        attended(paged, step, short, query, cache)
    assert [index.stop for index in paged.indexes] == [CHUNK_TOKENS]
    assert paged.counts.indexes == 2


def testindexes_learn_from_the_queries_of_their_own_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept by block, in pieces, until the block begins anew."""
    paged = paged_of(method="sketch", parameters={"rank": 4, "centroids": 8})
    assert paged.learns
    row, cache, *_ = filled(paged)
    seen: list[tuple[Tensor, Tensor]] = []
    kind = type(paged.retrieval.selector(SHAPE, 0))
    monkeypatch.setattr(kind, "observe", lambda _, queries, positions: seen.append((queries, positions)))
    queries = torch.randn(600, H * G, D)
    stale = torch.full((600, H * G, D), 7.0)
    for first, stop, given in ((0, 600, stale), (0, 250, queries), (250, 600, queries)):
        paged.wrote(torch.arange(N + first, N + stop), len(cache))
        positions = torch.tensor(list(kept_queries(first, stop)))
        part = PromptPart(positions - first, positions, (positions // N + 1).tolist())
        paged.heard(part, given[first:stop])
    attended(paged, 0, row, queries[-1], cache)
    positions = torch.cat([where for _, where in seen])
    assert positions.tolist() == list(range(0, 600, 16))
    assert torch.equal(torch.cat([asked for asked, _ in seen], 1), queries[positions].transpose(0, 1))


@pytest.mark.parametrize("packing", PACKINGS)
def test_tokens_are_read_where_they_lie_or_copied_first(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without numba, copies: the same attention."""
    torch.manual_seed(2)
    paged, found = paged_of(packing), []
    row, cache, *_ = filled(paged)
    query = torch.randn(H * G, D)
    assert in_place.rows_in_place(PACKINGS[packing], cache, D) is not None
    found.append(attended(paged, 0, row, query, cache))
    monkeypatch.setattr(in_place, "compiled_for_cpu", lambda: None)
    assert in_place.rows_in_place(PACKINGS[packing], cache, D) is None
    found.append(attended(paged, 1, row, query, cache))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_views_that_are_copies_are_not_read_in_place() -> None:
    cache = torch.zeros(4, H, N, 2 * D)
    copying = lambda blocks, key_dim, _: (blocks[..., :key_dim].clone(), blocks[..., key_dim:])  # noqa: E731
    assert in_place.rows_in_place(copying, cache, D) is None
    assert in_place.rows_in_place(PACKINGS["side by side"], cache.double(), D) is None


def test_an_index_is_made_while_the_prompt_is_computed() -> None:
    """In pieces; the first decoded token finds it, and learning methods wait for the whole prompt."""
    paged = paged_of()
    row, cache, keys, values = filled(paged)
    for step, length in enumerate((200, 330, 600)):
        paged.grow(step, [DecodeRow(0, 0, length - 1, row.blocks[: -(-length // N)])], cache)
        assert [index.stop for index in paged.indexes] == ([] if length < 300 else [paged.stop(length - 1)])
    (index,) = paged.indexes
    query = torch.randn(H * G, D)
    found = attended(paged, 3, row, query, cache)
    assert paged.indexes == [index] and paged.counts.indexes == 1
    assert torch.allclose(found, expected(paged, query, keys, values), atol=1e-5)
    learning = paged_of(method="sketch")
    learning.grow(0, [row], cache)
    assert not learning.indexes


def test_what_leaves_the_window_together_is_whole_blocks() -> None:
    assert [window_grid(block) for block in (16, 32, 128, 256, 96, 512)] == [256, 256, 256, 256, 288, 512]
