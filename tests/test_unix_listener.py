"""Listening at a path: a stale socket is replaced; a used socket, and what is no socket, stays as it is."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from vppipsec import unix_listener
from vppipsec.unix_listener import NotASocket, PathInUse, UnixListener

KINDS = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET, "datagram": socket.SOCK_DGRAM}
LISTENING = ("stream", "seqpacket")


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """A path in a directory in which nothing else is left."""
    yield str(tmp_path / "s")
    assert [name for name in os.listdir(tmp_path) if name != "s"] == []


def bound(path: str, kind: str, listens: bool = True) -> socket.socket:
    """Return a socket of another server."""
    server = socket.socket(socket.AF_UNIX, KINDS[kind])
    server.bind(path)
    if listens and kind in LISTENING:
        server.listen(0)
    return server


def answers(path: str, server: socket.socket) -> bool:
    """Tell whether a path leads to a server."""
    with socket.socket(socket.AF_UNIX, server.type) as client:
        client.settimeout(5)
        client.connect(path)
        client.sendall(b"ping")
        if server.type == socket.SOCK_DGRAM:
            return server.recv(9) == b"ping"
        accepted, _ = server.accept()
        with accepted:
            return accepted.recv(9) == b"ping"


@pytest.mark.parametrize("kind", LISTENING)
def test_it_listens_for_its_owner_alone_and_leaves_nothing(path: str, kind: str) -> None:
    listener = UnixListener(path, KINDS[kind])
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert answers(path, listener.socket)
    listener.release()
    listener.release()
    listener.socket.close()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("mine", LISTENING)
@pytest.mark.parametrize("theirs", KINDS)
def test_a_stale_socket_is_replaced(path: str, mine: str, theirs: str) -> None:
    bound(path, theirs).close()
    listener = UnixListener(path, KINDS[mine])
    with closing(listener.socket):
        assert answers(path, listener.socket)
        listener.release()


@pytest.mark.parametrize("mine", LISTENING)
@pytest.mark.parametrize("theirs", KINDS)
def test_a_used_socket_stays_and_its_server_sees_no_client(path: str, mine: str, theirs: str) -> None:
    with bound(path, theirs) as server:
        with pytest.raises(PathInUse):
            UnixListener(path, KINDS[mine])
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept() if theirs in LISTENING else server.recv(9)
        server.setblocking(True)
        assert answers(path, server)
    os.unlink(path)


@pytest.mark.parametrize("theirs", LISTENING)
def test_a_socket_whose_server_does_not_listen_yet_is_used(path: str, theirs: str) -> None:
    with bound(path, theirs, listens=False) as server:
        with pytest.raises(PathInUse):
            UnixListener(path)
        server.listen()
        assert answers(path, server)
    os.unlink(path)


def test_a_socket_with_a_full_queue_is_used(path: str) -> None:
    with bound(path, "stream") as server, socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        with pytest.raises(PathInUse):
            UnixListener(path)
        server.accept()[0].close()
    os.unlink(path)


def test_what_is_no_socket_stays(path: str) -> None:
    for make in (lambda: Path(path).write_text("precious"), lambda: os.mkfifo(path), lambda: os.mkdir(path)):
        make()
        before = os.lstat(path)
        with pytest.raises(NotASocket):
            UnixListener(path)
        assert os.lstat(path) == before
        os.rmdir(path) if stat.S_ISDIR(before.st_mode) else os.unlink(path)


def test_a_link_to_a_stale_socket_stays(path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = str(tmp_path_factory.mktemp("elsewhere") / "s")
    bound(elsewhere, "stream").close()
    os.symlink(elsewhere, path)
    with pytest.raises(NotASocket):
        UnixListener(path)
    assert os.readlink(path) == elsewhere
    assert os.path.exists(elsewhere)


def test_what_cannot_be_listened_at_is_an_error_and_opens_nothing(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for where in (f"{path}/none/s", path + "x" * 200):
        with pytest.raises(OSError, match=r"No such file|too long"):
            UnixListener(where)
    assert len(os.listdir("/proc/self/fd")) == before


def put_in_between(monkeypatch: pytest.MonkeyPatch, path: str) -> list[socket.socket]:
    """Let a server take the path after it was looked at, right before it would be removed; return its socket."""
    servers: list[socket.socket] = []
    really = tempfile.TemporaryDirectory

    def between(**options: Any) -> tempfile.TemporaryDirectory[str]:
        os.unlink(path)
        servers.append(bound(path, "stream"))
        return really(**options)

    monkeypatch.setattr(unix_listener.tempfile, "TemporaryDirectory", between)
    return servers


def test_a_server_that_replaces_a_stale_socket_at_the_same_moment_keeps_the_path(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound(path, "stream").close()
    servers = put_in_between(monkeypatch, path)
    with pytest.raises(PathInUse):
        UnixListener(path)
    with closing(servers[0]):
        assert answers(path, servers[0])
    os.unlink(path)


def test_a_server_that_takes_the_path_while_it_is_released_keeps_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = UnixListener(path)
    servers = put_in_between(monkeypatch, path)
    listener.release()
    with closing(listener.socket), closing(servers[0]):
        assert answers(path, servers[0])
    os.unlink(path)


def test_a_server_that_has_replaced_the_socket_keeps_the_path(path: str) -> None:
    listener = UnixListener(path)
    os.unlink(path)
    with bound(path, "stream") as server:
        listener.release()
        listener.socket.close()
        assert answers(path, server)
    os.unlink(path)
