"""Boots a Linux kernel with ESP on this machine's own files, and runs one command in it as root.

The guest sees the host's root read-only, under an overlay that is thrown away; it shares one directory with the host. Its
kernel, network and processes are its own. Here is what the kinds of guest have in common; they are `uml` and `qemu`.
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

_PACKAGES = {
    "charon-systemd": "charon-systemd",
    "swanctl": "strongswan-swanctl",
    "ip": "iproute2",
    "ping": "iputils-ping",
    "insmod": "kmod",
}
"""What the lab runs in every guest, and the Debian package that it is in."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED_ON = ("VPP_BIN", "LD_LIBRARY_PATH")
"""Variables of ours that the guest gets; everything else there is fixed."""
_CONSOLE_LINES = 20


class GuestError(Exception):
    """The guest could not be started, or did not end as it should; the text says why, in a sentence."""


def lab_environment(**more: str) -> dict[str, str]:
    """Return the environment for a command in the guest: the project's modules, the VPP to use, nothing of the user's."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        "PATH": f"{Path(sys.executable).parent}:{PATH}",
        "PYTHONPATH": ":".join(str(path) for path in (ROOT / "python", ROOT / "tests", HERE)),
        "PYTHONUNBUFFERED": "1",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        **passed_on,
        **more,
    }


class Guest(ABC):
    """One guest. Use it as a context manager: at its end nothing is left of it, however it ends.

    `directory` is shared with the guest, at the same place and writable; it goes with the guest.
    """

    packages: ClassVar[Mapping[str, str]]
    """Programs that this kind needs besides the lab's, and the Debian package that each is in."""

    def __init__(self, memory_mb: int = 2048) -> None:
        """Prepare. `memory_mb`: of it only what is used is taken. Raises GuestError where the lab cannot run."""
        if why := self.obstacle():
            raise GuestError(why)
        self._memory_mb = memory_mb
        self.directory = Path(tempfile.mkdtemp(prefix="lab-"))
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    def obstacle(cls) -> str | None:
        """Return in a sentence why this kind cannot run here and what to do about it, or None where it can."""
        needed = {**_PACKAGES, **cls.packages}
        missing = [package for tool, package in needed.items() if shutil.which(tool, path=PATH) is None]
        if missing:
            return f"the lab needs Debian packages that are not installed: apt-get install {' '.join(missing)}"
        if os.geteuid() != 0:
            return "the lab has to be run as root"
        return None

    @abstractmethod
    def _command_line(self) -> list[str]:
        """Return the command that runs the kernel: output of the job on standard output, its console on standard error.

        Whatever it starts ends with its first child, or with itself where it has none.
        """

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
        with (self.directory / "console").open("ab") as console:
            self._process = subprocess.Popen(
                self._command_line(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=console,
                cwd=self.directory,
                env={"PATH": PATH, "TMPDIR": self._memory_directory()},
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
        os.kill(int(children[0]) if children else number, signal.SIGKILL)
        self._process.wait()

    def _memory_directory(self) -> str:
        """Return where the guest's memory is kept as a file, where it is: in /dev/shm if that has room."""
        shm = Path("/dev/shm")
        if shm.is_dir() and shutil.disk_usage(shm).free >= self._memory_mb << 20:
            return str(shm)
        return tempfile.gettempdir()

    def _console(self) -> str:
        lines = (self.directory / "console").read_text(errors="replace").splitlines()
        told = [line for line in lines if not line.startswith(" ")]  # the others are a stack trace
        return "\n".join(told[-_CONSOLE_LINES:]) or "nothing"

    def __enter__(self) -> Self:
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
