"""Finds a key, whole or in part, in a text, in any form in which a program prints bytes."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable

PART = 4
"""Number of consecutive bytes of a key that a text must not contain."""


def secret(name: str, size: int) -> bytes:
    """Return a key that looks like nothing else."""
    return hashlib.sha512(f"secret {name}".encode()).digest()[:size]


def leaks(text: str, secrets: Iterable[bytes]) -> list[str]:
    """Return the secrets that a text contains.

    It recognises hexadecimal in both cases, with and without separators, base64, Python's notation of bytes, lists of
    numbers, and a salt as a number in either byte order.
    """
    plain = text.lower().replace("\\\\", "\\")  # JSON doubles them
    packed = re.sub(r"(?<=[0-9a-f]{2})[ :-](?=[0-9a-f]{2}(?![0-9a-f]))", "", plain)
    found = []
    for key in secrets:
        for offset in range(len(key) - PART + 1):
            part = key[offset : offset + PART]
            forms = {"hex": part.hex(), "list": ", ".join(map(str, part)), "bytes": repr(part)[2:-1].lower()}
            forms |= {order: str(int.from_bytes(part, order)) for order in ("big", "little")}
            found += [f"{form} of {key.hex()} at {offset}" for form, needle in forms.items() if needle in plain]
            if part.hex() in packed:
                found.append(f"separated hex of {key.hex()} at {offset}")
        for offset in range(3):  # any alignment
            encoded = base64.b64encode(bytes(offset) + key).decode()
            inner = encoded[(4 * offset + 2) // 3 + 1 : -4]
            if len(inner) > 6 and (inner in text or inner.translate(str.maketrans("+/", "-_")) in text):
                found.append(f"base64 of {key.hex()}")
    return found
