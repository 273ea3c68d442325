"""What vpp.service runs before VPP: startup.conf is edited at once or not at all, and VPP takes what comes of it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from support.vpp_box import VppBox
from vppipsec.activation.switch import SwitchError, Unit
from vppipsec.conf.prepare import prepare
from vppipsec.conf.replace import replace_file
from vppipsec.conf.settings import NetlinkSettings, Settings, find_config, render_settings
from vppipsec.conf.startup import edit

HELPER = Path(__file__).resolve().parents[2] / "src/helpers/vpp-ipsec-startup"
NETLINK = NetlinkSettings(rx_buffer_size=1_000_000, batch_size=300, batch_delay_ms=20)
READY = "plugins {\n    plugin linux_cp_plugin.so { enable }\n}\n"


def run_helper(startup_conf: Path, config: Path | None) -> subprocess.CompletedProcess[str]:
    """Run what vpp.service runs before VPP."""
    given_config = [] if config is None else ["--config", str(config)]
    command = [sys.executable, str(HELPER), *given_config, str(startup_conf)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of the service."""
    path = tmp_path / "config.toml"
    path.write_text(render_settings(Settings(netlink=NETLINK)))
    return path


def test_helper_keeps_mode_owner_link_and_binary_bytes(tmp_path: Path, config: Path) -> None:
    real, link = tmp_path / "real.conf", tmp_path / "vpp.conf"
    real.write_bytes(b"# caf\xe9\nlinux-xfrm-nl { interface ipsec }\n")
    real.chmod(0o640)
    link.symlink_to(real)
    owner = (12345, 54321) if os.getuid() == 0 else (os.getuid(), os.getgid())
    os.chown(real, *owner)
    ran = run_helper(link, config)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert real.read_bytes() == b"# caf\xe9\n" + b"\n" + READY.encode()
    assert link.is_symlink()
    state = real.stat()
    assert (stat.S_IMODE(state.st_mode), state.st_uid, state.st_gid) == (0o640, *owner)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "real.conf", "vpp.conf"]


def test_helper_does_not_write_a_file_that_is_right(tmp_path: Path, config: Path) -> None:
    path = tmp_path / "vpp.conf"
    path.write_text(READY)
    before = path.stat()
    ran = run_helper(path, config)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b"unix {\n",
            "{path}, line 1: the '{{' is never closed: add the '}}' that it belongs to; the file stays as it was\n",
        ),
        (b"a {}\n}\xff", "{path}, line 2: the '}}' closes nothing: remove it, or add the '{{' that it belongs to;"),
    ],
)
def test_helper_leaves_a_broken_file_and_says_why(tmp_path: Path, config: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "vpp.conf"
    path.write_bytes(content)
    before = path.stat()
    ran = run_helper(path, config)
    assert ran.returncode == 1
    assert ran.stderr.startswith(complaint.format(path=path))
    assert ran.stderr.count("\n") == 1
    assert path.read_bytes() == content
    assert path.stat().st_ino == before.st_ino


def test_helper_leaves_the_file_when_the_configuration_is_wrong(tmp_path: Path, config: Path) -> None:
    path = tmp_path / "vpp.conf"
    path.write_text("cpu {}\n")
    config.write_text("[netlink]\nbatch_size = 0\n")
    ran = run_helper(path, config)
    assert ran.returncode == 1
    assert (
        ran.stderr == f"{config}, line 2: netlink.batch_size must be from 1 to 1000000, not 0; {path} stays as it was\n"
    )
    assert path.read_text() == "cpu {}\n"


@pytest.mark.skipif(find_config(None) is not None, reason="this machine has a configuration of the service")
@pytest.mark.parametrize(
    ("text", "edited"),
    [("cpu {}\n", "cpu {}\n"), ("linux-xfrm-nl {}\n", READY)],
    ids=["acceleration is off", "VyOS asked for the C engine"],
)
def test_helper_without_configuration_goes_by_what_vyos_wrote(tmp_path: Path, text: str, edited: str) -> None:
    path = tmp_path / "vpp.conf"
    path.write_text(text)
    ran = run_helper(path, None)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert path.read_text() == edited


def test_helper_says_that_there_is_no_file(tmp_path: Path, config: Path) -> None:
    ran = run_helper(tmp_path / "none.conf", config)
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}/none.conf is not there: nothing is edited\n")
    assert not (tmp_path / "none.conf").exists()


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_failure_on_the_way_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "vpp.conf"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["vpp.conf"]


def test_the_new_file_is_whole_on_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vpp.conf"
    path.write_text("old")
    steps: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        steps.append(f"fsync {os.path.basename(os.readlink(f'/proc/self/fd/{handle}')).startswith('.vpp.conf.')}")
        fsync(handle)

    def noted_replace(source: str, target: Path) -> None:
        steps.append(f"replace {Path(source).read_text()} for {path.read_text()}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    replace_file(path, b"new")
    assert steps == ["fsync True", "replace new for old", "fsync False"]
    assert path.read_text() == "new"


@pytest.mark.vpp
def test_vpp_starts_with_an_edited_file_and_has_what_is_needed() -> None:
    hostile = "plugins { plugin default { disable } }\ncrypto-engines { default { disable } }\nlinux-xfrm-nl { }\n"
    with VppBox(change=lambda text: edit(text.replace("plugin default { enable }", "") + hostile, None)) as box:
        plugins, engines = box.cli("show plugins"), box.cli("show crypto engines")
    assert set(re.findall(r"(\w+_plugin\.so)", plugins)) == {"abf_plugin.so", "acl_plugin.so", "linux_cp_plugin.so"}
    assert set(re.findall(r"^(\w+) ", engines, re.MULTILINE)) >= {"native", "openssl"}


@pytest.mark.vpp
def test_vpp_takes_the_netlink_values() -> None:
    mirroring = "linux-nl { nl-batch-size 1 }\n"
    with VppBox(change=lambda text: edit(text + mirroring, NETLINK)) as box:
        if not (box.plugins / "linux_nl_plugin.so").exists():
            pytest.skip("this VPP was built without linux_nl_plugin.so")
        assert "linux_nl_plugin.so" in box.cli("show plugins")


def test_first_file_that_is_there_is_edited_and_no_other(tmp_path: Path, config: Path) -> None:
    rendered, packaged = tmp_path / "vpp.conf", tmp_path / "startup.conf"
    packaged.write_text("unix { nodaemon }\n")
    assert prepare(config, (rendered, packaged)) == packaged
    assert "linux_cp_plugin.so" in packaged.read_text()
    rendered.write_text("unix { nodaemon }\n")
    before = packaged.read_text()
    assert prepare(config, (rendered, packaged)) == rendered
    assert packaged.read_text() == before
    assert prepare(config, (rendered, packaged)) is None  # nothing is left to edit
    assert prepare(config, (tmp_path / "none",)) is None


def test_operator_is_told_that_vpp_must_be_started_again(tmp_path: Path, config: Path) -> None:
    path = tmp_path / "startup.conf"
    path.write_text("unix { nodaemon }\n")
    told = Unit().prepare_vpp(config, (path,))
    assert told == f"{path} was edited for the service. VPP reads it when it is started again: 'systemctl restart vpp'."
    assert Unit().prepare_vpp(config, (path,)) == ""
    path.write_text("unix { nodaemon\n")
    with pytest.raises(SwitchError, match="the file stays as it was"):
        Unit().prepare_vpp(config, (path,))


def test_operator_can_be_told_before_what_would_be_edited(tmp_path: Path) -> None:
    path = tmp_path / "startup.conf"
    settings = Settings()
    assert Unit().file_to_edit(settings, (path,)) is None
    path.write_text("unix { nodaemon }\n")
    assert Unit().file_to_edit(settings, (path,)) == path
    assert path.read_text() == "unix { nodaemon }\n"
    path.write_text(edit(path.read_text(), settings.netlink))
    assert Unit().file_to_edit(settings, (path,)) is None
    path.write_text("unix { nodaemon\n")
    with pytest.raises(SwitchError, match="the file stays as it was"):
        Unit().file_to_edit(settings, (path,))
