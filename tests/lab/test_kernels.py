"""Tests how the lab selects its kernel, and that it leaves the machine unchanged."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import kernels
import pytest
from demo import Narrator
from guest import HERE, PATH, ROOT, Guest, GuestError, lab_environment
from own import OwnKernel
from reports import guest_with
from uml import Uml

PANIC = """ Stack:
 60a0bc60 0067bb96
Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b
 [<606931e5>] panic+0x197/0x376
"""


class ShellGuest(Guest):
    """A guest that is a shell script, which prints what a test wants in place of a kernel."""

    start_s = 10.0
    script: ClassVar = 'sh "$1/run"; echo $? >"$1/status"'

    @classmethod
    def obstacle(cls) -> str | None:
        return None

    def _command_line(self) -> list[str]:
        return ["sh", "-c", self.script, "sh", str(self.directory)]


class Works(ShellGuest):
    name = "a kernel with ESP"
    script = 'echo has ESP; echo 0 >"$1/status"'


class WorksToo(ShellGuest):
    name = "a kernel with all"
    script = 'echo has ESP; echo has vhost-net; echo 0 >"$1/status"'


class Panics(ShellGuest):
    name = "a kernel that panics"
    script = f"cat >&2 <<END\n{PANIC}END\n"


class Refuses(ShellGuest):
    name = "a kernel without ESP"
    script = 'echo "Error: Protocol not supported."; echo 1 >"$1/status"'


class Hangs(ShellGuest):
    name = "a kernel that hangs"
    start_s = 1.0
    script = "exec sleep 100"


class Missing(ShellGuest):
    name = "a kernel that is not here"

    @classmethod
    def obstacle(cls) -> str | None:
        return "it needs Debian packages that are not installed: apt-get install linux"


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Clear the cache of probes."""
    kernels.probe.cache_clear()
    yield
    kernels.probe.cache_clear()


def try_kinds(monkeypatch: pytest.MonkeyPatch, *kinds: type[Guest]) -> None:
    monkeypatch.delenv(kernels.CHOICE, raising=False)
    monkeypatch.setattr(kernels, "KINDS", kinds)


def test_first_kind_that_makes_an_esp_sa_is_used_and_the_others_say_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    try_kinds(monkeypatch, Refuses, Panics, Hangs, Missing, Works, WorksToo)
    found = kernels.find()
    assert found.kind is Works
    assert str(found).splitlines() == [
        "a kernel without ESP: no, it makes no ESP SA: Error: Protocol not supported.",
        "a kernel that panics: no, the guest ended without a status: "
        "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
        "a kernel that hangs: no, the guest was ended because it took longer than 1 s",
        "a kernel that is not here: no, it needs Debian packages that are not installed: apt-get install linux",
        "a kernel with ESP: it works, and is used",
    ]


def test_kind_that_lacks_what_is_needed_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    try_kinds(monkeypatch, Works, WorksToo)
    found = kernels.find((kernels.ESP, kernels.VHOST_NET))
    assert found.kind is WorksToo
    assert found.reasons == ("a kernel with ESP: no, its kernel has no vhost-net",)


def test_each_kind_is_probed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Counted(ShellGuest):
        name = "a kernel that counts"
        script = f'echo x >>{tmp_path}/starts; echo has ESP; echo 0 >"$1/status"'

    try_kinds(monkeypatch, Counted)
    assert kernels.find() == kernels.find()
    assert (tmp_path / "starts").read_text() == "x\n"


def test_lab_skips_with_all_reasons_where_no_kind_works(monkeypatch: pytest.MonkeyPatch) -> None:
    try_kinds(monkeypatch, Refuses, Missing)
    with pytest.raises(pytest.skip.Exception) as skipped:
        guest_with(kernels.ESP)
    assert "Protocol not supported" in str(skipped.value)
    assert "not installed" in str(skipped.value)
    with pytest.raises(GuestError, match="no kernel with ESP works here"):
        kernels.find().guest()


def test_kind_that_cannot_be_prepared_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(kind: type[Guest]) -> None:
        if kind is Works:
            raise GuestError("what it needs could not be installed")

    try_kinds(monkeypatch, Works, WorksToo)
    found = kernels.find(prepare=prepare)
    assert found.kind is WorksToo
    assert found.reasons == ("a kernel with ESP: no, what it needs could not be installed",)


@pytest.mark.skipif(os.geteuid() != 0, reason="root is asked for first")
def test_place_that_a_guest_does_not_see_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest.ROOT", Path("/dev/shm/clone"))
    for kind in (OwnKernel, Uml):
        assert kind.obstacle() == (
            "a guest has a /dev and a /run of its own, and this project is in /dev/shm/clone: move it"
        )


def test_environment_chooses_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KINDS", (Works, WorksToo))
    monkeypatch.setenv(kernels.CHOICE, "WorksToo,Works")
    assert kernels.chosen_kinds() == (WorksToo, Works)
    monkeypatch.setenv(kernels.CHOICE, "Xen")
    with pytest.raises(GuestError, match="names 'Xen'; the kinds are Works, WorksToo"):
        kernels.find()


def test_console_of_a_guest_that_dies_is_shown_whole() -> None:
    with Panics() as guest, pytest.raises(GuestError) as died:
        guest.run(["true"], {}, 10.0)
    assert PANIC.strip() in str(died.value)


def test_summary_is_the_line_that_says_why() -> None:
    mount = "mount: /root: wrong fs type\n       dmesg(1) may have more information after failed mount system call.\n"
    for console in (mount, f"{mount}sysrq: Power Off\nreboot: Power down\n"):
        assert GuestError("it ended", console).summary == "it ended: mount: /root: wrong fs type"


INTERRUPTED = """
from guest import end_by_signals
from test_kernels import Hangs
end_by_signals()
with Hangs() as guest:
    print(guest.directory, flush=True)
    guest.run(["true"], {}, 60.0)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_guest_ends_with_its_program(number: signal.Signals) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=lab_environment(),
        preexec_fn=lambda: signal.signal(number, signal.default_int_handler),  # as where this session ignores it
    )
    assert program.stdout is not None
    directory = Path(program.stdout.readline().strip())
    assert directory.is_dir()
    program.send_signal(number)
    program.communicate(timeout=10)
    assert not directory.exists()


def test_impatience_does_not_interrupt_the_end_of_a_guest() -> None:
    class Impatient(Works):
        def _clean_up(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # in which another thread, which has no mask, gets it
            super()._clean_up()

    with Narrator("at it"), pytest.raises(KeyboardInterrupt), Impatient() as guest:
        pass
    assert not guest.directory.exists()


def test_demo_says_what_is_under_way_while_nothing_else_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with Narrator("start", quiet_s=0.3) as narrator:
        narrator.say("[  1.0 s] bring up the tunnel")
        narrator.say("          some detail")
        time.sleep(1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["start", "[  1.0 s] bring up the tunnel", "          some detail"]
    assert len(lines) >= 4
    assert all(re.fullmatch(r" +still at it after \d+ s: bring up the tunnel", line) for line in lines[3:])


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.xdist_group("lab")
@pytest.mark.timeout(600)
def test_own_kernel_leaves_nothing_behind() -> None:
    said: list[str] = []
    with guest_with(kernels.ESP) as guest:  # nothing else runs there, so that everything can be compared
        status = guest.run([sys.executable, str(HERE / "untouched.py")], lab_environment(), 300.0, said.append)
    assert (status, [line for line in said if "is left" in line or "is gone" in line]) == (0, []), "\n".join(said)


MOUNTS = """
set -e
mount --make-rprivate /
cd "$1"
for name in "a blank" "100%" "a:b,c"; do mkdir "$name"; mount -t tmpfs tmpfs "$name"; echo seen >"$name/file"; done
exec "$2" -c '
import sys
from own import OwnKernel
from guest import PATH
with OwnKernel() as guest:
    sys.exit(guest.run(["sh", "-c", sys.argv[1]], {"PATH": PATH}, 30.0))
' "cd '$1' && cat 'a blank/file' '100%/file' 'a:b,c/file'"
"""


@pytest.mark.lab
@pytest.mark.xdist_group("lab")
def test_own_kernel_shows_file_systems_with_odd_names(tmp_path: Path) -> None:
    if why := OwnKernel.obstacle():
        pytest.skip(why)
    command = ["unshare", "--mount", "sh", "-c", MOUNTS, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, env=lab_environment(), timeout=60)
    assert (done.returncode, done.stdout) == (0, "seen\n" * 3), done.stderr


@pytest.mark.lab
@pytest.mark.xdist_group("lab")
@pytest.mark.parametrize("kind", [OwnKernel, Uml])
def test_guest_runs_where_paths_have_blanks(kind: type[Guest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if why := kind.obstacle() or (kind is Uml and kernels.probe(kind)[1]):
        pytest.skip(why)
    clone, directory = tmp_path / "a clone", tmp_path / "a directory"
    directory.mkdir()
    shutil.copytree(HERE, clone / "tests" / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("guest", "own", "uml"):
        monkeypatch.setattr(f"{module}.HERE", clone / "tests" / "lab")
    monkeypatch.setattr("guest.ROOT", clone)
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    said: list[str] = []
    with kind() as guest:
        assert guest.directory.parent == directory
        assert guest.run(["pwd"], {"PATH": PATH}, kind.start_s, said.append) == 0
    assert said == [str(clone)]


SET_UP = f"""
set -e
mkdir /fake
export PATH=/fake:$PATH FAIL="$1"
limit=$2
cat >/fake/apt-get <<'END'
#!/bin/sh
[ "$2" = update ] && exit
/usr/sbin/policy-rc.d && echo "services may start"
ln -s /lib/systemd/system/fake.service /etc/systemd/system/multi-user.target.wants/fake.service
sleep 5; echo "Unpacking fake"; sleep 5; echo "apt-get has more to say"; exit $FAIL
END
printf '#!/bin/sh\\nexit 1\\n' >/fake/dpkg-query
chmod +x /fake/*
rm -f /usr/sbin/policy-rc.d
mkdir -p /etc/systemd/system/multi-user.target.wants
ln -s /lib/systemd/system/mine.service /etc/systemd/system/multi-user.target.wants/mine.service
status=0
timeout --foreground --preserve-status "$limit" {ROOT}/tools/setup.sh packages "for a test" fake || status=$?
echo "status $status"
[ ! -e /usr/sbin/policy-rc.d ] || echo "the policy is left"
! pgrep -x sleep || echo "apt-get is left"
ls /etc/systemd/system/multi-user.target.wants
"""


def set_up(fail: int = 0, limit_s: int = 60) -> list[str]:
    """Run the set-up script in a throw-away overlay with an apt-get of the test's; return its lines.

    That apt-get takes 10 s and ends with status `fail`. After `limit_s` seconds the script gets SIGTERM.
    """
    if why := OwnKernel.obstacle():
        pytest.skip(why)
    said: list[str] = []
    with OwnKernel() as guest:
        guest.run(["bash", "-c", SET_UP, "bash", str(fail), str(limit_s)], {"PATH": PATH}, 60.0, said.append)
    return said


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.xdist_group("lab")
def test_set_up_says_what_why_and_how_far_and_enables_no_service() -> None:
    lines = set_up(fail=0)
    assert "Installing 1 Debian packages, for a test: fake" in lines
    assert any(line.endswith(" s: at work") for line in lines)
    assert any(line.endswith(" s: Unpacking fake") for line in lines)
    assert "services may start" not in lines
    assert "status 0" in lines
    assert "the policy is left" not in lines
    assert "mine.service" in lines
    assert "fake.service" not in lines


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.xdist_group("lab")
def test_set_up_that_fails_shows_all_that_was_said() -> None:
    lines = set_up(fail=100)
    assert {"Unpacking fake", "apt-get has more to say", "status 100"} <= set(lines)
    assert "the policy is left" not in lines
    assert "mine.service" in lines
    assert "fake.service" not in lines


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.xdist_group("lab")
def test_set_up_that_is_interrupted_ends_apt_and_leaves_no_policy_and_no_service() -> None:
    lines = set_up(limit_s=3)
    assert "status 130" in lines
    assert {"the policy is left", "apt-get is left", "fake.service"}.isdisjoint(lines)
    assert "mine.service" in lines
