"""Selects the kind of guest whose kernel has what the lab needs, by trying each: it must create a real ESP SA.

Run as a program, it installs the packages for the first kind that works, and prints which kind that is.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from guest import HERE, LAB_PACKAGES, PATH, ROOT, Guest, GuestError, end_by_signals, missing_packages
from own import OwnKernel
from qemu import Qemu, QemuKvm, fetch_kernel, find_kernel
from uml import Uml

KINDS: tuple[type[Guest], ...] = (OwnKernel, Uml, QemuKvm, Qemu)
"""The kinds in the order of trials: the fastest to start first."""
CHOICE = "VPPIPSEC_LAB_KERNEL"
"""Environment variable that names the kinds to try, by class and in order, separated by commas."""

ESP, XFRM_INTERFACE, VHOST_NET = "ESP", "xfrm interfaces", "vhost-net"
_SETUP = ROOT / "tools" / "setup.sh"


@dataclass(frozen=True)
class Found:
    """The kind of guest to use, None where no kind works, and the reason against each kind tried before it."""

    kind: type[Guest] | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Return a line for each kind that was tried."""
        return "\n".join((*self.reasons, *([f"{self.kind.name}: it works, and is used"] if self.kind else [])))

    def guest(self, memory_mb: int = 2048) -> Guest:
        """Return a guest of this kind. Raises GuestError where there is none."""
        if self.kind is None:
            raise GuestError("no kernel with ESP works here:\n" + "\n".join(self.reasons))
        return self.kind(memory_mb)


def chosen_kinds() -> tuple[type[Guest], ...]:
    """Return the kinds to try. Raises GuestError where the environment names one that does not exist."""
    named = os.environ.get(CHOICE)
    if not named:
        return KINDS
    by_name = {kind.__name__: kind for kind in KINDS}
    if unknown := [name for name in named.split(",") if name not in by_name]:
        raise GuestError(f"{CHOICE} names {unknown[0]!r}; the kinds are {', '.join(by_name)}")
    return tuple(by_name[name] for name in named.split(","))


@functools.cache
def probe(kind: type[Guest]) -> tuple[frozenset[str], str]:
    """Start a guest, and return what its kernel has, or in one line why it lacks ESP. The result is cached for the run."""
    if why := kind.obstacle():
        return frozenset(), why
    lines: list[str] = []
    try:
        with kind() as guest:
            status = guest.run(["sh", str(HERE / "probe.sh")], {"PATH": PATH}, kind.start_s, lines.append)
    except GuestError as error:
        return frozenset(), error.summary
    features = frozenset(line.removeprefix("has ") for line in lines if line.startswith("has "))
    said = "; ".join(line for line in lines if not line.startswith("has ")) or f"status {status}"
    return features, "" if ESP in features else f"it makes no ESP SA: {said}"


def find(needs: Iterable[str] = (ESP,), prepare: Callable[[type[Guest]], None] | None = None) -> Found:
    """Return the first kind whose kernel has all of `needs`. `prepare` may install what a kind lacks before it is tried."""
    reasons: list[str] = []
    for kind in chosen_kinds():
        if prepare is not None:
            try:
                prepare(kind)
            except GuestError as error:
                reasons.append(f"{kind.name}: no, {error.summary}")
                continue
        features, why = probe(kind)
        if ESP in features and (lacks := [need for need in needs if need not in features]):
            why = f"its kernel has no {' and no '.join(lacks)}"
        if not why:
            return Found(kind, tuple(reasons))
        reasons.append(f"{kind.name}: no, {why}")
    return Found(None, tuple(reasons))


def install(kind: type[Guest]) -> None:
    """Install what a kind needs, and print that. Raises GuestError where a package is not available."""
    if why := kind.unfit():
        raise GuestError(why)
    if missing := missing_packages({**LAB_PACKAGES, **kind.programs}):
        _set_up("packages", f"to run the lab on {kind.name}", *missing)
    if issubclass(kind, Qemu) and find_kernel() is None:
        _set_up(
            "run",
            "Fetching Debian's kernel for QEMU, about 70 MB; it is not installed",
            sys.executable,
            __file__,
            "--fetch",
        )


def _set_up(*arguments: str) -> None:
    if subprocess.run([_SETUP, *arguments], stdin=subprocess.DEVNULL).returncode:
        raise GuestError("what it needs could not be installed")


def main() -> int:
    """Install what the lab needs here, or fetch the kernel for QEMU. Returns 0 where a kernel was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fetch", action="store_true", help="fetch Debian's kernel for QEMU and do nothing else")
    parser.add_argument("--wires", action="store_true", help="also ask for xfrm interfaces and vhost-net")
    arguments = parser.parse_args()
    end_by_signals()
    try:
        if arguments.fetch:
            print(f"Debian's kernel is in {fetch_kernel()}")
            return 0
        print("Looking for a kernel with ESP for the lab:", flush=True)
        found = find((ESP, XFRM_INTERFACE, VHOST_NET) if arguments.wires else (ESP,), install)
    except GuestError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
