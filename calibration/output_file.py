"""Files that a command writes: checked before the work, replaced as a whole afterwards."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_MOST_LINKS = 40  # as Linux follows


def check_output(path: Path) -> None:
    """Refuse a path that `write_output` could not write to, before hours go into what belongs there.

    Changes nothing. A named pipe is not opened: its reader may not be there yet.

    Raises
    ------
    ValueError : it is a folder, its folder is missing, or the system does not permit it.
    """
    try:
        number = _open_file_number(path)
        if number is not None:
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "it is open for reading only")
            return
        target = Path(os.path.realpath(path))
        mode = _mode(target)
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, "it is a folder")
        if stat.S_ISSOCK(mode):
            raise OSError(errno.ENXIO, "it is a socket")
        if mode and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        if mode and not stat.S_ISREG(mode):
            return
        if not target.parent.is_dir():
            raise OSError(errno.ENOENT, f"there is no folder {target.parent}")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name a file in a folder that exists") from error


def write_output(path: Path, data: bytes) -> None:
    """Write the whole file, or through to what is not a regular file.

    Symbolic links are followed. A regular file is replaced in one step: a reader sees the old or the new one, and it
    keeps its permissions. Named pipes, devices and our own open files (`/dev/stdout`, `/dev/fd/3`) are written to as
    they are; a named pipe waits for its reader.

    Raises
    ------
    OSError : as for any file.
    """
    number = _open_file_number(path)
    if number is not None:
        for stream in (sys.stdout, sys.stderr):  # what was printed before stands before it
            stream.flush()
        with os.fdopen(number, "wb", closefd=False) as file:
            file.write(data)
        return
    target = Path(os.path.realpath(path))
    mode = _mode(target)
    if mode and not stat.S_ISREG(mode):
        target.write_bytes(data)
        return
    temporary = target.with_name(f".kvloom-{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # less the umask
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if mode:
                _keep_owner_and_mode(target, handle)
            os.fsync(handle)
        _replace(temporary, target, data)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _replace(temporary: Path, target: Path, data: bytes) -> None:
    try:
        temporary.replace(target)
    except OSError as error:
        # Busy: a file mounted by itself, as containers do. Not permitted: another's file in a folder like /tmp. Both
        # can be written in place, and there is room for it: the temporary copy is complete.
        if error.errno not in {errno.EBUSY, errno.EPERM, errno.EACCES}:
            raise
        target.write_bytes(data)
        temporary.unlink()


def _keep_owner_and_mode(old: Path, handle: int) -> None:
    was, now = old.stat(), os.fstat(handle)
    if (was.st_uid, was.st_gid) != (now.st_uid, now.st_gid):
        with suppress(PermissionError):  # another's file in a folder of ours
            os.fchown(handle, was.st_uid, was.st_gid)
    os.fchmod(handle, stat.S_IMODE(was.st_mode))


def _mode(target: Path) -> int:
    """Kind and permissions; 0 where nothing is there yet."""
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return 0


def _open_file_number(path: Path) -> int | None:
    """Number of this process's own open file that `/dev/stdout`, `/dev/fd/3` and links to them name; else None.

    Opening such a name again would start at the file's beginning and write over what was printed into it.
    """
    for _ in range(_MOST_LINKS):
        folder = os.path.realpath(path.parent)
        if folder in {"/dev/fd", f"/proc/{os.getpid()}/fd"} and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
