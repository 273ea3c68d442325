"""Boots a Linux kernel with ESP (user-mode Linux) on this machine's own files, and runs one command in it as root.

The guest sees the host's root read-only, under an overlay that is thrown away; it shares one directory with the host. Its
kernel, network and processes are its own. It is an ordinary process: no virtual machine, no image, no download.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

_PACKAGES = {
    "linux.uml": "user-mode-linux",
    "charon-systemd": "charon-systemd",
    "swanctl": "strongswan-swanctl",
    "ip": "iproute2",
    "ping": "iputils-ping",
    "insmod": "kmod",
    "unshare": "util-linux",
}
"""What the guest and the lab within it run, and the Debian package that it is in."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED_ON = ("VPP_BIN", "LD_LIBRARY_PATH")
"""Variables of ours that the guest gets; everything else there is fixed."""
_CONSOLE_LINES = 20


class GuestError(Exception):
    """The guest could not be started, or did not end as it should; the text says why, in a sentence."""


def obstacle() -> str | None:
    """Return in a sentence why the lab cannot run here and what to do about it, or None where it can."""
    missing = [package for tool, package in _PACKAGES.items() if shutil.which(tool, path=_PATH) is None]
    if missing:
        return f"the lab needs Debian packages that are not installed: apt-get install {' '.join(missing)}"
    if os.geteuid() != 0:
        return "the lab has to be run as root"
    return None


def lab_environment(**more: str) -> dict[str, str]:
    """Return the environment for a command in the guest: the project's modules, the VPP to use, nothing of the user's."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "PYTHONPATH": ":".join(str(path) for path in (ROOT / "python", ROOT / "tests", HERE)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        **passed_on,
        **more,
    }


class Guest:
    """One guest. Use it as a context manager: at its end nothing is left of it, however it ends.

    `directory` is shared with the guest, at the same place and writable; it goes with the guest.
    """

    def __init__(self, memory_mb: int = 2048) -> None:
        """Prepare. `memory_mb`: of it only what is used is taken. Raises GuestError where the lab cannot run."""
        if why := obstacle():
            raise GuestError(why)
        self._memory_mb = memory_mb
        self.directory = Path(tempfile.mkdtemp(prefix="lab-"))
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        limit_s: float,
        output: Callable[[str], None] = print,
    ) -> int:
        """Boot, run a command in the project's directory, hand each line that it prints to `output`; return its status.

        Raises GuestError where the guest gives none, or not within `limit_s` seconds.
        """
        settings = [f"{name}={value}" for name, value in environment.items()]
        job = shlex.join(["exec", "env", "-i", *settings, *command])
        (self.directory / "run").write_text(f"cd {shlex.quote(str(ROOT))} && {job}\n")
        status = self.directory / "status"
        status.unlink(missing_ok=True)
        with (self.directory / "console").open("wb") as console:
            self._process = subprocess.Popen(
                self._command_line(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=console,
                cwd=self.directory,
                env={"PATH": _PATH, "TMPDIR": _memory_directory(self._memory_mb)},
                start_new_session=True,  # Ctrl-C is ours to handle
                text=True,
                errors="replace",
            )
        out_of_time = threading.Event()

        def stop() -> None:
            out_of_time.set()
            self.end()

        alarm = threading.Timer(limit_s, stop)
        alarm.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                output(line.rstrip("\n"))
            self._process.wait()
        finally:
            alarm.cancel()
            self.end()
        if out_of_time.is_set():
            raise GuestError(f"the guest was ended because it took longer than {limit_s:.0f} s")
        try:
            return int(status.read_text())
        except (OSError, ValueError):
            raise GuestError(f"the guest ended without a status; its console says:\n{self._console()}") from None

    def end(self) -> None:
        """End the guest, with everything that runs in it. Returns once all of it is gone."""
        if self._process is None or self._process.poll() is not None:
            return
        number = self._process.pid
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
        # `unshare` ends when its child, the first of the namespace, does, which is when the whole namespace is empty
        os.kill(int(children[0]) if children else number, signal.SIGKILL)
        self._process.wait()

    def _command_line(self) -> list[str]:
        # The kernel consists of many processes. In a PID namespace of their own they all end with its first, that one with
        # `unshare`, and `unshare` with us. The first is a shell, since a kernel that panics aborts, which a first process cannot.
        return [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", '"$@"; exit', "sh"),
            *("linux.uml", "rootfstype=hostfs", "rootflags=/", "ro", f"init={HERE / 'init.sh'}"),
            *(f"mem={self._memory_mb}M", "quiet", "loglevel=1", f"uml_dir={self.directory}", "umid=guest"),
            *("con=null", "con0=null,fd:2", "ssl=null", "ssl0=null,fd:1"),
            f"LAB_JOB={self.directory}",
        ]

    def _console(self) -> str:
        lines = (self.directory / "console").read_text(errors="replace").splitlines()
        told = [line for line in lines if not line.startswith(" ")]  # the others are a stack trace
        return "\n".join(told[-_CONSOLE_LINES:]) or "nothing"

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        impatience = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self.end()
            shutil.rmtree(self.directory, ignore_errors=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, impatience)


def _memory_directory(memory_mb: int) -> str:
    """Return where the guest's memory is kept as a file: in /dev/shm where it has room."""
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).free >= memory_mb << 20:
        return str(shm)
    return tempfile.gettempdir()
