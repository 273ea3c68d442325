"""The command line: every command, its exit status, and complaints in one line."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.build import GCM, make_policy, sa_in, sa_out
from support.fake_kernel import FakeKernel
from support.recorded import shared_data
from vppipsec import __version__, cli
from vppipsec.cli import EXIT_FAILED, EXIT_UNAVAILABLE, main
from vppipsec.conf.settings import Settings, StatusSettings, VppSettings, render_settings
from vppipsec.status.server import StatusServer
from vppipsec.sync.engine import Engine
from vppipsec.sync.journal import JournalSource

KEY = bytes(range(0xA0, 0xC4))
WHAT = ("sync", "sa", "policy", "tunnel", "events", "counters")


class Service:
    """A status socket whose engine knows the kernel's SAs and has no VPP; it works in a thread of its own."""

    def __init__(self, socket: Path) -> None:
        self.socket = str(socket)
        self.ready, self.end = threading.Event(), threading.Event()
        self.resyncs = 0
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self.ready.wait(10)

    def stop(self) -> None:
        self.end.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _serve(self) -> None:
        engine = Engine(Settings(), FakeKernel())
        secret = GCM._replace(key=KEY)
        engine.model.replace([sa_out(0xD1, aead=secret), sa_in(0xC1, aead=secret)], [make_policy()])
        for number in range(30):
            engine.journal.note(JournalSource.OPERATOR, f"line {number}")
        engine.request_resync = self._count_resync  # type: ignore[method-assign]  # nothing is there to be dumped
        server = StatusServer(engine, self.socket)
        await server.start()
        self.ready.set()
        await asyncio.to_thread(self.end.wait)
        await server.stop()

    def _count_resync(self) -> None:
        self.resyncs += 1


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path / "status.sock")
    yield running
    running.stop()


@pytest.mark.parametrize("what", WHAT)
def test_show_prints_text_and_raw_prints_json_and_neither_prints_keys(
    service: Service, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--socket", service.socket, "show", what]) == 0
    text = capsys.readouterr()
    assert main(["show", what, "--socket", service.socket, "--raw"]) == 0
    raw = capsys.readouterr()
    assert isinstance(json.loads(raw.out), list if what in ("sa", "policy", "tunnel", "events") else dict)
    assert text.out.strip()
    assert (text.err, raw.err) == ("", "")
    for told in (text.out, raw.out):
        assert KEY.hex()[:16] not in told


@pytest.mark.parametrize(
    ("arguments", "shown", "hidden"),
    [
        (["sa"], ["0x000000c1", "0x000000d1", "pending: VPP is not connected"], ["selector"]),
        (["sa", "--spi", "0xc1"], ["0x000000c1"], ["0x000000d1"]),
        (["sa", "--spi", "209"], ["0x000000d1"], ["0x000000c1"]),
        (["sa", "--peer", "192.0.2.2"], ["0x000000c1", "0x000000d1"], []),
        (["sa", "--peer", "192.0.2.99"], ["There are no such SAs"], ["0x000000c1"]),
        (["sa", "--detail", "--spi", "0xc1"], ["spi 0x000000c1", "selector", "not connected yet"], ["0x000000d1"]),
        (["counters", "--spi", "0xd1"], ["0x000000d1", "Packets", "not connected yet"], ["0x000000c1"]),
        (["counters", "--peer", "2001:db8::1"], ["There are no such SAs"], ["0x000000c1"]),
        (["tunnel", "--peer", "192.0.2.1"], ["192.0.2.2"], []),
        (["policy", "--peer", "192.0.2.99"], ["There are no such policies"], ["10.2.0.0"]),
        (["policy"], ["10.1.0.0/24 > 10.2.0.0/24", "VPP is not connected"], []),
        (["events"], ["(10 earlier)", "line 10", "line 29"], ["line 9\n"]),
        (["events", "--last", "2"], ["(28 earlier)", "line 28"], ["line 27"]),
        (["events", "--last", "200"], ["line 0"], ["earlier"]),
        (["sync"], ["State      disconnected: not connected yet", "2 SAs, 1 policy"], []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_show_shows_what_is_asked_for(
    service: Service, arguments: list[str], shown: list[str], hidden: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--socket", service.socket, "show", *arguments]) == 0
    out = capsys.readouterr().out
    assert [text for text in shown if text not in out] == []
    assert [text for text in hidden if text in out] == []


def test_reset_asks_for_everything_anew(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--socket", service.socket, "reset", "sync"]) == 0
    assert capsys.readouterr().out == "The kernel's SAs and policies are being read anew.\n"
    assert service.resyncs == 1


def test_status_socket_is_the_one_that_the_configuration_names(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(render_settings(Settings(status=StatusSettings(service.socket))))
    assert main(["--config", str(config), "show", "sync"]) == 0
    assert main(["show", "sync", "--config", str(config)]) == 0
    assert capsys.readouterr().out.count("State") == 2


@pytest.mark.parametrize("arguments", [*(["show", what] for what in WHAT), ["reset", "sync"]], ids=" ".join)
def test_a_service_that_is_not_there_is_said_in_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    socket = str(tmp_path / "status.sock")
    assert main(["--socket", socket, *arguments]) == EXIT_UNAVAILABLE
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (f"vpp-ipsecd does not answer on {socket}: No such file or directory; is the service running?\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["show"], "the following arguments are required: WHAT"),
        (["show", "keys"], "invalid choice: 'keys'"),
        (["show", "sync", "--peer", "192.0.2.2"], "unrecognized arguments: --peer"),
        (["show", "sa", "--peer", "there"], "argument --peer: 'there' is not an IP address"),
        (["show", "sa", "--spi", "x"], "argument --spi: 'x' is not an SPI"),
        (["show", "counters", "--spi", "0x100000000"], "argument --spi: '0x100000000' is not an SPI"),
        (["show", "events", "--last", "0"], "argument --last: '0' is not a number of lines"),
        (["show", "events", "--last", "-3"], "argument --last: '-3' is not a number of lines"),
        (["reset", "everything"], "invalid choice: 'everything'"),
        (["decode"], "the following arguments are required: file"),
        (["commit"], "the following arguments are required: file"),
        (["standin"], "invalid choice: 'standin'"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_wrong_usage_is_explained(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "config.toml: cannot be read: No such file or directory"),
        ('[status]\nsocket = "there"\n', "config.toml, line 2: status.socket must be an absolute path, not 'there'"),
        ("[vpp\n", "config.toml: "),
    ],
)
def test_a_wrong_configuration_is_said_with_its_place(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    if content is not None:
        config.write_text(content)
    assert main(["--config", str(config), "show", "sync"]) == EXIT_FAILED
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


# decode


def test_recordings_decode_and_print_no_key_by_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = sorted(shared_data("xfrm").rglob("*.jsonl"))
    assert files
    keys: set[str] = set()
    for file in files:
        assert main(["decode", str(file), "--show-keys"]) == 0
        for line in capsys.readouterr().out.splitlines():
            keys |= set(_keys(json.loads(line)))
        assert main(["decode", str(file)]) == 0
        hidden = capsys.readouterr().out
        assert list(_keys_in(hidden)) == []
        assert [key for key in keys if len(key) >= 16 and key in hidden] == []
    assert len(keys) > 10


def _keys_in(lines: str) -> Iterator[str]:
    for line in lines.splitlines():
        yield from _keys(json.loads(line))


def _keys(value: Any) -> Iterator[str]:
    """Return all that stands under `key`."""
    if isinstance(value, dict):
        if isinstance(value.get("key"), str):
            yield value["key"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)


def test_a_line_that_is_no_message_is_named_and_the_rest_is_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recorded.jsonl"
    file.write_text('{"remark": "flush"}\n{"hex": "1000"}\nnonsense\n{"hex": "18000000" "1c00"}\n')
    assert main(["decode", str(file)]) == EXIT_FAILED
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["line"] for record in said] == [2, 3, 4]
    assert all("error" in record for record in said)


def test_a_file_that_is_not_there_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(tmp_path / "none")]) == EXIT_FAILED
    assert capsys.readouterr().err == f"{tmp_path}/none: No such file or directory\n"


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(tmp_path: Path) -> None:
    file = tmp_path / "recorded.jsonl"
    file.write_text('{"hex": "00"}\n' * 20_000)
    with subprocess.Popen(
        [sys.executable, "-m", "vppipsec.cli", "decode", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == EXIT_FAILED


# plan


class Kernel(FakeKernel):
    """What `plan` opens in place of a netlink socket."""

    def __init__(self, rx_buffer_size: int) -> None:
        super().__init__()
        self.sas = {sa.id: sa for sa in (sa_in(0xC1), sa_out(0xD1))}

    def close(self) -> None:
        """Nothing is open."""


def test_plan_without_vpp_says_that_vpp_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vppipsec.kernel.xfrm.socket.XfrmSocket", Kernel)
    config = tmp_path / "config.toml"
    config.write_text(render_settings(Settings(vpp=VppSettings(api_socket=f"{tmp_path}/api.sock"))))
    assert main(["plan", "--config", str(config)]) == EXIT_UNAVAILABLE
    said = capsys.readouterr().err
    assert said == f"VPP's API socket {tmp_path}/api.sock cannot be opened: No such file or directory\n"


def test_plan_without_the_right_to_read_the_kernel_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(rx_buffer_size: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("vppipsec.kernel.xfrm.socket.XfrmSocket", refuse)
    monkeypatch.setattr(cli, "find_config", lambda path: None)
    assert main(["plan"]) == EXIT_FAILED
    assert "Operation not permitted" in capsys.readouterr().err


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent / "python")}


def test_output_that_cannot_be_flushed_is_a_failure(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["--socket", service.socket, "show", "sync"]) == EXIT_FAILED
    assert "No space left on device" in capsys.readouterr().err
