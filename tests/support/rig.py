"""An engine between a fake kernel and a VPP, which is the stand-in or a real one."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.clock import run_jumping
from support.equality import differences
from support.fake_kernel import FakeKernel
from support.fake_routes import FakeRoutes
from support.lanwan import SETUP_CALLS
from support.recorded import PATIENCE_S
from support.vpp_box import VppBox, vpp_binary
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.kernel.hostpath.apply import HostRedirects
from vppipsec.kernel.text import parse_addr
from vppipsec.sync.engine import Engine
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.stats import read_route_packets
from vppipsec.vpp.types import NO_INDEX
from vppstandin.server import Fault, StandIn
from vppstandin.world import World, address_reply

KINDS = (
    "standin",
    pytest.param(
        "vpp",
        marks=[pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")],
    ),
)
ADDRESSES = ("192.0.2.1/24", "2001:db8::1/64")


def furnish(world: World) -> int:
    """Give a stand-in, before it listens, the interface that has the local addresses and reaches the remote ones."""
    index = int(world.handle("create_loopback_instance", SimpleNamespace(mac_address=bytes(6)))["sw_if_index"])
    world.handle("sw_interface_set_flags", SimpleNamespace(sw_if_index=index, flags=1))
    for text in ADDRESSES:
        address, length = text.split("/")
        given = address_reply(parse_addr(address))
        un = SimpleNamespace(ip4=given["un"]["ip6"][:4], ip6=given["un"]["ip6"])
        prefix = SimpleNamespace(address=SimpleNamespace(af=given["af"], un=un), len=int(length))
        world.handle("sw_interface_add_del_address", SimpleNamespace(sw_if_index=index, is_add=True, prefix=prefix))
    return index


def startup_script(directory: str) -> Path:
    """Write what gives a real VPP the same interface when it starts."""
    lines = ["create loopback interface", "set interface state loop0 up"]
    lines += [f"set interface ip address loop0 {text}" for text in ADDRESSES]
    script = Path(directory) / "startup.vpp"
    script.write_text("\n".join(lines) + "\n")
    return script


async def read_packets(path: str, indices: Sequence[int]) -> list[int]:
    """Return VPP's route counters. Without a stats segment they are all zero, and no thread is needed."""
    return await read_route_packets(path, indices) if _exists(path) else [0] * len(indices)


def _exists(path: str) -> bool:
    return Path(path).exists()


@dataclass
class Rig:
    """The objects of a test."""

    kernel: FakeKernel
    standin: StandIn | None
    box: VppBox | None
    settings: Settings
    engine: Engine
    work: asyncio.Task[None] | None = None
    wan: int = 0
    admins: list[VppClient] = field(default_factory=list)
    routes: FakeRoutes | None = None
    """The kernel's routes over VTIs, where the engine follows them."""
    send: Callable[[HostRedirects], None] | None = None
    """Makes the kernel send to host interfaces, where the test has one that can."""
    furnish: Callable[[World], object] = furnish
    """Gives a stand-in that starts again its initial state."""

    @property
    def api_socket(self) -> str:
        """VPP's API socket."""
        return self.settings.vpp.api_socket

    async def admin(self) -> VppClient:
        """Return a connection of the test's own to VPP."""
        client = await connect(self.api_socket, "admin", also=SETUP_CALLS)
        self.admins.append(client)
        return client

    async def find_wan(self) -> None:
        """Wait until VPP has the interface with the local addresses."""
        admin = await self.admin()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for itf in await admin.dump("sw_interface_dump", {"sw_if_index": NO_INDEX}):
                    of = {"sw_if_index": itf.sw_if_index, "is_ipv6": True}
                    if itf.interface_name == "loop0" and await admin.dump("ip_address_dump", of):
                        self.wan = itf.sw_if_index
                        return
                await asyncio.sleep(0.01)

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
        """End the engine, if it runs, and start a new one without knowledge."""
        await self.stop()
        self.kernel.forget_listener()
        if self.routes is not None:
            self.routes.forget_listener()
        self.engine = Engine(
            self.settings, self.kernel, routes=self.routes, apply_hosts=self.send, read_packets=read_packets
        )
        self.start()

    async def kill_vpp(self) -> None:
        """End VPP as kill -9 does; its state is lost."""
        if self.box is not None:
            self.box.kill()
        else:
            assert self.standin is not None
            await self.standin.stop()

    async def bring_vpp_back(self) -> None:
        """Start VPP again, with its interface and addresses but nothing else."""
        if self.box is not None:
            self.box.start()
        else:
            assert self.standin is not None
            await self.standin.stop()
            self.standin.forget()
            self.furnish(self.standin.world)
            await self.standin.start()
        await self.find_wan()

    async def settle(self, within_s: float = PATIENCE_S) -> None:
        """Wait until the engine has applied all events of the kernel, and check that VPP is then equal."""
        assert self.work is not None
        async with asyncio.timeout(within_s):
            while self._untold() and not self.work.done():  # noqa: ASYNC110  # a queue has no event for being empty
                await asyncio.sleep(0.001)
            waiting = asyncio.create_task(self.engine.wait_in_sync())
            await asyncio.wait((waiting, self.work), return_when=asyncio.FIRST_COMPLETED)
            if self.work.done():
                waiting.cancel()
                self.work.result()
        found = await self.differences()
        assert found == [], found

    async def differences(self) -> list[str]:
        """Return how VPP differs from the kernel."""
        routes = None if self.routes is None else self.routes.routes
        sas, policies = await self.kernel.dump_sas(), await self.kernel.dump_policies()
        return await differences(self.api_socket, sas, policies, self.engine.settings.offload.unsupported, routes)

    def _untold(self) -> bool:
        return bool(self.kernel.pending) or (self.routes is not None and self.routes.pending)


@contextlib.asynccontextmanager
async def rig(
    kind: str,
    fault: Fault | None = None,
    batch_delay_ms: int = 0,
    kernel: FakeKernel | None = None,
    routes: FakeRoutes | None = None,
    send: Callable[[HostRedirects], None] | None = None,
) -> AsyncIterator[Rig]:
    """Make a rig whose engine has not been started. At its end a strict stand-in must have refused nothing."""
    kernel = FakeKernel() if kernel is None else kernel
    netlink = NetlinkSettings(batch_delay_ms=batch_delay_ms)
    with tempfile.TemporaryDirectory(prefix="rig-") as directory, contextlib.ExitStack() as stack:
        unix = f"unix {{ startup-config {startup_script(directory)}"
        box = None
        if kind == "vpp":
            box = stack.enter_context(VppBox(change=lambda text: text.replace("unix {", unix)))
        path = box.api_socket if box is not None else str(Path(directory) / "api.sock")
        standin = StandIn(path, fault) if box is None else None
        if standin is not None:
            furnish(standin.world)
            await standin.start()
        stats = Path(box.dir if box is not None else directory) / "stats.sock"
        settings = Settings(vpp=VppSettings(api_socket=path, stats_socket=str(stats)), netlink=netlink)
        engine = Engine(settings, kernel, routes=routes, apply_hosts=send, read_packets=read_packets)
        made = Rig(kernel, standin, box, settings, engine, routes=routes, send=send)
        try:
            await made.find_wan()
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
    """Run a test in a rig, within a minute."""

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), rig(kind, fault, batch_delay_ms) as made:
            await story(made)

    asyncio.run(run())


def play_jumping(
    story: Callable[[Rig], Awaitable[None]], fault: Fault | None = None, kernel: FakeKernel | None = None
) -> None:
    """Run a test in a rig with a stand-in, where time jumps over every wait."""

    async def run() -> None:
        async with rig("standin", fault, kernel=kernel) as made:
            await story(made)

    run_jumping(run())
