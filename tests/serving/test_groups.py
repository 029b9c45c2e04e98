"""Groups of layers that keep different tokens: which pieces are stored, offered and loaded; no engine."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.connectors.serving.groups import NULL_BLOCK, GroupShape
from kvloom.connectors.serving.messages import Revocation, Save, Scheduled, StepPlan, WorkerInfo
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.settings import RequestOptions, ServingSettings
from kvloom.connectors.serving.worker.layer_loads import LayerLoads
from kvloom.connectors.serving.worker.pieces import CacheGroup
from kvloom.connectors.serving.worker.steps import Steps, Worker
from kvloom.connectors.serving.worker.transfers import Transfers
from kvloom.core import KVSpec
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.faulty import eventually, leaves_no_threads

BLOCK, CHUNK = 4, 8
SPECS = [KVSpec(f"model {group}", 1, 1, 2, torch.float32, None) for group in range(3)]
FULL, WINDOW, LOCAL = GroupShape(BLOCK), GroupShape(BLOCK, window_tokens=11), GroupShape(BLOCK, local_tokens=12)
TOKENS = list(range(100, 140))
LIMITS = st.one_of(st.none(), st.integers(1, 40))


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def is_attended(shape: GroupShape, token: int, by: int) -> bool:
    if shape.window_tokens is not None and token <= by - shape.window_tokens:
        return False
    return shape.local_tokens is None or token >= by - by % shape.local_tokens


@given(st.integers(1, 12), LIMITS, st.booleans(), st.integers(1, 20), st.integers(0, 9))
def test_pieces_hold_all_that_is_attended_to(
    block: int, limit: int | None, is_local: bool, chunk_tokens: int, chunk: int
) -> None:
    """By the token behind the chunk, and by its last one; and no more than the engine keeps while it computes it."""
    shape = GroupShape(block, None if is_local else limit, limit if is_local else None)
    first, stop = shape.first_chunk(chunk, chunk_tokens), (chunk + 1) * chunk_tokens
    held = [token for each in range(first, chunk + 1) for token in range(*shape.piece(each, chunk_tokens))]
    for by in (stop - 1, stop):
        begin = shape.first_kept(by)
        needed = [token for token in range(stop) if is_attended(shape, token, by) and token < by]
        assert begin % block == 0
        assert set(needed) <= {token for token in held if begin <= token < by}
        assert set(range(begin, by)) <= set(held), "blocks are filled whole"
    start, _ = shape.piece(chunk, chunk_tokens)
    assert all(start >= shape.first_kept(computed) for computed in range(stop))


class Pages:
    """A group's part of a cache: rows of numbers."""

    def __init__(self) -> None:
        self.block_tokens = BLOCK
        self.rows = torch.randn(1, 1, 60 * BLOCK, 2)

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> list[int]:
        return [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[:, :, self.slots(blocks, start, stop)]
        return rows, rows + 1

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        assert torch.equal(keys + 1, values)
        self.rows[:, :, self.slots(blocks, start, start + keys.shape[2])] = keys

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        raise NotImplementedError


class Halves:
    """Both halves of a connector over such groups."""

    def __init__(self, shapes: Sequence[GroupShape]) -> None:
        self.shapes, self.pages = shapes, [Pages() for _ in shapes]
        groups = [CacheGroup(*each) for each in zip(self.pages, SPECS, shapes, strict=False)]
        self.store = KVStore([HostTier(None)])
        limits = {"chunk_tokens": CHUNK, "load_timeout_s": 20.0}
        self.transfers = Transfers(
            self.store, self.pages[0], SPECS[0], 0, save_pending_bytes=1 << 20, groups=groups, **limits
        )
        nothing = LayerLoads(
            self.transfers.reader,
            self.transfers.offers,
            self.pages[0],
            SPECS[0],
            0,
            count=self.transfers.count,
            **limits,
        )
        info = WorkerInfo(SPECS[0], further=tuple(SPECS[1 : len(shapes)]))
        self.steps = Steps(Worker(info, self.transfers, nothing, {}, None, None, fails_whole=True))
        self.planner = Planner(
            ServingSettings.of({"chunk_tokens": CHUNK}),
            SPECS[:1],
            BLOCK,
            self.transfers.look_up,
            shapes=shapes,
            further=[[spec] for spec in SPECS[1 : len(shapes)]],
        )

    def rows(self, first: int, tokens: int, kept_from: int) -> list[tuple[int, ...]]:
        """Rows of blocks from number `first` on, with null blocks for what a request does not keep."""
        made = []
        for shape in self.shapes:
            begin, count = min(shape.first_kept(kept_from), tokens) // BLOCK, -(-tokens // BLOCK)
            made.append((NULL_BLOCK,) * begin + tuple(range(first + begin, first + count)))
        return made

    def store_all(self, tokens: int = len(TOKENS), by: int = 5) -> None:
        """A request computed in steps of `by` tokens, in blocks from 1 on."""
        self.planner.open("first", TOKENS[:tokens], b"", RequestOptions())
        for done in range(0, tokens, by):
            computed = min(done + by, tokens)
            blocks, *further = self.rows(1, computed, done)
            self.run(Scheduled("first", computed, blocks, by, tuple(further)))
        self.planner.close("first")
        assert self.transfers.settle(10.0)

    def run(self, *scheduled: Scheduled) -> StepPlan:
        plan = self.planner.plan_step(scheduled)
        self.steps.begin(plan)
        self.steps.save(plan)
        return plan

    def arrive(self) -> tuple[set[str], set[str]]:
        """Requests whose loads are over, and those of them that have failed."""
        arrived: set[str] = set()
        assert eventually(lambda: arrived or arrived.update(self.steps.end(StepPlan(), set())) or arrived)
        assert not self.steps.take_bad_blocks()
        return arrived, self.steps.take_failed()

    def ask(self, tokens: int, local: int = 0) -> tuple[int, list[tuple[int, ...]]]:
        """Tokens offered to another request of the same tokens, and its blocks if it takes them."""
        self.planner.open("second", TOKENS[:tokens], b"", RequestOptions())
        offered = self.planner.matched_tokens("second", local) or 0
        return offered, self.rows(30, local + offered, local + offered)

    def piece(self, chunk: int, group: int) -> bytes:
        keys = self.planner._keys.prefixes(TOKENS, self.planner._keys.salt(b""))
        keys.extend()
        return keys.of(chunk, group)[0]


@pytest.fixture(params=[(FULL, WINDOW, LOCAL), (WINDOW,), (FULL, WINDOW)], ids=["three", "a window", "two"])
def halves(request: pytest.FixtureRequest) -> Iterator[Halves]:
    made = Halves(request.param)
    yield made
    made.steps.close()


@pytest.mark.parametrize("by", [5, 8, 40])
@pytest.mark.parametrize("local", [0, 4, 12])
@pytest.mark.parametrize("tokens", [40, 39, 33, 32, 25])
def test_a_request_gets_what_it_keeps_and_nothing_else(halves: Halves, tokens: int, local: int, by: int) -> None:
    halves.store_all(by=by)
    before = [pages.rows.clone() for pages in halves.pages]
    offered, rows = halves.ask(tokens, local)
    stop = min(tokens // CHUNK * CHUNK, tokens - 1)
    assert local + offered == stop
    halves.planner.allocated("second", offered, *rows)
    (load,) = halves.run().loads
    assert halves.arrive() == ({"second"}, set())
    for group, (shape, pages, row) in enumerate(zip(halves.shapes, halves.pages, rows, strict=True)):
        start = max(local, shape.first_kept(stop))
        source = before[group][:, :, pages.slots(tuple(range(1, 11)), start, stop)]
        written = pages.slots(row, start, stop)
        assert torch.equal(pages.rows[:, :, written], source)
        others = [slot for slot in range(60 * BLOCK) if slot not in written]
        assert torch.equal(pages.rows[:, :, others], before[group][:, :, others])
    assert load.skipped == max(halves.shapes[0].first_kept(stop) - local, 0)


def test_a_probe_reads_all_that_a_request_needs_to_go_on_behind_a_chunk(halves: Halves) -> None:
    halves.store_all()
    offered, rows = halves.ask(40)
    halves.planner.allocated("second", offered, *rows)
    halves.run()
    assert halves.arrive() == ({"second"}, set())
    report = halves.steps.take_report()
    assert report is not None
    halves.planner.apply_report(report)
    halves.planner.arrived({"second"})
    plan = halves.run()
    assert plan.probe is not None
    for group, (shape, part) in enumerate(zip(halves.shapes, (plan.probe, *plan.probe.further), strict=True)):
        first = 4 if shape.is_full else shape.first_chunk(4, CHUNK)
        assert part.keys[0] == tuple(halves.piece(chunk, group) for chunk in range(first, 5))
    before = [pages.rows.clone() for pages in halves.pages]
    assert halves.steps.end(plan, set()) == set()
    assert eventually(lambda: halves.steps.end(StepPlan(), set()) or not halves.transfers.prober.is_probing)
    report = halves.steps.take_report()
    assert report is not None and report.probed is not None
    assert (dict(report.probed.tokens), report.probed.failed) == ({"host": CHUNK}, False)
    assert all(torch.equal(*pair) for pair in zip(before, [pages.rows for pages in halves.pages], strict=True))


def test_an_offer_ends_behind_the_last_chunk_of_which_all_is_there(halves: Halves) -> None:
    """Whatever is missing, as a count of all possibilities has it."""
    halves.store_all()
    groups, chunks = range(len(halves.shapes)), len(TOKENS) // CHUNK
    missing: set[tuple[int, int]] = set()
    for chunk, group in ((3, 0), (1, len(groups) - 1), (4, len(groups) - 1), (0, 0)):
        missing.add((chunk, group))
        halves.store.delete(halves.piece(chunk, group))  # type: ignore[arg-type]
        reach = [
            last + 1
            for last in range(chunks)
            if not any(
                (each, other) in missing
                for other in groups
                for each in range(halves.shapes[other].first_chunk(last, CHUNK), last + 1)
            )
        ]
        assert halves.ask(39)[0] == max(reach, default=0) * CHUNK


@pytest.mark.parametrize("group", [0, -1])
def test_a_piece_that_is_lost_fails_the_whole_load(halves: Halves, group: int) -> None:
    halves.store_all()
    offered, rows = halves.ask(39)
    halves.planner.allocated("second", offered, *rows)
    halves.store.delete(halves.piece(3, group % len(halves.shapes)))  # type: ignore[arg-type]
    halves.run()
    assert halves.arrive() == ({"second"}, {"second"})
    report = halves.steps.take_report()
    assert report is not None
    assert (report.loaded["second"].failed, dict(report.loaded["second"].tokens)) == (True, {})
    halves.planner.apply_report(report)
    assert halves.planner.matched_tokens("second", 0) == 0, "it is not offered again"


def test_a_row_that_is_not_understood_is_a_load_of_nothing(halves: Halves) -> None:
    """The engine keeps a block that no later token attends to, or lacks one that is attended to."""
    halves.store_all()
    for change in ("kept", "lacking"):
        offered, rows = halves.ask(39)
        row = list(rows[-1])
        number = 0 if change == "kept" else -1
        row[number] = 55 if change == "kept" else NULL_BLOCK
        if change == "kept" and rows[-1][0] != NULL_BLOCK:
            continue
        halves.planner.allocated("second", offered, *rows[:-1], tuple(row))
        halves.run()
        assert halves.arrive() == ({"second"}, {"second"})
        report = halves.steps.take_report()
        assert report is not None
        halves.planner.apply_report(report)


def test_pieces_whose_blocks_were_taken_back_are_not_saved(halves: Halves) -> None:
    """As after a hit of the engine's own cache: what a window has left of it is all that there is."""
    halves.planner.open("r", TOKENS, b"", RequestOptions())
    blocks, *further = halves.rows(1, 33, 32)
    plan = halves.run(Scheduled("r", 33, blocks, 1, tuple(further)))
    for group, shape in enumerate(halves.shapes):
        saved = [save.start for save in plan.saves if save.group == group]
        kept = shape.first_kept(32)
        assert saved == [start for start, _ in (shape.piece(i, CHUNK) for i in range(4)) if start >= kept]
    assert all(NULL_BLOCK not in save.blocks for save in plan.saves)


def test_a_revoked_load_fails_though_it_has_arrived(halves: Halves) -> None:
    halves.store_all()
    offered, rows = halves.ask(39)
    halves.planner.allocated("second", offered, *rows)
    halves.run()
    halves.planner.reset()
    plan = halves.run()
    assert [each.request_id for each in plan.revocations] == ["second"]
    assert halves.arrive() == ({"second"}, {"second"})


def test_a_load_that_was_reported_before_it_was_revoked_is_reported_again_as_failed(halves: Halves) -> None:
    """An engine that plans ahead: the reset came while the report was on its way."""
    halves.store_all()
    offered, rows = halves.ask(39)
    halves.planner.allocated("second", offered, *rows)
    halves.run()
    assert halves.arrive() == ({"second"}, set())
    report = halves.steps.take_report()
    halves.planner.reset()
    assert report is not None
    halves.planner.apply_report(report)
    assert halves.planner.arrived({"second"}) == set(), "held back"
    plan = halves.run()
    assert plan.revocations == [Revocation("second", plan.revocations[0].blocks)]
    assert halves.steps.end(plan, set()) == set()
    report = halves.steps.take_report()
    assert report is not None
    halves.planner.apply_report(report)
    assert halves.planner.arrived(set()) == set()
    plan = halves.run()
    assert plan.failures == ["second"]
    arrived, failed = halves.steps.end(plan, set()), halves.steps.take_failed()
    assert (arrived, failed) == ({"second"}, {"second"})
    assert halves.planner.arrived(arrived) == {"second"}


def test_a_group_of_full_attention_is_saved_as_an_engine_with_nothing_else_is() -> None:
    settings = ServingSettings.of({"chunk_tokens": CHUNK})
    plain, grouped = Planner(settings, SPECS[:1], BLOCK), Planner(settings, SPECS[:1], BLOCK, shapes=(FULL,))
    saves: list[list[Save]] = []
    for planner in (plain, grouped):
        planner.open("r", TOKENS, b"", RequestOptions())
        saves.append(planner.plan_step([Scheduled("r", 40, tuple(range(1, 11)), 40)]).saves)
        planner.close("r")
    for one, other in zip(*saves, strict=True):
        assert (one.keys, one.after, one.start, one.blocks) == (other.keys, other.after, other.start, other.blocks)


class Trace:
    """An engine with full attention and states, which says where it has one: at the ends of some steps."""

    shapes = (FULL, GroupShape(BLOCK, keeps_state=True))

    def __init__(self, ends: Sequence[int]) -> None:
        self.halves, self.ends = Halves(self.shapes), ends

    def store(self, tokens: int = len(TOKENS)) -> list[Save]:
        planner, saves = self.halves.planner, list[Save]()
        planner.open("first", TOKENS[:tokens], b"", RequestOptions())
        done = 0
        for end in (*self.ends, tokens):
            blocks = tuple(range(1, 1 + -(-end // BLOCK)))
            states = (NULL_BLOCK,) * (end // BLOCK - 1) + (40 + end // BLOCK,) if end % BLOCK == 0 else ()
            saves += self.halves.run(Scheduled("first", end, blocks, end - done, (states,))).saves
            done = end
        planner.close("first")
        assert self.halves.transfers.settle(10.0)
        return saves


@pytest.mark.parametrize(
    ("ends", "tokens", "reach"),
    [
        ((16, 32), 40, 32),
        ((16, 32), 33, 32),
        ((16, 32), 32, 16),  # the last token is computed again, and the state behind 32 has seen it
        ((16, 32), 31, 16),
        ((16, 36), 40, 16),  # a state within a chunk is of no use
        ((12, 20), 40, 0),
        ((8, 16, 24, 32, 40), 40, 32),
    ],
)
def test_with_states_a_request_goes_on_where_a_step_ended(ends: Sequence[int], tokens: int, reach: int) -> None:
    trace = Trace(ends)
    halves = trace.halves
    saves = trace.store()
    states = [save for save in saves if save.group]
    assert [(save.start, len(save.token_ids), save.blocks) for save in states] == [
        (end - 1, 1, (40 + end // BLOCK,)) for end in sorted({*ends, len(TOKENS)}) if end % CHUNK == 0
    ]
    assert [save.start for save in saves if not save.group] == [0, 8, 16, 24, 32], "chunks are all stored"
    before = halves.pages[1].rows.clone()
    halves.planner.open("second", TOKENS[:tokens], b"", RequestOptions())
    assert halves.planner.matched_tokens("second", 0) == reach
    if reach:
        count = reach // BLOCK
        row = (NULL_BLOCK,) * (count - 1) + (50,)
        halves.planner.allocated("second", reach, tuple(range(20, 20 + count)), row)
        halves.run()
        assert halves.arrive() == ({"second"}, set())
        slot, source = 50 * BLOCK + BLOCK - 1, (40 + count) * BLOCK + BLOCK - 1
        assert torch.equal(halves.pages[1].rows[:, :, slot], before[:, :, source])
        halves.pages[1].rows[:, :, slot] = before[:, :, slot]
        assert torch.equal(halves.pages[1].rows, before), "of a block of states nothing else is written"
    halves.steps.close()


def test_a_state_that_is_lost_leaves_the_one_before_it() -> None:
    trace = Trace((16, 32))
    trace.store()
    for border, reach in ((32, 16), (16, 0)):
        trace.halves.store.delete(trace.halves.piece(border // CHUNK - 1, 1))  # type: ignore[arg-type]
        assert trace.halves.ask(39)[0] == reach
    trace.halves.steps.close()
