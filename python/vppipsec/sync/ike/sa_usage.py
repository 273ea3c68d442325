"""One sender per outbound SA: which SAs this VPP must not begin to send with, and when the IKE daemon is asked to replace them.

A new SA in VPP starts at sequence number 1 (it cannot be set), and the peer drops whatever it has seen (RFC 4303 section 3.4.3).
Worse, a counter mode cipher must never use a key and a sequence number twice (RFC 4106 section 2, RFC 8750). So an outbound SA
that the kernel or an earlier VPP has sent with is *worn*: it is rekeyed, not programmed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

from vppipsec.kernel.xfrm.values import Algorithm, Sa
from vppipsec.vpp.types import SaSpec


def process_started(pid: int) -> float | None:
    """Return when a process of this machine was started, seconds since 1970, or None where that cannot be told (proc(5))."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _TICKS_A_SECOND)
    return None


_TICKS_A_SECOND = 100  # USER_HZ, what /proc counts in on every architecture that VPP runs on


class SaUsage:
    """Remembers which SAs a VPP has had to send with, and judges SAs by it."""

    def __init__(self) -> None:
        self._added_to_vpp: set[int] = set()
        self._kernel_sends_with: set[int] = set()
        self._missing_in_last_dump: set[int] = set()
        self._seen_added_in_first_second: set[int] = set()
        self._dumped_in_first_second: set[int] = set()
        self._followed_since = time.time()
        self._vpp_since = 0.0

    def set_vpp_start(self, pid: int) -> None:
        """Note which VPP it is from now on. One whose age cannot be told is taken for new."""
        started = process_started(pid)
        self._vpp_since = time.time() if started is None else started

    def note_added_to_vpp(self, spec: SaSpec) -> None:
        """Note that VPP took an SA."""
        if not spec.inbound:
            self._added_to_vpp.add(_spec_fingerprint(spec))

    def note_added_by_kernel(self, sa: Sa) -> None:
        """Note that the kernel told of an SA's addition. That matters in the second in which we began to follow it alone.

        One that was there before is only moving: it goes and comes again as it was.
        """
        if sa.usage.add_time == int(self._followed_since) and _fingerprint(sa) not in self._dumped_in_first_second:
            self._seen_added_in_first_second.add(_fingerprint(sa))

    def retain_only(self, sas: Collection[Sa]) -> None:
        """Take a dump of the SAs: drop what is remembered of those that two dumps in a row did not have, since one that moves is
        gone for a moment.
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
        """Note that the kernel is given packets to send with an SA."""
        self._kernel_sends_with.add(_fingerprint(sa))

    def kernel_has_sent(self, spec: SaSpec) -> bool:
        """Tell whether the kernel is known to have sent with an SA that VPP has."""
        return _spec_fingerprint(spec) in self._kernel_sends_with

    def vpp_may_have_sent(self, sa: Sa) -> bool:
        """Tell whether a VPP that we know may have sent with an SA."""
        return _fingerprint(sa) in self._added_to_vpp

    def sequence_lost(self, sa: Sa) -> bool:
        """Tell whether somebody may have sent with an SA that VPP does not hold.

        The kernel's own sequence number says it of the kernel, what was noted of a VPP that we knew. Of the time before we ran
        nothing was noted: then an SA that is older than this VPP may have served an earlier one. The kernel tells no fractions:
        in the second in which both were started, what counts is whether we saw the SA being added. Not known is what an earlier
        run of ours has taken out of this VPP while the kernel kept it.
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
    """Hash what makes an SA the same one for its peer, wherever its addresses move: SPI and keys."""
    key = sa.aead.key[:-4] if sa.aead is not None else _cipher_key(sa.crypt)
    return hash((sa.spi, key, b"" if sa.auth is None else sa.auth.key))


def _spec_fingerprint(spec: SaSpec) -> int:
    """Hash likewise what VPP has of an SA."""
    return hash((spec.spi, spec.crypto_key, spec.integ_key))


def _cipher_key(crypt: Algorithm | None) -> bytes:
    if crypt is None:
        return b""
    return crypt.key[:-4] if crypt.name == "rfc3686(ctr(aes))" else crypt.key
