"""Selection of SAs by an operator: the peers and SPIs to choose from, and parsers for the choice."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


class SelectionError(ValueError):
    """The operator's choice is not an address, or not an SPI; the text says so."""


def peers(rows: Sequence[Row]) -> list[str]:
    """Return the remote addresses of SAs, sorted; both endpoints of an SA if its direction is not known yet."""
    ends = {"in": ("src",), "out": ("dst",)}
    found = {row[end] for row in rows for end in ends.get(row["direction"], ("src", "dst"))}
    return sorted(found, key=lambda text: (":" in text, ipaddress.ip_address(text).packed))


def spis(rows: Sequence[Row]) -> list[str]:
    """Return the SPIs of SAs in the form of `show sa`, sorted."""
    return sorted({row["spi"] for row in rows})


def parse_peer(text: str) -> str:
    """Return a peer's address in its canonical form. Raises SelectionError."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise SelectionError(f"'{text}' is not an IP address: name a peer by its address") from error


def parse_spi(text: str) -> int:
    """Return an SPI from text, in hexadecimal after 0x or in decimal. Raises SelectionError."""
    try:
        spi = int(text, 0)
    except ValueError:
        spi = -1
    if not 0 < spi < 1 << 32:
        raise SelectionError(f"'{text}' is not an SPI: write it as 0xc1234567")
    return spi
