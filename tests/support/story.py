"""A kernel with an IKE daemon, a stand-in and the service under a series of events, in a loop whose time jumps.

VPP and the service can be ended at any moment and start again. A watch checks every request. `settle` checks that VPP
is equal in the end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from support.charon import REKEY_S, Charon
from support.clock import run_jumping
from support.fake_routes import FakeRoutes
from support.faults import Trouble
from support.invariants import Watch, differences_in, our_routes, our_sas
from support.rig import Rig, furnish, rig
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.status.summary import sync_view
from vppipsec.sync.ike import sa_usage
from vppipsec.vpp.types import NO_INDEX
from vppstandin.server import End, StandIn
from vppstandin.world import World

SETTLE_S = 900.0
"""Longest time, of the loop, until VPP is equal: two longest back-offs, and some repeated rekeys."""
EPOCH = 1_700_000_000
OWN = ("10.1.0.1", "10.1.1.1")
"""Addresses of the router in the networks of some tunnels."""
FOREIGN = ((77, ""), (3, "others"))
"""Instances and tags of other owners' `ipsec` interfaces."""


class Story:
    """The objects and events of a test. `begin` starts the service."""

    def __init__(self, made: Rig, kernel: Charon, trouble: Trouble, births: dict[int, float]) -> None:
        assert made.standin is not None
        self.rig, self.kernel, self.trouble = made, kernel, trouble
        self.standin: StandIn = made.standin
        self._births = births
        self._restarts: list[asyncio.Task[None]] = []
        made.furnish = self._furnish
        self._furnish_more(self.standin.world)
        self.watch = Watch(kernel, self.standin, trouble)

    @property
    def world(self) -> World:
        """The state of the stand-in."""
        return self.standin.world

    async def begin(self) -> None:
        """Start the service, and wait until VPP has all tunnels of the kernel."""
        self.watch.service_is_new()
        self.rig.start()
        await self.settle()

    def _furnish(self, world: World) -> None:
        furnish(world)
        self._furnish_more(world)

    def _furnish_more(self, world: World) -> None:
        """Give a VPP a process number, a linux-cp pair, and other owners' `ipsec` interfaces, one of them in use."""
        world.pid = (1 << 30) + len(self._births)
        self._births[world.pid] = EPOCH + math.floor(asyncio.get_running_loop().time())
        for instance, tag in FOREIGN:
            itf = SimpleNamespace(user_instance=instance, mode=0, sw_if_index=NO_INDEX)
            made = world.handle("ipsec_itf_create", SimpleNamespace(itf=itf))
            assert isinstance(made, dict)
            world.interfaces[made["sw_if_index"]].tag = tag
        world.interfaces[made["sw_if_index"]].up = True
        wan = next(index for index, itf in world.interfaces.items() if itf.addresses)
        names = SimpleNamespace(is_add=True, sw_if_index=wan, host_if_name="wan", host_if_type=0, netns="")
        world.handle("lcp_itf_pair_add_del_v3", names)

    # Events of VPP and of the service

    def vpp_dies(self, down_s: float) -> None:
        """End VPP, if it runs, and start it again after a while."""
        if self.standin.death is None and not self._restarting("vpp"):
            self._later("vpp", self._vpp_restarts(down_s, kill=True))

    def vpp_dies_at(self, number: int, down_s: float, then: Callable[[], object] = lambda: None) -> None:
        """End VPP at its `number`-th change from now, and run the test's action at that moment."""

        def dies() -> None:
            then()
            self._later("vpp", self._vpp_restarts(down_s, kill=False))

        self.trouble.at(number, End.VPP, dies)

    def service_dies(self, down_s: float) -> None:
        """End the service, if it runs, and start another one after a while."""
        if not self._restarting("service"):
            assert self.rig.work is not None
            self.rig.work.cancel()
            self.watch.service_runs = False
            self._later("service", self._service_restarts(down_s))

    def service_dies_at(self, number: int, down_s: float, then: Callable[[], object] = lambda: None) -> None:
        """End the service right after VPP's `number`-th change from now, and then run the test's action."""

        def dies() -> None:
            self.service_dies(down_s)
            asyncio.get_running_loop().call_soon(then)

        self.trouble.at(number, End.CONNECTION, dies)

    def _later(self, name: str, what: Coroutine[Any, Any, None]) -> None:
        self._restarts.append(asyncio.create_task(what, name=name))

    def _restarting(self, name: str) -> bool:
        return any(task.get_name() == name and not task.done() for task in self._restarts)

    async def _vpp_restarts(self, down_s: float, kill: bool) -> None:
        loop = asyncio.get_running_loop()
        if kill:
            await self.standin.stop()
        # on the full second: the comparison of ages must not depend on fractions, which the kernel does not report
        await asyncio.sleep(math.ceil(loop.time() + down_s) - loop.time())
        await self.standin.stop()
        self.standin.forget()
        self._furnish(self.world)
        self.watch.vpp_is_new()
        await self.standin.start()

    async def _service_restarts(self, down_s: float) -> None:
        await self.rig.stop()
        await asyncio.sleep(down_s)
        self.watch.service_is_new()
        await self.rig.restart_engine()

    async def all_are_back(self) -> None:
        """Wait until VPP and the service run again."""
        await asyncio.gather(*self._restarts)
        self._restarts.clear()

    # Checks

    def look(self) -> None:
        """Check the invariants of every moment."""
        assert self.watch.complaints == []
        if not all(task.done() for task in self._restarts):
            return
        work, engine = self.rig.work, self.rig.engine
        assert work is not None
        if work.done():
            work.result()
        if engine.in_sync and not self.kernel.pending:
            assert self._differences(engine.model) == []

    def _differences(self, model: KernelModel) -> list[str]:
        """Compare. Unchanged policies that were added again have their old position or a new one."""
        assert self.rig.routes is not None
        found = differences_in(self.world, model, self.rig.wan, self.rig.routes.routes)
        if found:
            seen = KernelModel()
            sas = [sa for tunnel in model.tunnels.values() for sa in tunnel.sas.values()]
            policies = sorted(model.policies(), key=lambda policy: self.kernel.places[policy.id])
            seen.replace(sas[::-1], policies[::-1])
            found = differences_in(self.world, seen, self.rig.wan, self.rig.routes.routes)
        return found

    async def settle(self, within_s: float = SETTLE_S) -> None:
        """End all faults, and check that VPP is equal in the end."""
        self.trouble.heal()
        self.kernel.deaf_to = 0
        await self.all_are_back()
        await asyncio.sleep(0.01)  # in a loop that jumps: until nothing is left to do
        if self.kernel.unheard:
            await asyncio.sleep(self.rig.settings.netlink.resync_interval_s + 1)
        await self.wait_in_sync(within_s)
        model = KernelModel()
        model.replace(await self.kernel.dump_sas(), [*reversed(self.kernel.policies.values())])
        assert self._differences(model) == []
        view = sync_view(self.rig.engine)
        assert (view["state"], view["problem"], view["counts"]["refused"]) == ("in-sync", "", 0)
        assert view["vpp"]["sas"] == len(our_sas(self.world))
        assert view["vpp"]["routes"] == len(our_routes(self.world))
        self.watch.mark()

    async def wait_in_sync(self, within_s: float = SETTLE_S) -> None:
        """Wait until the service says that it is in sync. Check meanwhile, at growing intervals."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.timeout(within_s):
            while self.kernel.pending or not self.rig.engine.in_sync:
                self.look()
                await asyncio.sleep(max(0.01, (loop.time() - begun) / 10))
        self.look()

    async def end(self) -> None:
        """Remove everything from the kernel, and check that nothing of the service stays in VPP."""
        await self.settle()
        for _ in range(5):  # requests that charon received meanwhile may take effect after a flush
            await asyncio.sleep(2 * REKEY_S)
            self.kernel.flush_sas()
            self.kernel.flush_policies()
            await self.settle()
            if not self.kernel.sas and not self.kernel.policies:
                break
        itfs = [itf.instance for itf in self.world.interfaces.values() if itf.kind == "IPSEC Tunnel"]
        assert (our_sas(self.world), our_routes(self.world)) == ({}, {})
        assert itfs == [instance for instance, _ in FOREIGN]
        assert not self.world.sas


def play_story(tell: Callable[[Story], Awaitable[None]]) -> None:
    """Run a story under a watch, and check that VPP holds nothing of the service at its end."""

    async def run() -> None:
        loop, trouble = asyncio.get_running_loop(), Trouble()
        births: dict[int, float] = {}

        def clock() -> float:
            return EPOCH + loop.time()

        kernel = Charon(clock)
        with (
            patch.object(sa_usage, "time", SimpleNamespace(time=clock)),
            patch.object(sa_usage, "process_started", births.get),
        ):
            routes = FakeRoutes()
            routes.link("lan")
            for address in OWN:
                routes.address("lan", f"{address}/24")
            async with rig("standin", trouble, kernel=kernel, routes=routes) as made:
                story = Story(made, kernel, trouble, births)
                await tell(story)
                await story.end()

    run_jumping(run())
