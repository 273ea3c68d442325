"""Benchmark: set-up and rekey of many tunnels, from netlink bytes to VPP's last answer, compared with the floor.

The *floor* is the time that VPP itself needs. It replays the engine's recorded requests to a fresh VPP, over a plain socket, with
as many requests in flight. Both are measured in one run, so that their ratio is meaningful.

    VPP_BIN=/path/to/vpp python bench/run.py [--tunnels 100,1000,10000] [--repeat 3] [--standin]

Engine and floor are repeated in turn, and the fastest run of each counts. That excludes other load on the machine. The service's
batch delay, a setting of the operator, is 0 here.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests")]

from support.lanwan import SETUP_CALLS, make_loopback  # noqa: E402  # after the path
from vppipsec.conf.settings import RX_BUFFER_SIZE, NetlinkSettings, Settings, VppSettings  # noqa: E402  # after the path
from vppipsec.daemon import spare_collector  # noqa: E402  # likewise
from vppipsec.kernel.xfrm.socket import XfrmSocket  # noqa: E402  # likewise
from vppipsec.kernel.xfrm.values import Policy, Sa  # noqa: E402  # likewise
from vppipsec.status.summary import sync_view  # noqa: E402  # likewise
from vppipsec.sync.engine import Engine  # noqa: E402  # likewise
from vppipsec.vpp.api.client import MAX_IN_FLIGHT, Reply, VppClient, connect  # noqa: E402  # likewise
from vppipsec.vpp.api.request import Request  # noqa: E402  # likewise

LOCAL = bytes((10, 0, 0, 1))
_INF = (1 << 64) - 1
_NOW = int(time.time()) + 3600  # the SAs are younger than any VPP that is started for them
_NETLINK_USERSOCK = 2
_FRAME = struct.Struct(">QII")


# Netlink messages that the kernel sends for strongSwan's SAs and policies (include/uapi/linux/xfrm.h)


def _attr(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def _message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def _selector(dst: bytes, src: bytes, length: int) -> bytes:
    return dst.ljust(16, b"\0") + src.ljust(16, b"\0") + bytes(8) + struct.pack("=HBBB3xII", 2, length, length, 0, 0, 0)


def _limits() -> bytes:
    return struct.pack("=8Q", _INF, _INF, _INF, _INF, 0, 3600, 0, 0)


def _sa_info(src: bytes, dst: bytes, spi: int, reqid: int) -> bytes:
    body = _selector(bytes(4), bytes(4), 0) + dst.ljust(16, b"\0") + struct.pack(">I", spi) + struct.pack("=B3x", 50)
    body += src.ljust(16, b"\0") + _limits() + struct.pack("=4Q", 0, 0, _NOW, 0)
    return body + struct.pack("=IIIIIHBBB7x", 0, 0, 0, 0, reqid, 2, 1, 32 if dst == LOCAL else 0, 32)


def sa_message(src: bytes, dst: bytes, spi: int, reqid: int, updated: bool) -> bytes:
    """Return NEWSA or UPDSA of an AES-GCM-256 SA."""
    key = spi.to_bytes(4, "big") * 9
    algorithm = b"rfc4106(gcm(aes))".ljust(64, b"\0") + struct.pack("=II", 8 * len(key), 128) + key
    attributes = _attr(18, algorithm) + _attr(10, bytes(12))
    return _message(0x1A if updated else 0x10, _sa_info(src, dst, spi, reqid) + attributes)


def del_sa_message(src: bytes, dst: bytes, spi: int, reqid: int) -> bytes:
    """Return DELSA, which carries the deleted SA."""
    identity = dst.ljust(16, b"\0") + struct.pack(">I", spi) + struct.pack("=HBx", 2, 50)
    return _message(0x11, identity + _attr(6, _sa_info(src, dst, spi, reqid)))


def policy_message(direction: int, src_net: bytes, dst_net: bytes, src: bytes, dst: bytes, reqid: int) -> bytes:
    """Return NEWPOLICY with one tunnel mode template."""
    body = _selector(dst_net, src_net, 30) + _limits() + struct.pack("=4Q", 0, 0, _NOW, 0)
    body += struct.pack("=IIBBBB4x", 367_231, 0, direction, 0, 0, 0)
    template = dst.ljust(16, b"\0") + bytes(4) + struct.pack("=B3xH2x", 50, 2) + src.ljust(16, b"\0")
    template += struct.pack("=IBBBxIII", reqid, 1, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return _message(0x13, body + _attr(5, template))


def set_up(tunnel: int) -> list[bytes]:
    """Return the kernel's messages when a tunnel comes up."""
    remote, reqid = _remote(tunnel), tunnel + 1
    near, far = _net(20, tunnel), _net(40, tunnel)
    return [
        sa_message(remote, LOCAL, 0xC0000000 + tunnel, reqid, True),
        sa_message(LOCAL, remote, 0xD0000000 + tunnel, reqid, False),
        policy_message(0, far, near, remote, LOCAL, reqid),
        policy_message(2, far, near, remote, LOCAL, reqid),
        policy_message(1, near, far, LOCAL, remote, reqid),
    ]


def rekey(tunnel: int) -> list[bytes]:
    """Return the kernel's messages when a tunnel is rekeyed, including the deletion of the old SAs."""
    remote, reqid = _remote(tunnel), tunnel + 1
    return [
        sa_message(remote, LOCAL, 0xE0000000 + tunnel, reqid, True),
        sa_message(LOCAL, remote, 0xF0000000 + tunnel, reqid, False),
        del_sa_message(LOCAL, remote, 0xD0000000 + tunnel, reqid),
        del_sa_message(remote, LOCAL, 0xC0000000 + tunnel, reqid),
    ]


def _remote(tunnel: int) -> bytes:
    return (0x0A640000 + tunnel + 1).to_bytes(4, "big")


def _net(first: int, tunnel: int) -> bytes:
    return ((first << 24) + 4 * tunnel).to_bytes(4, "big")


# Kernel and VPP


class Kernel(XfrmSocket):
    """A fake kernel that starts empty and sends netlink messages, from another process over NETLINK_USERSOCK."""

    def __init__(self) -> None:
        ear, self.mouth = (socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_USERSOCK) for _ in range(2))
        ear.bind((0, 0))
        super().__init__(RX_BUFFER_SIZE.default, ear)
        self.mouth.connect((self.port_id, 0))

    async def dump_sas(self) -> list[Sa]:
        return []

    async def dump_policies(self) -> list[Policy]:
        return []

    def say(self, messages: Iterable[bytes]) -> None:
        """Put messages into the receive buffer. A child process makes them, so that this process's memory does not grow."""
        number = os.fork()
        if number == 0:
            status = 1
            with contextlib.suppress(OSError):
                self.mouth.setblocking(False)
                for message in messages:
                    self.mouth.send(message)
                status = 0
            os._exit(status)
        if os.waitpid(number, 0)[1]:
            raise SystemExit("the receive buffer does not hold the burst")


class Recorder:
    """Records a client's requests, by phase."""

    def __init__(self) -> None:
        self.phases: list[list[bytes]] = []
        self.client: VppClient | None = None

    async def connect(self, path: str, **arguments: object) -> VppClient:
        client = await connect(path, **arguments)  # type: ignore[arg-type]  # passes through what the engine gives
        self.client = client
        plain = client.run
        self.phases.append([])  # requests before the first phase

        async def run(requests: list[Request]) -> list[Reply]:
            self.phases[-1] += [client.codec.pack(request, 0) for request in requests]
            return await plain(requests)

        client.run = run  # type: ignore[method-assign, assignment]  # records, then runs
        return client


@contextlib.contextmanager
def vpp(standin: bool) -> Iterator[str]:
    """Start VPP or the stand-in, and yield its API socket."""
    if not standin:
        from support.vpp_box import VppBox

        with VppBox("3G") as box:
            yield box.api_socket
        return
    from support.vpp_box import listens, start_standin

    with tempfile.TemporaryDirectory(prefix="standin-") as directory:
        path = f"{directory}/api.sock"
        process = start_standin(path)
        try:
            if not listens(path, 20, lambda: process.poll() is None):
                raise SystemExit("the stand-in does not start")
            yield path
        finally:
            process.terminate()
            process.wait(10)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "python")}


async def prepare(path: str) -> None:
    """Add a WAN interface to VPP that has the local address and reaches every peer."""
    client = await connect(path, "bench", also=SETUP_CALLS)
    await make_loopback(client, "10.0.0.1/8")
    await client.close()


async def measure(path: str, tunnels: int, recorder: Recorder | None) -> dict[str, float]:
    """Set up and rekey `tunnels` tunnels, and return seconds, memory in MiB and requests a tunnel."""
    await prepare(path)
    kernel = Kernel()
    settings = Settings(vpp=VppSettings(api_socket=path), netlink=NetlinkSettings(batch_delay_ms=0))
    engine = Engine(settings, kernel, recorder.connect) if recorder is not None else Engine(settings, kernel)
    work = asyncio.create_task(engine.run())
    await asyncio.wait_for(engine.wait_in_sync(), 60)
    result: dict[str, float] = {}
    for name, make in (("setup", set_up), ("rekey", rekey)):
        messages = (message for tunnel in range(tunnels) for message in make(tunnel))
        if recorder is not None:
            recorder.phases.append([])
        sent = sync_view(engine)["requests"]
        expected = engine.counters.events + tunnels * len(make(0))
        kernel.say(messages)  # the engine reads nothing meanwhile: this call blocks the event loop
        start = time.perf_counter()
        while engine.counters.events < expected:  # noqa: ASYNC110  # the engine has no event for this
            await asyncio.sleep(0.001)
        await asyncio.wait_for(engine.wait_in_sync(), 600)
        result[name] = time.perf_counter() - start
        view = sync_view(engine)
        result[f"{name} requests a tunnel"] = (view["requests"] - sent) / tunnels
        if view["counts"]["synced"] != 2 * tunnels or view["vpp"]["sas"] != 2 * tunnels:
            raise SystemExit(f"not converged: {view}")
    result["memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    kernel.close()
    return result


async def floor(path: str, phases: list[list[bytes]]) -> list[float]:
    """Replay recorded requests over a plain socket, with as many in flight, and return the seconds of each phase."""
    await prepare(path)
    client = await connect(path, "floor")  # only for its client index and the FIB source
    from vppipsec.vpp import inventory

    await inventory.read_inventory(client, lambda tag: False, 0, 0)
    await client.call("want_interface_events", {"enable_disable": 1, "pid": 0})
    index = client.codec.client_index.to_bytes(4, "big")
    reader, writer = client._transport.get_extra_info("socket"), client._transport  # type: ignore[union-attr]  # it is connected
    plain = socket.socket(fileno=os.dup(reader.fileno()))
    writer.pause_reading()
    plain.setblocking(True)
    seconds = []
    for phase in phases:
        frames = [_FRAME.pack(0, len(m), 0) + m[:2] + index + m[6:] for m in phase]
        start = time.perf_counter()
        await asyncio.to_thread(_exchange, plain, frames)
        seconds.append(time.perf_counter() - start)
    plain.close()
    writer.abort()
    return seconds


def _exchange(plain: socket.socket, frames: list[bytes]) -> None:
    sent = answered = 0
    buffer = bytearray()
    while answered < len(frames):
        if sent - answered <= MAX_IN_FLIGHT // 2 and sent < len(frames):
            portion = frames[sent : sent + MAX_IN_FLIGHT - (sent - answered)]
            plain.sendall(b"".join(portion))
            sent += len(portion)
        buffer += plain.recv(1 << 18)
        offset = 0
        while len(buffer) - offset >= _FRAME.size:
            end = offset + _FRAME.size + _FRAME.unpack_from(buffer, offset)[1]
            if end > len(buffer):
                break
            # a reply carries retval behind message number and context; an event there carries something else
            answered += buffer[offset + 18 : offset + 22] == b"\0\0\0\0"
            offset = end
        del buffer[:offset]


def child(arguments: argparse.Namespace) -> None:
    """Measure one number of tunnels in this process, so that its memory is for that number alone, and print JSON."""
    tunnels = int(arguments.child)
    spare_collector()
    recorder = Recorder() if arguments.record else None
    with vpp(arguments.standin) as path:
        result = asyncio.run(measure(path, tunnels, recorder))
    if recorder is not None:
        with vpp(arguments.standin) as path:
            result["setup floor"], result["rekey floor"] = asyncio.run(floor(path, recorder.phases[-2:]))
    print(json.dumps(result))


def main() -> None:
    """Measure each number of tunnels and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tunnels", default="100,1000,10000")
    parser.add_argument("--standin", action="store_true", help="measure with the stand-in, whose floor says little")
    parser.add_argument("--repeat", type=int, default=3, help="how often each size is measured; the fastest counts")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--record", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    arguments.standin |= "VPP_BIN" not in os.environ
    print(f"with {'the stand-in' if arguments.standin else os.environ['VPP_BIN']}")
    print("tunnels  phase      s   floor s  ratio  us/tunnel  requests/tunnel  memory MiB")
    for tunnels in arguments.tunnels.split(","):
        runs = [[_run(arguments, tunnels, record) for record in (False, True)] for _ in range(arguments.repeat)]
        plain = runs[0][0]
        for phase in ("setup", "rekey"):
            seconds = min(run[phase] for run, _ in runs)
            lowest = min(recorded[f"{phase} floor"] for _, recorded in runs)
            print(
                f"{tunnels:>7}  {phase:5}  {seconds:6.3f}  {lowest:7.3f}  {seconds / lowest:5.2f}  "
                f"{1e6 * seconds / int(tunnels):9.0f}  {plain[f'{phase} requests a tunnel']:15.2f}  {plain['memory MiB']:10.0f}"
            )


def _run(arguments: argparse.Namespace, tunnels: str, record: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", tunnels]
    command += ["--standin"] * arguments.standin + ["--record"] * record
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
