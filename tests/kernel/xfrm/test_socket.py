"""The netlink socket: over a socket pair, and with the kernel of this machine, in a namespace of its own."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import subprocess
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from support.build import make_policy, sa_out
from support.netns import in_new_netns, ip
from support.recorded import PATIENCE_S
from vppipsec.kernel.netlink.messages import NetlinkError
from vppipsec.kernel.netlink.socket import open_netlink
from vppipsec.kernel.netlink.wire import HEADER
from vppipsec.kernel.text import format_selector
from vppipsec.kernel.xfrm.events import Acquired, PoliciesFlushed, PolicyAdded, PolicyDeleted, SasFlushed
from vppipsec.kernel.xfrm.socket import EVENT_GROUPS, NETLINK_XFRM, Overflow, XfrmSocket
from vppipsec.kernel.xfrm.values import MsgType, MulticastGroup
from vppipsec.kernel.xfrm.wire import decode_xfrm


def flush(proto: int = 0) -> bytes:
    return HEADER.pack(HEADER.size + 4, MsgType.FLUSHSA, 0, 0, 0) + bytes([proto, 0, 0, 0])


def paired() -> tuple[socket.socket, XfrmSocket]:
    mouth, ear = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return mouth, XfrmSocket(0, ear)


def finish(story: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await story

    asyncio.run(bounded())


def test_reads_several_datagrams_and_several_messages_of_one() -> None:
    async def story() -> None:
        mouth, ear = paired()
        mouth.send(flush(50) + flush(51))
        mouth.send(flush(108))
        assert await ear.read(100) == [SasFlushed(50), SasFlushed(51), SasFlushed(108)]
        ear.close()

    finish(story())


def test_reads_no_more_than_asked_for_at_a_time() -> None:
    async def story() -> None:
        mouth, ear = paired()
        for proto in range(5):
            mouth.send(flush(proto))
        assert await ear.read(2) == [SasFlushed(0), SasFlushed(1)]
        assert await ear.read(100) == [SasFlushed(2), SasFlushed(3), SasFlushed(4)]
        ear.close()

    finish(story())


def test_malformed_messages_are_counted_and_left_out_and_reading_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        mouth, ear = paired()
        mouth.send(b"\x01")
        mouth.send(HEADER.pack(16, 0x77, 0, 0, 0) + flush(50))
        mouth.send(flush(51)[:-4] + b"\xff" * 3)
        mouth.send(HEADER.pack(16, 0x77, 0, 0, 0))
        mouth.send(flush(52))
        assert await ear.read(100) == [SasFlushed(50), SasFlushed(52)]
        assert ear.malformed == 4
        ear.close()

    with caplog.at_level(logging.WARNING):
        finish(story())
    assert [record.getMessage() for record in caplog.records] == [
        "left out a netlink message: 1 bytes are left over, too few for a netlink header",
        "left out a netlink message: netlink message of unknown type 0x77, 16 bytes",
        "left out a netlink message: a netlink message claims 20 bytes; 19 are there",
    ]


def test_read_ends_with_an_error_when_the_socket_is_closed() -> None:
    async def story() -> None:
        mouth, ear = paired()
        reading = asyncio.create_task(ear.read(1))
        await asyncio.sleep(0)
        ear.close()
        with pytest.raises(OSError, match="the netlink socket was closed"):
            await reading
        mouth.close()

    finish(story())


def policy(number: int) -> str:
    source = f"10.{number >> 8}.{number & 255}.0/24"
    return f"xfrm policy add src {source} dst 172.16.0.0/16 dir out priority {number + 1} action block"


def states() -> str:
    """Return all SAs, larval ones as well, as iproute2 tells them."""
    asked = ["ip", "xfrm", "state"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout


def with_kernel(story: Any, rx_buffer_size: int = 0) -> None:
    def work() -> None:
        async def run() -> None:
            ear = XfrmSocket(rx_buffer_size)
            try:
                await story(ear)
            finally:
                ear.close()

        finish(run())

    in_new_netns(work)


def test_follows_and_dumps_the_policies_of_a_kernel() -> None:
    async def story(ear: XfrmSocket) -> None:
        ip(*(policy(number) for number in range(3)))
        ip("xfrm policy delete src 10.0.1.0/24 dst 172.16.0.0/16 dir out")
        told = await ear.read(100)
        assert [type(event) for event in told] == [PolicyAdded] * 3 + [PolicyDeleted]
        assert isinstance(told[0], PolicyAdded)
        assert isinstance(told[3], PolicyDeleted)
        assert format_selector(told[0].policy.selector) == "10.0.0.0/24 > 172.16.0.0/16"
        assert told[3].id == told[1].policy.id
        dumped = await ear.dump_policies()
        assert {p.id for p in dumped} == {told[0].policy.id, told[2].policy.id}
        assert await ear.dump_sas() == []
        ip("xfrm policy flush")
        assert await ear.read(100) == [PoliciesFlushed(0)]

    with_kernel(story)


def test_overflow_is_told_once_and_nothing_older_comes_after_it() -> None:
    async def story(ear: XfrmSocket) -> None:
        ip(*(policy(number) for number in range(400)))
        assert await ear.read(1) == [Overflow()]
        assert ear.overflows == 1
        ip(policy(400))
        (told,) = await ear.read(1000)
        assert isinstance(told, PolicyAdded)
        assert told.policy.priority == 401
        assert len(await ear.dump_policies()) == 401

    with_kernel(story, rx_buffer_size=8192)


def test_receive_buffer_goes_beyond_what_the_system_allows_others() -> None:
    async def story(ear: XfrmSocket) -> None:
        assert ear.receive_buffer >= 32 << 20
        assert ear.port_id != 0

    with_kernel(story, rx_buffer_size=32 << 20)


def test_expiry_of_an_unknown_sa_is_refused_by_the_kernel() -> None:
    async def story(ear: XfrmSocket) -> None:
        with pytest.raises(NetlinkError, match=r"^the kernel refused the expiry of an SA: No such file") as caught:
            await ear.expire(sa_out(0x1234))
        assert caught.value.errno == errno.ENOENT

    with_kernel(story)


def test_kernel_reports_unused_sa_and_refuses_an_unknown_one() -> None:
    async def story(ear: XfrmSocket) -> None:
        ip("xfrm state allocspi src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel reqid 9 mark 5 mask 0xff")
        (larval,) = await ear.dump_sas()
        assert not await ear.has_sent(larval)
        with pytest.raises(NetlinkError, match=r"^the kernel refused a question about an SA: No such process"):
            await ear.has_sent(larval._replace(spi=larval.spi + 1))

    with_kernel(story)


@pytest.mark.parametrize("if_id", ["", "if_id 7"])
def test_acquire_reaches_whoever_listens_and_leaves_no_larval_sa(if_id: str) -> None:
    async def story(ear: XfrmSocket) -> None:
        template = "tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 9 mode tunnel"
        ip(f"xfrm policy add src fd01::/64 dst fd02::/64 dir out priority 7 {if_id} {template}")
        (policy,) = await ear.dump_policies()
        with open_netlink(NETLINK_XFRM, (MulticastGroup.ACQUIRE,)) as daemon:
            await ear.acquire(policy)
            told = decode_xfrm(daemon.recv(65536))
            assert isinstance(told, Acquired)
            assert replace(told.policy, usage=policy.usage) == policy
            assert (told.selector, told.id.proto) == (policy.selector, 50)
            assert (told.id.daddr, told.saddr) == (policy.templates[0].daddr, policy.templates[0].saddr)
        assert states() == ""

    with_kernel(story)


def test_acquire_of_a_policy_without_a_family_is_refused_by_the_kernel() -> None:
    async def story(ear: XfrmSocket) -> None:
        policy = make_policy()
        with pytest.raises(NetlinkError, match=r"^the kernel refused an ACQUIRE: Invalid argument"):
            await ear.acquire(replace(policy, selector=replace(policy.selector, family=0)))

    with_kernel(story)


def test_dump_of_many_policies_is_whole() -> None:
    async def story(ear: XfrmSocket) -> None:
        ip(*(policy(number) for number in range(3000)))
        dumped = await ear.dump_policies()
        assert sorted(p.priority for p in dumped) == list(range(1, 3001))

    with_kernel(story)


def test_second_dump_decodes_only_what_changed() -> None:
    async def story(ear: XfrmSocket) -> None:
        ip(*(policy(number) for number in range(3)))
        before = {p.priority: p for p in await ear.dump_policies()}
        ip("xfrm policy delete src 10.0.1.0/24 dst 172.16.0.0/16 dir out", policy(4))
        ip("xfrm policy update src 10.0.2.0/24 dst 172.16.0.0/16 dir out priority 77 action block")
        after = {p.priority: p for p in await ear.dump_policies()}
        assert after.keys() == {1, 5, 77}
        assert after[1] is before[1]
        assert {p.priority: p for p in await ear.dump_policies()} == after

    with_kernel(story)


def test_subscribes_to_whatever_changes_sas_or_policies() -> None:
    assert {tunnel.name for tunnel in EVENT_GROUPS} == {"EXPIRE", "SA", "POLICY", "MIGRATE", "MAPPING"}
