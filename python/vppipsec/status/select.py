"""Which SAs an operator means: rows of `show sa` by their peer or by their SPI."""

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


def with_peer(rows: Sequence[Row], peer: str) -> list[Row]:
    """Return the SAs that have an address as one of their ends. Raises SelectionError."""
    try:
        address = str(ipaddress.ip_address(peer))
    except ValueError as error:
        raise SelectionError(f"'{peer}' is not an IP address: name a peer by its address") from error
    return [row for row in rows if address in (row["src"], row["dst"])]


def with_spi(rows: Sequence[Row], spi: str) -> list[Row]:
    """Return the SAs with an SPI, given in hexadecimal with 0x before it or as a decimal number. Raises SelectionError."""
    try:
        number = int(spi, 0)
    except ValueError as error:
        raise SelectionError(f"'{spi}' is not an SPI: write it as 0xc1234567") from error
    return [row for row in rows if int(row["spi"], 16) == number]
