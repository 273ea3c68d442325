"""A real VPP between two wires, LAN and WAN, in a network namespace of its own; the test has the other end of both."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from support.netns import ip
from support.vpp_box import VppBox
from vppipsec.vpp.api.client import VppClient, connect

LAN_MAC, WAN_MAC = "02:00:00:00:01:01", "02:00:00:00:02:01"
"""Hardware addresses of the test's ends."""
HOST, PEER = "10.1.0.2", "192.0.2.2"
HOST6, PEER6 = "fd01::2", "2001:db8::2"
ETH_P_ALL = 3
PATIENCE_S = 30.0
"""How long a test waits for a packet, s. VPP takes milliseconds, and only a timeout shows that it dropped one."""

_CLI = """
create host-interface name lan0
create host-interface name wan0
set interface state host-lan0 up
set interface state host-wan0 up
set interface ip address host-lan0 10.1.0.1/24
set interface ip address host-lan0 fd01::1/64
set interface ip address host-wan0 192.0.2.1/24
set interface ip address host-wan0 2001:db8::1/64
set ip neighbor host-lan0 {host} {lan}
set ip neighbor host-lan0 {host6} {lan}
set ip neighbor host-wan0 {peer} {wan}
set ip neighbor host-wan0 {peer6} {wan}
"""


class Wire:
    """The test's end of a veth pair, as a packet socket."""

    def __init__(self, name: str, vpp_mac: str, own_mac: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.bind((name, 0))
        self.vpp_mac = vpp_mac
        self._head = Ether(src=own_mac, dst=vpp_mac)

    def send(self, packet: Packet) -> None:
        """Send an IP packet to VPP."""
        self._socket.send(bytes(self._head / packet))

    def receive(self, wanted: Callable[[Packet], bool], patience_s: float = PATIENCE_S) -> Packet | None:
        """Return the first matching IP packet from VPP, None where none comes in time."""
        deadline = time.monotonic() + patience_s
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self._socket], [], [], left)[0]:
                break
            data, (_, _, kind, _, _) = self._socket.recvfrom(65536)
            frame = Ether(data)
            if kind != socket.PACKET_OUTGOING and wanted(frame.payload):
                return frame.payload
        return None

    def waiting(self) -> Iterator[Packet]:
        """Yield the packets from VPP that have arrived."""
        while select.select([self._socket], [], [], 0)[0]:
            data, (_, _, kind, _, _) = self._socket.recvfrom(65536)
            if kind != socket.PACKET_OUTGOING:
                yield Ether(data).payload

    def fileno(self) -> int:
        """Return the descriptor, for an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


@dataclass
class Router:
    """VPP as a router between two wires."""

    box: VppBox
    admin: VppClient
    lan: Wire
    wan: Wire

    async def cli(self, command: str) -> str:
        """Run a command of VPP's CLI and return what it prints."""
        return str((await self.admin.call("cli_inband", {"cmd": command})).reply)


@contextlib.asynccontextmanager
async def router() -> AsyncIterator[Router]:
    """Start VPP between two wires in the namespace of this thread."""
    for near, far, mac in (("lan0", "lan1", LAN_MAC), ("wan0", "wan1", WAN_MAC)):
        ip(
            f"link add {near} type veth peer name {far} address {mac}",
            f"link set {near} arp off up",
            f"link set {far} arp off up",
        )
    with VppBox() as box, contextlib.ExitStack() as stack:
        admin = await connect(box.api_socket, "admin", also=("cli_inband",))
        try:
            for line in _CLI.format(host=HOST, host6=HOST6, peer=PEER, peer6=PEER6, lan=LAN_MAC, wan=WAN_MAC).split(
                "\n"
            ):
                if line:
                    await admin.call("cli_inband", {"cmd": line})
            macs = {
                itf.interface_name: bytes(itf.l2_address).hex(":")
                for itf in await admin.dump("sw_interface_dump", {"sw_if_index": 0xFFFFFFFF})
            }
            wires = []
            for name, far, mac in (("host-lan0", "lan1", LAN_MAC), ("host-wan0", "wan1", WAN_MAC)):
                wires.append(Wire(far, macs[name], mac))
                stack.callback(wires[-1].close)
            yield Router(box, admin, *wires)
        finally:
            await admin.close()
