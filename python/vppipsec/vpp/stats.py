"""Reads VPP's counters of SAs, ACLs and routes from its stats segment, shared memory that VPP hands out over a unix socket.

Layout: src/vlib/stats/shared.h and src/vppinfra/vec_bootstrap.h. There is no lock that a reader could wait for. VPP sets
`in_progress` while it moves vectors, and counts the changes in `epoch`. If VPP changed the segment during a read, the read is
repeated. vpp_papi's VPPStats knows the same layout, but it waits for ever if VPP died in the middle of a change.

Each read opens the segment again, in about 0.2 ms. So it always reads the segment of the VPP that runs now.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from vppipsec.vpp.api.errors import VppIncompatible, VppUnavailable

VERSION = 2
"""STAT_SEGMENT_VERSION."""
SA_COUNTERS = b"/net/ipsec/sa"
"""Name of the combined counter of SAs, by stat_index. The simple counters of errors are below it, in `err/`."""
ACL_COUNTERS = b"/acl/%d/matches"
"""Name of the combined counter of an ACL, with its acl_index. It has an element for each rule (src/plugins/acl/acl.c)."""
ROUTE_COUNTERS = b"/net/route/to"
"""Name of the combined counter of routes, by stats_index. It includes dropped packets (src/vnet/dpo/load_balance.c)."""
STATS_TIMEOUT_S = 2.0
"""Seconds that VPP has to hand out its segment."""
MAX_READ_TRIES = 200
READ_PAUSE_S = 0.002
"""A read that a change disturbs is repeated after this pause, at most MAX_READ_TRIES times."""

_HEADER = struct.Struct("@QQQQQ")  # version, base, epoch, in_progress, directory_vector (vlib_stats_shared_header_t)
_ENTRY = struct.Struct("@IQ128s")  # type, data, name (vlib_stats_entry_t)
_NAME_AT = 16
_VECTOR_LENGTH = struct.Struct("@I")
_VECTOR_HEADER_BYTES = 8  # vec_header_t, in front of a vector; begins with its length
_POINTER_BYTES = 8
_COUNTER_BYTES = 8
_COUNTER_VECTOR_SIMPLE = 2
_COUNTER_VECTOR_COMBINED = 3
_COMBINED_BYTES = 2 * _COUNTER_BYTES
_T = TypeVar("_T")


class SaTraffic(NamedTuple):
    """VPP's counters of one SA since its addition. `errors` maps VPP's name of an error to packets, if above 0."""

    packets: int
    bytes: int
    errors: Mapping[str, int]


class SaCounters:
    """VPP's counters of all SAs at one moment. `of_sa` sums them over VPP's threads."""

    def __init__(self, usage: Sequence[array[int]], errors: Mapping[str, Sequence[array[int]]]) -> None:
        """Hold the counters of each thread: `usage` alternates packets and bytes, `errors` has packets by name of error.

        Errors that are 0 for all SAs are left out.
        """
        self._usage = usage
        self._errors = errors

    def of_sa(self, stat_index: int) -> SaTraffic | None:
        """Return the counters of a stat_index, None if VPP has no such counter."""
        at = 2 * stat_index
        threads = [thread for thread in self._usage if at + 1 < len(thread)]
        if not threads:
            return None
        errors = {
            name: number
            for name, by_thread in self._errors.items()
            if (number := sum(thread[stat_index] for thread in by_thread if stat_index < len(thread)))
        }
        return SaTraffic(sum(thread[at] for thread in threads), sum(thread[at + 1] for thread in threads), errors)


async def read_sa_counters(path: str) -> SaCounters:
    """Return the SA counters of the VPP whose stats socket is at `path`. A thread reads them, so the event loop goes on.

    Raises VppUnavailable if nothing answers there, VppIncompatible if the segment has another layout.
    """
    return await asyncio.to_thread(_read_segment, path, _sa_counters)


async def read_acl_matches(path: str, rules: Mapping[int, Collection[int]]) -> dict[int, int]:
    """Return how many packets matched rules of ACLs, by acl_index. `rules` maps each acl_index to numbers of rules.

    VPP counts from the moment an ACL gets its rules, and only while acl_stats_intf_counters_enable is set. An ACL without
    counters is left out. Thread and exceptions are as for `read_sa_counters`.
    """
    return await asyncio.to_thread(_read_segment, path, lambda segment: _acl_matches(segment, rules))


async def read_route_packets(path: str, indices: Sequence[int]) -> list[int]:
    """Return how many packets used each route. `indices` are their stats_indexes; the result has the same order.

    VPP counts from the moment a table gets the prefix, wherever the packets go. Thread and exceptions are as for
    `read_sa_counters`.
    """
    return await asyncio.to_thread(_read_segment, path, lambda segment: _route_packets(segment, indices))


class _Disturbed(Exception):
    """VPP changed the segment during a read."""


def _read_segment(path: str, copy: Callable[[_Segment], _T]) -> _T:
    with _map_segment(path) as memory:
        segment = _Segment(memory)
        for _ in range(MAX_READ_TRIES):
            try:
                return copy(segment)
            except _Disturbed:
                time.sleep(READ_PAUSE_S)
    raise VppUnavailable(f"VPP's counters could not be read: it changes its stats segment ({path}) all the time")


def _map_segment(path: str) -> mmap.mmap:
    """Return the mapped stats segment of the VPP at a stats socket."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
            asking.settimeout(STATS_TIMEOUT_S)
            asking.connect(path)
            descriptors = socket.recv_fds(asking, 1, 1)[1]
    except OSError as error:
        reason = error.strerror or "VPP does not answer"
        raise VppUnavailable(f"VPP's stats socket {path} cannot be read: {reason}; is `statseg` configured?") from error
    if not descriptors:
        raise VppUnavailable(f"VPP's stats socket {path} gave no segment")
    try:
        return mmap.mmap(descriptors[0], 0, mmap.MAP_SHARED, mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise VppIncompatible(f"what VPP's stats socket {path} gave is not a stats segment") from error
    finally:
        os.close(descriptors[0])


def _sa_counters(segment: _Segment) -> SaCounters:
    usage: list[array[int]] = []
    errors: dict[str, list[array[int]]] = {}
    for kind, pointer, name in segment.entries(SA_COUNTERS):
        if name == SA_COUNTERS and kind == _COUNTER_VECTOR_COMBINED:
            usage = segment.by_thread(pointer, _COMBINED_BYTES)
        elif name.startswith(SA_COUNTERS + b"/err/") and kind == _COUNTER_VECTOR_SIMPLE:
            counted = [thread for thread in segment.by_thread(pointer, _COUNTER_BYTES) if any(thread)]
            if counted:
                errors[name.rpartition(b"/")[2].decode("ascii", "replace")] = counted
    return SaCounters(usage, errors)


def _acl_matches(segment: _Segment, rules: Mapping[int, Collection[int]]) -> dict[int, int]:
    wanted = {ACL_COUNTERS % acl_index: acl_index for acl_index in rules}
    matches = {}
    for kind, pointer, name in segment.entries(ACL_COUNTERS.partition(b"%")[0]):
        acl_index = wanted.get(name)
        if acl_index is None or kind != _COUNTER_VECTOR_COMBINED:
            continue
        places = [2 * number for number in rules[acl_index]]
        threads = [t for t in segment.by_thread(pointer, _COMBINED_BYTES) if max(places, default=0) < len(t)]
        if threads:
            matches[acl_index] = sum(thread[place] for thread in threads for place in places)
    return matches


def _route_packets(segment: _Segment, indices: Sequence[int]) -> list[int]:
    threads = segment.combined(ROUTE_COUNTERS)
    return [sum(thread[2 * index] for thread in threads if 2 * index < len(thread)) for index in indices]


class _Segment:
    """The mapped memory. Every length and offset in it is checked before use."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self._size = len(memory)
        if self._size < _HEADER.size:
            raise VppIncompatible("VPP's stats segment is too short")
        version, self._base, *_ = _HEADER.unpack_from(memory)
        if version != VERSION:
            raise VppIncompatible(f"VPP's stats segment has layout {version}, where {VERSION} is known")

    def entries(self, prefix: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield kind, pointer and name of the directory's entries whose names begin with a prefix.

        Raises _Disturbed if VPP changed the segment meanwhile, also after the last entry.
        """
        _, _, epoch, in_progress, directory = _HEADER.unpack_from(self._memory)
        if in_progress:
            raise _Disturbed
        entries = self._vector(directory, _ENTRY.size)
        for at in range(0, len(entries), _ENTRY.size):
            if entries.startswith(prefix, at + _NAME_AT):
                kind, pointer, name = _ENTRY.unpack_from(entries, at)
                yield kind, pointer, name.partition(b"\0")[0]
        if _HEADER.unpack_from(self._memory)[2:] != (epoch, 0, directory):
            raise _Disturbed

    def combined(self, name: bytes) -> list[array[int]]:
        """Return the combined counter with exactly this name, as `by_thread` does. Reads no other part of the long directory.

        Raises _Disturbed.
        """
        _, _, epoch, in_progress, directory = _HEADER.unpack_from(self._memory)
        if in_progress:
            raise _Disturbed
        start, end = self._bounds(directory, _ENTRY.size)
        at = self._memory.find(name + b"\0", start, end)
        while at >= 0 and (at - start) % _ENTRY.size != _NAME_AT:
            at = self._memory.find(name + b"\0", at + 1, end)
        kind, pointer, _ = _ENTRY.unpack_from(self._memory, at - _NAME_AT) if at >= 0 else (0, 0, b"")
        counter = self.by_thread(pointer, _COMBINED_BYTES) if kind == _COUNTER_VECTOR_COMBINED else []
        if _HEADER.unpack_from(self._memory)[2:] != (epoch, 0, directory):
            raise _Disturbed
        return counter

    def by_thread(self, pointer: int, element_bytes: int) -> list[array[int]]:
        """Return a copy of a counter: for each thread a vector of 64-bit numbers. Raises _Disturbed."""
        threads = array("Q", self._vector(pointer, _POINTER_BYTES))
        return [array("Q", self._vector(thread, element_bytes)) for thread in threads]

    def _vector(self, pointer: int, element_bytes: int) -> bytes:
        """Return a copy of a vector. A null pointer gives an empty one. Raises _Disturbed."""
        start, end = self._bounds(pointer, element_bytes)
        return self._memory[start:end]

    def _bounds(self, pointer: int, element_bytes: int) -> tuple[int, int]:
        """Return the offsets of a vector's start and end. Raises _Disturbed."""
        if not pointer:
            return 0, 0
        start = pointer - self._base
        if not _HEADER.size + _VECTOR_HEADER_BYTES <= start <= self._size:
            raise _Disturbed
        end = start + element_bytes * _VECTOR_LENGTH.unpack_from(self._memory, start - _VECTOR_HEADER_BYTES)[0]
        if end > self._size:
            raise _Disturbed
        return start, end
