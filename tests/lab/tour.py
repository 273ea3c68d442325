"""The demo's part in the guest: real tunnels are set up, rekeyed and deleted, and VPP follows. Each step is checked."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from peers import ADDRESSES, CHILDREN, COUNTED, KINDS, TIMED, Child, LabError, Peers, kernel_spis, replaced, until
from router import Router

from vppipsec.vpp.inventory import Inventory

LOG_LINES = 12


class Tour:
    """The steps, one after the other. The first that fails ends the tour."""

    def __init__(self) -> None:
        self.peers = Peers(Path("/run/lab"))
        self.router = Router(Path("/run/lab/router"))
        self.step = ""
        self._began = time.monotonic()

    def run(self) -> None:
        """Run all steps. Raises LabError."""
        self._step(
            f"start two strongSwan peers: a, the router, at {_list(ADDRESSES['a'])}; b at {_list(ADDRESSES['b'])}"
        )
        self.peers.start()
        self._step("start VPP with the router's addresses, and vpp-ipsecd beside it")
        self.router.start()
        self._say(f"VPP is {self.router.version}")
        for child in CHILDREN:
            self._step(f"bring up the CHILD_SA '{child.name}': {child.about}")
            self.peers.up(child)
        self._step("send pings through every tunnel, with the kernel's own ESP")
        for child in CHILDREN:
            self.peers.ping(child)
        self._equal(len(CHILDREN))
        self._show("sync", "sa")
        for child in KINDS:
            self._step(f"rekey '{child.name}' by hand")
            before = kernel_spis(child)
            self.peers.rekey(child)
            self._replaced(child, before)
        self._step(f"send 25,000 bytes through '{COUNTED.name}', so that it is rekeyed by volume")
        before = kernel_spis(COUNTED)
        self.peers.ping(COUNTED, count=25, size=1000)
        self._replaced(COUNTED, before)
        self._step(f"wait until '{TIMED.name}' is rekeyed by time")
        before = kernel_spis(TIMED)
        new = until("new SAs by time", lambda: (now := kernel_spis(TIMED)).isdisjoint(before) and now)
        self._say(f"SPIs {_hex(before)} became {_hex(new)}")
        self._equal(len(CHILDREN))
        self._show("sa")
        self._step("take all tunnels down")
        self.peers.all_down()
        self._equal(0)
        self._show("sync", "sa")

    def logs(self) -> str:
        """Return the last lines of the logs that may explain why a step failed."""
        parts = []
        for log in (self.router.log, self.peers.a.log, self.peers.b.log):
            if log.exists():
                lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
                parts.append("\n".join((f"--- the end of {log.parent.name}/{log.name}", *lines)))
        return "\n".join(parts)

    def _step(self, text: str) -> None:
        self.step = text
        print(f"[{time.monotonic() - self._began:5.1f} s] {text}")

    def _say(self, text: str) -> None:
        print(f"          {text}")

    def _equal(self, tunnels: int) -> None:
        """Check that VPP is equal to the kernel and holds the expected number of tunnels."""
        self._step("compare a dump of VPP with what a dump of the kernel means")
        actual = self.router.wait_equal()
        if len(actual.interfaces) != tunnels or len(actual.routes) != tunnels:
            raise LabError(f"VPP has {_totals(actual)}; there should be {tunnels} tunnels and as many routes")
        self._say(
            f"VPP has {_totals(actual)}: no more, no less than the kernel" if tunnels else "VPP has nothing of ours"
        )

    def _replaced(self, child: Child, before: frozenset[int]) -> None:
        """Wait until a rekey is complete and the old SAs are gone, and check the same in VPP."""
        after = replaced(child, before)
        in_vpp = {sa.spec.spi for sa in self.router.wait_equal().sas}
        if not after <= in_vpp or before & in_vpp:
            raise LabError(f"VPP has SPIs {_hex(in_vpp)}")
        self._say(f"SPIs {_hex(before)} became {_hex(after)}, in VPP too")

    def _show(self, *what: str) -> None:
        for name in what:
            print(f"\n$ vpp-ipsec show {name}\n{self.router.show(name).strip()}\n")


def _totals(actual: Inventory) -> str:
    return f"{len(actual.interfaces)} tunnels, {len(actual.sas)} SAs, {len(actual.routes)} routes"


def _list(names: tuple[str, ...]) -> str:
    return " and ".join(names)


def _hex(spis: frozenset[int] | set[int]) -> str:
    return ", ".join(sorted(f"{spi:08x}" for spi in spis))


def main() -> int:
    """Run the tour. Returns 0 only if every step held."""
    tour = Tour()
    try:
        tour.run()
    except Exception as error:  # whatever it is: the step did not hold
        kind = "" if isinstance(error, LabError) else f"{type(error).__name__}: "
        print(f"\nFAILED at the step '{tour.step}': {kind}{error}\n{tour.logs()}")
        return 1
    print("All steps held: VPP followed the kernel from the first SA to the last.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
