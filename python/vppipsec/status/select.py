"""Which SAs an operator means: what peers and SPIs there are to choose from, and what was chosen."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


class SelectionError(ValueError):
    """What was given is neither an address nor an SPI; the text says so."""


def peers(rows: Sequence[Row]) -> list[str]:
    """Return the remote addresses of SAs; both ends of an SA whose direction is not known yet."""
    ends = {"in": ("src",), "out": ("dst",)}
    found = {row[end] for row in rows for end in ends.get(row["direction"], ("src", "dst"))}
    return sorted(found, key=lambda text: (":" in text, ipaddress.ip_address(text).packed))


def spis(rows: Sequence[Row]) -> list[str]:
    """Return the SPIs of SAs as `show sa` writes them."""
    return sorted({row["spi"] for row in rows})


def parse_peer(text: str) -> str:
    """Return a peer's address in its usual form. Raises SelectionError."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise SelectionError(f"'{text}' is not an IP address: name a peer by its address") from error


def parse_spi(text: str) -> int:
    """Return the number of an SPI that is given in hexadecimal with 0x before it, or decimal. Raises SelectionError."""
    try:
        spi = int(text, 0)
    except ValueError:
        spi = -1
    if not 0 < spi < 1 << 32:
        raise SelectionError(f"'{text}' is not an SPI: write it as 0xc1234567")
    return spi
