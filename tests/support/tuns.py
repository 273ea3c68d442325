"""Tun interfaces in a test's network namespace, in place of VPP's: the test reads and answers what the kernel sends."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_QUIET_S = 0.1
_ARRIVES_S = 1.0
_NAMES = {6: "tcp", 17: "udp", 1: "icmp", 47: "gre"}


class Tun:
    """The process's end of a tun interface. Closing it removes the interface."""

    def __init__(self, name: str) -> None:
        self.name = name
        if not Path("/dev/net/tun").exists():
            pytest.skip("there is no /dev/net/tun here")
        self._fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(self._fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN_NO_PI))

    def fileno(self) -> int:
        """Return the descriptor that packets are read from."""
        return self._fd

    def close(self) -> None:
        """Remove the interface."""
        os.close(self._fd)

    def packets(self) -> list[str]:
        """Return protocol and destination port of the unencrypted IPv4 packets, until no more come."""
        found = []
        while select.select([self._fd], [], [], _QUIET_S)[0]:
            packet = os.read(self._fd, 65536)
            name = _NAMES.get(packet[9]) if packet[0] >> 4 == 4 else None
            if name is not None:
                found.append(f"{name} {int.from_bytes(packet[22:24], 'big')}" if name in ("tcp", "udp") else name)
        return found

    def udp(self) -> list[tuple[str, str]]:
        """Return source and destination of the unencrypted UDP packets, until no more come."""
        found = []
        while select.select([self._fd], [], [], _QUIET_S)[0]:
            packet = os.read(self._fd, 65536)
            if packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_UDP:
                ends = packet[12:16], packet[16:20]
            elif packet[0] >> 4 == 6 and packet[6] == socket.IPPROTO_UDP:
                ends = packet[8:24], packet[24:40]
            else:
                continue
            found.append((str(ipaddress.ip_address(ends[0])), str(ipaddress.ip_address(ends[1]))))
        return found

    def give(self, source: str, to: str, port: int, text: bytes) -> None:
        """Send a UDP packet into the kernel, as if it had been decrypted."""
        ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(to).packed
        size = 8 + len(text)
        body = struct.pack(">HHHH", 7, port, size, 0) + text
        body = (
            body[:6]
            + struct.pack(">H", _checksum(ends + struct.pack(">II", size, socket.IPPROTO_UDP) + body))
            + body[8:]
        )
        if len(ends) == 8:
            head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 0, 0, 64, socket.IPPROTO_UDP, 0) + ends
            head = head[:10] + struct.pack(">H", _checksum(head)) + head[12:]
        else:
            head = struct.pack(">IHBB", 6 << 28, size, socket.IPPROTO_UDP, 64) + ends
        os.write(self._fd, head + body)


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2 + len(data) % 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@contextlib.contextmanager
def tun(*names: str) -> Iterator[list[Tun]]:
    """Create tun interfaces for a while."""
    with contextlib.ExitStack() as stack:
        made = []
        for name in names:
            made.append(Tun(name))
            stack.callback(made[-1].close)
        yield made


def send(to: str, port: int = 9, source_port: int = 0, from_: str = "") -> None:
    """Send a UDP packet from the router itself, and ignore the kernel's error."""
    family = socket.AF_INET6 if ":" in to else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.setblocking(False)
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sender.bind((from_, source_port))
        sender.sendto(b"to the peer", (to, port))


def receives(via: Tun, source: str, own: str, device: str = "") -> bool:
    """Return whether a packet from a tun arrives at a local address, on a `device` where one is named."""
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        receiver.bind((own, 0))
        if device:
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        receiver.settimeout(_ARRIVES_S)
        via.give(source, own, receiver.getsockname()[1], b"from the peer")
        with contextlib.suppress(TimeoutError):
            text, sender = receiver.recvfrom(100)
            return text == b"from the peer" and sender[0] == source
    return False
