"""Packets from VPP's LAN: over a wire to a real VPP. The stand-in forwards none, and only counts."""

from __future__ import annotations

import asyncio
import mmap
import re
import socket
import struct
from array import array
from types import TracebackType

from peers import Child, LabError, run, until
from router import Router

from support.vpp_box import VppBox
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.stats import ROUTE_COUNTERS, _Segment
from vppipsec.vpp.types import NO_INDEX

_MAC = "02:00:00:00:01:01"
_COUNT = struct.Struct("@Q")
_NAME, _FAR = "lan0", "lan1"


class Lan:
    """A host on VPP's LAN, in the prefixes behind `a`. Use it as a context manager."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._box = router.box
        self._vpp_mac = ""

    def send(self, child: Child) -> None:
        """Send a packet through VPP to the other side of a CHILD_SA."""
        src, dst = child.host("a")[:-1] + "9", child.host("b")
        if isinstance(self._box, VppBox):
            self._send(src, dst)
        else:
            self._count(child.network("b"))

    def is_carried(self, child: Child) -> bool:
        """Send packets until VPP has sent some with the newest SA. For the stand-in, return True without a check."""
        if not isinstance(self._box, VppBox):
            return True

        def look() -> bool:
            self.send(child)
            rows = self._router.ask("show counters")["rows"]
            return any(row["direction"] == "out" and row["packets"] for row in rows)

        return until("packets that VPP has encrypted", look)

    def _send(self, src: str, dst: str) -> None:
        import scapy.layers.l2 as l2  # not at the top: it takes seconds in the guest
        from scapy.layers.inet import IP, UDP
        from scapy.layers.inet6 import IPv6

        packet = (IPv6 if ":" in dst else IP)(src=src, dst=dst) / UDP(sport=1000, dport=2000)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((_FAR, 0))
            wire.send(bytes(l2.Ether(src=_MAC, dst=self._vpp_mac) / packet))

    def _count(self, destination: str) -> None:
        """Make the stand-in count a dropped packet, as VPP would."""
        index = asyncio.run(self._counter_of(destination))
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.connect(self._box.stats_socket)
            (descriptor,) = socket.recv_fds(asking, 1, 1)[1]
        with mmap.mmap(descriptor, 0) as memory:
            segment = _Segment(memory)
            ((_, pointer, _),) = segment.entries(ROUTE_COUNTERS)
            (thread,) = array("Q", segment._vector(pointer, _COUNT.size))
            at = thread - segment._base + 2 * _COUNT.size * index
            _COUNT.pack_into(memory, at, _COUNT.unpack_from(memory, at)[0] + 1)

    async def _counter_of(self, destination: str) -> int:
        """Return the stats_index of the route that drops packets to a destination."""
        client = await connect(self._box.api_socket, "lan", also=("ip_route_lookup_v2",))
        try:
            for number, is_ip6 in [(it.table.table_id, it.table.is_ip6) for it in await client.dump("ip_table_dump")]:
                if number and bool(is_ip6) == (":" in destination):
                    asked = {"table_id": number, "exact": 1, "prefix": destination}
                    route = (await client.call("ip_route_lookup_v2", asked)).route
                    if all(path.sw_if_index == NO_INDEX for path in route.paths):
                        return int(route.stats_index)
            raise LabError(f"nothing in the stand-in drops what is for {destination}")
        finally:
            await client.close()

    def __enter__(self) -> Lan:
        if isinstance(self._box, VppBox):
            run("ip", "link", "add", _NAME, "type", "veth", "peer", "name", _FAR, "address", _MAC)
            run("ip", "link", "set", _NAME, "arp", "off", "up")
            run("ip", "link", "set", _FAR, "arp", "off", "up")
            self._box.cli(f"create host-interface name {_NAME}")
            self._box.cli(f"set interface state host-{_NAME} up")
            for address in ("10.1.1.254/24", "fd01::ffff/64"):
                self._box.cli(f"set interface ip address host-{_NAME} {address}")
            shown = self._box.cli(f"show hardware-interfaces host-{_NAME}")
            (self._vpp_mac,) = re.findall(r"Ethernet address ([0-9a-f:]+)", shown)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._box, VppBox):
            self._box.cli(f"delete host-interface name {_NAME}")
            run("ip", "link", "delete", _NAME)
