"""No key, and no part of one, is in anything that the service says: logs, answers, exceptions, representations, files."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import json
import logging
import pprint
import tarfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vpp_papi.vpp_papi import VPPApiJSONFiles

from support import netlink_encode
from support.build import ENV, LOCAL, REMOTE, SHA256, make_policy, sa_in, sa_out
from support.lanwan import SETUP_CALLS, make_loopback
from support.netlink_kernel import WireKernel
from support.netns import in_new_netns
from support.recorded import PATIENCE_S
from support.secrets_in import leaks, secret
from vppipsec import cli, daemon
from vppipsec.conf.settings import NetlinkSettings, Settings, VppSettings
from vppipsec.kernel.netlink.wire import WireError
from vppipsec.kernel.xfrm.events import SaAdded, SaDeleted, SaExpired
from vppipsec.kernel.xfrm.recordings import decode_file
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import Algorithm
from vppipsec.kernel.xfrm.wire import decode_xfrm
from vppipsec.status.archive import write_archive
from vppipsec.status.server import StatusServer, ask
from vppipsec.status.summary import sa_view
from vppipsec.sync import engine as engine_module
from vppipsec.sync.actual.backoff import RefusedRequest
from vppipsec.sync.actual.vpp_state import TunnelState
from vppipsec.sync.apply import tunnels as apply_tunnels
from vppipsec.sync.desired.algorithms import Suite, suite_of
from vppipsec.sync.desired.tunnel import translate
from vppipsec.sync.engine import Engine
from vppipsec.sync.plan.tunnel import Plan
from vppipsec.sync.preview import dry_run
from vppipsec.vpp.algorithms import CryptoAlg
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.api.codec import Codec
from vppipsec.vpp.api.errors import VppIncompatible
from vppipsec.vpp.api.ipsec import SadEntryAdd
from vppipsec.vpp.guard import GuardError, check_sa
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel
from vppstandin.server import StandIn, definitions

pytestmark = pytest.mark.versions

GCM_KEY, CBC_KEY, HMAC_KEY, BAD_KEY = secret("gcm", 36), secret("cbc", 16), secret("hmac", 32), secret("bad", 33)
KEYS = (GCM_KEY, CBC_KEY, HMAC_KEY, BAD_KEY)
SALT = GCM_KEY[-4:]

GCM: dict[str, Any] = {"aead": Algorithm("rfc4106(gcm(aes))", GCM_KEY, 128)}
CBC: dict[str, Any] = {"aead": None, "crypt": Algorithm("cbc(aes)", CBC_KEY), "auth": SHA256._replace(key=HMAC_KEY)}
BAD: dict[str, Any] = {"aead": Algorithm("rfc4106(gcm(aes))", BAD_KEY, 128)}
SAS = [
    sa_in(1, 1, **GCM),
    sa_out(2, 1, **GCM),
    sa_in(3, 2, **CBC),
    sa_out(4, 2, **CBC),
    sa_in(5, 3, **BAD),
    sa_out(6, 3, **BAD),
]
POLICIES = [make_policy(dst=f"10.2.{reqid}.0/24", reqid=reqid, ends=(LOCAL, REMOTE)) for reqid in (1, 2, 3)]
REFUSED_SPI = 9


# That the search finds


@pytest.mark.parametrize(
    "text",
    [
        GCM_KEY.hex(),
        f"0X{GCM_KEY[3:9].hex().upper()}",
        GCM_KEY[:8].hex(":"),
        GCM_KEY[5:20].hex(" ").upper(),
        repr(GCM_KEY[10:20]),
        str(list(GCM_KEY[:6])),
        base64.b64encode(b"x" + GCM_KEY + b"yz").decode(),
        base64.urlsafe_b64encode(b"xy" + GCM_KEY).decode(),
        f"salt={int.from_bytes(SALT, 'big')}",
        f"salt={int.from_bytes(SALT, 'little')}",
    ],
)
def test_a_key_is_found_however_it_is_written(text: str) -> None:
    assert leaks(f"before {text} after", KEYS)
    assert not leaks(f"before {text} after", [secret("another", 36)])


# Values and exceptions


def values() -> Iterator[Any]:
    """Yield everything that holds a key, and what holds that."""
    model = KernelModel()
    model.replace(SAS[::-1], POLICIES)
    yield model
    yield from (
        Algorithm("cbc(aes)", CBC_KEY),
        *SAS,
        SaAdded(SAS[0]),
        SaDeleted(SAS[0].id, SAS[0]),
        SaExpired(SAS[0], True),
    )
    yield decode_xfrm(netlink_encode.del_sa(SAS[0]))
    for key, group in model.tunnels.items():
        yield group
        desired = translate(key, group, ENV)
        yield from (desired, desired.tunnel, *desired.decisions.values())
        for spec in (*desired.tunnel.inbound, *desired.tunnel.outbound) if desired.tunnel is not None else ():
            request, actual = SadEntryAdd(1, spec), ActualSa(spec, 1)
            tunnel = ActualTunnel(sas={1: actual})
            refusal = RefusedRequest("it says so", 1.0, 1.0)
            yield from (spec, request, actual, tunnel, Plan([request], True))
            state = TunnelState(desired, tunnel, ENV)
            state.refusals.update({spec: refusal, request: refusal})
            yield state
            yield state.refusals
            yield state.refusals.all
    yield from (suite_of(SAS[0], frozenset(CryptoAlg)), suite_of(SAS[2], frozenset(CryptoAlg)))
    yield Suite(CryptoAlg.AES_CBC_128, CBC_KEY, 0, integ_key=HMAC_KEY)


def test_no_value_shows_its_key() -> None:
    shown = [f(value) for value in values() for f in (repr, str, pprint.pformat, lambda v: f"{v} {[v]} {(v, {1: v})}")]
    assert len(shown) > 100
    assert leaks("\n".join(shown), KEYS) == []


def test_no_exception_tells_a_key() -> None:
    told = []
    for sa in SAS:
        for whole in (netlink_encode.new_sa(sa), netlink_encode.del_sa(sa), netlink_encode.expire_sa(sa, hard=True)):
            for place in range(4, len(whole), 3):
                broken = bytearray(whole)
                broken[place] ^= 0xFF
                for message in (
                    bytes(broken),
                    whole[:place],
                    len(whole[:place]).to_bytes(4, "little") + whole[4:place],
                ):
                    told += _complaints(WireError, decode_xfrm, message)
    spec = SadEntryAdd(1, next(v for v in values() if type(v).__name__ == "SaSpec")).sa
    for bent in (
        spec._replace(crypto_key=BAD_KEY),
        spec._replace(integ_key=HMAC_KEY),
        spec._replace(salt=1 << 32 | spec.salt),
        spec._replace(crypto=99),  # type: ignore[arg-type]  # hostile
        spec._replace(src=b""),
    ):
        assert _complaints(GuardError, check_sa, bent)
        told += _complaints(GuardError, check_sa, bent)
    for bent in (spec._replace(salt=1 << 32), spec._replace(crypto_key=BAD_KEY * 9)):
        told.append(_packing_error(bent))
    told += list(_unreadable_answers())
    assert len(told) > 1000
    assert leaks("\n".join(told), KEYS) == []


def _complaints(kind: type[Exception], function: Any, argument: Any) -> list[str]:
    try:
        function(argument)
    except kind as error:
        return [str(error), repr(error), "".join(traceback.format_exception(error))]
    return []


def _unreadable_answers() -> Iterator[str]:
    """Yield what is said of SAs in VPP's answers that are cut short, or that have letters which are none."""
    messages, _ = VPPApiJSONFiles.process_json_array_str(definitions())
    names = sorted(messages)
    codec = Codec(1, {f"{name}_{messages[name].crc[2:]}": number for number, name in enumerate(names)}, definitions())
    key = {"length": len(HMAC_KEY), "data": HMAC_KEY}
    entry = {"crypto_key": key, "integrity_key": key, "salt": int.from_bytes(SALT, "big")}
    details = bytes(messages["ipsec_sa_v5_details"].pack({"_vl_msg_id": 1, "context": 1, "entry": entry}))
    version = bytes(messages["show_version_reply"].pack({"_vl_msg_id": 1, "context": 1, "retval": 0}))
    for name, answer in (
        *(("ipsec_sa_v5_details", details[:size]) for size in range(len(details))),
        ("show_version_reply", version[:20] + HMAC_KEY),
    ):
        complaints = _complaints(VppIncompatible, lambda data, name=name: codec.unpack(name, data), answer)
        assert complaints or name == "ipsec_sa_v5_details"
        yield from complaints


def _packing_error(spec: Any) -> str:
    try:
        SadEntryAdd(1, spec).pack(1, 2, 3)
    except Exception as error:
        return "".join(traceback.format_exception(error))
    return ""


def test_decode_hides_keys_until_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "recorded.jsonl"
    lines = [netlink_encode.new_sa(sa) for sa in SAS] + [
        netlink_encode.del_sa(SAS[0]),
        netlink_encode.new_sa(SAS[0])[:-2],
        b"\x01" + GCM_KEY,
    ]
    records = [*(json.dumps({"hex": line.hex()}) for line in lines), f'{{"hex": "{GCM_KEY.hex()}x"}}', GCM_KEY.hex()]
    path.write_text("\n".join(records))
    hidden, shown = io.StringIO(), io.StringIO()
    decode_file(path, False, hidden)
    decode_file(path, True, shown)
    assert leaks(hidden.getvalue(), KEYS) == []
    assert hidden.getvalue().count("rfc4106(gcm(aes))") >= 5
    assert len({leak.split(" at ")[0] for leak in leaks(shown.getvalue(), KEYS)}) >= 4


# The service


class Ears(logging.Handler):
    """Hears everything that is logged, tracebacks included."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s %(funcName)s %(threadName)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what a log file would have, and what the record holds beside it."""
        self.lines += [self.format(record), repr(record.args), repr(record.msg)]


@contextlib.contextmanager
def hearing() -> Iterator[Ears]:
    """Log as the service does with `--log-level debug`, into ears; asyncio's debug messages too."""
    root, papi, ears = logging.getLogger(), logging.getLogger("vpp_papi"), Ears()
    levels = root.level, papi.level
    papi.setLevel(logging.NOTSET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(daemon, "_forbid_core_dumps", lambda: None)
        patch.setattr(daemon, "spare_collector", lambda: None)
        assert daemon.main(["--config", "/nonexistent", "--log-level", "debug"]) == 2  # it sets up logging first
    root.setLevel(logging.DEBUG)
    root.addHandler(ears)
    try:
        yield ears
    finally:
        root.removeHandler(ears)
        root.setLevel(levels[0])
        papi.setLevel(levels[1])


def refuse_one(name: str, request: Any) -> int | None:
    """Let VPP refuse the SA with one SPI."""
    return -7 if name == "ipsec_sad_entry_add_v2" and request.entry.spi == REFUSED_SPI else None


async def until(holds: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.01)


def shows(status_socket: str) -> Iterator[str]:
    """Yield what each `vpp-ipsec show` prints."""
    for what in ("sync", "sa", "policy", "tunnel", "events", "counters"):
        more: list[list[str]] = [[]]
        if what in ("sa", "counters"):
            more += [["--spi", "0x1"], ["--peer", "192.0.2.2"]]
        if what == "sa":
            more.append(["--detail"])
        for options, raw in itertools.product(more, ([], ["--raw"])):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert cli.main(["--socket", status_socket, "show", what, *options, *raw]) == 0
            yield out.getvalue()


def archived(path: Path) -> str:
    with tarfile.open(path) as archive:
        members = [archive.extractfile(member) for member in archive]
        return "\n".join(member.read().decode(errors="replace") for member in members if member is not None)


async def everything_said(directory: Path, said: list[str], patch: pytest.MonkeyPatch) -> None:
    """Run the service through good and bad times, and gather what it says."""
    asyncio.get_running_loop().slow_callback_duration = (
        0.0  # in debug mode asyncio then tells of everything that it runs
    )
    kernel = WireKernel()
    standin = StandIn(str(directory / "api.sock"), refuse_one)
    await standin.start()
    admin = await connect(standin.api_socket, "admin", also=SETUP_CALLS)
    await make_loopback(admin, "192.0.2.1/24")
    settings = Settings(
        vpp=VppSettings(standin.api_socket, str(directory / "none")), netlink=NetlinkSettings(batch_delay_ms=0)
    )
    engine = Engine(settings, kernel)
    status = StatusServer(engine, str(directory / "status.sock"))
    await status.start()
    work = asyncio.create_task(engine.run())
    kernel.add(*SAS, *POLICIES)
    said += await dry_run(settings, kernel)
    await until(lambda: engine.in_sync and engine.counters.events >= kernel.said)

    async def look() -> None:
        parts = (engine, engine.vpp, engine.environment, engine.steering, engine.vtis)
        said.extend(
            [
                repr(engine),
                *(repr(vars(it)) for it in parts),
                engine.vpp_problem,
                engine.kernel_problem,
                repr(engine.counters),
            ]
        )
        said.extend(await asyncio.to_thread(lambda: list(shows(status.path))))
        path = await asyncio.to_thread(write_archive, directory, lambda question: ask(status.path, question))
        said.append(archived(path))
        path.unlink()

    await look()
    refused = sa_out(REFUSED_SPI, 1, **GCM)
    kernel.add(refused)  # VPP refuses it
    await until(lambda: engine.counters.refusals)
    message = netlink_encode.new_sa(refused)
    for place in range(16, len(message), 5):  # malformed, with keys in it
        kernel.say(len(message[:place]).to_bytes(4, "little") + message[4:place], message[:place], message[place:])
    await until(lambda: kernel.malformed > 50)
    await look()

    def stumble(*arguments: object) -> None:
        raise RuntimeError(f"with {GCM_KEY.hex()}")

    patch.setattr(engine_module, "translate", stumble)  # a mistake of ours
    kernel.add(SAS[0])
    await until(lambda: any("a mistake in vpp-ipsecd" in row["reason"] for row in sa_view(engine)))
    await look()
    patch.undo()
    patch.setattr(apply_tunnels, "check_tunnel_request", _refuse)  # the guard
    kernel.add(*(sa._replace(spi=sa.spi + 0x100) for sa in SAS[:4]))
    await until(lambda: engine.counters.withheld)
    await look()
    patch.undo()
    await admin.close()
    await standin.stop()  # VPP dies
    await until(lambda: engine.vpp_problem)
    await look()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    said.append(repr(work))
    await status.stop()
    kernel.close()


def _refuse(request: object, *arguments: object) -> None:
    if isinstance(request, SadEntryAdd):
        raise GuardError("it is held back")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "by-vpp_papi"])
def test_nothing_that_the_service_says_has_a_key_in_it(tmp_path: Path, packed: bool) -> None:
    said: list[str] = []

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as slow:
            if not packed:  # as with a VPP that lays its messages out in another way
                slow.setattr(Codec, "_packed_form_fits", lambda *arguments: False)
            asyncio.run(asyncio.wait_for(everything_said(tmp_path, said, patch), PATIENCE_S), debug=True)

    with hearing() as ears:
        in_new_netns(work)
    text = "\n".join(said + ears.lines)
    assert leaks(text, KEYS) == []
    provoked = ("INVALID_VALUE (-7)", "it is held back", "left out a netlink message", "RuntimeError")
    for expected in ("rfc4106(gcm(aes)) 256/128", "add outbound SA", *provoked):
        assert expected in text
    assert any("Executing" in line for line in ears.lines)  # asyncio told what ran
