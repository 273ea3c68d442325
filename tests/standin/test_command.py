"""The stand-in as a command: both sockets, until it is told to end; what is at a socket's path and is not stale stays."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from support.vpp_box import start_standin
from vppipsec.vpp.stats import read_sa_counters
from vppstandin.__main__ import main
from vppstandin.server import StandIn
from vppstandin.stats import StatsServer

OPTIONS = {"--api-socket": socket.SOCK_STREAM, "--stats-socket": socket.SOCK_SEQPACKET}
IN_USE = "another process uses that socket"


def sockets(directory: Path) -> dict[str, str]:
    return {option: str(directory / f"{option[2:]}.sock") for option in OPTIONS}


def words(paths: dict[str, str]) -> list[str]:
    return [word for pair in paths.items() for word in pair]


def test_both_sockets_are_served_until_it_is_told_to_end(tmp_path: Path) -> None:
    paths = sockets(tmp_path)
    for option, path in paths.items():  # left by a process that is dead
        with socket.socket(socket.AF_UNIX, OPTIONS[option]) as dead:
            dead.bind(path)
    with start_standin(*paths.values(), stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                with socket.socket(socket.AF_UNIX, OPTIONS["--stats-socket"]) as probe:
                    if probe.connect_ex(paths["--stats-socket"]) == 0:
                        break
                time.sleep(0.02)
            assert asyncio.run(read_sa_counters(paths["--stats-socket"])).of_sa(0) is None
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_where_it_cannot_listen_is_said(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sockets(tmp_path) | {option: str(tmp_path / "none" / "x.sock")}
    assert main(words(paths)) == 1
    assert capsys.readouterr().err == f"the stand-in cannot listen on {paths[option]}: No such file or directory\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", OPTIONS)
def test_a_socket_that_a_process_uses_stays(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sockets(tmp_path)
    with socket.socket(socket.AF_UNIX, OPTIONS[option]) as server:
        server.bind(paths[option])
        server.listen()
        assert main(words(paths)) == 1
        assert capsys.readouterr().err == f"the stand-in cannot listen on {paths[option]}: {IN_USE}\n"
        with socket.socket(socket.AF_UNIX, OPTIONS[option]) as client:
            client.connect(paths[option])
    assert [str(path) for path in tmp_path.iterdir()] == [paths[option]]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_file_at_a_sockets_path_stays(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sockets(tmp_path)
    Path(paths[option]).write_text("precious")
    assert main(words(paths)) == 1
    complaint = f"the stand-in cannot listen on {paths[option]}: what is there is not a socket\n"
    assert capsys.readouterr().err == complaint
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {Path(paths[option]).name: "precious"}


def test_one_path_for_both_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "s")
    assert main(words(dict.fromkeys(OPTIONS, path))) == 1
    assert capsys.readouterr().err == f"the stand-in cannot listen on {path}: {IN_USE}\n"
    assert not os.path.lexists(path)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_server_that_has_replaced_a_socket_keeps_the_path(option: str, tmp_path: Path) -> None:
    paths = sockets(tmp_path)

    async def run() -> None:
        standin = StandIn(paths["--api-socket"])
        stats = StatsServer(standin.world, paths["--stats-socket"])
        await standin.start()
        stats.start()
        os.unlink(paths[option])
        with socket.socket(socket.AF_UNIX, OPTIONS[option]) as server:
            server.bind(paths[option])
            server.listen()
            await standin.stop()
            stats.stop()
            with socket.socket(socket.AF_UNIX, OPTIONS[option]) as client:
                client.connect(paths[option])

    asyncio.run(run())
    assert [str(path) for path in tmp_path.iterdir()] == [paths[option]]


def test_wrong_usage_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "the following arguments are required: --api-socket" in capsys.readouterr().err
