"""Prints the kernel's addresses, selectors and numbers for people, and parses addresses."""

from __future__ import annotations

import ipaddress
import socket

from vppipsec.kernel.xfrm.values import Mark, Selector

_PROTOS = {0: "any", 1: "icmp", 6: "tcp", 17: "udp", 47: "gre", 50: "esp", 51: "ah", 58: "ipv6-icmp", 108: "comp"}


def format_addr(address: bytes) -> str:
    """Return an address of 4 or 16 bytes in network order as text. Raises ValueError for another length."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def parse_addr(text: str) -> bytes:
    """Return an IPv4 or IPv6 address as bytes in network order. Raises ValueError if the text is no address."""
    return ipaddress.ip_address(text).packed


def format_prefix(address: bytes, length: int) -> str:
    """Return an address with its prefix length as text."""
    return f"{format_addr(address)}/{length}"


def format_proto(proto: int) -> str:
    """Return the name of an IP protocol, or its number as text."""
    return _PROTOS.get(proto, str(proto))


def format_mark(mark: Mark | None) -> str:
    """Return a mark as iproute2 prints it, value and mask. No mark gives an empty text."""
    return "" if mark is None else f"{mark.value:#x}/{mark.mask:#x}"


def format_selector(selector: Selector) -> str:
    """Return a selector as text: `10.1.0.0/24 > 10.2.0.0/24 udp sport 500 dport 500`."""
    text = (
        f"{format_prefix(selector.saddr, selector.prefixlen_s)} > {format_prefix(selector.daddr, selector.prefixlen_d)}"
    )
    if selector.proto:
        text += f" {format_proto(selector.proto)}"
    for name, port, mask in (
        ("sport", selector.sport, selector.sport_mask),
        ("dport", selector.dport, selector.dport_mask),
    ):
        if mask:
            text += f" {name} {port}" + ("" if mask == 0xFFFF else f"/{mask:#x}")
    return text
