"""The benchmark of the tiers at its smallest size, and what its figures are made of."""

import json
import math
import os
import sys
import textwrap
import time
import types
from contextlib import closing
from pathlib import Path

import pytest
import torch
import xxhash
from rich.progress import Progress

from kvloom import cli
from kvloom.bench.harness import peer
from kvloom.bench.harness.page_cache import can_drop_page_cache, drop_page_cache, file_system
from kvloom.bench.harness.peer import Peer, PeerError, find_python
from kvloom.bench.harness.rounds import Comparison, interleave, size_text, speed_table, time_text, timed
from kvloom.bench.harness.samples import expect_same, sample_chunk, sample_key, tensors_of, touched_like
from kvloom.bench.tiers import peer_speed
from kvloom.bench.tiers import run as tiers
from kvloom.bench.tiers.alternatives import KVLOOM, LMDB, STORES
from kvloom.bench.tiers.disk_files import in_random_order, read_raw, write_raw
from kvloom.bench.tiers.many_chunks import ListedTier, match_times, reopen_times
from kvloom.bench.tiers.verification import COLD_VERIFY, WARM_VERIFY, constant_checksums, overhead, verification_speeds
from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo, Entry, Tier
from kvloom.errors import ChunkCorruptError
from kvloom.evaluation.environment import usable
from kvloom.kvstore import format as container
from kvloom.kvstore.store import KVStore

from ..support.fakes import Clock

KIB, MIB = 1 << 10, 1 << 20
ALWAYS = {
    *("host_put_vs_copy", "host_get_vs_copy", "disk_put_vs_raw", "disk_cold_get_vs_raw", "verify_overhead"),
    *("verify_overhead_page_cache", "worst_vs_alternatives", "match_1m_p99_s", "reopen_100k_s"),
}
WITH_LMCACHE = {"put_vs_lmcache_disk", "get_vs_lmcache_disk", "get_vs_lmcache_host"}

quiet = Progress(disable=True)


def bench(*args: str) -> int:
    with pytest.raises(SystemExit) as leave:
        cli.main(["bench", "tiers", "--quick", *args])
    return int(leave.value.code or 0)


@pytest.fixture
def fake_lmcache(tmp_path: Path) -> Path:
    """An interpreter that runs something else than it is told: it answers as LMCache's side does, and notes questions.

    Its first argument is the real script, its second the folder.
    """
    program = f"""\
        #!{sys.executable}
        import json, pathlib, sys
        folder = pathlib.Path(sys.argv[2])
        print(json.dumps({{"version": "0.0"}}), flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            with (pathlib.Path(sys.argv[0]).parent / "questions").open("a") as file:
                file.write(line)
            if question["do"] == "die":
                sys.exit("out of luck")
            if question["do"] == "wait":
                continue
            answer = {{"error": "no room"}} if question.get("count") == 13 else {{"seconds": 0.25}}
            print(json.dumps(answer), flush=True)
        """
    path = tmp_path / "fake" / "python"
    path.parent.mkdir()
    path.write_text(textwrap.dedent(program))
    path.chmod(0o755)
    return path


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is there and sane, every way has its row, nothing stays on the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.chdir(tmp_path)
    assert bench("--dir", str(disk), "--json", "out.json") == 0
    shown = capsys.readouterr().out
    result = json.loads(Path("out.json").read_text())
    assert result["bench"] == "tiers"
    assert set(result["metrics"]) == ALWAYS
    for name, metric in result["metrics"].items():
        assert math.isfinite(metric["value"])
        assert metric["value"] > (-1 if name.startswith("verify") else 0)
        assert metric["low"] <= metric["high"]
        assert metric["unit"]
        assert metric["baseline"] is not None
    rows = [row for row in result["rows"] if row["what"] != "note"]
    names = [(row["what"], row.get("size_bytes"), row["alternative"]) for row in rows]
    assert len(set(names)) == len(names)
    assert {row["what"] for row in rows} >= {"host put", "host get", "disk get, cold", "put, each synced", "match"}
    for row in rows:
        times = [value for name, value in row.items() if name.endswith(("_s", "_s_p50", "_s_p99"))]
        assert times
        assert all(time > 0 for time in times)
        if row.get("baseline") == row["alternative"]:
            assert row["share"] == 1
    stores = {row["alternative"] for row in rows if row["what"] == "get, cold"}
    assert stores == {name for name in STORES if name != LMDB or usable("lmdb")}
    assert "LMCache is not installed" in shown
    assert "make engines" in shown
    assert ("LMDB is not installed" in shown) == (not usable("lmdb"))
    for target in tiers.TARGETS:
        assert target.metric in shown
    assert shown.count("not measured") == len(WITH_LMCACHE)
    assert list(disk.iterdir()) == []


def test_wrong_places_are_refused_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--dir", str(tmp_path / "missing")) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert bench("--lmcache-python", str(tmp_path / "missing")) == 2
    assert "there is no file" in capsys.readouterr().err


def test_shares_are_paired_by_round() -> None:
    """Rounds on a machine that gets ten times slower: speeds spread, the share does not."""
    seconds = {"raw": [1.0, 10.0, 3.0], "ours": [2.0, 20.0, 6.0]}
    comparison = Comparison("put", 500_000_000, 2, "raw", seconds)
    share = comparison.share("ours")
    assert (share.value, share.low, share.high, share.baseline) == (0.5, 0.5, 0.5, "raw")
    assert comparison.share("raw", of="ours").value == 2.0
    assert comparison.speed("ours").value == pytest.approx(1 / 6)
    low, high = comparison.speed("ours").low, comparison.speed("ours").high
    assert low is not None
    assert high is not None
    assert low < 1 / 6 < high
    (raw, ours) = comparison.rows()
    assert (raw["share"], ours["share"], ours["chunk_s"], ours["rounds"]) == (1.0, 0.5, 3.0, 3)


def test_references_have_a_time_and_no_speed() -> None:
    comparison = Comparison("get", MIB, 1, "copy", {"copy": [1.0], "view": [1e-6]}, frozenset({"view"}))
    _, view = comparison.rows()
    assert view["chunk_s"] == 1e-6
    assert not {"gb_s", "share"} & view.keys()
    assert [row[3] for row in speed_table([comparison]).rows] == ["0.00", "-"]


def test_rounds_take_turns_in_changing_order_after_one_to_warm_up() -> None:
    calls: list[str] = []

    def way(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    seconds = interleave({name: lambda name=name: way(name) for name in "abc"}, 20, quiet, "")
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 21
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len({tuple(order) for order in rounds}) == 6
    assert seconds["a"] == [3.0 * i + rounds[i].index("a") + 1 for i in range(1, 21)]


def test_freeing_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(time, "perf_counter", clock)

    class Slow:
        def __init__(self) -> None:
            clock.now_s += 1.0

        def __del__(self) -> None:
            clock.now_s += 10.0

    assert timed(Slow) == 1.0 and clock.now_s == 11.0


def test_texts() -> None:
    assert [size_text(n) for n in (128 * KIB, MIB, 32 * MIB)] == ["128 KiB", "1 MiB", "32 MiB"]
    assert [time_text(s) for s in (2.5, 0.0125, 3.25e-7)] == ["2.5 s", "12.5 ms", "0.325 µs"]


@pytest.mark.parametrize("size", [128 * KIB, MIB, 4 * MIB])
def test_samples_have_the_size_and_cannot_be_made_smaller(size: int) -> None:
    import zlib

    chunk, other = sample_chunk(size, seed=1), sample_chunk(size, seed=2)
    assert chunk.keys.nbytes + chunk.values.nbytes == size
    assert 0 < RawCodec().encode(chunk).nbytes - size <= size / 500
    data = chunk.keys.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert len(zlib.compress(data, 1)) > 0.9 * len(data)
    assert not torch.equal(chunk.keys.view(torch.int16), other.keys.view(torch.int16))
    with pytest.raises(RuntimeError, match="somewhere gave back other"):
        expect_same(tensors_of(chunk), tensors_of(other), "somewhere")
    with pytest.raises(ValueError, match="multiple"):
        sample_chunk(size + 1, seed=0)


def test_verification_is_off_within_and_on_again_after() -> None:
    """A flipped bit is not noticed within, which is how we know what is timed there."""
    key, blob = sample_key("flip"), RawCodec().encode(sample_chunk(128 * KIB, seed=0))
    real = xxhash.xxh3_64_intdigest
    with constant_checksums() as asked:
        data = bytearray(container.to_bytes(key, blob))
        assert sum(asked) >= blob.nbytes
        data[-1] ^= 1
        container.from_bytes(key, data)
        assert sum(asked) >= 2 * blob.nbytes
        assert xxhash.xxh3_64(b"abc").intdigest() == xxhash.xxh3_64_intdigest(b"abc")
    assert xxhash.xxh3_64_intdigest is real
    data = bytearray(container.to_bytes(key, blob))
    data[-1] ^= 1
    with pytest.raises(ChunkCorruptError):
        container.from_bytes(key, data)


def test_verification_that_cannot_be_switched_off_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("xxh3_64", "xxh3_64_intdigest", "xxh3_64_digest", "xxh3_64_hexdigest")
    own = types.SimpleNamespace(**{name: getattr(xxhash, name) for name in names})
    monkeypatch.setattr(container, "xxhash", own)
    blobs = {sample_key(i): RawCodec().encode(sample_chunk(128 * KIB, seed=i)) for i in range(2)}
    with pytest.raises(RuntimeError, match="constant_checksums"):
        verification_speeds(tmp_path, blobs, 1, quiet, "")


def test_overhead_is_of_the_bare_read() -> None:
    comparison = Comparison("v", MIB, 1, "unverified", {"unverified": [1.0, 2.0], "DiskTier.get": [1.25, 2.5]})
    assert overhead(comparison).value == pytest.approx(0.25)


class TestStores:
    """What is compared does the same: every store gives back, bit for bit, what it was given."""

    @pytest.fixture(params=list(STORES))
    def name(self, request: pytest.FixtureRequest) -> str:
        if request.param == LMDB:
            pytest.importorskip("lmdb", reason="LMDB needs the extra `bench-peers`")
        return str(request.param)

    @pytest.mark.parametrize("sync_each", [False, True])
    def test_gives_back_after_opening_again(self, name: str, sync_each: bool, tmp_path: Path) -> None:
        chunks = {sample_key(i): sample_chunk(128 * KIB, seed=i) for i in range(3)}
        with closing(STORES[name](tmp_path, sync_each=sync_each)) as store:
            for key, chunk in chunks.items():
                store.put(key, tensors_of(chunk))
            store.sync()
        with closing(STORES[name](tmp_path, sync_each=sync_each)) as store:
            for (key, chunk), target in zip(chunks.items(), touched_like(chunks.values()), strict=True):
                store.get(key, target)
                expect_same(target, tensors_of(chunk), name)

    def test_the_last_put_counts_and_is_a_copy(self, name: str, tmp_path: Path) -> None:
        key, (first, second) = sample_key(0), (sample_chunk(128 * KIB, seed=i) for i in (1, 2))
        expected = {name: tensor.clone() for name, tensor in tensors_of(second).items()}
        (target,) = touched_like([second])
        with closing(STORES[name](tmp_path, sync_each=False)) as store:
            store.put(key, tensors_of(first))
            store.put(key, tensors_of(second))
            second.keys.zero_()
            store.get(key, target)
        expect_same(target, expected, name)

    def test_what_is_not_there_is_not_found(self, name: str, tmp_path: Path) -> None:
        (target,) = touched_like([sample_chunk(128 * KIB, seed=0)])
        with closing(STORES[name](tmp_path, sync_each=False)) as store, pytest.raises((RuntimeError, OSError)):
            store.get(sample_key("nothing"), target)


def test_raw_reads_are_whole_also_if_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may read or write less than asked: at most 5 bytes at a time here."""
    preadv, pwrite = os.preadv, os.pwrite
    chunks = [bytes(range(20)), bytes(range(100, 120))]
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    write_raw(tmp_path / "raw", chunks)
    monkeypatch.undo()
    assert (tmp_path / "raw").read_bytes() == b"".join(chunks)

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        data = bytearray(min(5, sum(map(len, views))))
        count = preadv(fd, [data], offset)
        for view in views:
            part = data[: len(view)]
            view[: len(part)] = part
            data = data[len(part) :]
        return count

    fd = os.open(tmp_path / "raw", os.O_RDONLY)
    try:
        for patched in (False, True):
            if patched:
                monkeypatch.setattr(os, "preadv", short)
            first, empty, last = read_raw(fd, 20, [3, 0, 17])
            assert bytes(first.tolist() + empty.tolist() + last.tolist()) == chunks[1]
        with pytest.raises(RuntimeError, match="ends at byte 40"):
            read_raw(fd, 35, [6])
    finally:
        os.close(fd)


def test_reading_order_is_a_shuffle_that_stays() -> None:
    keys = [sample_key(i) for i in range(50)]
    order = in_random_order(keys)
    assert order == in_random_order(keys)
    assert list(order) != keys
    assert {keys[place]: place for place in order.values()} == order


def test_cold_is_cold(tmp_path: Path) -> None:
    if not can_drop_page_cache(tmp_path):
        pytest.skip("the file system of the temporary folder keeps its pages")
    path = tmp_path / "a" / "file"
    path.parent.mkdir()
    path.write_bytes(bytes(MIB))
    with path.open("rb", buffering=0) as file:
        assert os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) == 4096
        drop_page_cache(tmp_path)
        with pytest.raises(BlockingIOError):
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)


def test_a_file_system_in_memory_is_never_cold() -> None:
    shm = Path("/dev/shm")
    if file_system(shm) != "tmpfs":
        pytest.skip("no tmpfs to try")
    assert not can_drop_page_cache(shm)
    assert file_system(Path("/proc")) == "proc"


def test_match_is_asked_of_a_full_store() -> None:
    tier = ListedTier([Entry(sample_key(i), 7, ChunkInfo()) for i in range(10)])
    assert isinstance(tier, Tier)
    with KVStore([tier]) as store:
        assert store.match([sample_key(i) for i in (0, 3, 9, 10, 4)]) == 3
    times = match_times(stored=60, prompt=20, calls=3, rounds=2, bar=quiet)
    assert (times.stored, times.prompt) == (60, 20)
    assert {row["alternative"]: row["calls"] for row in times.rows()} == {"lookups in a dict": 6, "KVStore.match": 6}
    p50, p99 = times.quantile("KVStore.match", 0.5), times.quantile("KVStore.match", 0.99)
    assert 0 < p50.value <= p99.value <= max(map(max, times.rounds["KVStore.match"]))


def test_reopening_finds_everything(tmp_path: Path) -> None:
    times = reopen_times(tmp_path, stored=20, rounds=2, bar=quiet)
    assert {row["stored_chunks"] for row in times.rows()} == {20}
    assert all(0 < row["open_s_p10"] <= row["open_s"] for row in times.rows())  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def comparisons() -> list[Comparison]:
    """A run as it could be: `ours` takes 1 s where the other takes `other` s, at 128 KiB, 1 MiB and 16 MiB."""
    found = []
    for size, other in ((128 * KIB, 0.1), (MIB, 0.9), (16 * MIB, 0.5)):
        for what, baseline, way in (
            ("host put", "plain copy, fresh memory", "KVStore.put"),
            ("host get", "plain copy, warm memory", "KVStore.get and copy"),
            ("disk put, one sync at the end", "pwrite + fdatasync", "KVStore.put"),
            ("disk get, cold", "pread", "KVStore.get"),
            (WARM_VERIFY, "unverified", "DiskTier.get"),
            (COLD_VERIFY, "unverified", "DiskTier.get"),
        ):
            found.append(Comparison(what, size, 4, baseline, {baseline: [other], way: [1.0]}))
        found.append(Comparison("get, cold", size, 4, KVLOOM, {KVLOOM: [1.0], "SQLite": [2 * other]}))
    return found


def test_the_worst_size_from_1_mib_on_counts(tmp_path: Path) -> None:
    match, reopen = match_times(20, 10, 2, 1, quiet), reopen_times(tmp_path, 2, 1, quiet)
    metrics = tiers.figures(comparisons(), match, reopen)
    assert set(metrics) == ALWAYS
    for name in ("host_put_vs_copy", "host_get_vs_copy", "disk_put_vs_raw", "disk_cold_get_vs_raw"):
        assert metrics[name].value == 0.5
    assert metrics["verify_overhead"].value == pytest.approx(1.0)
    assert metrics["worst_vs_alternatives"].value == pytest.approx(0.2)  # every size counts: 128 KiB
    assert metrics["match_1m_p99_s"].baseline == match.quantile("lookups in a dict", 0.99).value


def test_targets() -> None:
    at_least, below = tiers.Target("a", ">=", 0.8), tiers.Target("b", "<", 0.07)
    assert [at_least.reached(v) for v in (0.79, 0.8, math.nan)] == [False, True, False]
    assert [below.reached(v) for v in (0.069, 0.07, math.nan)] == [True, False, False]
    assert {target.metric for target in tiers.TARGETS} == (ALWAYS | WITH_LMCACHE) - {"verify_overhead_page_cache"}


def test_peer_answers_fails_and_dies(fake_lmcache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Peer(fake_lmcache, tmp_path, 1)) as other:
        assert other.version == "0.0"
        assert other.ask("put", where="host", size_bytes=1, count=1) == 0.25
        with pytest.raises(PeerError, match="cannot put: no room"):
            other.ask("put", count=13)
        assert other.ask("clear") == 0.25
        with pytest.raises(PeerError, match="exit code 1: out of luck"):
            other.ask("die")
    monkeypatch.setattr(peer, "ANSWER_S", 0.2)
    monkeypatch.setattr(peer, "START_S", 30.0)
    with closing(Peer(fake_lmcache, tmp_path, 1)) as other, pytest.raises(PeerError, match=r"said nothing for 0\.2 s"):
        other.ask("wait")


@pytest.mark.slow
def test_peer_without_lmcache(tmp_path: Path) -> None:
    """This interpreter has no LMCache: the reason is the error's last line."""
    if usable("lmcache"):
        pytest.skip("LMCache is installed beside kvloom")
    with pytest.raises(PeerError, match="No module named 'lmcache'"):
        Peer(Path(sys.executable), tmp_path, 1)


def test_peer_is_found_or_named(fake_lmcache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_python(None) is None
    assert find_python(fake_lmcache) == fake_lmcache
    with pytest.raises(ValueError, match="no interpreter"):
        find_python(tmp_path / "missing")
    place = tmp_path / peer.DEFAULT_PYTHON
    place.parent.mkdir(parents=True)
    place.write_text("")
    assert find_python(None) == peer.DEFAULT_PYTHON


def test_peer_is_asked_in_turn(fake_lmcache: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    version, found = peer_speed.peer_speeds(fake_lmcache, disk, [MIB], 2 * MIB, 2, quiet)
    assert version == "0.0"
    assert [c.what for c in found] == [
        "put to memory",
        "get from memory",
        "put to memory and disk",
        "get from disk, page cache",
        "get from disk, cold",
    ]
    for comparison in found:
        assert comparison.baseline == "LMCache"
        assert comparison.seconds["LMCache"] == [0.25, 0.25]
        assert comparison.share("kvloom").value > 0
    questions = [json.loads(line) for line in (fake_lmcache.parent / "questions").read_text().splitlines()]
    reads = [i for i, q in enumerate(questions) if q["do"] == "get" and q["where"] == "disk"]
    assert len(reads) == 6
    assert all(questions[i - 1] == {"do": "drop_host"} for i in reads)
    assert list(disk.iterdir()) == []


@pytest.mark.engine
def test_lmcache_itself(tmp_path: Path) -> None:
    python = Path(__file__).resolve().parent.parent.parent / peer.DEFAULT_PYTHON
    if not python.is_file():
        pytest.skip(f"LMCache is not installed: {peer.INSTALL}")
    version, found = peer_speed.peer_speeds(python, tmp_path, [MIB], 2 * MIB, 1, quiet)
    assert version.startswith("0.5.")
    assert len(found) == 5
    for comparison in found:
        assert 0.001 < comparison.share("kvloom").value < 1000
