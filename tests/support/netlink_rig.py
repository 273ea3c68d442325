"""An engine between a kernel that speaks netlink and the stand-in, or a real VPP, in a network namespace of its own."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.build import LOCAL, make_policy, make_sa
from support.equality import differences
from support.lanwan import SETUP_CALLS, make_loopback
from support.netlink_kernel import WireKernel
from support.netns import in_new_netns
from support.recorded import PATIENCE_S
from support.rig import ADDRESSES
from support.vpp_box import VppBox
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm import socket as xfrm_socket
from vppipsec.kernel.xfrm.events import Event
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.kernel.xfrm.values import Policy, PolicyDir, Sa
from vppipsec.sync.engine import Engine
from vppipsec.vpp.api.client import connect
from vppstandin.server import StandIn


@dataclass
class WireRig:
    """The objects of a test."""

    kernel: XfrmSocket
    engine: Engine
    standin: StandIn | None
    box: VppBox | None
    work: asyncio.Task[None] | None = None
    decoded: list[int] = field(default_factory=list)
    """Types of the messages decoded so far."""

    def start(self) -> None:
        """Start the engine."""
        self.work = asyncio.create_task(self.engine.run())

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until a condition holds; the engine must keep running meanwhile."""
        assert self.work is not None
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # any condition
                if self.work.done():
                    self.work.result()
                self.check_vpp()
                await asyncio.sleep(0.005)

    def check_vpp(self) -> None:
        """Check that VPP lives. Otherwise fail with its status and last output."""
        if self.standin is not None:
            assert self.standin.death is None
        elif self.box is not None and not self.box.alive:
            last_words = (self.box.dir / "out").read_text(errors="replace")[-2000:]
            raise AssertionError(f"VPP ended with status {self.box.wait()}: {last_words}")

    async def resynced(self, before: int) -> None:
        """Wait until more than `before` dumps of both tables have been applied, and VPP is in sync."""
        await self.until(lambda: self.engine.counters.resyncs > before)
        await self.until(lambda: self.engine.in_sync)

    async def differences(self) -> list[str]:
        """Return how VPP differs from the state that the kernel's own tables require, read again."""
        sas, policies = await self.kernel.dump_sas(), await self.kernel.dump_policies()
        return await differences(self.engine.settings.vpp.api_socket, sas, policies)

    def asked(self) -> Counter[str]:
        """Return the number of the stand-in's requests so far, by message."""
        assert self.standin is not None
        return Counter(self.standin.requests)


@contextlib.asynccontextmanager
async def _rig(kernel: XfrmSocket, netlink: NetlinkSettings, kind: str) -> AsyncIterator[WireRig]:
    with tempfile.TemporaryDirectory(prefix="wirerig-") as directory, contextlib.ExitStack() as stack:
        box = stack.enter_context(VppBox()) if kind == "vpp" else None
        path = box.api_socket if box is not None else str(Path(directory) / "api.sock")
        standin = StandIn(path) if box is None else None
        if standin is not None:
            await standin.start()
        admin = await connect(path, "admin", also=SETUP_CALLS)
        await make_loopback(admin, *ADDRESSES)
        await admin.close()
        made = WireRig(kernel, Engine(Settings(vpp=VppSettings(path), netlink=netlink), kernel), standin, box)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xfrm_socket, "decode_xfrm", _counting(made.decoded))
            try:
                yield made
                made.check_vpp()
                if standin is not None:
                    assert (standin.refused, standin.death, standin.world.lost_references) == ([], None, [])
            finally:
                if made.work is not None:
                    made.work.cancel()
                    await asyncio.gather(made.work, return_exceptions=True)
                kernel.close()
                if standin is not None:
                    await standin.stop()


def _counting(kinds: list[int]) -> Callable[..., Event]:
    plain = xfrm_socket.decode_xfrm

    def decode(message: memoryview, last_words: bool = True) -> Event:
        kinds.append(xfrm_socket.HEADER.unpack_from(message)[1])
        return plain(message, last_words)

    return decode


def play(
    story: Callable[[WireRig], Awaitable[None]],
    netlink: NetlinkSettings,
    kind: str = "standin",
    make_kernel: Callable[[int], XfrmSocket] = WireKernel,
    limit_s: float = PATIENCE_S,
) -> None:
    """Run a test in a rig whose engine has not been started, in a network namespace of its own."""

    async def run() -> None:
        async with asyncio.timeout(limit_s), _rig(make_kernel(netlink.rx_buffer_size), netlink, kind) as made:
            await story(made)

    in_new_netns(lambda: asyncio.run(run()), limit_s + 10)


def wire_kernel(rig: WireRig) -> WireKernel:
    """Return the test's kernel."""
    assert isinstance(rig.kernel, WireKernel)
    return rig.kernel


def spoken(kinds: Sequence[int], *wanted: int) -> int:
    """Return the number of messages of certain types."""
    return sum(kind in wanted for kind in kinds)


def pair(number: int) -> tuple[list[Sa], list[Policy]]:
    """Return SAs (inbound first) and policies of one of many tunnels."""
    remote = parse_addr(f"192.0.2.{2 + number % 250}")
    reqid, inner = 1 + number, f"10.{number >> 8}.{number & 255}.0/24"
    sas = [make_sa(0xC0000000 + number, remote, LOCAL, reqid), make_sa(0xD0000000 + number, LOCAL, remote, reqid)]
    directions = (PolicyDir.IN, PolicyDir.FWD, PolicyDir.OUT)
    nets = {PolicyDir.OUT: ("172.16.0.0/16", inner)}
    return sas, [
        make_policy(way, *nets.get(way, (inner, "172.16.0.0/16")), reqid, (LOCAL, remote)) for way in directions
    ]
