"""The stand-in's stats segment: VPP's shared memory of counters, laid out and handed out as VPP does (src/vlib/stats/).

It has the counters of SAs, which nobody but a test moves, since the stand-in passes no packets.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import struct

from vppipsec.standin.world import World

SIZE = 32 << 20
"""STAT_SEGMENT_DEFAULT_SIZE, bytes. Only what is written to takes memory."""
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

_BASE = 0x7F0000000000  # where VPP would have mapped it; pointers in it are relative to that
_HEADER = struct.Struct("@QQQQQ")  # version, base, epoch, in_progress, directory_vector
_ENTRY = struct.Struct("@IQ128s")  # type, data, name
_COUNTER = struct.Struct("@Q")
_LENGTH = struct.Struct("@I")
_VECTOR_HEADER_BYTES = 8
_ALIGN = 64
_PAGE = 4096
_SCALAR, _SIMPLE, _COMBINED = 1, 2, 3
_USAGE = "/net/ipsec/sa"
_SYSTEM = ("/sys/last_stats_clear", "/sys/heartbeat", "/sys/boottime")


class StatsSegment:
    """Counters of SAs by stat_index, for each of VPP's threads."""

    def __init__(self, threads: int = 1) -> None:
        self.fd = os.memfd_create("stat segment")
        os.ftruncate(self.fd, SIZE)
        self._memory = mmap.mmap(self.fd, SIZE)
        self._free = _PAGE
        self._epoch = 0
        self._threads = threads
        self._room = 0
        self._vectors: dict[str, list[int]] = {}
        self._directory = self._make_directory()
        self.hold(False)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self.fd)

    def start(self, stat_index: int) -> None:
        """Have counters for a stat_index, all 0, as VPP does when an SA is added."""
        if stat_index >= self._room:
            self._grow(stat_index + 1)
        for name in (_USAGE, *SA_ERRORS):
            width = _width(name)
            for vector in self._vectors[name]:
                self._memory[vector + width * stat_index : vector + width * (stat_index + 1)] = bytes(width)

    def count(self, stat_index: int, packets: int = 0, octets: int = 0, thread: int = 0, **errors: int) -> None:
        """Add to the counters of an SA, as that thread of VPP would. Raises KeyError for an error that VPP does not know."""
        at = self._vectors[_USAGE][thread] + 2 * _COUNTER.size * stat_index
        self._add(at, packets)
        self._add(at + _COUNTER.size, octets)
        for name, number in errors.items():
            self._add(self._vectors[name][thread] + _COUNTER.size * stat_index, number)

    def hold(self, in_progress: bool) -> None:
        """Say that things are being moved, or are no longer; a VPP that dies in between leaves it said."""
        self._epoch += not in_progress
        _HEADER.pack_into(self._memory, 0, VERSION, _BASE, self._epoch, in_progress, _BASE + self._directory)

    def _add(self, at: int, number: int) -> None:
        _COUNTER.pack_into(self._memory, at, _COUNTER.unpack_from(self._memory, at)[0] + number)

    def _grow(self, needed: int) -> None:
        """Move all counters to where there is room for twice as many."""
        self.hold(True)
        before, self._room = self._room, max(2 * self._room, needed, 64)
        for name in (_USAGE, *SA_ERRORS):
            moved = []
            for thread in range(self._threads):
                vector = self._allocate(self._room, _width(name))
                if before:
                    old = self._vectors[name][thread]
                    self._memory[vector : vector + before * _width(name)] = self._memory[
                        old : old + before * _width(name)
                    ]
                moved.append(vector)
            self._vectors[name] = moved
        self._directory = self._make_directory()
        self.hold(False)

    def _allocate(self, length: int, width: int) -> int:
        """Make a vector of zeroes and return where it begins. Raises MemoryError when the segment is full."""
        start = -(-(self._free + _VECTOR_HEADER_BYTES) // _ALIGN) * _ALIGN
        if start + length * width >= SIZE:
            raise MemoryError("the stats segment is full")
        _LENGTH.pack_into(self._memory, start - _VECTOR_HEADER_BYTES, length)
        self._free = start + length * width
        return start

    def _make_directory(self) -> int:
        entries = [(_SCALAR, 0, name) for name in _SYSTEM]
        for name, vectors in self._vectors.items():
            pointers = self._allocate(len(vectors), _COUNTER.size)
            for i, vector in enumerate(vectors):
                _COUNTER.pack_into(self._memory, pointers + _COUNTER.size * i, _BASE + vector)
            kind, path = (_COMBINED, name) if name == _USAGE else (_SIMPLE, f"{_USAGE}/err/{name}")
            entries.append((kind, _BASE + pointers, path))
        directory = self._allocate(len(entries), _ENTRY.size)
        for i, (kind, data, name) in enumerate(entries):
            _ENTRY.pack_into(self._memory, directory + _ENTRY.size * i, kind, data, name.encode())
        return directory


def _width(name: str) -> int:
    """Bytes of one element of a counter's vector."""
    return 2 * _COUNTER.size if name == _USAGE else _COUNTER.size


class StatsServer:
    """Hands the segment of a stand-in's world to whoever connects, and keeps its counters in step with the SAs."""

    def __init__(self, world: World, path: str, threads: int = 1) -> None:
        self.path = path
        self.segment = StatsSegment(threads)
        for held in world.sas.values():
            self.segment.start(held.stat_index)
        world.on_new_sa(self.segment.start)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def start(self) -> None:
        """Listen, within a running event loop. Raises OSError."""
        self._unlink()
        self._listener.bind(self.path)
        self._listener.listen()
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Stop listening; who has the segment mapped keeps it, as after VPP's end."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._unlink()
        self.segment.close()

    def _unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the client went away
            client, _ = self._listener.accept()
            with client:
                socket.send_fds(client, [b""], [self.segment.fd])
