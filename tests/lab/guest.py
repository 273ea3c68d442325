"""Runs one command as root under a kernel with ESP, in a guest: the host's files, read-only under a throw-away overlay.

The guest shares one directory with the host. It has a network and processes of its own. This module holds what all
kinds of guest share. `own`, `uml` and `qemu` are the kinds; `kernels` selects one.
"""

from __future__ import annotations

import compileall
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

LAB_PACKAGES = {
    "charon-systemd": "charon-systemd",
    "swanctl": "strongswan-swanctl",
    "ip": "iproute2",
    "ping": "iputils-ping",
    "nft": "nftables",
    "insmod": "kmod",
}
"""Programs that the lab runs in every guest, each with its Debian package."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OF_EACH_GUEST = ("/dev", "/run")
"""What a guest does not see of the host: it has its own."""
_PASSED_ON = ("VPP_BIN", "LD_LIBRARY_PATH")
"""Variables that the guest gets from the host. All others are fixed."""


_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks a program to end: Ctrl-C, `kill`, and a terminal that is closed."""
_AFTERMATH = re.compile(r" |dmesg\(1\) may have|sysrq: Power Off|reboot: Power down|Aborted$")
"""Lines of a console that say nothing of why a guest ended: what mount adds to its complaint, and how the power goes off."""


class GuestError(Exception):
    """The guest did not start, or did not end properly. The text says why; `console` is its console output."""

    def __init__(self, why: str, console: str = "") -> None:
        super().__init__(f"{why}; its console says:\n{console}" if console else why)
        self.console = console
        lines = [line for line in console.splitlines() if line.strip() and not _AFTERMATH.match(line)]
        last = re.findall(r"Kernel panic - .*", console) or lines[-1:]
        self.summary = f"{why}: {last[0].strip()}" if last else why
        """The same in one line: with the kernel's panic, or with the last line of the console that says why."""


def end_by_signals() -> None:
    """Have this program end as by Ctrl-C, with all that it started, at each signal that asks for it."""
    for number in _TO_END:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Have signals to end wait. A mask would not do, as it is each thread's own, and Python's handlers run in the first."""
    held: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in _TO_END if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in held[:1]:
        signal.raise_signal(number)


def lab_environment(**more: str) -> dict[str, str]:
    """Return the environment of a command in the guest: the project's modules and the VPP to use.

    It contains nothing of the user's environment.
    """
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


def compile_modules() -> None:
    """Compile the project's modules here, once: an emulated processor takes twenty times as long, for each guest."""
    for directory in (ROOT / "python", ROOT / "tests" / "support", HERE):
        compileall.compile_dir(directory, quiet=2)


def missing_packages(programs: Mapping[str, str]) -> list[str]:
    """Return the Debian packages of the programs that are not installed."""
    return [package for program, package in programs.items() if shutil.which(program, path=PATH) is None]


class Guest(ABC):
    """One guest. Use it as a context manager: it leaves nothing behind, however it ends.

    `directory` is shared with the guest, at the same path and writable. It is removed with the guest.
    """

    name: ClassVar[str]
    """The name of this kind in messages."""
    programs: ClassVar[Mapping[str, str]] = {}
    """Further programs that this kind needs, each with its Debian package."""
    start_s: ClassVar[float]
    """Time limit for this kind to start and to run a command that ends at once, s."""

    def __init__(self, memory_mb: int = 2048) -> None:
        """`memory_mb` is a limit; the guest uses only what it needs. Raises GuestError where this kind cannot run."""
        if why := self.obstacle():
            raise GuestError(why)
        self._memory_mb = memory_mb
        self.directory = Path(tempfile.mkdtemp(prefix="lab-"))
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    def unfit(cls) -> str | None:
        """Return why this kind can never start here, whatever is installed, or None."""
        if os.geteuid() != 0:
            return "it has to be run as root"
        if any(ROOT.is_relative_to(place) for place in _OF_EACH_GUEST):
            return f"a guest has a {' and a '.join(_OF_EACH_GUEST)} of its own, and this project is in {ROOT}: move it"
        return None

    @classmethod
    def obstacle(cls) -> str | None:
        """Return in a sentence why this kind cannot start here and what to do about it, or None where it can."""
        if why := cls.unfit():
            return why
        if missing := missing_packages({**LAB_PACKAGES, **cls.programs}):
            return f"it needs Debian packages that are not installed: apt-get install {' '.join(missing)}"
        return None

    @abstractmethod
    def _command_line(self) -> list[str]:
        """Return the command that runs the guest: the job writes to standard output, the console to standard error.

        Its first child ends all its processes when it ends; without a child, the command itself does.
        """

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        limit_s: float,
        output: Callable[[str], None] = print,
    ) -> int:
        """Start, run a command in the project's directory, pass each line of its output to `output`, and return its
        status.

        Raises GuestError where the guest gives no status, or none within `limit_s` seconds.
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
                start_new_session=True,  # Ctrl-C is handled here
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
            raise GuestError(f"the guest was ended because it took longer than {limit_s:.0f} s", self._console())
        try:
            return int(status.read_text())
        except (OSError, ValueError):
            raise GuestError("the guest ended without a status", self._console() or "nothing") from None

    def end(self) -> None:
        """End the guest, with everything that runs in it. Returns once all of it is gone."""
        if self._process is None or self._process.poll() is not None:
            return
        number = self._process.pid
        try:
            children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            os.kill(int(children[0]) if children else number, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended in the meantime
        self._process.wait()

    def _memory_directory(self) -> str:
        """Return the directory of the guest's memory file: /dev/shm if that has room."""
        shm = Path("/dev/shm")
        if shm.is_dir() and shutil.disk_usage(shm).free >= self._memory_mb << 20:
            return str(shm)
        return tempfile.gettempdir()

    def _console(self) -> str:
        return (self.directory / "console").read_text(errors="replace").strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _signals_held():
            self.end()
            self._clean_up()

    def _clean_up(self) -> None:
        """Remove what a guest that has ended leaves. No signal interrupts this."""
        shutil.rmtree(self.directory, ignore_errors=True)
