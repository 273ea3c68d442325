"""The stand-in's stats segment: shared memory of counters, with VPP's layout and socket (src/vlib/stats/).

It has counters of SAs, ACLs and routes. Only tests increase them, since the stand-in forwards no packets.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import struct
from dataclasses import dataclass

from vppipsec.unix_listener import UnixListener
from vppstandin.world import World

SIZE = 32 << 20
"""STAT_SEGMENT_DEFAULT_SIZE, bytes. Only written pages use memory."""
VERSION = 2
SA_ERRORS = (
    "lost",
    "handoff",
    "integ_error",
    "decryption_failed",
    "crypto_engine_error",
    "replay",
    "runt",
    "no_buffers",
    "oversized_header",
    "no_tail_space",
    "tun_no_proto",
    "unsup_payload",
    "seq_cycled",
    "crypto_queue_full",
    "no_encryption",
    "drop_fragments",
)
"""foreach_ipsec_sa_err, src/vnet/ipsec/ipsec_sa.h."""

_BASE = 0x7F0000000000  # address at which VPP would map it; pointers in the segment are addresses in that mapping
_HEADER = struct.Struct("@QQQQQ")  # version, base, epoch, in_progress, directory_vector
_ENTRY = struct.Struct("@IQ128s")  # type, data, name
_DATA_AT = 8
_NUMBER = struct.Struct("@Q")
_LENGTH = struct.Struct("@I")
_VECTOR_HEADER_BYTES = 8
_ALIGN = 64
_PAGE = 4096
_SCALAR, _SIMPLE, _COMBINED = 1, 2, 3
_USAGE = "/net/ipsec/sa"
_ERRORS = f"{_USAGE}/err/"
_ROUTES = "/net/route/to"
_OF_SAS = (_USAGE, *(_ERRORS + name for name in SA_ERRORS))
_SYSTEM = ("/sys/last_stats_clear", "/sys/heartbeat", "/sys/boottime")


@dataclass(slots=True)
class _Counter:
    """A counter: the width of an element, bytes, and the number of elements.

    `entry` is the number of its directory entry. `vectors` are the offsets of its vectors, one for each thread.
    """

    width: int
    length: int
    entry: int
    vectors: list[int]


class StatsSegment:
    """Counters of SAs by stat_index, of ACLs by rule, and of routes by stats_index, for each of VPP's threads."""

    def __init__(self, threads: int = 1) -> None:
        self.fd = os.memfd_create("stat segment")
        os.ftruncate(self.fd, SIZE)
        self._memory = mmap.mmap(self.fd, SIZE)
        self._free = _PAGE
        self._epoch = 0
        self._threads = threads
        self._counters: dict[str, _Counter] = {}
        self._entries = 0
        self._directory_room = 64
        self._directory = self._allocate(self._directory_room, _ENTRY.size)
        for name in _SYSTEM:
            self._enter(_SCALAR, name)
        self.hold(False)

    def close(self) -> None:
        """Release the memory."""
        self._memory.close()
        os.close(self.fd)

    def start(self, stat_index: int) -> None:
        """Start the counters of a stat_index at 0, as VPP does when an SA is added."""
        for path in _OF_SAS:
            self._begin(path, stat_index)

    def start_acl(self, acl_index: int, rules: int) -> None:
        """Start the counters of an ACL's rules at 0, as VPP does when it gets the rules. The counters outlive the ACL."""
        path = _acl_counter_name(acl_index)
        self._validate(path, rules + 1)
        self._clear(path, 0, self._counters[path].length)

    def start_route(self, stats_index: int) -> None:
        """Start the counter of a stats_index at 0, as VPP does when a table gets a prefix."""
        self._begin(_ROUTES, stats_index)

    def count(self, stat_index: int, packets: int = 0, octets: int = 0, thread: int = 0, **errors: int) -> None:
        """Add to the counters of an SA, for one thread of VPP. Raises KeyError for an error that VPP does not know."""
        self._add(_USAGE, thread, stat_index, packets, octets)
        for name, number in errors.items():
            self._add(_ERRORS + name, thread, stat_index, number)

    def count_matches(self, acl_index: int, rule: int, packets: int, octets: int = 0, thread: int = 0) -> None:
        """Add to the matches of an ACL's rule, for one thread of VPP. Raises KeyError if there was no such ACL."""
        self._add(_acl_counter_name(acl_index), thread, rule, packets, octets)

    def count_route(self, stats_index: int, packets: int, octets: int = 0, thread: int = 0) -> None:
        """Add to the packets of a route, forwarded or dropped, for one thread of VPP."""
        self._add(_ROUTES, thread, stats_index, packets, octets)

    def hold(self, in_progress: bool) -> None:
        """Set `in_progress` at the start of a change, and clear it at the end. It stays set if VPP dies in between."""
        self._epoch += not in_progress
        _HEADER.pack_into(self._memory, 0, VERSION, _BASE, self._epoch, in_progress, _BASE + self._directory)

    def _add(self, path: str, thread: int, element: int, *numbers: int) -> None:
        counter = self._counters[path]
        for i, number in enumerate(numbers):
            at = counter.vectors[thread] + counter.width * element + _NUMBER.size * i
            _NUMBER.pack_into(self._memory, at, _NUMBER.unpack_from(self._memory, at)[0] + number)

    def _begin(self, path: str, index: int) -> None:
        """Make room for an index in a counter, and set that element to 0."""
        room = self._counters[path].length if path in self._counters else 0
        if index >= room:
            self._validate(path, max(2 * room, index + 1, 64))
        self._clear(path, index, 1)

    def _clear(self, path: str, first: int, elements: int) -> None:
        counter = self._counters[path]
        for vector in counter.vectors:
            start = vector + counter.width * first
            self._memory[start : start + counter.width * elements] = bytes(counter.width * elements)

    def _validate(self, path: str, length: int) -> None:
        """Give a counter at least `length` elements (vlib_stats_validate). A counter that is too short moves to free memory."""
        counter = self._counters.get(path)
        if counter is not None and length <= counter.length:
            return
        self.hold(True)
        if counter is None:
            kind = _SIMPLE if path.startswith(_ERRORS) else _COMBINED
            counter = _Counter(_NUMBER.size * (2 if kind == _COMBINED else 1), 0, self._enter(kind, path), [])
            self._counters[path] = counter
        used = counter.width * counter.length
        moved = [self._allocate(length, counter.width) for _ in range(self._threads)]
        for old, new in zip(counter.vectors, moved, strict=False):  # a new counter has no vectors to move
            self._memory[new : new + used] = self._memory[old : old + used]
        counter.length, counter.vectors = length, moved
        pointers = self._allocate(self._threads, _NUMBER.size)
        for i, vector in enumerate(moved):
            _NUMBER.pack_into(self._memory, pointers + _NUMBER.size * i, _BASE + vector)
        _NUMBER.pack_into(self._memory, self._directory + _ENTRY.size * counter.entry + _DATA_AT, _BASE + pointers)
        self.hold(False)

    def _enter(self, kind: int, name: str) -> int:
        """Add an entry to the directory and return its number."""
        if self._entries == self._directory_room:
            used = _ENTRY.size * self._entries
            self._directory_room *= 2
            directory = self._allocate(self._directory_room, _ENTRY.size)
            self._memory[directory : directory + used] = self._memory[self._directory : self._directory + used]
            self._directory = directory
        number = self._entries
        _ENTRY.pack_into(self._memory, self._directory + _ENTRY.size * number, kind, 0, name.encode())
        self._entries += 1
        _LENGTH.pack_into(self._memory, self._directory - _VECTOR_HEADER_BYTES, self._entries)
        return number

    def _allocate(self, length: int, width: int) -> int:
        """Allocate a vector of zeroes and return its offset. Raises MemoryError if the segment is full."""
        start = -(-(self._free + _VECTOR_HEADER_BYTES) // _ALIGN) * _ALIGN
        if start + length * width >= SIZE:
            raise MemoryError("the stats segment is full")
        _LENGTH.pack_into(self._memory, start - _VECTOR_HEADER_BYTES, length)
        self._free = start + length * width
        return start


def _acl_counter_name(acl_index: int) -> str:
    return f"/acl/{acl_index}/matches"


class StatsServer:
    """Hands out the stats segment to each client that connects. It has counters for the SAs, ACLs and routes of a world."""

    def __init__(self, world: World, path: str, threads: int = 1) -> None:
        self.path = path
        self.segment = StatsSegment(threads)
        for present in world.sas.values():
            self.segment.start(present.stat_index)
        world.on_new_sa(self.segment.start)
        for number, acl in world.acls.items():
            self.segment.start_acl(number, len(acl.rules))
        world.on_put_acl(self.segment.start_acl)
        for fib in world.fibs.values():
            for entry in fib.entries.values():
                self.segment.start_route(entry.stats_index)
        world.on_new_route(self.segment.start_route)
        self._listener: UnixListener | None = None

    def start(self) -> None:
        """Listen, in the running event loop. Raises OSError."""
        self._listener = UnixListener(self.path, socket.SOCK_SEQPACKET)
        self._listener.socket.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener.socket, self._accept, self._listener.socket)

    def stop(self) -> None:
        """Stop listening. Clients that have mapped the segment keep it, as after VPP's end."""
        if self._listener is not None:
            self._listener.release()
            asyncio.get_running_loop().remove_reader(self._listener.socket)
            self._listener.socket.close()
        self.segment.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client went away
            client, _ = listener.accept()
            with client:
                socket.send_fds(client, [b""], [self.segment.fd])
