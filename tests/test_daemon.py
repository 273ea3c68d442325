"""The service as a process: between this machine's kernel, in a network namespace of its own, and the stand-in for VPP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.lanwan import SETUP_CALLS, make_loopback
from support.netns import in_new_netns, ip
from support.recorded import PATIENCE_S
from support.vpp_box import start_standin
from vppipsec import daemon
from vppipsec.kernel.text import format_addr
from vppipsec.status.server import ask
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.types import NO_INDEX

pytestmark = pytest.mark.versions

RUN = (sys.executable, "-m", "vppipsec.daemon", "--config")
POLICY = (
    "xfrm policy add src 0.0.0.0/0 dst 10.{}.0.9/32 dir out priority 5"
    " tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 1 mode tunnel"
)


def until(holds: Callable[[], Any], what: str) -> None:
    """Wait until something holds, and fail with what it was where it does not in time."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


class StandInProcess:
    """The stand-in in a process, with an interface that has the tunnels' local address."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = start_standin(str(path))

    def set_up(self) -> None:
        """Wait until it listens, and make its interface."""

        def listens() -> bool:
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(self.path)) == 0

        until(listens, "the stand-in")
        self.ask(lambda client: make_loopback(client, "192.0.2.1/24"))

    def ask(self, question: Callable[[VppClient], Any]) -> Any:
        """Run one coroutine function over a connection of the test's own."""

        async def run() -> Any:
            async with asyncio.timeout(PATIENCE_S):
                client = await connect(str(self.path), "test", also=SETUP_CALLS)
                try:
                    return await question(client)
                finally:
                    await client.close()

        return asyncio.run(run())

    def routes(self) -> list[str]:
        """Return the prefixes for which our FIB source has a route."""

        async def read(client: VppClient) -> list[str]:
            sources = [details.src.id for details in await client.dump("fib_source_dump")]
            table = {"table_id": 0, "is_ip6": False, "name": ""}
            found = [await client.dump("ip_route_v2_dump", {"src": number, "table": table}) for number in sources]
            prefixes = [details.route.prefix for each in found for details in each]
            return sorted(f"{format_addr(prefix.address.un.ip4)}/{prefix.len}" for prefix in prefixes)

        return self.ask(read)  # type: ignore[no-any-return]  # what `read` returns

    def interfaces(self) -> list[Any]:
        """Return all interfaces as they are."""
        return self.ask(lambda client: client.dump("sw_interface_dump", {"sw_if_index": NO_INDEX}))  # type: ignore[no-any-return]  # vpp_papi's tuples

    def stop(self) -> None:
        """End it, and with it all that it holds."""
        self._process.terminate()
        self._process.wait(PATIENCE_S)


class Service:
    """vpp-ipsecd in a process, with what it tells systemd and what it logs."""

    def __init__(self, directory: Path, config: str, command: Sequence[str] = RUN) -> None:
        self.config = directory / "config.toml"
        self.config.write_text(config)
        self.status_socket = directory / "status.sock"
        self._log = directory / "log"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify = directory / "notify"
        notify.unlink(missing_ok=True)
        self._notify.bind(str(notify))
        self._notify.setblocking(False)
        self.told: list[str] = []
        """Lines that systemd was told."""
        environment = {**os.environ, "NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "200000"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, str(self.config)], env=environment, stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> list[str]:
        """Lines of its log so far."""
        return self._log.read_text().splitlines()

    def listen(self) -> list[str]:
        """Return what systemd was told so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told += self._notify.recv(4096).decode().splitlines()
        return self.told

    def ready(self) -> Service:
        """Wait until it says that it is."""
        until(lambda: "READY=1" in self.listen() or not self.runs, "READY=1")
        assert self.runs, self.log
        return self

    def fill_notify_socket(self) -> None:
        """Leave no room for anything more to be told."""
        with contextlib.suppress(BlockingIOError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mouth:
            mouth.setblocking(False)
            mouth.connect(self._notify.getsockname())
            while True:
                mouth.send(b"noise")

    def status(self) -> dict[str, Any]:
        """Ask `show sync`."""
        return ask(str(self.status_socket), "show sync")  # type: ignore[no-any-return]  # JSON

    def settle(self, policies: int) -> None:
        """Wait until it is in sync with a kernel that has so many policies."""
        until(lambda: (self.status()["state"], self.status()["kernel"]["policies"]) == ("in-sync", policies), "in-sync")

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end and return its exit status."""
        return self._process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.runs:
            self._process.kill()
            self._process.wait(PATIENCE_S)
        self._notify.close()


@contextlib.contextmanager
def standing_in(directory: Path) -> Iterator[StandInProcess]:
    made = StandInProcess(directory / "api.sock")
    try:
        made.set_up()
        yield made
    finally:
        made.stop()


@contextlib.contextmanager
def serving(directory: Path, more: str = "", **how: Any) -> Iterator[Service]:
    config = f'[vpp]\napi_socket = "{directory}/api.sock"\n[status]\nsocket = "{directory}/status.sock"\n{more}'
    service = Service(directory, config, **how)
    try:
        yield service
        if service.runs:
            service.listen()  # else it waits for room to say that it ends
            service.signal(signal.SIGTERM)
            assert service.ended() == 0
    finally:
        service.close()


def test_service_tells_systemd_follows_the_kernel_and_answers(tmp_path: Path) -> None:
    def story() -> None:
        ip(POLICY.format(2))
        with standing_in(tmp_path) as vpp, serving(tmp_path) as service:
            service.ready().settle(policies=1)
            assert vpp.routes() == ["10.2.0.9/32"]
            ip(POLICY.format(3))
            service.settle(policies=2)
            assert vpp.routes() == ["10.2.0.9/32", "10.3.0.9/32"]
            count = service.listen().count("WATCHDOG=1")
            until(lambda: service.listen().count("WATCHDOG=1") > count + 1, "WATCHDOG=1, again and again")
            until(lambda: "STATUS=in sync" in service.listen(), "the state for systemctl status")
            assert service.told[0] == "READY=1"

    in_new_netns(story)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_status_0_and_leaves_vpp_as_it_is(tmp_path: Path, number: signal.Signals) -> None:
    def story() -> None:
        ip(POLICY.format(2))
        with standing_in(tmp_path) as vpp, serving(tmp_path) as service:
            service.ready().settle(policies=1)
            before = vpp.interfaces()
            service.signal(number)
            assert service.ended() == 0
            assert service.listen()[-1] == "STOPPING=1"
            assert service.log[-1] == "INFO ended; VPP keeps what it has"
            assert vpp.routes() == ["10.2.0.9/32"]
            assert vpp.interfaces() == before
            assert not service.status_socket.exists()

    in_new_netns(story)


def test_reload_takes_a_good_configuration(tmp_path: Path) -> None:
    def story() -> None:
        with standing_in(tmp_path), serving(tmp_path, "[netlink]\nresync_interval_s = 86400\n") as service:
            service.ready().settle(policies=0)
            service.config.write_text(service.config.read_text().replace("86400", "1"))
            service.signal(signal.SIGHUP)
            until(lambda: "RELOADING=1" in service.listen(), "RELOADING=1")
            until(lambda: service.listen().count("READY=1") == 2, "READY=1 after it")
            assert "INFO configuration read again" in service.log
            resyncs = service.status()["resyncs"]
            until(lambda: service.status()["resyncs"] > resyncs + 1, "the new interval")

    in_new_netns(story)


def test_reload_of_a_bad_configuration_keeps_the_old_and_logs_why(tmp_path: Path) -> None:
    def story() -> None:
        with standing_in(tmp_path), serving(tmp_path) as service:
            service.ready().settle(policies=0)
            before = service.log
            service.config.write_text("[netlink]\nresync_interval_s = 0\n")
            service.signal(signal.SIGHUP)
            until(lambda: service.listen().count("READY=1") == 2, "READY=1")
            assert service.log[len(before) :] == [
                f"ERROR the configuration stays as it was: {service.config}, line 2:"
                " netlink.resync_interval_s must be from 1 to 86400, not 0"
            ]
            ip(POLICY.format(2))
            service.settle(policies=1)

    in_new_netns(story)


def test_reload_says_what_it_cannot_change_at_once(tmp_path: Path) -> None:
    def story() -> None:
        with standing_in(tmp_path), serving(tmp_path) as service:
            service.ready().settle(policies=0)
            service.config.write_text(f'[vpp]\napi_socket = "/none"\n[status]\nsocket = "{tmp_path}/other.sock"\n')
            service.signal(signal.SIGHUP)
            until(lambda: service.listen().count("READY=1") == 2, "READY=1")
            assert [line for line in service.log if line.startswith("WARNING")] == [
                "WARNING [vpp] counts from the next connection to VPP on",
                "WARNING [status] counts from the next start of the service on",
            ]
            until(lambda: service.status()["state"] == "in-sync", "the service back in sync, with the VPP that it had")
            assert service.status()["reconnects"] == 0

    in_new_netns(story)


def test_reload_finds_a_file_that_goes_before_the_one_that_was_there(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from vppipsec.conf import settings; from vppipsec.daemon import main;"
        "settings.FALLBACK_CONFIG = pathlib.Path(sys.argv[1]);"
        "settings.DEFAULT_CONFIG = settings.FALLBACK_CONFIG.with_name('default.toml');"
        "sys.exit(main([]))"
    )

    def story() -> None:
        with serving(tmp_path, command=(sys.executable, "-c", program)) as service:
            service.ready()
            (tmp_path / "default.toml").write_text("[netlink]\nresync_interval_s = 0\n")
            service.signal(signal.SIGHUP)
            complaint = f"ERROR the configuration stays as it was: {tmp_path}/default.toml, line 2: "
            until(lambda: any(line.startswith(complaint) for line in service.log), "the complaint")

    in_new_netns(story)


def test_settings_that_this_version_does_not_act_on_are_named(tmp_path: Path) -> None:
    def story() -> None:
        used = '[offload]\nrestart_rekey_rate = 7\nunsupported = "drop"\n'
        unused = 'statistics_interval_s = 7\n[metrics]\nlisten_address = "127.0.0.1"\n'
        for more, warnings in ((used, []), (used + unused, ["offload", "metrics"])):
            with standing_in(tmp_path), serving(tmp_path, more) as service:
                service.ready().settle(policies=0)
                lines = [line for line in service.log if line.startswith("WARNING")]
                assert [f"[{name}]" in line for name, line in zip(warnings, lines, strict=True)] == [True] * len(lines)

    in_new_netns(story)


def test_systemd_that_does_not_listen_does_not_stop_the_service(tmp_path: Path) -> None:
    def story() -> None:
        with standing_in(tmp_path), serving(tmp_path) as service:
            service.ready().settle(policies=0)
            service.fill_notify_socket()
            time.sleep(0.3)  # the next words to systemd are due within 0.1 s
            ip(POLICY.format(2))
            service.settle(policies=1)

    in_new_netns(story)


def test_vpp_that_is_absent_is_waited_for_and_one_that_goes_too(tmp_path: Path) -> None:
    def story() -> None:
        ip(POLICY.format(2))
        with serving(tmp_path) as service:
            service.ready()
            until(lambda: "cannot be opened" in service.status()["problem"], "the reason")
            assert service.status()["state"] == "disconnected"
            for _ in range(2):
                with standing_in(tmp_path) as vpp:
                    service.settle(policies=1)
                    until(lambda: vpp.routes() == ["10.2.0.9/32"], "the policy's route")
                until(lambda: service.status()["state"] == "disconnected", "the end of VPP")
            service.signal(signal.SIGTERM)
            assert service.ended() == 0

    in_new_netns(story)


def test_start_after_a_kill_goes_on_with_what_vpp_holds(tmp_path: Path) -> None:
    def story() -> None:
        ip(POLICY.format(2))
        with standing_in(tmp_path) as vpp:
            with serving(tmp_path) as service:
                service.ready().settle(policies=1)
                service.signal(signal.SIGKILL)
                assert service.ended() == -signal.SIGKILL
            assert vpp.routes() == ["10.2.0.9/32"]
            ip(POLICY.format(2).replace(" add ", " delete ").split(" priority")[0], POLICY.format(3))
            with serving(tmp_path) as service:
                service.ready().settle(policies=1)
                assert vpp.routes() == ["10.3.0.9/32"]

    in_new_netns(story)


def test_status_socket_is_private_and_replaces_a_stale_one(tmp_path: Path) -> None:
    def story() -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / "status.sock"))
        with serving(tmp_path) as service:
            service.ready()
            mode = service.status_socket.stat().st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600

    in_new_netns(story)


def test_no_core_is_dumped(tmp_path: Path) -> None:
    def story() -> None:
        with serving(tmp_path) as service:
            service.ready()
            limits = Path(f"/proc/{service.pid}/limits").read_text().splitlines()
            (core,) = (line.split() for line in limits if line.startswith("Max core file size"))
            assert core[-3:-1] == ["0", "0"]

    in_new_netns(story)


def test_memory_is_closed_to_others_before_the_configuration_is_read() -> None:
    program = (
        "import ctypes, sys; from vppipsec.daemon import main;"
        "status = main(['--config', '/none']);"
        "print(status, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    assert ran.stdout == "2 0\n"


# What ends it at the start: status 2 and one line


def refused(service: Service) -> str:
    """Return the one line with which the service gives up at its start."""
    assert service.ended() == 2
    (line,) = service.log
    assert "READY=1" not in service.listen()
    return line


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("[netlink]\nbatch_size = 0\n", ", line 2: netlink.batch_size must be from 1 to 1000000, not 0"),
        ("[netlink]\n\nbuffer = 1\n", ", line 3: [netlink] has no key 'buffer'; it has "),
        ("\n[netlink\n", ": Expected ']' at the end of a table declaration (at line 2, column 9)"),
    ],
)
def test_wrong_configuration_is_told_with_file_and_line(tmp_path: Path, config: str, complaint: str) -> None:
    service = Service(tmp_path, config)
    try:
        assert refused(service).startswith(f"ERROR {service.config}{complaint}")
    finally:
        service.close()


def test_status_socket_that_cannot_be_made_is_told_with_its_path(tmp_path: Path) -> None:
    def story() -> None:
        (tmp_path / "file").touch()
        service = Service(tmp_path, f'[status]\nsocket = "{tmp_path}/file/status.sock"\n')
        try:
            assert refused(service) == (
                f"ERROR the status socket {tmp_path}/file/status.sock cannot be opened: File exists"
            )
        finally:
            service.close()

    in_new_netns(story)


def test_missing_rights_are_told(tmp_path: Path) -> None:
    def story() -> None:
        with serving(tmp_path, command=("setpriv", "--bounding-set=-net_admin", *RUN)) as service:
            assert refused(service) == "ERROR reading the kernel's SAs needs CAP_NET_ADMIN"

    if os.geteuid():
        pytest.skip("only root can give up rights that it has")
    in_new_netns(story)


# Within the process


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_through_either_kind_of_socket(
    abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"@vpp-ipsecd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
        ear.settimeout(PATIENCE_S)
        ear.bind(name.replace("@", "\0", 1) if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        daemon.notify("READY=1")
        assert ear.recv(100) == b"READY=1"
    daemon.notify("nobody listens any more, which is no error")
