"""Packets between network namespaces: streams, echo requests and TCP conversations, and a capture on a wire.

Namespaces are given by name; the empty name is the router's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import socket
import struct
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from peers import PATIENCE_S, LabError, until

from vppipsec.kernel.text import format_addr

ESP = 50
TALK_PORT = 179
"""The server's TCP port."""

_ETH_P_ALL, _ETH_IP4, _ETH_IP6 = 3, 0x0800, 0x86DD
_SO_RCVBUFFORCE = 33
_CLONE_NEWNET = 0x40000000
_RECEIVE_BYTES = 16 << 20
_ECHO_PORT, _PAUSE_S, _LAST_S, _SOME = 7, 0.02, 10.0, 5
_TALK_BYTES, _TALK_S = 10_000, 20.0
_AT_ONCE = struct.pack("=ii", 1, 0)
_OSPF = 89  # RFC 2328
_XFRM_POLICY = {socket.AF_INET: (socket.IPPROTO_IP, 17), socket.AF_INET6: (socket.IPPROTO_IPV6, 35)}
_POLICY = struct.Struct("=40xH118xBB6x")  # struct xfrm_userpolicy_info: the selector's family, dir, action
_HOPS = {
    socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
}


class End(NamedTuple):
    """A source or destination of packets; in a VRF of the namespace where one is named."""

    namespace: str
    address: str
    vrf: str = ""


class Datagram(NamedTuple):
    """An IP packet on a wire. `spi` and `seq` are 0 where it is not ESP."""

    src: str
    dst: str
    proto: int
    spi: int = 0
    seq: int = 0


class Ear:
    """Captures packets that an interface of a namespace receives."""

    def __init__(self, namespace: str, interface: str) -> None:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
            made.bind((interface, 0))
            return made

        self._socket = _within(namespace, make)

    def received(self) -> list[Datagram]:
        """Return the IP packets since the last call, without neighbor discovery."""
        packets = []
        while True:
            try:
                frame, (_, _, kind, _, _) = self._socket.recvfrom(65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return packets
            if kind != socket.PACKET_OUTGOING and (packet := _read(frame)) is not None:
                packets.append(packet)


def _read(frame: bytes) -> Datagram | None:
    """Return the IP packet in a frame, None for any other frame.

    It also returns None for IPv4 fragments but the first, link-local addresses, IPv6 multicast and neighbor discovery.
    """
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    if ethertype == _ETH_IP4:
        proto, src, dst, payload = frame[23], frame[26:30], frame[30:34], 14 + 4 * (frame[14] & 15)
        if int.from_bytes(frame[20:22], "big") & 0x1FFF:
            return None
    elif ethertype == _ETH_IP6:
        proto, src, dst, payload = frame[20], frame[22:38], frame[38:54], 54
        if src[0] == 0xFE or dst[0] in (0xFE, 0xFF) or (proto == socket.IPPROTO_ICMPV6 and 133 <= frame[54] <= 137):
            return None
    else:
        return None
    spi, seq = struct.unpack_from("!II", frame, payload) if proto == ESP else (0, 0)
    return Datagram(format_addr(src), format_addr(dst), proto, spi, seq)


class _Sender(ABC):
    """Sends from a thread of its own, within a `with` block."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    @abstractmethod
    def _run(self) -> None:
        """Send until the block ends."""


class Stream(_Sender):
    """Numbered datagrams without a pause to another end, which sends each back, within a `with` block."""

    def __init__(self, here: End, there: End) -> None:
        super().__init__()
        self._here = _open(here, socket.SOCK_DGRAM)
        self._there = _open(there, socket.SOCK_DGRAM)
        self._here.bind((here.address, 0))
        self._there.bind((there.address, _ECHO_PORT))
        self._target = there.address, _ECHO_PORT
        self.sent = 0
        self._came: set[int] = set()
        self._answered: set[int] = set()

    @property
    def unheard(self) -> list[int]:
        """Numbers of datagrams that did not reach the other end."""
        return [number for number in range(self.sent) if number not in self._came]

    @property
    def lost(self) -> list[int]:
        """Numbers of datagrams that did not come back."""
        return [number for number in range(self.sent) if number not in self._answered]

    def go_on(self) -> None:
        """Wait until some datagrams that are sent from now on have come back."""
        first = self.sent
        until("an answer on the stream", lambda: sum(number >= first for number in self._answered.copy()) >= _SOME)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._here.close()
        self._there.close()

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            self._here.sendto(self.sent.to_bytes(4, "big"), self._target)
            self.sent += 1
            self._pass_on()
        until_s = time.monotonic() + _LAST_S
        while self.lost and time.monotonic() < until_s:
            self._pass_on()
            time.sleep(_PAUSE_S)

    def _pass_on(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, source = self._there.recvfrom(65536, socket.MSG_DONTWAIT)
                self._came.add(int.from_bytes(data, "big"))
                self._there.sendto(data, source)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._answered.add(int.from_bytes(self._here.recv(65536, socket.MSG_DONTWAIT), "big"))


class Calls(_Sender):
    """Datagrams to another end, within a `with` block. Nothing answers, and no change of an interface ends them."""

    def __init__(self, here: End, there: End) -> None:
        super().__init__()
        self._here, self._there = here, there
        self._sent = 0

    def go_on(self) -> None:
        """Wait until some more have been sent."""
        first = self._sent
        until("calls that can be sent", lambda: self._sent >= first + _SOME)

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE_S):
            with contextlib.suppress(OSError), _open(self._here, socket.SOCK_DGRAM) as caller:
                caller.bind((self._here.address, 0))
                caller.sendto(b"is anybody there?", (self._there.address, _ECHO_PORT))
                self._sent += 1


def ping(here: End, there: End, count: int) -> int:
    """Send echo requests from one end to another; return the number of replies.

    After a first reply, ping waits for the last one no longer than its interval. That must suffice on a busy machine.
    """
    options = ("-q", "-c", str(count), "-i", "0.3", "-W", "2", "-I", here.address)
    in_vrf = ("-I", here.vrf) if here.vrf else ()
    command = (*inside(here.namespace), "ping", *in_vrf, *options, there.address)
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stdout
    received = re.search(r", (\d+) received", said)
    if received is None:
        raise LabError(f"ping from {here.address} to {there.address} did not come to its end: {said}")
    return int(received[1])


def talk(server: End, client: End, blocks: int, hops: int = 1) -> int:
    """Send blocks of 10 kB by TCP to a server that sends each back before the next; return how many came back complete.

    `hops` is the TTL of both ends. By default it is that of eBGP, which permits no hop between them.
    """
    target = server.address, TALK_PORT
    listener, caller = _open(server, socket.SOCK_STREAM), _open(client, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(target)
    listener.listen()

    def answer() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as here:
            here.settimeout(_TALK_S)
            while data := here.recv(65536):
                here.sendall(data)

    came = 0
    with listener, caller:
        for end in (listener, caller):
            end.settimeout(_TALK_S)
            end.setsockopt(*_HOPS[end.family], hops)
            # or the kernels continue until the last FIN has come
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        thread = threading.Thread(target=answer)
        thread.start()
        with contextlib.suppress(OSError):
            caller.bind((client.address, 0))
            caller.connect(target)
            for _ in range(blocks):
                caller.sendall(bytes(_TALK_BYTES))
                left = _TALK_BYTES
                while left and (data := caller.recv(left)):
                    left -= len(data)
                came += _TALK_BYTES - left
        caller.close()
        thread.join()
    return came // _TALK_BYTES


def call(here: End, there: End, size: int, bypass_port: int = 0) -> bool:
    """Send a datagram of `size` bytes to an end that sends it back; return whether it came back complete.

    With a port, both ends send from that port and bypass all XFRM policies, as IKE daemons do.
    """
    ends = [_open(end, socket.SOCK_DGRAM) for end in (here, there)]
    with ends[0], ends[1], contextlib.suppress(TimeoutError):
        for end, each in zip((here, there), ends, strict=True):
            if bypass_port:
                for direction in (0, 1):
                    each.setsockopt(*_XFRM_POLICY[each.family], _POLICY.pack(each.family, direction, 0))
            each.settimeout(_LAST_S)
            each.bind((end.address, bypass_port))
        ends[0].sendto(bytes(size), ends[1].getsockname())
        ends[1].sendto(*ends[1].recvfrom(65536))
        return len(ends[0].recv(65536)) == size
    return False


def cast(here: End, link: str, there: End, far_link: str, count: int) -> int:
    """Send as OSPF does, over a link, to all routers; return how many packets the other end received.

    Source: RFC 2328 appendix A.1.
    """
    family = _family(here)
    level, tunnel = ((socket.IPPROTO_IP, "224.0.0.5"), (socket.IPPROTO_IPV6, "ff02::5"))[family == socket.AF_INET6]

    def listener() -> socket.socket:
        made, index = socket.socket(family, socket.SOCK_RAW, _OSPF), socket.if_nametoindex(far_link)
        packed = socket.inet_pton(family, tunnel)
        if level == socket.IPPROTO_IP:
            made.setsockopt(level, socket.IP_ADD_MEMBERSHIP, packed + struct.pack("=4xi", index))
        else:
            made.setsockopt(level, socket.IPV6_JOIN_GROUP, packed + struct.pack("=i", index))
        made.settimeout(_LAST_S)
        return made

    def sender() -> socket.socket:
        made, index = socket.socket(family, socket.SOCK_RAW, _OSPF), socket.if_nametoindex(link)
        if level == socket.IPPROTO_IP:
            made.setsockopt(level, socket.IP_MULTICAST_IF, struct.pack("=8xi", index))
        else:
            made.setsockopt(level, socket.IPV6_MULTICAST_IF, index)
        return made  # the default TTL is 1

    with _within(there.namespace, listener) as hearing, _within(here.namespace, sender) as calling:
        calling.bind((here.address, 0))
        for _ in range(count):
            calling.sendto(b"hello", (tunnel, 0))
        came = 0
        with contextlib.suppress(TimeoutError):
            while came < count:
                came += here.address in hearing.recvfrom(2048)[1]
    return came


def _family(end: End) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in end.address else socket.AF_INET


def _open(end: End, kind: socket.SocketKind) -> socket.socket:
    """Return an unbound socket in an end's namespace and VRF."""
    made = _within(end.namespace, lambda: socket.socket(_family(end), kind))
    if end.vrf:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, end.vrf.encode())
    return made


def inside(namespace: str) -> tuple[str, ...]:
    """Return the first words of a command that runs in a namespace."""
    return ("ip", "netns", "exec", namespace) if namespace else ()


def _within(namespace: str, make: Callable[[], socket.socket]) -> socket.socket:
    """Return a socket that belongs to a namespace: that in which it is created."""
    if not namespace:
        return make()
    made: list[socket.socket] = []
    trouble: list[OSError] = []

    def work() -> None:  # in a thread, since only the thread changes its namespace
        try:
            with open(f"/run/netns/{namespace}", "rb") as there:
                if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            made.append(make())
        except OSError as error:
            trouble.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if trouble:
        raise LabError(f"no socket in namespace '{namespace}': {trouble[0]}")
    return made[0]
