"""Removes everything of the service from VPP: the engine runs with a kernel that has no SAs and no policies.

The kernel's redirects to VPP are removed, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from dataclasses import dataclass

from vppipsec.conf.settings import Settings
from vppipsec.kernel.hostpath.apply import HostError, HostRedirects, apply_host_redirects
from vppipsec.kernel.netlink.messages import NetlinkError
from vppipsec.kernel.xfrm.events import Event
from vppipsec.kernel.xfrm.socket import Overflow
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.sync.engine import Engine
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.inventory import Inventory, read_inventory
from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST, TABLE_NUMBERS, TAG_PREFIX

CLEANUP_TIMEOUT_S = 60.0
"""Maximum duration of the removal; 10,000 tunnels take a few seconds."""


class CleanupFailed(VppError):
    """VPP still holds something of the service; the text says what."""


@dataclass(frozen=True, slots=True)
class CleanupReport:
    """Numbers of removed objects."""

    sas: int
    tunnels: int
    routes: int
    acls: int
    tables: int
    neighbors: int = 0

    def __str__(self) -> str:
        counts = (
            (self.sas, "SA"),
            (self.tunnels, "tunnel"),
            (self.routes, "route"),
            (self.acls, "ACL"),
            (self.tables, "FIB table"),
            *([(self.neighbors, "neighbor")] if self.neighbors else []),
        )
        *parts, last = (f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in counts)
        return f"{', '.join(parts)} and {last}"

    def __bool__(self) -> bool:
        return self != CleanupReport(0, 0, 0, 0, 0)


class _EmptyKernel:
    """A kernel source that is empty and never reports an event."""

    async def read(self, limit: int) -> list[Event | Overflow]:
        """Wait for ever."""
        await asyncio.Event().wait()
        return []

    async def dump_sas(self) -> list[Sa]:
        """Return no SA."""
        return []

    async def dump_policies(self) -> list[Policy]:
        """Return no policy."""
        return []

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Raise: there is no SA."""
        raise NetlinkError("the expiry of an SA", errno.ESRCH)

    async def has_sent(self, sa: Sa) -> bool:
        """Raise: there is no SA."""
        raise NetlinkError("a question about an SA", errno.ESRCH)

    async def acquire(self, policy: Policy) -> None:
        """Raise: there is no policy."""
        raise NetlinkError("an ACQUIRE", errno.ESRCH)


async def clean_up(settings: Settings, timeout_s: float = CLEANUP_TIMEOUT_S) -> CleanupReport:
    """Remove everything of the service from VPP and from the kernel, and return what VPP had.

    The service must not run meanwhile. Raises VppUnavailable where no VPP answers, CleanupFailed where something stays.
    """
    try:
        return await _clean_up_vpp(settings, timeout_s)
    finally:  # without VPP as well: the interfaces that it redirects to are gone
        await _clean_up_kernel()


async def _clean_up_kernel() -> None:
    try:
        await asyncio.to_thread(apply_host_redirects, HostRedirects())
    except HostError as error:
        raise CleanupFailed(f"the kernel may still send its own packets to VPP's host interfaces: {error}") from error


async def _clean_up_vpp(settings: Settings, timeout_s: float) -> CleanupReport:
    before = _report(await _read_inventory(settings))
    if before:
        engine = Engine(settings, _EmptyKernel())
        work = asyncio.create_task(engine.run())
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await engine.wait_in_sync()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        left = _report(await _read_inventory(settings))
        if left:
            raise CleanupFailed(f"VPP still holds {left} of ours: {engine.vpp_problem or 'it refuses to let them go'}")
    return before


async def _read_inventory(settings: Settings) -> Inventory:
    client = await connect(settings.vpp.api_socket, "vpp-ipsec clear")
    try:
        return await read_inventory(
            client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, TABLE_NUMBERS
        )
    finally:
        await client.close()


def _report(found: Inventory) -> CleanupReport:
    sas = len(found.sas) + found.has_block_sa
    counted = (found.interfaces, found.routes, found.acls, found.tables, found.neighbors)
    return CleanupReport(sas, *map(len, counted))
