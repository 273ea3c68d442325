"""Measures how long VPP takes to equal the kernel again after a fault: the figures of docs/recovery.md.

    VPP_BIN=/path/to/vpp python bench/recovery.py [--tunnels 1000]

The kernel is the tests' fake, whose IKE daemon rekeys at once. So the result measures the service and VPP only.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]

from support.build import make_policy, sa_in, sa_out  # noqa: E402  # after the path
from support.rig import Rig, rig  # noqa: E402  # likewise
from support.vpp_box import vpp_binary  # noqa: E402  # likewise
from vppipsec.conf.settings import OffloadSettings  # noqa: E402  # likewise
from vppipsec.daemon import spare_collector  # noqa: E402  # likewise
from vppipsec.kernel.xfrm.socket import Overflow  # noqa: E402  # likewise
from vppipsec.kernel.xfrm.values import Policy, Sa  # noqa: E402  # likewise

Fault = Callable[[Rig], Awaitable[None]]
RATE = 10_000
"""Rekeys that the service requests a second. With the default of 50 that limit would dominate the result."""


def tunnel(number: int) -> list[Sa | Policy]:
    """Return inbound SA, outbound SA and policy of a tunnel."""
    reqid = number + 1
    dst = f"10.{64 + (number >> 8)}.{number & 255}.0/24"
    return [sa_in(reqid, reqid), sa_out(0x100000 + reqid, reqid), make_policy(dst=dst, reqid=reqid)]


async def nothing(rig: Rig) -> None:
    """Read the kernel's tables again while nothing has changed."""
    rig.engine.request_resync()


async def overflow(rig: Rig) -> None:
    """Delete a tenth of the tunnels' inbound SAs without events, and report an overflow as the kernel does."""
    items = [item for item in rig.kernel.sas.values() if item.spi < 0x100000]
    rig.kernel.silent = True
    rig.kernel.delete(*items[::10])
    rig.kernel.silent = False
    rig.kernel.tell(Overflow())


async def vpp_dies(rig: Rig) -> None:
    """Kill VPP with kill -9 and start it again. The measurement begins when VPP answers again."""
    await rig.kill_vpp()
    await rig.bring_vpp_back()


async def service_dies(rig: Rig) -> None:
    """End the service and start a new one that knows nothing. VPP still holds all tunnels."""
    await rig.restart_engine()


async def service_dies_and_tunnels_change(rig: Rig) -> None:
    """End the service, rekey every tunnel, and start a new service."""
    await rig.stop()
    for sa in [sa for sa in rig.kernel.sas.values() if sa.spi < 0x100000]:
        rig.kernel.rekey(sa)
    await rig.restart_engine()


FAULTS: dict[str, Fault] = {
    "a dump that finds nothing new": nothing,
    "overflow, a tenth of the tunnels changed unseen": overflow,
    "VPP killed, and back": vpp_dies,
    "service killed, and back": service_dies,
    "service killed, everything rekeyed, and back": service_dies_and_tunnels_change,
}


async def measure(kind: str, tunnels: int, fault: Fault) -> float:
    """Return the seconds from the end of a fault until the service is in sync. Then checks that VPP equals the kernel."""
    async with rig(kind) as made:
        settings = replace(made.settings, offload=OffloadSettings(restart_rekey_rate=RATE))
        made.settings = made.engine.settings = settings
        made.kernel.add(*(item for number in range(tunnels) for item in tunnel(number)))
        made.start()
        await made.settle()
        await fault(made)
        begun = time.perf_counter()
        await asyncio.sleep(0)
        while made.kernel.pending:  # noqa: ASYNC110  # a queue has no event for being empty
            await asyncio.sleep(0.001)
        await made.engine.wait_in_sync()
        duration_s = time.perf_counter() - begun
        await made.settle()
        return duration_s


def main() -> None:
    """Measure each fault and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tunnels", type=int, default=1000)
    arguments = parser.parse_args()
    spare_collector()
    kind = "standin" if vpp_binary() is None else "vpp"
    print(f"with {vpp_binary() or 'the stand-in'}, {arguments.tunnels} tunnels")
    for name, fault in FAULTS.items():
        print(f"{asyncio.run(measure(kind, arguments.tunnels, fault)):8.2f} s  {name}", flush=True)


if __name__ == "__main__":
    main()
