"""The disk tier when the process is killed, the power goes, calls fail or bits flip, at every place where they can.

The file system is simulated (`simulated.py`), so that every call can be the last one and nothing needs to wait for a
disk; `test_disk_shared.py` kills real processes on a real one.
"""

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvloom.core import ChunkInfo, ChunkKey
from kvloom.errors import ChunkCorruptError, KVLoomError, TierFullError, TierUnavailableError
from kvloom.kvstore.tiers.disk.tier import DiskTier, Durability
from kvloom.testing import make_blob, make_key, same_blob

from ..support.simulated import Inode, KilledError, SimulatedFiles

FOLDER = Path("/kv")
KEYS = [make_key(number) for number in range(8)]
BLOBS = [make_blob(seed, numbers=(10, 700, 2500)[seed % 3]) for seed in range(40)]  # one, two or three pages

Contents = dict[ChunkKey, int | None]  # seed of the blob that a key stands for


def open_tier(files: SimulatedFiles, durability: Durability = "cache") -> DiskTier:
    files.slack_records = 4  # so that journals are rewritten every few operations
    # the interval: no thread of its own in the background, all rounds are run by `flush`, `put` and `close`
    return DiskTier(FOLDER, 40 * 4096, durability=durability, sync_interval_s=1e6, segment_bytes=5 * 4096, files=files)


def stop(tier: DiskTier) -> None:
    """Ends the threads of a tier whose process is dead."""
    with suppress(KilledError):
        tier.close()


class Model:
    """What a tier may hold: by key the seeds that `get` may find (None: nothing)."""

    def __init__(self) -> None:
        self.may: dict[ChunkKey, set[int | None]] = {key: {None} for key in KEYS}
        self.durable: dict[ChunkKey, set[int | None]] = {key: {None} for key in KEYS}

    def begin(self, key: ChunkKey, seed: int | None) -> None:
        """From now on until `end`, either; what is replaced is lost if only the record of the new one gets through."""
        self.may[key].add(seed)
        self.durable[key] |= {seed, None}

    def end(self, key: ChunkKey, seed: int | None, *, synced: bool) -> None:
        self.may[key] = {seed}
        if synced:
            self.durable[key] = {seed}

    def failed(self, key: ChunkKey) -> None:
        self.may[key].add(None)
        self.durable[key].add(None)

    def flushed(self) -> None:
        self.durable = {key: set(seeds) for key, seeds in self.may.items()}


def found(tier: DiskTier, key: ChunkKey) -> int | None:
    """Seed of what is stored under a key, or None; fails if the bytes are those of none."""
    try:
        blob = tier.get(key)
    except ChunkCorruptError:
        return None
    if blob is None:
        return None
    seed = int(blob.meta["seed"])
    assert same_blob(blob, BLOBS[seed])
    return seed


def check_against(files: SimulatedFiles, may: dict[ChunkKey, set[int | None]]) -> SimulatedFiles:
    """Opens what a crash has left, twice: nothing wrong, nothing missing, the same both times."""
    seen = []
    for _ in range(2):
        tier = open_tier(files)
        listed = [entry.key for entry in tier.entries()]
        contents = {key: found(tier, key) for key in KEYS}
        assert all(contents[key] in may[key] for key in KEYS), [
            (key[-1], contents[key], may[key]) for key in KEYS if contents[key] not in may[key]
        ]
        assert tier.check() == []
        assert {key for key in KEYS if contents[key] is not None} == {entry.key for entry in tier.entries()}
        assert len(listed) == len(set(listed))
        seen.append(contents)
        tier.close()
        assert not files.opened
        files = files.restarted()
    assert seen[0] == seen[1]
    return files


Step = tuple[str, int, int]  # put, delete, get or flush; number of the key, seed


def steps_of(dice: random.Random, count: int) -> list[Step]:
    """Every seed is put under one key, so that a chunk under a wrong key shows."""
    return [
        (dice.choice(["put", "put", "put", "delete", "get", "flush"]), number, number + 8 * dice.randrange(5))
        for number in (dice.randrange(8) for _ in range(count))
    ]


def run(tier: DiskTier, model: Model, steps: list[Step], durability: Durability, *, faults: bool = False) -> None:
    for action, number, seed in steps:
        key = KEYS[number]
        try:
            if action == "put":
                model.begin(key, seed)
                tier.put(key, BLOBS[seed], ChunkInfo(namespace=f"tenant {seed % 4}"))
                model.end(key, seed, synced=durability == "sync")
            elif action == "delete":
                model.begin(key, None)
                tier.delete(key)
                model.end(key, None, synced=False)
            elif action == "get":
                assert found(tier, key) in model.may[key]
            else:
                tier.flush()
                if durability != "cache":
                    model.flushed()
        except TierFullError:
            assert faults or tier.used_bytes > 30 * 4096
            if faults:
                model.failed(key)
        except KVLoomError:
            assert faults
            for touched in KEYS:  # a failed sync gives up all that waited for it
                model.failed(touched)


def run_to_death(
    files: SimulatedFiles, model: Model, steps: list[Step], durability: Durability, last_call: int
) -> bool:
    """Whether the process died at that call, rather than come to the end."""

    def before(_: str) -> None:
        if files.calls > last_call:
            files.kill()

    files.before = before
    try:
        tier = open_tier(files, durability)
    except KilledError:
        return True
    try:
        run(tier, model, steps, durability)
        tier.close()
    except KilledError:
        return True
    finally:
        stop(tier)
    return False


# ------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
@pytest.mark.parametrize("can_punch", [True, False], ids=["punching", "compacting"])
@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
def test_killed_at_every_call(durability: Durability, can_punch: bool) -> None:
    """Put, replace, delete, new segment, journal rewritten, compaction, flush and close among them."""
    kill_at_every_call(durability, can_punch, steps_of(random.Random(3), 30))


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("can_punch", [True, False], ids=["punching", "compacting"])
@pytest.mark.parametrize("durability", ["cache", "batch", "sync"])
def test_killed_at_every_call_of_longer_runs(durability: Durability, can_punch: bool, seed: int) -> None:
    kill_at_every_call(durability, can_punch, steps_of(random.Random(seed), 100))


def kill_at_every_call(durability: Durability, can_punch: bool, steps: list[Step]) -> None:
    calls = 0
    while True:
        files, model = SimulatedFiles(can_punch=can_punch), Model()
        if not run_to_death(files, model, steps, durability, calls):
            break
        check_against(files.restarted(), model.may)
        calls += 1
    assert calls > 200


def test_the_run_comes_through_everything() -> None:
    """What the kills above are meant to hit does happen."""
    for can_punch in (True, False):
        files, names = SimulatedFiles(can_punch=can_punch), []
        files.before = names.append
        tier = open_tier(files, "batch")
        run(tier, Model(), steps_of(random.Random(3), 30), "batch")
        tier.close()
        assert names.count("rename") > 1 and names.count("unlink") > 0 and names.count("fdatasync") > 6
        assert names.count("punch") > 2 or not can_punch


# ------------------------------------------------------------------------------------------------------- power losses


def lose_power(seed: int) -> None:
    dice = random.Random(seed)
    durability: Durability = ("cache", "batch", "sync")[seed % 3]
    files, model = SimulatedFiles(can_punch=seed % 4 > 0), Model()
    ever: dict[ChunkKey, set[int | None]] = {key: {None, *range(key[-1], 40, 8)} for key in KEYS}
    for _ in range(dice.choice([1, 1, 2])):
        died = run_to_death(files, model, steps_of(dice, 25), durability, dice.randrange(20, 500))
        promised = ever if durability == "cache" else model.durable
        if not died and durability != "cache":
            model.flushed()
            promised = model.may
        files = check_against(files.after_power_loss(dice), promised)
        tier = open_tier(files)
        model = Model()
        for key in KEYS:
            model.end(key, found(tier, key), synced=True)
        # what has been read from the device is still there next time, whatever comes; what was repaired is not synced
        tier.close()
        files = files.restarted()
        settle(files.root)


def settle(inode: Inode) -> None:
    """The device has had all the time it needs."""
    inode.durable = bytes(inode.data)
    inode.pending.clear()
    inode.pending_names.clear()
    inode.durable_names = dict(inode.names)
    for child in inode.names.values():
        settle(child)


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_power_losses(first: int) -> None:
    for seed in range(first, first + 50):
        lose_power(seed)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(200, 10_200, 500))
def test_many_power_losses(first: int) -> None:
    for seed in range(first, first + 500):
        lose_power(seed)


def test_the_simulation_loses_what_is_not_synced() -> None:
    """The power losses above would find a tier that does not sync."""
    lost = 0
    for seed in range(30):
        files = SimulatedFiles()
        tier = open_tier(files, "cache")
        for number, key in enumerate(KEYS):
            tier.put(key, BLOBS[number])
        stop(tier)
        survivor = open_tier(files.after_power_loss(random.Random(seed)))
        lost += sum(found(survivor, key) is None for key in KEYS)
    assert lost > 30


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE])
@pytest.mark.parametrize("durability", ["cache", "batch"])
def test_a_fault_at_every_call(durability: Durability, code: int) -> None:
    """One call fails, or all from there on for a while: the tier says so or copes, and is in order afterwards."""
    steps = steps_of(random.Random(5), 25)
    dice = random.Random(code)
    for nth in range(0, 400, 3):
        files, model = SimulatedFiles(can_punch=nth % 2 > 0), Model()
        until = nth + dice.choice([1, 1, 5, 20])

        def before(name: str, files: SimulatedFiles = files, nth: int = nth, until: int = until) -> None:
            if nth < files.calls <= until and name != "close":
                raise OSError(code, f"simulated fault of {name}")

        files.before = before
        tier = None
        with suppress(TierUnavailableError, TierFullError):
            tier = open_tier(files, durability)
        if tier is None:
            assert nth < 60 and not files.opened
            continue
        run(tier, model, steps, durability, faults=True)
        files.before = lambda _: None
        contents = {key: found(tier, key) for key in KEYS}
        assert all(contents[key] in model.may[key] for key in KEYS), (
            nth,
            [(key[-1], contents[key], model.may[key]) for key in KEYS if contents[key] not in model.may[key]],
        )
        assert tier.check() == []
        for number, key in enumerate(KEYS[:3]):
            try:
                tier.put(key, BLOBS[number])
            except TierUnavailableError:  # a sync in the background had failed
                tier.put(key, BLOBS[number])
            assert found(tier, key) == number
            model.end(key, number, synced=False)
        tier.close()
        assert not files.opened, (nth, [inode.number for inode in files.opened.values()])
        check_against(files.restarted(), model.may)


# ----------------------------------------------------------------------------------------------- bits, lengths, files


def small_store() -> tuple[SimulatedFiles, dict[ChunkKey, set[int | None]]]:
    files, model = SimulatedFiles(), Model()
    tier = open_tier(files)
    run(tier, model, steps_of(random.Random(1), 60), "cache")
    tier.close()
    return files.restarted(), model.may


def copy_of(inode: Inode) -> Inode:
    names = {name: copy_of(child) for name, child in inode.names.items()}
    return Inode(inode.number, inode.is_folder, bytearray(inode.data), set(inode.pages), names=names)


def stored_files(root: Inode) -> Iterator[Inode]:
    for _, inode in sorted(root.names.items()):
        if inode.is_folder:
            yield from stored_files(inode)
        else:
            yield inode


def check_damaged(root: Inode, may: dict[ChunkKey, set[int | None]]) -> int:
    """Nothing wrong is read from a damaged store, and it goes on working; how many chunks are still there."""
    files = SimulatedFiles(root)
    files.numbers = 10_000
    tier = None
    with suppress(KVLoomError):
        tier = open_tier(files)
    if tier is None:
        assert not files.opened
        return 0
    contents = {key: found(tier, key) for key in KEYS}
    # a damaged record may be one of a deletion: what was deleted may be back
    assert all(seed is None or seed % 8 == key[-1] for key, seed in contents.items())
    assert tier.check() == []
    tier.delete(KEYS[0])
    tier.put(KEYS[0], BLOBS[0])
    assert found(tier, KEYS[0]) == 0
    tier.close()
    return sum(seed is not None and seed in may[key] for key, seed in contents.items())


def flip_bits(step: int, start: int = 0) -> None:
    files, may = small_store()
    stored = sum(seeds != {None} for seeds in may.values())
    assert stored > 4
    sizes = [len(inode.data) for inode in stored_files(files.root)]
    assert sum(sizes) < 1 << 17
    bits = [(which, bit) for which, size in enumerate(sizes) for bit in range(8 * size)]
    least = stored
    for which, bit in bits[start::step]:
        root = copy_of(files.root)
        inode = list(stored_files(root))[which]
        inode.data[bit // 8] ^= 1 << bit % 8
        left = check_damaged(root, may)
        name = next(name for name, child in [*root.names["kv"].names.items()] if child is inode or child.is_folder)
        if name != "kvloom.json" and inode is not root.names["kv"].names["kvloom.json"]:
            least = min(least, left)
    assert least >= stored - 3  # of a flipped bit, hardly anything else


def test_flipped_bits() -> None:
    flip_bits(1999)


@pytest.mark.torture
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("start", range(16))
def test_every_flipped_bit(start: int) -> None:
    flip_bits(16, start)


def truncations(step: int) -> Iterator[tuple[int, int]]:
    files, _ = small_store()
    for which, inode in enumerate(stored_files(files.root)):
        for length in {*range(0, len(inode.data), step), max(0, len(inode.data) - 1)}:
            yield which, length


@pytest.mark.parametrize("step", [1499, pytest.param(7, marks=[pytest.mark.torture, pytest.mark.timeout(7200)])])
def test_truncated_files(step: int) -> None:
    files, may = small_store()
    for which, length in truncations(step):
        root = copy_of(files.root)
        inode = list(stored_files(root))[which]
        del inode.data[length:]
        check_damaged(root, may)


def test_a_torn_record_stays_torn() -> None:
    """What is appended behind it must not complete it: a record may end in zeros, which is what a hole reads as."""
    files, may = small_store()
    whole = len(files.root.names["kv"].names["journal"].data)
    for length in range(2 * 128 - 1, whole, 128):
        root = copy_of(files.root)
        del root.names["kv"].names["journal"].data[length:]
        check_damaged(root, may)


def test_swapped_and_foreign_files() -> None:
    files, may = small_store()
    count = len(list(stored_files(files.root)))
    noise = random.Random(1).randbytes(30_000)
    contents: list[Callable[[list[Inode], int], bytes]] = [
        lambda _inodes, _: noise,
        lambda inodes, _: noise[: len(inodes[0].data)] * 3,
        lambda inodes, which: bytes(inodes[(which + 1) % count].data),
        lambda inodes, which: bytes(inodes[which].data) * 2,
        lambda inodes, which: bytes(inodes[which].data)[128:],
        lambda inodes, which: bytes(inodes[which].data)[4096:],
        lambda inodes, which: bytes(len(inodes[which].data)),
    ]
    for which in range(count):
        for content in contents:
            root = copy_of(files.root)
            inodes = list(stored_files(root))
            inodes[which].data = bytearray(content(inodes, which))
            check_damaged(root, may)
        root = copy_of(files.root)
        removed = list(stored_files(root))[which]
        for folder in (root.names["kv"], root.names["kv"].names["segments"]):
            folder.names = {name: child for name, child in folder.names.items() if child is not removed}
        check_damaged(root, may)


def test_journals_of_another_time() -> None:
    """An old journal brought back beside new segments: what it says of them no longer holds."""
    files, _ = small_store()
    old = copy_of(files.root)
    tier = open_tier(files)
    for seed in range(8, 40):
        tier.put(KEYS[seed % 8], BLOBS[seed])
    tier.close()
    files = files.restarted()
    files.root.names["kv"].names["journal"] = old.names["kv"].names["journal"]
    check_damaged(files.root, {key: {None} for key in KEYS})
