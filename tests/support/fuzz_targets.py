"""Fuzz targets: each takes bytes, and raises if they cause something that no bytes may cause.

TARGETS has for each a context in which it can be called repeatedly, so it accumulates nothing, and the fuzzer's seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vpp_papi.vpp_papi import VPPApiJSONFiles

from support import netlink_encode
from support.build import ENV, LOCAL, REMOTE, make_policy, sa_in, sa_out
from support.fake_kernel import FakeKernel
from support.hostile import Flood
from support.lanwan import SETUP_CALLS, make_loopback
from support.recorded import data_directory
from vppipsec.conf.settings import Settings, VppSettings
from vppipsec.kernel.netlink.wire import HEADER, WireError, messages_in
from vppipsec.kernel.xfrm.events import Event
from vppipsec.kernel.xfrm.recordings import records
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import Algorithm
from vppipsec.kernel.xfrm.wire import decode_xfrm
from vppipsec.status.server import StatusServer
from vppipsec.sync.desired.tunnel import translate
from vppipsec.sync.engine import Engine
from vppipsec.vpp.api.client import VppClient, connect
from vppipsec.vpp.api.codec import Codec
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.api.ip import RouteLookup
from vppipsec.vpp.api.ipsec import IpsecItfCreate
from vppipsec.vpp.guard import check_sa
from vppstandin.server import StandIn, definitions

Target = Callable[[bytes], None]


# The kernel's messages


@contextlib.contextmanager
def wire() -> Iterator[Target]:
    """From a datagram to VPP's requests: only WireError may be raised, and the guard must have nothing to withhold."""

    def run(data: bytes) -> None:
        follow(_events(data))
        if len(data) >= HEADER.size:
            follow(_events(struct.pack("=I", len(data)) + data[4:]))  # as one message with a valid header
        for _ in records([json.dumps({"hex": data.hex()})], show_keys=True):
            pass

    yield run


def _events(data: bytes) -> Iterator[Event]:
    messages = messages_in(data)
    while True:
        try:
            message = next(messages, None)
        except WireError:
            return
        if message is None:
            return
        with contextlib.suppress(WireError):
            decode_xfrm(message, last_words=False)
            yield decode_xfrm(message)


def follow(events: Iterable[Event]) -> None:
    """Apply events to a model, and check the desired state of its tunnels."""
    model = KernelModel()
    for event in events:
        for key in model.apply(event):
            group = model.tunnels.get(key)
            tunnel = translate(key, group, ENV).tunnel if group is not None else None
            for spec in (*tunnel.inbound, *tunnel.outbound) if tunnel is not None else ():
                check_sa(spec)


def wire_seeds() -> Iterator[bytes]:
    """Yield recorded messages where they are available, and some generated ones."""
    recorded = data_directory() / "xfrm"
    for path in sorted(recorded.glob("*.jsonl")) if recorded.is_dir() else ():
        for line in path.read_text().splitlines():
            yield bytes.fromhex(json.loads(line)["hex"])
    yield from (
        netlink_encode.new_sa(sa_in(1)),
        netlink_encode.del_sa(sa_out(2)),
        netlink_encode.new_policy(make_policy()),
        netlink_encode.flush_sas(),
    )
    yield (
        netlink_encode.new_sa(sa_in(1))
        + netlink_encode.new_sa(sa_out(2), updated=True)
        + netlink_encode.new_policy(make_policy())
    )
    yield from (told.message for told in itertools.islice(Flood(1).told(), 300))


# The status socket


class Writer:
    """Receives an answer, as asyncio's StreamWriter would."""

    def __init__(self) -> None:
        self.taken = bytearray()

    def write(self, data: bytes) -> None:
        self.taken += data

    async def drain(self) -> None:
        """Return at once."""


@contextlib.contextmanager
def status() -> Iterator[Target]:
    """From a line on the status socket to its answer: one line of JSON with an answer or an error, and without a key."""
    key = KEY.hex()

    async def ask(data: bytes) -> bytes:
        reader, writer = asyncio.StreamReader(limit=4096), Writer()
        reader.feed_data(data)
        reader.feed_eof()
        await server._send(writer, await server._answer(reader))  # type: ignore[arg-type]  # it implements the used part
        return bytes(writer.taken)

    with asyncio.Runner() as runner:
        context = status_server()
        server = runner.run(context.__aenter__())

        def run(data: bytes) -> None:
            text = runner.run(ask(data)).decode()
            assert text.endswith("\n")
            assert "\n" not in text[:-1]
            assert json.loads(text).keys() in ({"answer"}, {"error"})
            assert key not in text

        yield run
        runner.run(context.__aexit__(None, None, None))


KEY = bytes(range(100, 136))
"""Key of the SAs that the status socket is asked about."""


@contextlib.asynccontextmanager
async def status_server() -> AsyncIterator[StatusServer]:
    """Provide a server whose engine has put some tunnels into the stand-in and does not run."""
    kernel = FakeKernel()
    algorithm = Algorithm("rfc4106(gcm(aes))", KEY, 128)
    for reqid in (1, 2, 3):
        kernel.add(sa_in(reqid, reqid, aead=algorithm), sa_out(reqid + 100, reqid, aead=algorithm))
        kernel.add(make_policy(dst=f"10.2.{reqid}.0/24", reqid=reqid, ends=(LOCAL, REMOTE)))
    kernel.add(sa_in(50, 9, mode=0, limits=sa_in(1).limits._replace(hard_bytes=1 << 63)))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        standin = StandIn(f"{directory}/api.sock")
        await standin.start()
        admin = await connect(standin.api_socket, "admin", also=SETUP_CALLS)
        await make_loopback(admin, "192.0.2.1/24")
        engine = Engine(Settings(vpp=VppSettings(standin.api_socket, f"{directory}/none")), kernel)
        engine.model.replace(await kernel.dump_sas(), await kernel.dump_policies())
        client = await connect(standin.api_socket, "fuzz")
        await engine.adopt_vpp(client)
        await engine.reconcile(client)
        engine.client, engine.vpp_problem = client, ""
        assert sum(state.actual.protection is not None for state in engine.tunnels.values()) == 3
        yield StatusServer(engine, f"{directory}/status.sock")
        for connection in (admin, client):
            await connection.close()
        await standin.stop()


def status_seeds() -> Iterator[bytes]:
    """Yield questions."""
    for name in ("sync", "sa", "policy", "tunnel", "events", "counters"):
        yield json.dumps({"ask": f"show {name}"}).encode() + b"\n"
        yield json.dumps({"ask": f"show {name}", "peer": "192.0.2.2", "spi": 1, "detail": True}).encode() + b"\n"
    yield b'{"ask": "reset sync"}\n'
    yield b'{"ask": "show sa", "peer": "2001:db8::1%1", "spi": null, "detail": false}'
    yield from (b"", b"\n", b"[]\n", b"{}\n", b'{"ask": 1}\n', b"\xff\xfe\n", b"[" * 3000 + b"\n", b"1e999\n", b"NaN\n")
    yield b'{"ask": "show sa", "spi": 4294967296}\n' + b"{}\n"


# VPP's answers


class Transport(asyncio.Transport):
    """Receives what a client sends."""

    def __init__(self) -> None:
        super().__init__()
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Discard the data."""

    def is_closing(self) -> bool:
        """Return whether the client gave up."""
        return self._closing

    def abort(self) -> None:
        """Record that the client gave up."""
        self._closing = True


@contextlib.contextmanager
def vpp() -> Iterator[Target]:
    """From VPP's bytes to a client that waits for a batch, a call and a dump: all end, at worst with a VppError."""
    messages, _ = VPPApiJSONFiles.process_json_array_str(definitions())
    ids = {name: 15 + number for number, name in enumerate(sorted(messages))}
    table = {f"{name}_{messages[name].crc[2:]}": number for name, number in ids.items()}
    codec = Codec(1, table, definitions())

    async def ask(data: bytes) -> None:
        client, transport = VppClient(lambda index: None), Transport()
        client.connection_made(transport)
        client._codec = codec
        waiting = [
            asyncio.ensure_future(
                client.run([IpsecItfCreate(1), RouteLookup(bytes(4)), IpsecItfCreate(2)])
            ),  # contexts 1 to 3
            asyncio.ensure_future(client.call("show_version")),  # 4
            asyncio.ensure_future(client.dump("ipsec_sa_v5_dump")),  # 5
        ]
        await asyncio.sleep(0)
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            if not transport.is_closing():
                client.data_received(part)
                await asyncio.sleep(0)
        client.connection_lost(None)
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, VppError):
                raise outcome

    with asyncio.Runner() as runner:
        yield lambda data: runner.run(ask(data))


def vpp_seeds() -> Iterator[bytes]:
    """Yield answers as VPP would send them, in its order and in others."""
    messages, _ = VPPApiJSONFiles.process_json_array_str(definitions())
    ids = {name: 15 + number for number, name in enumerate(sorted(messages))}

    def frame(name: str, context: int, **fields: Any) -> bytes:
        packed = bytes(messages[name].pack({"_vl_msg_id": ids[name], "context": context, "retval": 0, **fields}))
        return struct.pack(">QII", 0, len(packed), 0) + packed

    made = [frame("ipsec_itf_create_reply", number, sw_if_index=7) for number in (1, 3)]
    route = {"route": {"paths": [], "n_paths": 0, "prefix": {"address": {"af": 0, "un": {"ip4": bytes(4)}}, "len": 0}}}
    looked_up = frame("ip_route_lookup_v2_reply", 2, **route)
    version = frame("show_version_reply", 4, program="vpe", version="1", build_date="", build_directory="")
    details = frame("ipsec_sa_v5_details", 5)
    ping = frame("control_ping_reply", 5, client_index=1, vpe_pid=1)
    yield made[0] + looked_up + made[1] + version + details * 2 + ping
    yield from (*made, looked_up, version, details, ping, version + ping, details[:60], made[0] * 3)
    yield frame("ipsec_itf_create_reply", 1, retval=-31, sw_if_index=0) + version


TARGETS: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[Target]], Callable[[], Iterator[bytes]]]] = {
    "wire": (wire, wire_seeds),
    "status": (status, status_seeds),
    "vpp": (vpp, vpp_seeds),
}


def write_seeds(name: str, directory: Path) -> int:
    """Write a target's seeds into a directory, each once, and return their number."""
    seeds = dict.fromkeys(TARGETS[name][1]())
    for number, seed in enumerate(seeds):
        (directory / f"{number:04}").write_bytes(seed)
    return len(seeds)
