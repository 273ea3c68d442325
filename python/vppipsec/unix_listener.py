"""Listening Unix sockets. A path has one server. Sockets in use, and files that are no sockets, stay."""

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
    """Another process uses the socket at a path."""

    def __init__(self) -> None:
        super().__init__(errno.EADDRINUSE, "another process uses that socket")


class NotASocket(OSError):
    """The file at a path is not a socket."""

    def __init__(self) -> None:
        super().__init__(errno.EEXIST, "what is there is not a socket")


class UnixListener:
    """A listening socket and its path. Only the owner of the path may connect."""

    def __init__(self, path: str, kind: int = socket.SOCK_STREAM, backlog: int = socket.SOMAXCONN) -> None:
        """Listen at a path; replace the socket of a dead process. Raises PathInUse, NotASocket and OSError."""
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
        """Remove the path, unless it belongs to another socket now. Call it before the socket is closed. It may be repeated."""
        if self._path_fd < 0:
            return
        with contextlib.suppress(OSError):
            _remove(self.path, self._path_fd)
        os.close(self._path_fd)
        self._path_fd = -1


def _remove_stale(path: str) -> None:
    """Remove a socket that no process uses. Raises PathInUse, NotASocket and OSError."""
    with _opened_path(path) as fd:
        if fd is None:
            return
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise NotASocket
        if _is_used(fd) or not _remove(path, fd):
            raise PathInUse


@contextlib.contextmanager
def _opened_path(path: str) -> Iterator[int | None]:
    """Yield an open descriptor of a path, None if it does not exist. Meanwhile no other file gets its inode number."""
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
    """Return whether a process has bound a socket. Raises OSError.

    The probe is a datagram socket. A stream socket in use refuses it because of its type (unix_find_bsd), even before it listens
    and with a full queue. Its server sees no connection.
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
    """Remove a path if it is the file of the descriptor `fd`. Return False if it is another file.

    Another process may replace the file after the check. So the path is renamed first, and linked back if it is another file.
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
