"""A file system in memory, behind the seam of the disk tier: its calls fail, kill, or are lost with the power."""

import errno
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvloom.kvstore.tiers.disk.files import Files

PAGE_BYTES = 4096
SECTOR_BYTES = 512


class KilledError(BaseException):
    """The process ends here: nothing it does afterwards has any effect."""


@dataclass(eq=False)
class Inode:
    """A file or folder. `durable` is what the device holds; `pending` what was written since, in order."""

    number: int
    is_folder: bool = False
    data: bytearray = field(default_factory=bytearray)
    pages: set[int] = field(default_factory=set)  # that take space
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    names: dict[str, "Inode"] = field(default_factory=dict)
    durable_names: dict[str, "Inode"] = field(default_factory=dict)
    pending_names: list[tuple[str, "Inode | None"]] = field(default_factory=list)
    links: int = 1
    locked_by: int | None = None


class SimulatedFile:
    """An open file, closed when the last reference to it is gone."""

    def __init__(self, files: "SimulatedFiles", fd: int) -> None:
        self.files, self.fd = files, fd

    def __del__(self) -> None:
        self.files.close(self.fd)


class SimulatedFiles(Files):
    """One process on one file system; `restarted` is the next process, `after_power_loss` the next boot.

    Attributes
    ----------
    before : called with the name of each call before it is made; raises what the call shall raise.
    calls : how many were made.
    """

    def __init__(self, root: Inode | None = None, *, can_punch: bool = True) -> None:
        self.root = Inode(1, is_folder=True) if root is None else root
        self.can_punch = can_punch
        self.before: Callable[[str], None] = lambda _: None
        self.calls = 0
        self.numbers = 100
        self.opened: dict[int, Inode] = {}
        self.next_fd = 1000 + (id(self) % 1000) * 1000
        self.dead = False

    def restarted(self) -> "SimulatedFiles":
        """As after kill -9: all that was written is there, all locks are gone."""
        self.dead = True
        for inode in self.opened.values():
            inode.locked_by = None
        self.opened.clear()
        new = SimulatedFiles(self.root, can_punch=self.can_punch)
        new.numbers = self.numbers
        return new

    def another_process(self) -> "SimulatedFiles":
        new = SimulatedFiles(self.root, can_punch=self.can_punch)
        new.next_fd = self.next_fd + 500_000
        new.numbers = self.numbers + 10_000
        return new

    def after_power_loss(self, dice: random.Random) -> "SimulatedFiles":
        """Of what was not synced, any part of each sector's and folder's history arrived, in any order across them."""
        self.dead = True
        new = SimulatedFiles(can_punch=self.can_punch)
        new.numbers = self.numbers
        new.root = _survivor(self.root, dice, {})
        return new

    def _step(self, name: str) -> None:
        if self.dead:
            raise KilledError(name)
        self.calls += 1
        self.before(name)

    def kill(self) -> None:
        self.dead = True
        raise KilledError

    def _find(self, path: Path) -> Inode:
        inode = self.root
        for part in path.parts[1:]:
            if part not in inode.names:
                raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
            inode = inode.names[part]
        return inode

    def _name(self, path: Path, inode: Inode | None) -> None:
        folder = self._find(path.parent)
        old = folder.names.pop(path.name, None)
        if old is not None and old is not inode:
            old.links -= 1
        if inode is not None:
            folder.names[path.name] = inode
        folder.pending_names.append((path.name, inode))

    def _new(self, path: Path, *, is_folder: bool = False) -> Inode:
        self.numbers += 1
        inode = Inode(self.numbers, is_folder)
        self._name(path, inode)
        return inode

    def open(self, path: Path, mode: str) -> "SimulatedFile":
        self._step("open")
        try:
            inode = self._find(path)
            if mode == "x+b":
                raise FileExistsError(errno.EEXIST, "exists", str(path))
        except FileNotFoundError:
            if mode not in ("x+b", "w+b"):
                raise
            inode = self._new(path)
        if mode == "w+b":
            self._set_length(inode, 0)
        self.next_fd += 1
        self.opened[self.next_fd] = inode
        return SimulatedFile(self, self.next_fd)

    def _set_length(self, inode: Inode, length: int) -> None:
        del inode.data[length:]
        inode.pages = {page for page in inode.pages if page * PAGE_BYTES < length}
        inode.durable = b""  # only ever to nothing, on a file that is about to be renamed into place
        inode.pending.clear()

    def close(self, fd: int) -> None:
        inode = self.opened.pop(fd, None)
        if inode is not None and inode.locked_by == fd:
            inode.locked_by = None

    def _inode(self, file: SimulatedFile) -> Inode:
        fd = file.fd
        if fd not in self.opened:
            raise OSError(errno.EBADF, f"descriptor {fd} is not open")
        return self.opened[fd]

    def preadv(self, file: SimulatedFile, buffers: list[memoryview], offset: int) -> int:
        self._step("preadv")
        data, done = self._inode(file).data, 0
        for buffer in buffers:
            part = data[offset + done : offset + done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def preadv_cached(self, file: SimulatedFile, buffers: list[memoryview], offset: int) -> int:
        return self.preadv(file, buffers, offset)

    def pwritev(self, file: SimulatedFile, buffers: list[memoryview], offset: int) -> int:
        self._step("pwritev")
        inode, data = self._inode(file), b"".join(buffers)
        self._write(inode, offset, data)
        inode.pages.update(range(offset // PAGE_BYTES, -(-(offset + len(data)) // PAGE_BYTES)))
        return len(data)

    def _write(self, inode: Inode, offset: int, data: bytes) -> None:
        if offset > len(inode.data):
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(data)] = data
        inode.pending.append((offset, data))

    def fdatasync(self, file: SimulatedFile) -> None:
        self._step("fdatasync")
        inode = self._inode(file)
        inode.durable = bytes(inode.data)
        inode.pending.clear()

    def sync_folder(self, path: Path) -> None:
        self._step("sync_folder")
        folder = self._find(path)
        folder.durable_names = dict(folder.names)
        folder.pending_names.clear()

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename")
        inode = self._find(old)
        self._find(old.parent).names.pop(old.name)
        self._find(old.parent).pending_names.append((old.name, None))
        self._name(new, inode)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        self._find(path)
        self._name(path, None)

    def mkdir(self, path: Path) -> None:
        self._step("mkdir")
        for folder in (*reversed(path.parents), path):
            if len(folder.parts) > 1 and folder.name not in self._find(folder.parent).names:
                self._new(folder, is_folder=True)
        if not self._find(path).is_folder:
            raise FileExistsError(errno.EEXIST, "is a file", str(path))

    def listdir(self, path: Path) -> list[str]:
        self._step("listdir")
        return list(self._find(path).names)

    def flock(self, file: SimulatedFile, operation: int) -> None:
        self._step("flock")
        inode = self._inode(file)
        if operation == 8:  # LOCK_UN
            inode.locked_by = None
        elif inode.locked_by not in (None, file.fd):
            raise BlockingIOError(errno.EAGAIN, "locked")
        else:
            inode.locked_by = file.fd

    def fstat(self, file: SimulatedFile) -> os.stat_result:
        self._step("fstat")
        return _stat(self._inode(file))

    def stat(self, path: Path) -> os.stat_result:
        self._step("stat")
        return _stat(self._find(path))

    def punch(self, file: SimulatedFile, offset: int, nbytes: int) -> None:
        self._step("punch")
        if not self.can_punch:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        inode = self._inode(file)
        if offset < len(inode.data):
            self._write(inode, offset, bytes(min(nbytes, len(inode.data) - offset)))
        inode.pages -= set(range(-(-offset // PAGE_BYTES), (offset + nbytes) // PAGE_BYTES))

    def allocate(self, file: SimulatedFile, offset: int, nbytes: int) -> None:
        self._step("allocate")


def _stat(inode: Inode) -> os.stat_result:
    mode = (stat.S_IFDIR if inode.is_folder else stat.S_IFREG) | 0o644
    fields = (mode, inode.number, 1, inode.links, 0, 0, len(inode.data), 0, 0, 0)
    return os.stat_result(fields, {"st_blocks": len(inode.pages) * PAGE_BYTES // SECTOR_BYTES})


def _survivor(inode: Inode, dice: random.Random, known: dict[int, Inode]) -> Inode:
    """What is found of an inode at the next boot."""
    if inode.number in known:
        return known[inode.number]
    new = known[inode.number] = Inode(inode.number, inode.is_folder)
    if inode.is_folder:
        names = dict(inode.durable_names)
        arrived: dict[str, bool] = {}
        for name, target in inode.pending_names:
            # the changes of one name arrive in order; a rename, two names, arrives as one
            if arrived.setdefault(name, True):
                arrived[name] = dice.random() < 0.7
                if arrived[name]:
                    if target is None:
                        names.pop(name, None)
                    else:
                        names[name] = target
        new.names = {name: _survivor(target, dice, known) for name, target in names.items()}
        new.durable_names = dict(new.names)
        return new
    lengths = [len(inode.durable), *(offset + len(data) for offset, data in inode.pending)]
    data = bytearray(max(len(inode.durable), dice.choice([0, max(lengths), dice.choice(lengths)])))
    data[: len(inode.durable)] = inode.durable[: len(data)]
    fraction = dice.choice([0.0, 0.5, 0.9, 1.0])
    for offset, written in inode.pending:
        for start in range(offset - offset % SECTOR_BYTES, offset + len(written), SECTOR_BYTES):
            if dice.random() < fraction:
                low, high = max(start, offset), min(start + SECTOR_BYTES, offset + len(written), len(data))
                if low < high:
                    data[low:high] = written[low - offset : high - offset]
    new.data, new.durable = data, bytes(data)
    new.pages = set(range(-(-len(data) // PAGE_BYTES)))
    return new
