"""Files that commands write: links are followed, pipes and devices written to, regular files replaced as a whole."""

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvloom.calibration import output_file
from kvloom.calibration.output_file import check_output, write_output

WRITE = """
import sys
from pathlib import Path
from kvloom.calibration.output_file import check_output, write_output
print("before")
check_output(Path(sys.argv[1]))
write_output(Path(sys.argv[1]), b"data\\n")
print("after")
"""


def write(path: Path, data: bytes) -> None:
    check_output(path)
    write_output(path, data)


def test_a_regular_file_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_bytes(b"old and longer")
    path.chmod(0o640)
    held = path.open("rb")  # a reader of the old file sees the old file
    write(path, b"new")
    assert (path.read_bytes(), held.read()) == (b"new", b"old and longer")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]
    held.close()


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write(tmp_path / "out", b"data")
    (tmp_path / "touched").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "touched").stat().st_mode


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_keeps_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    write(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 2345)


@pytest.mark.parametrize("is_there", [True, False])
def test_links_are_followed(is_there: bool, tmp_path: Path) -> None:
    target, link, chain = tmp_path / "real" / "target", tmp_path / "link", tmp_path / "chain"
    target.parent.mkdir()
    if is_there:
        target.write_bytes(b"old")
    link.symlink_to("real/target")
    chain.symlink_to(link)
    write(chain, b"new")
    assert chain.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_a_named_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    check_output(pipe)  # does not wait for a reader
    reader.start()
    write_output(pipe, b"data" * 100_000)
    reader.join(20)
    assert found == [b"data" * 100_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_devices_are_written_to(tmp_path: Path) -> None:
    before = Path("/dev/null").stat()
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    for path in (Path("/dev/null"), link):
        write(path, b"data")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) and Path("/dev/null").stat().st_ino == before.st_ino
    check_output(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        write_output(Path("/dev/full"), b"data")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_takes_it_in_its_place(name: str, kind: str, tmp_path: Path) -> None:
    """Also where the shell has opened a file for it: nothing that was printed is written over."""
    with (tmp_path / "log").open("w+b") as log:
        log.write(b"earlier\n")
        log.flush()
        output = log if kind == "file" else subprocess.PIPE
        done = subprocess.run([sys.executable, "-c", WRITE, name], stdout=output, check=True)
        if kind == "file":
            log.seek(0)
            assert log.read() == b"earlier\nbefore\ndata\nafter\n"
        else:
            assert done.stdout == b"before\ndata\nafter\n"


def test_another_open_file_takes_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+b") as log:
        number = log.fileno()
        command = [sys.executable, "-c", WRITE, f"/dev/fd/{number}"]
        subprocess.run(command, pass_fds=[number], check=True, capture_output=True)
        assert (tmp_path / "log").read_bytes() == b"data\n"


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("no/such/folder")
    (tmp_path / "to folder").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server, (tmp_path / "file").open("rb") as reading:
        server.bind(str(tmp_path / "socket"))
        for path, reason in (
            (tmp_path, "it is a folder"),
            (tmp_path / "to folder", "it is a folder"),
            (tmp_path / "no" / "out", f"there is no folder {tmp_path / 'no'}"),
            (tmp_path / "dangling", f"there is no folder {tmp_path / 'no/such'}"),
            (tmp_path / "file" / "out", "Not a directory"),
            (tmp_path / "loop", "Too many levels of symbolic links"),
            (tmp_path / "socket", "it is a socket"),
            (Path("/proc/out"), "No such file or directory"),
            (Path("/dev/fd/98"), "Bad file descriptor"),
            (Path(f"/dev/fd/{reading.fileno()}"), "it is open for reading only"),
        ):
            with pytest.raises(ValueError, match=reason):
                check_output(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_what_is_not_permitted_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o444)
    with pytest.raises(ValueError, match="Permission denied"):
        check_output(tmp_path / "file")
    tmp_path.chmod(0o555)
    with pytest.raises(ValueError, match="Permission denied"):
        check_output(tmp_path / "new")
    tmp_path.chmod(0o755)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_file.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_output(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container mounts single files, which cannot be renamed over."""
    path = tmp_path / "out"
    path.write_bytes(b"old and longer")
    inode = path.stat().st_ino

    def busy(self: Path, target: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    write_output(path, b"new")
    assert (path.read_bytes(), path.stat().st_ino) == (b"new", inode)
    assert list(tmp_path.iterdir()) == [path]
