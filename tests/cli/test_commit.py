"""`vpp-ipsec commit` and `show config` off VyOS, with the stand-in as VPP."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from build import make_policy, sa_in, sa_out
from lanwan import SETUP_CALLS, make_loopback
from rig import play
from shared import PATIENCE_S
from vppipsec.conf.commit import commit, show_config
from vppipsec.conf.settings import load_settings, render_settings
from vppipsec.conf.switch import SwitchError, Unit
from vppipsec.vpp.client import connect
from vppstandin.server import StandIn

ON = """\
set vpp settings interface eth0
set vpp settings ipsec-acceleration
set vpp ipsec statistics-interval 30
set vpp settings lcp netlink rx-buffer-size 65536
"""


class RecordingUnit(Unit):
    """Systemd as the commit sees it."""

    def __init__(self):
        self.calls = []

    def turn_on(self):
        self.calls.append("on")
        return "IPsec acceleration is on."

    def turn_off(self):
        self.calls.append("off")

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
    assert capsys.readouterr().out == "IPsec acceleration is on.\n"


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
        ("set vpp ipsec nonsense\n", "bad, line 1: there is no 'vpp ipsec nonsense'\n"),
        ("set vpp ipsec metrics port 0\n", "'vpp ipsec metrics port' must be from 1 to 65535, not 0\n"),
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
    if not Unit().managed:
        subprocess.run([*command, "commit", place / "later"], timeout=30, check=True)
        ran = subprocess.run([*command, "show", "config"], capture_output=True, text=True, timeout=30, check=True)
        assert ran.stdout == "set vpp ipsec metrics port 9000\nset vpp ipsec statistics-interval 30\n"


def test_while_it_is_off_no_file_turns_the_service_on_and_settings_are_kept(place):
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
        "IPsec acceleration is off: 2 SAs, 1 tunnel, 1 route, 2 ACLs and 1 FIB table were removed from VPP. What VPP forwards,"
        " it no longer encrypts: where the kernel's policies ask for encryption, give the interfaces back to the kernel.\n"
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
