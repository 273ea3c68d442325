"""`vpp-ipsec commit` and `show config` off VyOS, with the stand-in as VPP."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.build import make_policy, sa_in, sa_out
from support.lanwan import SETUP_CALLS, make_loopback
from support.recorded import PATIENCE_S
from support.rig import play
from vppipsec.activation.commit import commit, show_config
from vppipsec.activation.switch import SwitchError, Unit
from vppipsec.conf.settings import load_settings, render_settings
from vppipsec.vpp.api.client import connect
from vppstandin.server import StandIn

ON = """\
set vpp settings interface eth0
set vpp settings ipsec-acceleration
set vpp ipsec statistics-interval 30
set vpp settings lcp netlink rx-buffer-size 65536
"""


CHANGES_ON = (
    "IPsec acceleration: off -> on; vpp-ipsecd starts\n"
    "vpp settings interface: none -> eth0\n"
    "vpp settings lcp netlink rx-buffer-size: 268435456 -> 65536\n"
    "vpp ipsec statistics-interval: 10 -> 30\n"
)
DRY = "This was a dry run: nothing is changed.\n"


class RecordingUnit(Unit):
    """Systemd as the commit sees it."""

    def __init__(self):
        self.calls = []

    def turn_on(self):
        self.calls.append("on")
        return "IPsec acceleration is on."

    def turn_off(self):
        self.calls.append("off")

    def file_to_edit(self, settings):
        return None

    def prepare_vpp(self, config):
        self.calls.append(f"prepare {config.name}")
        return ""


@pytest.fixture
def place(tmp_path):
    (tmp_path / "on").write_text(ON)
    (tmp_path / "off").write_text("set vpp ipsec statistics-interval 30\n")
    return tmp_path


def test_a_commit_writes_the_settings_and_starts_the_service(place, capsys):
    unit = RecordingUnit()
    assert commit(place / "on", place / "etc" / "config.toml", unit) == 0
    assert unit.calls == ["on", "prepare config.toml"]
    assert load_settings(place / "etc" / "config.toml").offload.statistics_interval_s == 30
    assert capsys.readouterr().out == CHANGES_ON + "IPsec acceleration is on.\n"


def state_of(place):
    """Return all files below a directory with what they hold."""
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_what_changes_is_printed_before_it_is_done(place, capsys):
    printed = []

    class Watching(RecordingUnit):
        def turn_on(self):
            printed.append(capsys.readouterr().out)
            return super().turn_on()

    assert commit(place / "on", place / "config.toml", Watching()) == 0
    assert printed == [CHANGES_ON]
    (place / "other").write_text(
        "set vpp settings interface eth1\nset vpp settings interface eth0\nset vpp settings ipsec-acceleration\n"
        "set vpp settings lcp netlink rx-buffer-size 65536\nset vpp ipsec metrics listen-address 192.0.2.1\n"
        "set vpp ipsec selector-enforcement disable\n"
    )
    capsys.readouterr()
    assert commit(place / "other", place / "config.toml", Watching()) == 0
    capsys.readouterr()
    assert printed[1] == (
        "IPsec acceleration: on, no change\n"
        "vpp settings interface: eth0 -> eth1, eth0\n"
        "vpp ipsec metrics listen-address: none -> 192.0.2.1\n"
        "vpp ipsec statistics-interval: 30 -> 10\n"
        "vpp ipsec selector-enforcement: on -> off\n"
    )
    assert commit(place / "other", place / "config.toml", Watching()) == 0
    assert printed[2] == "IPsec acceleration: on, no change\nsettings: no change\n"


def test_a_reader_that_has_seen_enough_does_not_stop_a_commit(place, monkeypatch):
    class Reader(io.StringIO):
        """Reads what is printed first, and goes."""

        def write(self, text):
            if self.getvalue().endswith("\n"):
                raise BrokenPipeError
            return super().write(text)

    for name, calls, there in (("on", ["on", "prepare config.toml"], True), ("off", ["off"], False)):
        unit = RecordingUnit()
        monkeypatch.setattr(sys, "stdout", Reader())
        with pytest.raises(BrokenPipeError):
            commit(place / name, place / "config.toml", unit)
        assert (unit.calls, (place / "config.toml").exists()) == (calls, there)


def test_a_dry_run_prints_the_same_and_changes_nothing(place, capsys):
    config, unit = place / "etc" / "config.toml", RecordingUnit()
    assert commit(place / "on", config, unit, dry_run=True) == 0
    assert capsys.readouterr().out == CHANGES_ON + DRY
    assert (unit.calls, config.parent.exists()) == ([], False)
    commit(place / "on", config, unit)
    before = state_of(place)
    capsys.readouterr()
    assert commit(place / "off", config, unit, dry_run=True) == 0
    assert capsys.readouterr().out == (
        "IPsec acceleration: on -> off; vpp-ipsecd ends, and what it made in VPP is removed\n"
        "vpp settings interface: eth0 -> none\n"
        f"vpp settings lcp netlink rx-buffer-size: 65536 -> 268435456\n{DRY}"
    )
    assert (unit.calls, state_of(place)) == (["on", "prepare config.toml"], before)


def test_a_dry_run_of_a_wrong_file_fails_as_the_commit_would(place, capsys):
    (place / "bad").write_text("set vpp ipsec unsupportd drop\n")
    told = []
    for dry_run in (True, False):
        assert commit(place / "bad", place / "config.toml", RecordingUnit(), dry_run) == 1
        told.append(capsys.readouterr())
    assert told[0] == told[1]
    assert told[0].out == ""


def test_a_start_up_configuration_that_is_to_be_edited_is_told_before(place, capsys):
    startup = place / "startup.conf"

    class Editing(RecordingUnit):
        def file_to_edit(self, settings):
            return Unit().file_to_edit(settings, (startup,))

    startup.write_text("unix { nodaemon }\n")
    assert commit(place / "on", place / "config.toml", Editing(), dry_run=True) == 0
    assert capsys.readouterr().out == f"{CHANGES_ON}{startup}: edited for the service\n{DRY}"
    assert startup.read_text() == "unix { nodaemon }\n"
    startup.write_text("unix { nodaemon\n")
    before = state_of(place)
    unit = Editing()
    assert commit(place / "on", place / "config.toml", unit) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"{startup}, line 1: ")
    assert told.err.endswith("the file stays as it was\n")
    assert (told.out, unit.calls, state_of(place)) == ("", [], before)


def test_one_wrong_letter_does_not_turn_a_running_service_off(place, capsys):
    config, unit = place / "config.toml", RecordingUnit()
    commit(place / "on", config, unit)
    (place / "typo").write_text(ON.replace("acceleration", "acceleraton"))
    before = state_of(place)
    capsys.readouterr()
    assert commit(place / "typo", config, unit) == 1
    assert capsys.readouterr().err == (
        f"{place}/typo, line 2: there is no 'vpp settings ipsec-acceleraton';"
        " did you mean 'vpp settings ipsec-acceleration'?\n"
    )
    assert (unit.calls, state_of(place)) == (["on", "prepare config.toml"], before)


NO_COMMAND = (
    "has no command, so nothing is changed. To turn IPsec acceleration off with all settings at their defaults, commit"
    " 'set vpp ipsec unsupported kernel'"
)
NO_FILES = {
    b"": NO_COMMAND,
    b"\n\n": NO_COMMAND,
    b"# set vpp settings ipsec-acceleration\n": NO_COMMAND,
    b"\xef\xbb\xbf": NO_COMMAND,
    ON.encode("utf-16"): "cannot be read: it is not UTF-8 text",
    b"set system host-name '\xff'\n": "cannot be read: it is not UTF-8 text",
}


@pytest.mark.parametrize("content", NO_FILES, ids=repr)
def test_a_file_that_is_no_configuration_changes_nothing(place, capsys, content):
    config, unit = place / "config.toml", RecordingUnit()
    commit(place / "on", config, unit)
    (place / "empty").write_bytes(content)
    before = state_of(place)
    capsys.readouterr()
    assert commit(place / "empty", config, unit) == 1
    assert capsys.readouterr() == ("", f"{place}/empty {NO_FILES[content]}\n")
    assert (unit.calls, state_of(place)) == (["on", "prepare config.toml"], before)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (Path("."), "cannot be read: Is a directory"),
        (Path("none"), "cannot be read: No such file or directory"),
        (Path("/dev/zero"), "cannot be read: it is too long to be a configuration"),
        (Path("/dev/null"), NO_COMMAND),
    ],
    ids=str,
)
def test_what_is_no_file_changes_nothing(place, capsys, monkeypatch, file, reason):
    monkeypatch.chdir(place)
    before = state_of(place)
    assert commit(file, place / "config.toml", RecordingUnit()) == 1
    assert capsys.readouterr() == ("", f"{file} {reason}\n")
    assert state_of(place) == before


def test_a_file_from_another_editor_is_the_same(place):
    (place / "windows").write_bytes(b"\xef\xbb\xbf" + ON.replace("\n", "\r\n").encode())
    for name in ("on", "windows"):
        assert commit(place / name, place / f"{name}.etc" / "config.toml", RecordingUnit()) == 0
    assert list(state_of(place / "on.etc").values()) == list(state_of(place / "windows.etc").values())


def test_no_secret_of_a_routers_configuration_is_printed_or_written(place, capsys):
    (place / "router").write_text("set vpn ipsec authentication psk west secret 'hunter2'\n" + ON)
    config = place / "etc" / "config.toml"
    for dry_run in (True, False):
        assert commit(place / "router", config, RecordingUnit(), dry_run) == 0
    told = capsys.readouterr()
    assert "hunter2" not in told.out + told.err
    assert [path for path, content in state_of(place / "etc").items() if b"hunter2" in content] == []


def test_show_config_gives_commands_that_commit_to_the_same(place, capsys):
    config = place / "config.toml"
    commit(place / "on", config, RecordingUnit())
    capsys.readouterr()
    assert show_config(config) == 0
    shown = capsys.readouterr().out
    assert sorted(shown.splitlines()) == sorted(ON.splitlines())
    (place / "again").write_text(shown)
    before = config.read_text()
    assert commit(place / "again", config, RecordingUnit()) == 0
    assert config.read_text() == before


def test_show_config_says_so_where_nothing_was_committed(place, capsys):
    assert show_config(place / "config.toml") == 1
    assert capsys.readouterr().err == "Nothing was committed here: 'vpp-ipsec commit FILE' does so.\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            "set vpp ipsec unsuported drop\n",
            "bad, line 1: there is no 'vpp ipsec unsuported'; did you mean 'vpp ipsec unsupported'?\n",
        ),
        ("\nset vpp ipsec metrics port 0\n", "bad, line 2: 'vpp ipsec metrics port' must be from 1 to 65535, not 0\n"),
    ],
)
def test_a_wrong_file_changes_nothing(place, capsys, monkeypatch, text, complaint):
    monkeypatch.chdir(place)
    config, unit = place / "config.toml", RecordingUnit()
    commit(place / "on", config, unit)
    before = {path: path.read_bytes() for path in place.iterdir()}
    capsys.readouterr()
    Path("bad").write_text(text)
    assert commit(Path("bad"), config, unit) == 1
    assert capsys.readouterr().err == complaint
    assert unit.calls == ["on", "prepare config.toml"]
    assert {path: path.read_bytes() for path in before} == before


def test_settings_without_a_command_are_kept(place):
    config = place / "config.toml"
    config.write_text('[vpp]\napi_socket = "/run/other.sock"\n[netlink]\nresync_interval_s = 7\nbatch_size = 3\n')
    commit(place / "on", config, RecordingUnit())
    settings = load_settings(config)
    assert (settings.vpp.api_socket, settings.netlink.resync_interval_s) == ("/run/other.sock", 7)
    assert settings.netlink.batch_size == 10_000


def test_the_command_line_commits_and_shows(place):
    command = [sys.executable, "-m", "vppipsec.cli", "--config", place / "config.toml"]
    (place / "config.toml").write_text(f'[vpp]\napi_socket = "{place}/none.sock"\n')
    (place / "later").write_text("set vpp ipsec statistics-interval 30\nset vpp ipsec metrics port 9000\n")
    ran = subprocess.run([*command, "commit", place / "bad"], capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stderr) == (1, f"{place}/bad cannot be read: No such file or directory\n")
    dry = subprocess.run(
        [*command, "commit", place / "later", "--dry-run"], capture_output=True, text=True, timeout=30, check=True
    )
    assert (
        dry.stdout.splitlines()[0]
        == "IPsec acceleration: on -> off; vpp-ipsecd ends, and what it made in VPP is removed"
    )
    assert sorted(path.name for path in place.iterdir()) == ["config.toml", "later", "off", "on"]
    if not Unit().managed:
        subprocess.run([*command, "commit", place / "later"], timeout=30, check=True)
        ran = subprocess.run([*command, "show", "config"], capture_output=True, text=True, timeout=30, check=True)
        assert ran.stdout == "set vpp ipsec metrics port 9000\nset vpp ipsec statistics-interval 30\n"


def test_while_off_no_file_starts_the_service_and_settings_stay(place):
    config = place / "config.toml"
    config.write_text(f'[vpp]\napi_socket = "{place}/none.sock"\n')
    assert commit(place / "off", config, RecordingUnit()) == 0
    assert not config.exists()
    assert commit(place / "on", config, RecordingUnit()) == 0
    assert load_settings(config).vpp.api_socket == f"{place}/none.sock"
    assert sorted(path.name for path in place.iterdir()) == ["config.commands", "config.toml", "off", "on"]


def test_an_interface_of_a_running_vpp_is_enough_and_none_is_refused(place, capsys):
    (place / "bare").write_text(
        "set vpp settings ipsec-acceleration\nset vpp settings lcp netlink rx-buffer-size 65536\n"
    )

    config = place / "config.toml"
    config.write_text(f'[vpp]\napi_socket = "{place}/api.sock"\n')

    async def story():
        standin = StandIn(str(place / "api.sock"))
        await standin.start()
        try:
            before = await asyncio.to_thread(commit, place / "bare", config, RecordingUnit())
            admin = await connect(str(place / "api.sock"), "admin", also=SETUP_CALLS)
            await make_loopback(admin, "192.0.2.1/24")
            await admin.close()
            return before, await asyncio.to_thread(commit, place / "bare", config, RecordingUnit())
        finally:
            await standin.stop()

    assert asyncio.run(asyncio.wait_for(story(), PATIENCE_S)) == (1, 0)
    assert "needs an interface that VPP carries" in capsys.readouterr().err


def test_turning_it_off_leaves_nothing_of_ours_in_vpp_and_says_so(place, capsys):
    async def story(rig):
        rig.kernel.add(sa_out(0x100), sa_in(0x200), make_policy())
        rig.start()
        await rig.settle()
        await rig.stop()
        config, unit = place / "config.toml", RecordingUnit()
        config.write_text(render_settings(rig.settings))
        for _ in range(2):
            assert await asyncio.to_thread(commit, place / "off", config, unit) == 0
        assert unit.calls == ["off", "off"]
        rig.kernel.delete(sa_out(0x100), sa_in(0x200), make_policy())
        assert await rig.differences() == []

    play("standin", story)
    assert capsys.readouterr().out == (
        "IPsec acceleration: on -> off; vpp-ipsecd ends, and what it made in VPP is removed\n"
        "vpp settings lcp netlink batch-delay-ms: 0 -> 50\n"
        "vpp ipsec statistics-interval: 10 -> 30\n"
        "IPsec acceleration is off: 2 SAs, 1 tunnel, 1 route, 2 ACLs and 1 FIB table were removed from VPP. What VPP forwards,"
        " it no longer encrypts: where the kernel's policies ask for encryption, give the interfaces back to the kernel.\n"
        "IPsec acceleration: off, no change\n"
        "settings: no change\n"
        "IPsec acceleration is off. VPP holds nothing of ours.\n"
    )


def test_turning_it_off_without_vpp_says_so(place, capsys):
    config = place / "config.toml"
    config.write_text(f'[vpp]\napi_socket = "{place}/none.sock"\n')
    assert commit(place / "off", config, RecordingUnit()) == 0
    assert "VPP does not answer; once it is started it holds nothing of ours." in capsys.readouterr().out


def test_it_is_not_cleared_under_a_service_that_still_runs(place, capsys):
    config = place / "config.toml"
    config.write_text(
        f'[vpp]\napi_socket = "{place}/none.sock"\n[status]\nsocket = "{place}/status.sock"\n'
        "[netlink]\nrx_buffer_size = 65536\n"
    )
    daemon = subprocess.Popen([sys.executable, "-m", "vppipsec.daemon", "--config", config], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (place / "status.sock").exists() and daemon.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if daemon.poll() is not None:
            pytest.skip("the service cannot follow the kernel here: it needs root and XFRM")
        assert commit(place / "off", config, RecordingUnit()) == 1
        assert capsys.readouterr().err == (
            "vpp-ipsecd still runs, and would put back what is removed: end it, then commit again\n"
        )
    finally:
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.wait(20)
    assert commit(place / "off", config, RecordingUnit()) == 0


def test_systemd_is_asked_to_start_and_to_end_the_unit(monkeypatch, tmp_path):
    log = tmp_path / "log"
    (tmp_path / "systemctl").write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(Unit, "managed", True)
    assert Unit().turn_on() == "IPsec acceleration is on."
    Unit().turn_off()
    assert log.read_text().splitlines() == [
        "enable --quiet vpp-ipsecd.service",
        "reload-or-restart vpp-ipsecd.service",
        "disable --quiet --now vpp-ipsecd.service",
    ]


def test_what_systemd_complains_of_is_told(monkeypatch, tmp_path):
    (tmp_path / "systemctl").write_text("#!/bin/sh\necho 'Unit vpp-ipsecd.service not found.' >&2\nexit 5\n")
    (tmp_path / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(Unit, "managed", True)
    with pytest.raises(SwitchError, match=r"^systemctl enable --quiet vpp-ipsecd\.service: Unit .* not found\.$"):
        Unit().turn_on()


def test_where_systemd_does_not_run_the_operator_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(Unit, "managed", False)
    assert Unit().turn_on().endswith("systemd does not run here: start vpp-ipsecd, or send it SIGHUP.")
    assert Unit().turn_off() is None
