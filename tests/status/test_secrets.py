"""No key comes out: not in text or raw status, the journal, a log line at any level, nor an exception, whatever goes wrong."""

from __future__ import annotations

import io
import json
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from support.build import GCM, make_policy, sa_in, sa_out
from support.rig import Rig
from support.status_rig import Asker, play_asking, until
from vppipsec.kernel.xfrm.values import Algorithm, Sa
from vppipsec.status.text import TEXTS, sa_detail_text
from vppipsec.sync import engine as engine_module
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.api.ipsec import SadEntryAdd
from vppipsec.vpp.guard import GuardError, check_tunnel_request
from vppipsec.vpp.state.tunnels import ActualTunnel

GCM_KEY = bytes(range(0x90, 0xB4))
CBC_KEY = bytes(range(0xB4, 0xC4))
AUTH_KEY = bytes(range(0xC4, 0xE4))
KEYS = (GCM_KEY, CBC_KEY, AUTH_KEY)

AEAD = GCM._replace(key=GCM_KEY)
CIPHER, INTEGRITY = Algorithm("cbc(aes)", CBC_KEY), Algorithm("hmac(sha256)", AUTH_KEY, 128)


def tellings(key: bytes) -> list[str]:
    """Return how parts of a key, of 6 bytes each, might show in text."""
    pieces = [key[i : i + 6] for i in range(0, len(key) - 5)]
    told = [piece.hex() for piece in pieces] + [repr(piece)[2:-1] for piece in pieces]
    told += [str(list(piece))[1:-1] for piece in pieces] + [piece.hex(":") for piece in pieces]
    return told + [str(int.from_bytes(key[-4:], order)) for order in ("big", "little")]


def leaks(text: str) -> list[str]:
    lowered = text.lower()
    return [told for key in KEYS for told in tellings(key) if told.lower() in lowered]


@pytest.mark.parametrize("shown", [GCM_KEY.hex(), repr(AUTH_KEY), str(list(CBC_KEY)), CBC_KEY.hex(":")])
def test_the_search_finds_keys(shown: str) -> None:
    assert leaks(f"key {shown.upper() if shown.isalnum() else shown}")


async def everything(asking: Asker) -> str:
    """Return all that can be asked for, raw and as text."""
    told = io.StringIO()
    for what, text in TEXTS.items():
        answer = await asking.ask(f"show {what}")
        print(json.dumps(answer), text(answer), file=told)
    answer = await asking.ask("show sa", detail=True)
    print(json.dumps(answer), sa_detail_text(answer), file=told)
    return told.getvalue()


def add_everything(rig: Rig) -> None:
    """Add tunnels that VPP carries, and SAs that it cannot."""
    plain: dict[str, Any] = {"aead": None, "crypt": CIPHER, "auth": INTEGRITY}
    rig.kernel.add(sa_in(0xC1, aead=AEAD), sa_out(0xD1, aead=AEAD), make_policy())
    rig.kernel.add(sa_in(0xC2, 2, **plain), sa_out(0xD2, 2, **plain), make_policy(reqid=2, dst="10.3.0.0/24"))
    short = AEAD._replace(key=GCM_KEY[:19])
    rig.kernel.add(sa_in(0xC3, 3, aead=short), sa_out(0xD3, 3, aead=short), make_policy(reqid=3, dst="10.4.0.0/24"))
    unknown = {"aead": None, "crypt": Algorithm("cbc(camellia)", CBC_KEY), "auth": INTEGRITY}
    rig.kernel.add(sa_in(0xC4, 4, **unknown), sa_out(0xD4, 4, **unknown))


def refuse_sas(name: str, request: Any) -> int | None:
    return -156 if name == "ipsec_sad_entry_add_v2" and request.entry.spi == 0xD2 else None


def test_no_key_in_status_and_logs_through_set_up_refusal_and_rekey(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("vpp_papi").setLevel(
        logging.WARNING
    )  # as the service does: its debug messages print what it packs

    async def story(rig: Rig, asking: Asker) -> None:
        add_everything(rig)
        await until(
            lambda: rig.engine.counters.refusals > 0 and not rig.engine.queue_length and not rig.engine._is_working
        )
        told = await everything(asking)
        rig.kernel.add(sa_in(0xE1, aead=AEAD), sa_out(0xF1, aead=AEAD))
        rig.kernel.delete(sa_out(0xD1, aead=AEAD))
        await until(
            lambda: not rig.engine.queue_length and not rig.engine._is_working and rig.engine.model.sa_count == 9
        )
        told += await everything(asking)
        for state in ("synced", "refused", "unsupported"):
            assert state in told
        assert leaks(told) == []
        assert leaks(repr(rig.engine.tunnels) + repr(rig.engine.model.sas())) == []

    play_asking("standin", story, refuse_sas)
    assert "KEY_LENGTH" in caplog.text
    assert leaks(caplog.text) == []


def test_no_key_where_our_own_code_stumbles(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("vpp_papi").setLevel(logging.WARNING)

    def stumble(key: Any, tunnel: Any, *_: Any) -> Any:
        raise ValueError(f"{[bytes(sa.aead.key) for sa in tunnel.sas.values()]}")

    async def story(rig: Rig, asking: Asker) -> None:
        monkeypatch.setattr(engine_module, "translate", stumble)
        rig.kernel.add(sa_in(0xC1, aead=AEAD), sa_out(0xD1, aead=AEAD), make_policy())
        await until(
            lambda: rig.engine.model.sa_count == 2 and not rig.engine.queue_length and not rig.engine._is_working
        )
        await until(lambda: len(rig.engine.tunnels) == 1)
        told = await everything(asking)
        assert "unsupported: a mistake in vpp-ipsecd: ValueError" in told
        assert leaks(told) == []
        monkeypatch.undo()

    play_asking("standin", story)
    assert "a tunnel cannot be translated: ValueError" in caplog.text
    assert leaks(caplog.text) == []


def wrong_length() -> None:
    spec = SadEntryAdd(1, _spec()._replace(crypto_key=GCM_KEY[:31]))
    check_tunnel_request(spec, ActualTunnel(), frozenset())


def wrong_place() -> None:
    sa_in(0xC1, aead=AEAD)._replace(whatever=AEAD)


def wrong_type() -> None:
    SadEntryAdd(1, _spec()).pack("not a header")  # type: ignore[call-arg]  # the mistake under test


def _spec() -> Any:
    from support.tunnel_states import group, spec_of

    return spec_of(group((sa_in(1, aead=AEAD), sa_out(2, aead=AEAD))), 1)


@pytest.mark.parametrize("mistake", [wrong_length, wrong_place, wrong_type])
def test_no_key_in_exceptions_about_what_has_keys(mistake: Callable[[], None]) -> None:
    with pytest.raises((GuardError, VppError, ValueError, TypeError)) as failure:
        mistake()
    assert leaks("".join(traceback.format_exception(failure.value)) + repr(failure.value)) == []


def test_no_key_in_how_values_show_themselves() -> None:
    sa: Sa = sa_in(1, aead=AEAD, crypt=CIPHER, auth=INTEGRITY)
    shown = f"{sa!r} {sa} {_spec()!r} {_spec()} {SadEntryAdd(1, _spec())!r} {AEAD} {[CIPHER]} {(INTEGRITY,)}"
    assert "rfc4106" in shown
    assert leaks(shown) == []
