"""Unix sockets to listen on: a path has one server, and what another process uses, or what is no socket, stays."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


class PathInUse(OSError):
    """A process has the socket that is at a path."""

    def __init__(self) -> None:
        super().__init__(errno.EADDRINUSE, "another process uses that socket")


class NotASocket(OSError):
    """What is at a path is not a socket."""

    def __init__(self) -> None:
        super().__init__(errno.EEXIST, "what is there is not a socket")


class UnixListener:
    """A listening socket, and its path, which only its owner may open."""

    def __init__(self, path: str, kind: int = socket.SOCK_STREAM, backlog: int = socket.SOMAXCONN) -> None:
        """Listen, in place of a socket that a dead process left. Raises PathInUse, NotASocket and OSError."""
        self.path = path
        _remove_stale(path)
        self.socket = socket.socket(socket.AF_UNIX, kind)
        before = os.umask(0o177)
        try:
            self.socket.bind(path)
            self._path_fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
            self.socket.listen(backlog)
        except BaseException:
            self.socket.close()
            raise
        finally:
            os.umask(before)

    def release(self) -> None:
        """Remove the path, unless it is another socket's by now; call it before the socket is closed. It may be repeated."""
        if self._path_fd < 0:
            return
        with contextlib.suppress(OSError):
            _remove(self.path, self._path_fd)
        os.close(self._path_fd)
        self._path_fd = -1


def _remove_stale(path: str) -> None:
    """Remove a socket that no process has any more. Raises PathInUse, NotASocket and OSError."""
    with _opened_path(path) as fd:
        if fd is None:
            return
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise NotASocket
        if _is_used(fd) or not _remove(path, fd):
            raise PathInUse


@contextlib.contextmanager
def _opened_path(path: str) -> Iterator[int | None]:
    """Hold what is at a path, if anything: its inode number is not given to another file meanwhile."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _is_used(fd: int) -> bool:
    """Tell whether a process has bound a socket.

    A datagram socket asks: a stream socket refuses it by its type (unix_find_bsd), even before it listens and with a full
    queue, and its server sees no connection.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(f"/proc/self/fd/{fd}")
        except ConnectionRefusedError:
            return False
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise
    return True


def _remove(path: str, fd: int) -> bool:
    """Remove a path if it leads to what is held; return False where it leads to something else.

    Another process may put its own there after the look: so the path is moved aside first, and back if it is the other's.
    """
    with contextlib.suppress(FileNotFoundError):
        if not os.path.samestat(os.lstat(path), os.fstat(fd)):
            return False
        with tempfile.TemporaryDirectory(prefix=".", dir=Path(path).parent) as directory:
            aside = f"{directory}/socket"
            os.rename(path, aside)
            if not os.path.samestat(os.lstat(aside), os.fstat(fd)):
                os.link(aside, path, follow_symlinks=False)
                return False
    return True
