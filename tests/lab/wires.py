"""A LAN host, the router, which is the guest itself, and a remote peer; a capture on the wire from router to peer.

    lan: 10.1.0.2, fd01::2 -- 10.1.0.1, fd01::1: router: 192.0.2.1, fd09::1 --wire-- 192.0.2.2, fd09::2: peer: 10.2.0.9, fd02::9

VPP has the router's two interfaces, through af_packet, and forwards. The kernel has them too, as linux-cp's `lan` and
`wan`. Run it in the QEMU guest, as root; everything ends with the guest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from peers import Child, LabError, Peer, kernel_spis, run, until
from router import Router
from traffic import Ear, End, Stream, inside

from support.vpp_box import VppBox, plugin_directory, vpp_binary
from vppipsec.vpp.api.client import connect

LOCAL, REMOTE = ("192.0.2.1", "fd09::1"), ("192.0.2.2", "fd09::2")
"""The outer addresses of the router and the peer, by family."""
ROUTER = (End("", "10.1.0.1"), End("", "fd01::1"))
LAN_HOST = (End("lan", "10.1.0.2"), End("lan", "fd01::2"))
REMOTE_HOST = (End("peer", "10.2.0.9"), End("peer", "fd02::9"))
OTHER_HOST = (End("peer", "10.2.0.209"), End("peer", "fd02::8000:0:0:9"))
"""In the upper half of the remote network; REMOTE_HOST is in the lower half."""
VTI, VRF = "vti0", "red"
IN_VRF = (End("", "10.1.0.9", VRF), End("", "fd01::9", VRF)), (End("", "10.1.0.8", VRF), End("", "fd01::8", VRF))
"""The router's addresses in the VRF, by family: on the VTI, and on the VRF itself, as on a loopback."""
LAN_NET, REMOTE_NET = ("10.1.0.0/24", "fd01::/64"), ("10.2.0.0/24", "fd02::/64")
LOWER_NET, UPPER_NET = ("10.2.0.0/25", "fd02::/65"), ("10.2.0.128/25", "fd02::8000:0:0:0/65")
MTU = 1400
"""MTU of packets into a tunnel, so that ESP fits the wire. An af_packet ring stalls at a longer frame."""

PRIORITY = 1000
"""Priority of policies, as from an IKE daemon. iproute2's default is 0, which no policy of the service could precede.
"""

_ANY = ("0.0.0.0/0", "::/0")
_MODULES = ("bridge", "tun", "veth", "vhost_net", "vrf", "xfrm_interface", "xfrm_user", "esp4", "esp6")

_KERNEL = """
netns add lan
netns add wire
netns add peer
link add vlan mtu 1500 type veth peer name l0 netns lan
link add vwan mtu 1500 type veth peer name w0 netns wire
link set vlan arp off up
link set vwan arp off up
"""
_LAN = f"""
addr add {LAN_HOST[0].address}/24 dev l0
addr add {LAN_HOST[1].address}/64 dev l0 nodad
link set lo up
link set l0 mtu {MTU} up
route add default via {ROUTER[0].address}
route add default via {ROUTER[1].address}
"""
_WIRE = """
link add b0 type bridge
link set w0 master b0 up
link set w1 master b0 up
link set b0 up
"""
_PEER = f"""
link add p0 type veth peer name w1 netns wire
addr add {REMOTE[0]}/24 dev p0
addr add {REMOTE[1]}/64 dev p0 nodad
addr add {REMOTE_HOST[0].address}/32 dev lo
addr add {REMOTE_HOST[1].address}/128 dev lo nodad
addr add {OTHER_HOST[0].address}/32 dev lo
addr add {OTHER_HOST[1].address}/128 dev lo nodad
link set lo up
link set p0 up
route add {LAN_NET[0]} via {LOCAL[0]} src {REMOTE_HOST[0].address} mtu {MTU}
route add {LAN_NET[1]} via {LOCAL[1]} src {REMOTE_HOST[1].address} mtu {MTU}
"""
_ROUTER = f"""
link set lan up
link set wan up
addr add {ROUTER[0].address}/24 dev lan
addr add {ROUTER[1].address}/64 dev lan nodad
addr add {LOCAL[0]}/24 dev wan
addr add {LOCAL[1]}/64 dev wan nodad
route add default via {REMOTE[0]}
route add default via {REMOTE[1]}
"""
_VPP = """
create host-interface name vlan
create host-interface name vwan
set interface mtu packet 1500 host-vlan
set interface mtu packet 1500 host-vwan
set interface state host-vlan up
set interface state host-vwan up
lcp create host-vlan host-if lan
lcp create host-vwan host-if wan
"""
_VPP_ADDRESSES = f"""
set interface ip address host-vlan {ROUTER[0].address}/24
set interface ip address host-vlan {ROUTER[1].address}/64
set interface ip address host-vwan {LOCAL[0]}/24
set interface ip address host-vwan {LOCAL[1]}/64
ip route add 0.0.0.0/0 via {REMOTE[0]} host-vwan
ip route add ::/0 via {REMOTE[1]} host-vwan
"""
_ENABLE_NL = ("linux_nl_plugin.so { disable }", "linux_nl_plugin.so { enable }")
_SWANCTL = """
connections {{ site {{
  version = 2
  local_addrs = {here}
  remote_addrs = {there}
  proposals = aes128-sha256-modp2048
  local {{ auth = psk
    id = {name}.test }}
  remote {{ auth = psk
    id = {other}.test }}
  children {{ net {{
    local_ts = {local_ts}
    remote_ts = {remote_ts}
    esp_proposals = aes128gcm16
  }} }}
}} }}
secrets {{ ike-lab {{ secret = "only for the lab" }} }}
"""


class WireRouter(Router):
    """VPP between its two wires, with linux-cp's interfaces for the kernel, and the service.

    VPP gets addresses and routes from the kernel, through linux-nl. A VPP that was built without it gets them by CLI.
    """

    def _make_box(self) -> VppBox:
        return VppBox(change=lambda config: config.replace(*_ENABLE_NL) if _has_nl() else config)

    async def _give_addresses(self) -> None:
        client = await connect(self.api_socket, "lab", also=("cli_inband",))
        try:
            self.version = client.version
            for line in (_VPP if _has_nl() else _VPP + _VPP_ADDRESSES).split("\n"):
                reply = (await client.call("cli_inband", {"cmd": line})).reply if line else ""
                if "error" in reply or "fail" in reply:
                    raise LabError(f"VPP does not do '{line}': {reply}")
        finally:
            await client.close()
        run("ip", "-batch", "-", text=_ROUTER)
        until("the router's addresses and ways in VPP", self._is_set_up)

    def _is_set_up(self) -> bool:
        addresses = self.box.cli("show interface address")
        next_hops = self.box.cli(f"show ip fib {REMOTE_NET[0]}") + self.box.cli(f"show ip6 fib {REMOTE_NET[1]}")
        return all(
            f"L3 {local}/" in addresses and f"via {remote} host-vwan" in next_hops
            for local, remote in zip(LOCAL, REMOTE, strict=True)
        )

    def carries(self, sas: int, policies: int) -> None:
        """Wait until the service knows this many kernel SAs and policies, and is in sync."""
        view: dict[str, Any] = {}

        def look() -> bool:
            view.update(self.ask("show sync"))
            return view["state"] == "in-sync" and view["kernel"] == {"sas": sas, "policies": policies}

        try:
            until(f"a VPP in sync with {sas} SAs and {policies} policies", look)
        except LabError as error:
            raise LabError(f"{error}: {view['state']}, {view['kernel']}, {view['counts']} {view['problem']}") from None


@dataclass(frozen=True)
class Tunnel:
    """A tunnel with manual keys. `family` (0 IPv4, 1 IPv6) is that of both headers.

    `transform` is iproute2's, with a placeholder for the key. With an `if_id`, the router's policies are for all
    addresses, and routes over the interface VTI use the tunnel; the peer has no `if_id`. `remote` is a part of the
    network behind the peer, for both sides. `port`: only for this TCP port there. `echo`: only for echo requests to
    there, and their replies.
    """

    transform: str
    family: int = 0
    if_id: int = 0
    remote: str = ""
    port: int = 0
    echo: bool = False
    reqid: int = field(default_factory=itertools.count(1).__next__)
    generation: int = 0

    @property
    def spis(self) -> tuple[int, int]:
        """SPIs of the SA to the peer and of the SA to the router."""
        low = 0x100 * self.reqid + self.generation
        return 0x10000 + low, 0x20000 + low

    def state(self, inbound: bool, at_router: bool) -> str:
        """Return the line of `ip -batch` that adds one of the SAs on one side; `inbound` is the router's view."""
        ends = (LOCAL[self.family], REMOTE[self.family])
        src, dst = ends[::-1] if inbound else ends
        key = hashlib.sha256(str(self.spis[inbound]).encode()).hexdigest()
        return (
            f"xfrm state add src {src} dst {dst} proto esp spi {self.spis[inbound]} reqid {self.reqid} mode tunnel"
            f" replay-window 32 {self.transform.format(key)} {self._if_id(at_router)}\n"
        )

    def without(self, inbound: bool) -> str:
        """Return the line of `ip -batch` that deletes one of the SAs."""
        dst = (LOCAL if inbound else REMOTE)[self.family]
        return f"xfrm state delete dst {dst} proto esp spi {self.spis[inbound]}\n"

    def policies(self, at_router: bool, nets: tuple[str, str] | None = None) -> str:
        """Return the lines of `ip -batch` that add the policies of one side.

        `nets` are the networks that they are between, by default those of LAN and peer.
        """
        ends = (LOCAL[self.family], REMOTE[self.family])
        nets = nets or (LAN_NET[self.family], self.remote or REMOTE_NET[self.family])
        if at_router and self.if_id and not self.remote:
            nets = (_ANY[self.family],) * 2
        lines = ""
        for direction in ("out", "in", "fwd"):
            order = 1 if at_router == (direction == "out") else -1
            (src, dst), (here, there) = nets[::order], ends[::order]
            kind = f"proto tcp {'dport' if order == 1 else 'sport'} {self.port}" if self.port else ""
            if self.echo:
                proto, request, answer = (("icmp", 8, 0), ("ipv6-icmp", 128, 129))[self.family]
                kind = f"proto {proto} type {request if order == 1 else answer}"
            lines += (
                f"xfrm policy add src {src} dst {dst} {kind} dir {direction} priority {PRIORITY} {self._if_id(at_router)}"
                f" tmpl src {here} dst {there} proto esp reqid {self.reqid} mode tunnel\n"
            )
        return lines

    def _if_id(self, at_router: bool) -> str:
        return f"if_id {self.if_id}" if at_router and self.if_id else ""


class Network:
    """LAN, router and peer. Its actions change the kernels of the router and the peer."""

    def __init__(self, directory: Path) -> None:
        self.router = WireRouter(directory / "router")
        router, peer = ("router", LOCAL[0], LAN_NET[0]), ("peer", REMOTE[0], REMOTE_NET[0])
        self.daemons = (
            Peer("router", directory / "a", "wan", partial(_swanctl_conf, *router, *peer)),
            Peer("peer", directory / "b", "p0", partial(_swanctl_conf, *peer, *router), "ip", "netns", "exec", "peer"),
        )

    def start(self) -> None:
        """Create the wires, start VPP and the service, and start the capture."""
        for name in _MODULES:
            run("modprobe", name)
        run("ip", "-batch", "-", text=_KERNEL)
        for name, lines in (("peer", _PEER), ("lan", _LAN), ("wire", _WIRE)):
            run("ip", "-netns", name, "-batch", "-", text=lines)
        for name, interface in (("lan", "l0"), ("peer", "p0")):  # VPP forwards checksums unchanged
            run("ip", "netns", "exec", name, "ethtool", "-K", interface, "tx", "off")
        _set("net.ipv4.ip_forward", "1")
        _set("net.ipv6.conf.all.forwarding", "1")
        for name in ("vlan", "vwan"):  # for VPP only
            _set(f"net.ipv6.conf.{name}.disable_ipv6", "1")
            _set(f"net.ipv4.conf.{name}.forwarding", "0")
        self.router.start()
        self.ear = Ear("wire", "w0")

    def have(self, *tunnels: Tunnel) -> None:
        """Add tunnels, at the router and at the peer, and wait until VPP is in sync."""
        for tunnel, at_router in itertools.product(tunnels, (False, True)):
            both = tunnel.state(False, at_router) + tunnel.state(True, at_router)
            self._ip(at_router, both + tunnel.policies(at_router))
        self.router.carries(2 * len(tunnels), 3 * len(tunnels))

    def rekey(self, tunnel: Tunnel, stream: Stream) -> Tunnel:
        """Replace the SAs, make before break, while a stream continues; return the new tunnel."""
        new = replace(tunnel, generation=tunnel.generation + 1)
        self._ip(True, new.state(True, True))
        self._ip(False, new.state(False, False))
        self.router.carries(3, 3)
        self._ip(True, new.state(False, True))
        self._ip(False, new.state(True, False))
        self.router.carries(4, 3)
        stream.go_on()  # no packet with the old SAs is on its way any more
        for at_router in (True, False):
            self._ip(at_router, tunnel.without(False) + tunnel.without(True))
        self.router.carries(2, 3)
        return new

    def renew(self, tunnel: Tunnel) -> Tunnel:
        """Replace the SAs on both sides, with a moment without any; return the new tunnel."""
        new = replace(tunnel, generation=tunnel.generation + 1)
        for at_router in (False, True):
            both = new.state(False, at_router) + new.state(True, at_router)
            self._ip(at_router, tunnel.without(False) + tunnel.without(True) + both)
        return new

    def _ip(self, at_router: bool, lines: str) -> None:
        run("ip", *(() if at_router else ("-netns", "peer")), "-batch", "-", text=lines)

    @contextlib.contextmanager
    def vti(self, tunnel: Tunnel) -> Iterator[None]:
        """Create an xfrm interface at the router for a tunnel with an if_id, and a route over it to the remote network."""
        net = REMOTE_NET[tunnel.family]
        lines = f"link add {VTI} type xfrm dev wan if_id {tunnel.if_id}\nlink set {VTI} mtu {MTU} up\nroute add {net} dev {VTI}"
        self._ip(True, lines)
        try:
            yield
        finally:
            self._ip(True, f"link delete {VTI}")

    @contextlib.contextmanager
    def link_local(self, tunnel: Tunnel) -> Iterator[tuple[End, End]]:
        """Add link-local addresses for an IPv4 tunnel, on the xfrm interface and at the peer.

        The peer gets policies for them.
        """
        here, there = End("", "169.254.7.1"), End("peer", "169.254.7.2")
        self._ip(True, f"addr add {here.address}/30 dev {VTI}")
        lines = f"addr add {there.address}/32 dev lo\nroute add {here.address} via {LOCAL[0]} src {there.address} mtu {MTU}\n"
        self._ip(False, lines + tunnel.policies(False, (here.address, there.address)))
        try:
            yield here, there
        finally:
            self._ip(False, f"addr delete {there.address}/32 dev lo")  # which also removes the route

    @contextlib.contextmanager
    def groups(self, tunnel: Tunnel) -> Iterator[None]:
        """Add policies at the peer that send its link multicast, and receive it, through a tunnel."""
        family, ends = tunnel.family, (LOCAL[tunnel.family], REMOTE[tunnel.family])
        group, template = ("224.0.0.0/24", "ff02::/16")[family], f"proto esp reqid {tunnel.reqid} mode tunnel"
        out = f"src {REMOTE_NET[family]} dst {group} dir out"
        came = f"src {LAN_NET[family]} dst {group} dir in"
        lines = f"xfrm policy add {out} priority {PRIORITY} tmpl src {ends[1]} dst {ends[0]} {template}\n"
        self._ip(
            False, f"{lines}xfrm policy add {came} priority {PRIORITY} tmpl src {ends[0]} dst {ends[1]} {template}\n"
        )
        try:
            yield
        finally:
            self._ip(False, f"xfrm policy delete {out}\nxfrm policy delete {came}\n")

    @contextlib.contextmanager
    def vrf(self, table: int, family: int) -> Iterator[None]:
        """Move the xfrm interface into a VRF whose table VPP has.

        Add IN_VRF's addresses and a route to the remote network.
        """
        for ip in ("ip", "ip6"):
            assert not self.router.box.cli(f"{ip} table add {table}")
        lines = f"link add {VRF} type vrf table {table}\nlink set {VRF} up\nlink set {VTI} master {VRF}"
        for device, ends in zip((VTI, VRF), IN_VRF, strict=True):
            lines += f"\naddr add {ends[family].address}/{(32, 128)[family]} dev {device} {('', 'nodad')[family]}"
        self._ip(True, f"{lines}\nroute add {REMOTE_NET[family]} dev {VTI} table {table}")
        try:
            yield
        finally:
            self._ip(True, f"addr delete {IN_VRF[0][family].address} dev {VTI}\nlink delete {VRF}")

    @contextlib.contextmanager
    def strict(self) -> Iterator[None]:
        """Make the router's kernel drop packets from an interface over which it would not answer them."""
        _set("net.ipv4.conf.all.rp_filter", "1")
        try:
            yield
        finally:
            _set("net.ipv4.conf.all.rp_filter", "0")

    def errors(self) -> dict[str, int]:
        """Return the XFRM errors that the kernels of router and peer have counted since the last reset."""
        now = _xfrm_errors("") | _xfrm_errors("peer")
        return {name: value - self._errors[name] for name, value in now.items() if value != self._errors[name]}

    def reset(self) -> None:
        """Remove all SAs and policies on both sides, and reset captures and counters."""
        for at_router in (False, True):
            self._ip(at_router, "xfrm state flush\nxfrm policy flush")
        self.router.carries(0, 0)
        self.ear.received()
        self._errors = _xfrm_errors("") | _xfrm_errors("peer")

    @contextlib.contextmanager
    def negotiated(self) -> Iterator[None]:
        """Run strongSwan at both ends, and let it negotiate the tunnel between the networks over the wire."""
        for daemon in self.daemons:
            daemon.start()
        try:
            self.daemons[0].swanctl("--initiate", "--child", "net", "--timeout", "60")
            yield
        finally:
            self.daemons[0].swanctl("--terminate", "--ike", "site")
            for daemon in self.daemons:
                daemon.end()

    def renegotiate(self) -> None:
        """Make strongSwan rekey it, and wait until the kernel has no earlier SA."""
        before = kernel_spis()
        self.daemons[0].swanctl("--rekey", "--child", "net")
        until("a new pair of SAs", lambda: len(now := kernel_spis()) == 2 and now.isdisjoint(before))


def _has_nl() -> bool:
    binary = vpp_binary()
    return binary is not None and (plugin_directory(binary) / "linux_nl_plugin.so").exists()


def _swanctl_conf(
    name: str, here: str, local_ts: str, other: str, there: str, remote_ts: str, traps: Container[Child]
) -> str:
    assert not traps
    return _SWANCTL.format(name=name, other=other, here=here, there=there, local_ts=local_ts, remote_ts=remote_ts)


def _xfrm_errors(namespace: str) -> dict[str, int]:
    """Return the rows of /proc/net/xfrm_stat of a namespace, or of the router where it is empty."""
    rows = (line.split() for line in run(*inside(namespace), "cat", "/proc/net/xfrm_stat").splitlines())
    return {f"{name} of {namespace or 'router'}": int(value) for name, value in rows}


def _set(name: str, value: str) -> None:
    Path("/proc/sys", *name.split(".")).write_text(value)
