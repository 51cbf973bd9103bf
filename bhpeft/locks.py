"""One run a name: files that one process at a time holds. Plain Python; the lock is the kernel's (flock).

The kernel lets go of it when its process ends, however it ends, so a lock is never left behind; a file that is says
only that its run was killed. Over NFS, Linux tells the server of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from bhpeft.errors import InputError


def lock_beside(path: str | Path) -> Path:
    """The lock file of a file or folder: hidden, beside it."""
    path = Path(os.path.abspath(path))
    return path.with_name(f".{path.name}.lock")


def refuse_if_held(path: Path, what: str) -> None:
    """Raise `InputError` if another process holds a lock; nothing is made or changed.

    Args:
        what: is being done under it: "the run mine".
    """
    try:
        file = open(path, encoding="utf-8")
    except OSError:
        return
    with file:
        if not _acquired(file, fcntl.LOCK_SH | fcntl.LOCK_NB):
            raise _held(path, what, file)


@contextlib.contextmanager
def held(path: Path, what: str = "", wait: bool = False) -> Iterator[str | None]:
    """Hold a lock for the length of the block; the file is removed at its end.

    Args:
        what: as of `refuse_if_held`.
        wait: until it is free, instead of refusing.

    Yields:
        A line on the run that was killed while it held it, if one was.

    Raises:
        InputError: it is held by another process, or its folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+", encoding="utf-8")
            if not _acquired(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
                with file:
                    raise _held(path, what, file)
            if _has_name(file, path):
                break
            file.close()  # who held it has removed it since it was opened
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
    try:
        file.seek(0)
        left = file.read().strip()
        file.seek(0)
        file.truncate()
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # no room: it is held all the same
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
            file.flush()
        yield f"{path}: left by {left}, which is gone; taken over" if left else None
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.close()


def _has_name(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _acquired(file: TextIO, how: int) -> bool:
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nothing can be told
        return True
    return True


def _held(path: Path, what: str, file: TextIO) -> InputError:
    file.seek(0)
    who = file.read().strip() or "another process"
    return InputError(f"{what} is being made by {who} ({path}); wait for it, or choose another --run_name")
