"""Ensures one sender per outbound SA: finds SAs that VPP must not start to send with, so that they are rekeyed instead.

A new SA in VPP starts at sequence number 1, which cannot be set. The peer drops sequence numbers that it has seen (RFC
4303 section 3.4.3). Worse, a counter mode cipher must never use a key and a sequence number twice (RFC 4106 section 2,
RFC 8750). So an outbound SA with which the kernel or an earlier VPP has sent has lost its sequence: it is rekeyed, not
added to VPP.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from vppipsec.kernel.xfrm.values import Algorithm, Sa
from vppipsec.vpp.types import SaSpec


def process_started(pid: int) -> float | None:
    """Return the start time of a local process, seconds since 1970, or None where it is unknown (proc(5))."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _TICKS_A_SECOND)
    return None


_TICKS_A_SECOND = 100  # USER_HZ, the unit of /proc on every architecture that VPP runs on


class SaUsage:
    """Remembers which SAs VPP or the kernel has been able to send with."""

    def __init__(self) -> None:
        self._added_to_vpp: set[int] = set()
        self._kernel_sends_with: set[int] = set()
        self._missing_in_last_dump: set[int] = set()
        self._seen_added_in_first_second: set[int] = set()
        self._dumped_in_first_second: set[int] = set()
        self._followed_since = time.time()
        self._vpp_since = 0.0

    def set_vpp_start(self, pid: int) -> None:
        """Set which VPP is connected, by its process. A VPP of unknown age counts as new."""
        started = process_started(pid)
        self._vpp_since = time.time() if started is None else started

    def note_added_to_vpp(self, spec: SaSpec) -> None:
        """Record that VPP accepted an SA."""
        if not spec.inbound:
            self._added_to_vpp.add(_spec_fingerprint(spec))

    def note_added_by_kernel(self, sa: Sa) -> None:
        """Record the kernel's event that adds an SA. It matters only for SAs of the second in which following began.

        An SA of an earlier dump is only being migrated: the kernel deletes it and adds it again.
        """
        if sa.usage.add_time == int(self._followed_since) and _fingerprint(sa) not in self._dumped_in_first_second:
            self._seen_added_in_first_second.add(_fingerprint(sa))

    def retain_only(self, sas: Collection[Sa]) -> None:
        """Forget SAs that two consecutive dumps lack.

        One dump is not enough: an SA being migrated is gone for a moment.
        """
        self._dumped_in_first_second |= {
            _fingerprint(sa) for sa in sas if sa.usage.add_time == int(self._followed_since)
        }
        if self._added_to_vpp or self._kernel_sends_with:
            missing = (self._added_to_vpp | self._kernel_sends_with) - {_fingerprint(sa) for sa in sas}
            self._added_to_vpp -= missing & self._missing_in_last_dump
            self._kernel_sends_with -= missing & self._missing_in_last_dump
            self._missing_in_last_dump = missing

    def note_kernel_sends(self, sa: Sa) -> None:
        """Record that the kernel gets packets to send with an SA."""
        self._kernel_sends_with.add(_fingerprint(sa))

    def kernel_has_sent(self, spec: SaSpec) -> bool:
        """Return whether the kernel is known to have sent with an SA in VPP."""
        return _spec_fingerprint(spec) in self._kernel_sends_with

    def vpp_may_have_sent(self, sa: Sa) -> bool:
        """Return whether a VPP that the service has programmed may have sent with an SA."""
        return _fingerprint(sa) in self._added_to_vpp

    def sequence_lost(self, sa: Sa) -> bool:
        """Return whether the kernel or a VPP may have sent with an SA that VPP does not hold.

        The kernel's own sequence number shows that of the kernel. For a VPP that the service knew, its records do. For
        the time before the service ran there are no records: an SA that is older than this VPP may have served an
        earlier one. The kernel's times have no fractions. So for SAs of the second in which following and VPP started,
        it counts whether the service saw their addition. One case stays unknown: an earlier run removed the SA from
        this VPP while the kernel kept it.
        """
        if sa.replay is not None and sa.replay.oseq:
            return True
        if self._added_to_vpp and self.vpp_may_have_sent(sa):
            return True
        if self._kernel_sends_with and _fingerprint(sa) in self._kernel_sends_with:
            return True
        if sa.usage.add_time >= min(self._followed_since, self._vpp_since):
            return False
        return sa.usage.add_time < int(self._followed_since) or _fingerprint(sa) not in self._seen_added_in_first_second


def _fingerprint(sa: Sa) -> int:
    """Return a hash of what identifies an SA to its peer, whatever its addresses: SPI and keys."""
    key = sa.aead.key[:-4] if sa.aead is not None else _cipher_key(sa.crypt)
    return hash((sa.spi, key, b"" if sa.auth is None else sa.auth.key))


def _spec_fingerprint(spec: SaSpec) -> int:
    """Return the same hash for VPP's form of an SA."""
    return hash((spec.spi, spec.crypto_key, spec.integ_key))


def _cipher_key(crypt: Algorithm | None) -> bytes:
    if crypt is None:
        return b""
    return crypt.key[:-4] if crypt.name == "rfc3686(ctr(aes))" else crypt.key
