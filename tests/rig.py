"""An engine between a kernel of the test's and a VPP, which is the stand-in or a real one."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from equality import differences
from kernel import FakeKernel
from lanwan import SETUP_CALLS, make_loopback
from vppbox import VppBox, vpp_binary
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.standin.server import Fault, StandIn
from vppipsec.sync.engine import Engine
from vppipsec.vpp.client import VppClient, connect

KINDS = (
    "standin",
    pytest.param(
        "vpp",
        marks=[pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")],
    ),
)
ADDRESSES = ("192.0.2.1/24", "2001:db8::1/64")
SETTLE_S = 30.0


@dataclass
class Rig:
    """What a test works with."""

    kernel: FakeKernel
    standin: StandIn | None
    box: VppBox | None
    settings: Settings
    engine: Engine
    work: asyncio.Task[None] | None = None
    wan: int = 0
    admins: list[VppClient] = field(default_factory=list)

    @property
    def api_socket(self) -> str:
        """VPP's API socket."""
        return self.settings.vpp.api_socket

    async def admin(self) -> VppClient:
        """Return a connection of the test's own to VPP."""
        client = await connect(self.api_socket, "admin", also=SETUP_CALLS)
        self.admins.append(client)
        return client

    async def make_wan(self) -> None:
        """Give VPP the interface that has the local addresses and reaches the remote ones."""
        self.wan = await make_loopback(await self.admin(), *ADDRESSES)

    def start(self) -> None:
        """Start the engine."""
        self.work = asyncio.create_task(self.engine.run())

    async def stop(self) -> None:
        """End the engine as SIGTERM would."""
        if self.work is not None:
            self.work.cancel()
            await asyncio.gather(self.work, return_exceptions=True)
            self.work = None

    async def restart_engine(self) -> None:
        """End the engine, if it runs, and start another one that knows nothing."""
        await self.stop()
        self.kernel.forget_listener()
        self.engine = Engine(self.settings, self.kernel)
        self.start()

    async def kill_vpp(self) -> None:
        """End VPP as kill -9 does; what it held is gone."""
        if self.box is not None:
            self.box.kill()
        else:
            assert self.standin is not None
            await self.standin.stop()

    async def bring_vpp_back(self) -> None:
        """Start VPP anew, with its interface and addresses but nothing else."""
        if self.box is not None:
            self.box.start()
        else:
            assert self.standin is not None
            self.standin.forget()
            await self.standin.start()
        await self.make_wan()

    async def settle(self) -> None:
        """Wait until all that the kernel said is in VPP, and check that VPP then is equal."""
        assert self.work is not None
        async with asyncio.timeout(SETTLE_S):
            while self.kernel.pending and not self.work.done():  # noqa: ASYNC110  # a queue has no event for being empty
                await asyncio.sleep(0.001)
            waiting = asyncio.create_task(self.engine.wait_in_sync())
            await asyncio.wait((waiting, self.work), return_when=asyncio.FIRST_COMPLETED)
            if self.work.done():
                waiting.cancel()
                self.work.result()
        assert await self.differences() == []

    async def differences(self) -> list[str]:
        """Return how VPP differs from the kernel."""
        return await differences(self.api_socket, await self.kernel.dump_sas(), await self.kernel.dump_policies())


@contextlib.asynccontextmanager
async def rig(kind: str, fault: Fault | None = None, batch_delay_ms: int = 0) -> AsyncIterator[Rig]:
    """Make a rig whose engine has not been started. At the end a strict stand-in has never had anything to refuse."""
    kernel = FakeKernel()
    netlink = NetlinkSettings(batch_delay_ms=batch_delay_ms)
    with tempfile.TemporaryDirectory(prefix="rig-") as directory, contextlib.ExitStack() as stack:
        box = stack.enter_context(VppBox()) if kind == "vpp" else None
        path = box.api_socket if box is not None else str(Path(directory) / "api.sock")
        standin = StandIn(path, fault) if box is None else None
        if standin is not None:
            await standin.start()
        settings = Settings(vpp=VppSettings(api_socket=path), netlink=netlink)
        made = Rig(kernel, standin, box, settings, Engine(settings, kernel))
        await made.make_wan()
        try:
            yield made
            if standin is not None and fault is None:
                assert standin.refused == []
            assert standin is None or standin.death is None
            assert box is None or box.alive
        finally:
            await made.stop()
            for client in made.admins:
                await client.close()
            if standin is not None:
                await standin.stop()


def play(
    kind: str, story: Callable[[Rig], Awaitable[None]], fault: Fault | None = None, batch_delay_ms: int = 0
) -> None:
    """Run a story in a rig, within a minute."""

    async def run() -> None:
        async with asyncio.timeout(60), rig(kind, fault, batch_delay_ms) as made:
            await story(made)

    asyncio.run(run())
