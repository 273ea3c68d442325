"""The router's VPP, real or stand-in, with the router's addresses, and the service next to it.

Run it in the guest, as root, with `peers`.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers import ADDRESSES, PATIENCE_S, LabError, kernel_spis, run, until

from support.equality import differences
from support.lanwan import SETUP_CALLS, make_loopback
from support.vpp_box import VppBox, start_standin, vpp_binary
from vppipsec.conf.settings import (
    NetlinkSettings,
    OffloadSettings,
    Settings,
    StatusSettings,
    VppSettings,
    render_settings,
)
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.status.server import StatusUnavailable, ask
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.inventory import Inventory, read_inventory
from vppipsec.vpp.ownership import INSTANCES, SAD_ID_FIRST, SAD_ID_LAST, TABLE_NUMBERS, TAG_PREFIX


class StandInBox:
    """The stand-in as a process of its own, in place of a `VppBox`."""

    def __init__(self, directory: Path) -> None:
        self.api_socket = str(directory / "api.sock")
        self.stats_socket = str(directory / "stats.sock")
        self._log = directory / "standin.log"
        self.start()

    def start(self) -> None:
        """Start it empty, and wait until it listens."""
        with self._log.open("ab") as out:
            self._process = start_standin(self.api_socket, self.stats_socket, stdout=out, stderr=out)
        until("the stand-in's API socket", lambda: _answers(self.api_socket))

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait(PATIENCE_S)

    @property
    def alive(self) -> bool:
        """True while it runs."""
        return self._process.poll() is None


class Router:
    """VPP and the service.

    The service learns of changes from events only: its periodic dump comes after the end of any test.
    """

    def __init__(self, directory: Path) -> None:
        self.log = directory / "vpp-ipsecd.log"
        self.version = ""
        """VPP's version for messages."""
        self._dir = directory
        self._box: VppBox | StandInBox | None = None
        self._service: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start VPP, give it the router's addresses on a loopback interface, and start the service."""
        self._dir.mkdir(parents=True, exist_ok=True)
        self._box = self._make_box()
        asyncio.run(self._give_addresses())
        self.start_service()

    # The service

    def start_service(
        self,
        rx_buffer_size: int = NetlinkSettings().rx_buffer_size,
        unsupported: str = OffloadSettings().unsupported,
    ) -> None:
        """Start the service and wait until it answers. `rx_buffer_size` in bytes."""
        settings = Settings(
            vpp=VppSettings(api_socket=self.api_socket, stats_socket=self.box.stats_socket),
            netlink=NetlinkSettings(rx_buffer_size=rx_buffer_size, resync_interval_s=86_400),
            status=StatusSettings(socket=str(self._dir / "status.sock")),
            offload=OffloadSettings(unsupported=unsupported),
        )
        config = self._dir / "config.toml"
        config.write_text(render_settings(settings))
        with self.log.open("ab") as out:
            self._service = subprocess.Popen(
                [sys.executable, "-m", "vppipsec.daemon", "--config", config], stdout=out, stderr=out
            )
        until("an answer of vpp-ipsecd", lambda: self._answers())

    def signal_service(self, number: int) -> None:
        """Send a signal to the service."""
        assert self._service is not None
        self._service.send_signal(number)

    def end_service(self, kill: bool = False) -> None:
        """End the service as an operator does, or as a crash would. Nothing happens where it does not run."""
        if self._service is None:
            return
        if kill:
            self._service.kill()
        else:
            self._service.terminate()
        self._service.wait(PATIENCE_S)
        self._service = None

    def ask(self, question: str) -> Any:
        """Return the service's answer to a question such as `show sync`. Raises StatusUnavailable."""
        return ask(str(self._dir / "status.sock"), question)

    def show(self, what: str) -> str:
        """Return the output of `vpp-ipsec show`."""
        return run(sys.executable, "-m", "vppipsec.cli", "--config", str(self._dir / "config.toml"), "show", what)

    # VPP

    @property
    def api_socket(self) -> str:
        """VPP's API socket."""
        return self.box.api_socket

    @property
    def box(self) -> VppBox | StandInBox:
        """VPP."""
        assert self._box is not None
        return self._box

    def kill_vpp(self) -> None:
        """End VPP as a crash would; its state is lost."""
        self.box.kill()

    def bring_vpp_back(self) -> None:
        """Start VPP again, with its addresses and nothing else."""
        self.box.start()
        asyncio.run(self._give_addresses())

    def holdings(self) -> Inventory:
        """Return what the service holds in VPP, read over a connection of its own."""
        return asyncio.run(self._holdings())

    def wait_equal(self) -> Inventory:
        """Wait until VPP holds exactly the state that the kernel requires, by every comparison, and return it.

        The comparisons: the service is in sync and has offloaded every SA; a dump of VPP equals the translation of a
        dump of the kernel; VPP's SPIs are those that iproute2 reads. Raises LabError with the differences.
        """
        complaints: list[str] = []

        def look() -> Inventory | None:
            complaints[:] = self._complaints()
            if complaints:
                return None
            found = self.holdings()
            in_kernel, in_vpp = kernel_spis(), [sa.spec.spi for sa in found.sas]
            if sorted(in_kernel) != sorted(in_vpp):
                complaints.append(f"the kernel has SPIs {_hex(in_kernel)}, VPP {_hex(in_vpp)}")
                return None
            return found

        try:
            found = until("equality of VPP and kernel", look)
        except LabError as error:
            raise LabError(f"{error}: {'; '.join(complaints[:5])}") from None
        assert self.box.alive
        return found

    def _complaints(self) -> list[str]:
        view = self.ask("show sync")
        if view["state"] != "in-sync":
            return [f"the service is {view['state']}: {view['problem'] or view['counts']}"]
        if view["counts"]["synced"] != view["kernel"]["sas"]:
            return [f"of {view['kernel']['sas']} SAs these are carried: {view['counts']}"]
        return asyncio.run(self._differences())

    async def _differences(self) -> list[str]:
        return await differences(self.api_socket, *await _dump_kernel())

    async def _holdings(self) -> Inventory:
        client = await connect(self.api_socket, "lab")
        try:
            return await read_inventory(
                client, lambda tag: tag.startswith(TAG_PREFIX), SAD_ID_FIRST, SAD_ID_LAST, INSTANCES, TABLE_NUMBERS
            )
        finally:
            await client.close()

    def _make_box(self) -> VppBox | StandInBox:
        """Start VPP."""
        return StandInBox(self._dir) if vpp_binary() is None else VppBox()

    async def _give_addresses(self) -> None:
        """Give a VPP that has just started the router's interfaces and addresses."""
        client = await connect(self.api_socket, "lab", also=SETUP_CALLS)
        try:
            v4, v6 = ADDRESSES["a"]
            await make_loopback(client, f"{v4}/24", f"{v6}/64")
            real = isinstance(self._box, VppBox)
            self.version = f"{client.version}, " + (
                "a real one" if real else "the stand-in; VPP_BIN may name a real one"
            )
        finally:
            await client.close()

    def _answers(self) -> bool:
        if self._service is None or self._service.poll() is not None:
            raise LabError("vpp-ipsecd ended as soon as it was started")
        try:
            return bool(self.ask("show sync"))
        except StatusUnavailable:
            return False


async def _dump_kernel() -> tuple[list[Sa], list[Policy]]:
    source = XfrmSocket()
    try:
        return await source.dump_sas(), await source.dump_policies()
    finally:
        source.close()


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _hex(spis: Iterable[int]) -> str:
    shown = sorted(f"{spi:#x}" for spi in spis)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "none"
