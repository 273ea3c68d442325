"""The demo: shows, with a kernel that has ESP, how VPP follows real strongSwan tunnels. Exits with 0 if every step
held.

VPP is a real one where VPP_BIN names it or a `vpp` is in PATH, else the stand-in.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from types import TracebackType

from guest import HERE, GuestError, compile_modules, end_by_signals, lab_environment
from kernels import find, install

LIMIT_S = 600.0
"""Time limit, s; more than the slowest machine needs. An idle machine needs 25 to 90 s."""
_QUIET_S = 4.0
"""After this time without a line, s, the demo says that it still works."""

_END = """
What you saw: strongSwan negotiated, the kernel held the SAs and policies, and vpp-ipsecd made VPP hold the same after each
change. Each 'compare' step checked it against dumps of both.
Where to go next: 'make test' runs all tests; README.md has the commands; docs/architecture.md follows one SA through the code."""


class Narrator:
    """Prints lines, and names the current step while none come. Use it as a context manager."""

    def __init__(self, first: str, quiet_s: float = _QUIET_S) -> None:
        """`first` is the step at the start. After `quiet_s` without a line, the narrator repeats the current step."""
        self._lock = threading.Lock()
        self._began = self._last = time.monotonic()
        self._text = first
        self._quiet_s = quiet_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._remind, daemon=True)

    def say(self, line: str) -> None:
        """Print a line. A line of the tour such as `[ 12.3 s] step` begins a step."""
        with self._lock:
            if step := re.fullmatch(r"\[[ .\d]+ s\] (.+)", line):
                self._text = step[1]
            self._last = time.monotonic()
            print(line, flush=True)

    def _remind(self) -> None:
        while not self._over.wait(0.05):
            with self._lock:
                now = time.monotonic()
                if now - self._last >= self._quiet_s:
                    self._last = now
                    print(f"          still at it after {now - self._began:.0f} s: {self._text}", flush=True)

    def __enter__(self) -> Narrator:
        self.say(self._text)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()


def main() -> int:
    """Run the demo."""
    end_by_signals()
    environment = lab_environment()
    found_vpp = shutil.which("vpp")
    if not environment.get("VPP_BIN") and found_vpp is not None:
        environment["VPP_BIN"] = found_vpp
    try:
        with Narrator("Looking for a Linux kernel with ESP to show it in") as narrator:
            found = find(prepare=install)
            for line in str(found).splitlines():
                narrator.say(f"  {line}")
            began = time.monotonic()
            compile_modules()
            with found.guest() as guest:
                narrator.say(f"Starting the lab on {guest.name}; it sees this machine's files and changes none")
                status = guest.run([sys.executable, str(HERE / "tour.py")], environment, LIMIT_S, narrator.say)
    except GuestError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("Interrupted; everything that was started has ended.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    print(f"Took {time.monotonic() - began:.0f} s. Nothing that was started is left.")
    if status == 0:
        print(_END)
    return status


if __name__ == "__main__":
    sys.exit(main())
