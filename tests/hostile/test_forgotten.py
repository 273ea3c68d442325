"""When an SA is gone from kernel and VPP, nothing that lives in the service still holds its key."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support import netlink_encode
from support.build import LOCAL, REMOTE, make_policy, sa_in, sa_out
from support.netlink_kernel import WireKernel
from support.netlink_rig import WireRig, play, wire_kernel
from support.secrets_in import secret
from vppipsec.conf.settings import NetlinkSettings
from vppipsec.kernel.xfrm.values import Algorithm, Sa


def holders(*keys: bytes) -> list[list[str]]:
    """Return for each key the types of live containers that hold bytes in which it, or the cipher key before its salt, is."""
    own = {id(key) for key in keys}
    found: list[list[str]] = [[] for _ in keys]
    gc.collect()
    for thing in gc.get_objects():
        parts = [*_bytes_in(thing, own)]
        for key, types in zip(keys, found, strict=True):
            if any(key[:-4] in part for part in parts):
                types.append(type(thing).__name__)
    return found


def _bytes_in(thing: Any, own: set[int]) -> Iterator[bytes]:
    """Yield bytes that a container refers to, those in plain tuples included, which the collector may not track."""
    for inner in gc.get_referents(thing):
        if isinstance(inner, bytes | bytearray) and id(inner) not in own:
            yield bytes(inner)
        elif type(inner) is tuple and not gc.is_tracked(inner):
            yield from _bytes_in(inner, own)


def pair(name: str, spi: int, reqid: int) -> list[Sa]:
    """Return SAs with keys of their own."""
    keys = [Algorithm("rfc4106(gcm(aes))", secret(f"{name} {way}", 36), 128) for way in ("in", "out")]
    return [sa_in(spi, reqid, aead=keys[0]), sa_out(spi + 1, reqid, aead=keys[1])]


def delete(kernel: WireKernel, sas: list[Sa]) -> None:
    kernel.delete(*sas)


def rekey(kernel: WireKernel, sas: list[Sa]) -> None:
    kernel.add(*pair("new", 0x200, sas[0].reqid))
    kernel.delete(*sas)


def flush(kernel: WireKernel, sas: list[Sa]) -> None:
    kernel.flush()


def expire(kernel: WireKernel, sas: list[Sa]) -> None:
    kernel.forget(*sas)
    kernel.say(*(netlink_encode.expire_sa(sa, hard=True) for sa in sas))


@pytest.mark.parametrize("dumped", [False, True], ids=["told-by-events", "read-in-a-dump"])
@pytest.mark.parametrize("end", [delete, rekey, flush, expire], ids=lambda end: end.__name__)
def test_nothing_alive_holds_the_key_of_an_sa_that_is_gone(
    end: Callable[[WireKernel, list[Sa]], None], dumped: bool
) -> None:
    async def story(rig: WireRig) -> None:
        kernel = wire_kernel(rig)
        for reqid in (1, 2):
            kernel.add(make_policy(dst=f"10.2.{reqid}.0/24", reqid=reqid, ends=(LOCAL, REMOTE)))
        kernel.add(*pair("other", 0x300, 2), *pair("old", 0x100, 1))
        rig.start()
        await rig.until(lambda: rig.engine.in_sync and rig.engine.counters.events >= kernel.said)
        if dumped:
            rig.engine.request_resync()
            await rig.resynced(rig.engine.counters.resyncs)
        keys = [secret(f"old {way}", 36) for way in ("in", "out")]
        assert all({"Algorithm", "SaSpec"} <= {*types} for types in holders(*keys))
        end(kernel, pair("old", 0x100, 1))
        await rig.until(lambda: rig.engine.in_sync and rig.engine.counters.events >= kernel.said)
        assert holders(*keys) == [[], []]

    play(story, NetlinkSettings(batch_delay_ms=0))
