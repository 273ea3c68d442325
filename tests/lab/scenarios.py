"""Scenarios with real strongSwan peers, a real kernel and the service next to VPP. `test_lab` runs them in the guest.

After each step VPP holds exactly the state that the kernel requires. Each scenario checks that the kernel changed.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lan import Lan
from peers import (
    CBC,
    COUNTED,
    ESN,
    GCM,
    KINDS,
    NATT,
    SIX,
    TIMED,
    Child,
    Peers,
    kernel_spis,
    replaced,
    run,
    until,
)
from router import Router

from vppipsec.conf.settings import RX_BUFFER_SIZE
from vppipsec.kernel.xfrm.events import Event, SaAdded
from vppipsec.kernel.xfrm.socket import Overflow, XfrmSocket
from vppipsec.sync.ike.acquire import COUNTER_POLL_S
from vppipsec.vpp.algorithms import CryptoAlg, IntegAlg
from vppipsec.vpp.inventory import Inventory
from vppipsec.vpp.types import NO_INDEX, SadFlag, SaSpec

NOTHING = (0, 0, 0)
SHOWN_LINES = 15


@dataclass(frozen=True)
class Lab:
    peers: Peers
    router: Router


@pytest.fixture(scope="session")
def running() -> Lab:
    """The lab, started; it ends with the guest."""
    lab = Lab(Peers(Path("/run/lab")), Router(Path("/run/lab/router")))
    lab.peers.start()
    lab.router.start()
    return lab


@pytest.fixture
def lab(running: Lab) -> Iterator[Lab]:
    """The lab without tunnels. Afterwards pytest shows the end of its logs for a failure."""
    running.peers.all_down()
    flush()
    assert totals(running.router.wait_equal()) == NOTHING
    yield running
    for log in (running.peers.a.log, running.router.log):
        print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-SHOWN_LINES:], sep="\n")


def flush() -> None:
    run("ip", "xfrm", "state", "flush")
    run("ip", "xfrm", "policy", "flush")


def totals(actual: Inventory) -> tuple[int, int, int]:
    """Return the numbers of the service's interfaces, SAs and rules for outbound policies in VPP."""
    outbound = {policy.acl_index for policy in actual.policies}
    rules = [rule for acl in actual.acls if acl.acl_index in outbound for rule in acl.rules]
    return len(actual.interfaces), len(actual.sas), sum(rule.permit for rule in rules)


def spec_of(actual: Inventory, spi: int) -> SaSpec:
    return next(sa.spec for sa in actual.sas if sa.spec.spi == spi)


def sad_ids(actual: Inventory) -> dict[int, int]:
    """Return VPP's number of each SA by SPI."""
    return {sa.spec.spi: sa.sad_id for sa in actual.sas}


def test_set_up_of_every_kind_is_carried_over(lab: Lab) -> None:
    lab.peers.up(*KINDS)
    actual = lab.router.wait_equal()
    assert totals(actual) == (len(KINDS), 2 * len(KINDS), len(KINDS))
    for child in KINDS:
        lab.peers.ping(child)  # the keys are valid: the kernel's own ESP works with them
    specs = {child.name: [spec_of(actual, spi) for spi in kernel_spis(child)] for child in KINDS}
    assert [len(pair) for pair in specs.values()] == [2] * len(KINDS)
    assert {spec.crypto for spec in specs[GCM.name]} == {CryptoAlg.AES_GCM_256}
    assert {(spec.crypto, spec.integ) for spec in specs[CBC.name]} == {(CryptoAlg.AES_CBC_128, IntegAlg.SHA_256_128)}
    assert all(spec.flags & SadFlag.USE_ESN for spec in specs[ESN.name])
    assert {spec.replay_window for spec in specs[ESN.name] if spec.inbound} == {1024}
    assert all(spec.flags & SadFlag.UDP_ENCAP and spec.udp_dst_port == 4500 for spec in specs[NATT.name])
    assert {len(spec.src) for spec in specs[SIX.name]} == {16}


def test_several_tunnels_between_the_same_two_addresses_keep_their_own_sas(lab: Lab) -> None:
    lab.peers.up(GCM, CBC, ESN)
    actual = lab.router.wait_equal()
    inbound = {sa.sad_id: sa.spec.spi for sa in actual.sas}
    pairs = set()
    for itf in actual.interfaces:
        assert itf.protection is not None
        pairs.add(frozenset(inbound[number] for number in (itf.protection.outbound, *itf.protection.inbound)))
    assert pairs == {kernel_spis(child) for child in (GCM, CBC, ESN)}


def test_rekey_by_time_is_followed(lab: Lab) -> None:
    lab.peers.up(GCM, TIMED)
    lab.router.wait_equal()
    untouched, first = kernel_spis(GCM), kernel_spis(TIMED)
    second = until("a new SA by time", lambda: kernel_spis(TIMED) - first)
    until("the end of the old SAs", lambda: first.isdisjoint(kernel_spis(TIMED)))
    actual = lab.router.wait_equal()
    assert second.isdisjoint(first)
    assert not first & sad_ids(actual).keys()
    assert kernel_spis(GCM) == untouched
    until("a second rekey by time", lambda: kernel_spis(TIMED).isdisjoint(first | second))
    lab.router.wait_equal()


def test_rekey_by_bytes_is_followed(lab: Lab) -> None:
    lab.peers.up(GCM, COUNTED)
    lab.router.wait_equal()
    before = kernel_spis(COUNTED)
    lab.peers.ping(COUNTED, count=25, size=1000)
    after = replaced(COUNTED, before)
    assert sad_ids(lab.router.wait_equal()).keys() == after | kernel_spis(GCM)


def test_rekey_by_hand_of_every_kind_is_followed(lab: Lab) -> None:
    lab.peers.up(*KINDS)
    lab.router.wait_equal()
    for child in KINDS:
        before = kernel_spis(child)
        lab.peers.rekey(child)
        after = replaced(child, before)
        actual = lab.router.wait_equal()
        assert after <= sad_ids(actual).keys()
        assert totals(actual) == (len(KINDS), 2 * len(KINDS), len(KINDS))
        lab.peers.ping(child)


def test_delete_takes_one_tunnel_and_leaves_the_other_untouched(lab: Lab) -> None:
    lab.peers.up(GCM, CBC)
    before = sad_ids(lab.router.wait_equal())
    gone, stays = kernel_spis(CBC), kernel_spis(GCM)
    lab.peers.down(CBC)
    until("the end of the deleted SAs", lambda: not kernel_spis(CBC))
    actual = lab.router.wait_equal()
    assert len(gone) == 2
    assert sad_ids(actual) == {spi: before[spi] for spi in stays}
    assert totals(actual) == (1, 2, 1)
    lab.peers.all_down()
    until("the end of all SAs", lambda: not kernel_spis())
    assert totals(lab.router.wait_equal()) == NOTHING


def test_reestablishment_is_followed(lab: Lab) -> None:
    lab.peers.up(*KINDS)
    lab.router.wait_equal()
    before = kernel_spis()
    lab.peers.all_down()
    assert totals(lab.router.wait_equal()) == NOTHING
    lab.peers.up(*KINDS)
    after = kernel_spis()
    actual = lab.router.wait_equal()
    assert len(before) == len(after) == 2 * len(KINDS)
    assert not before & after
    assert sad_ids(actual).keys() == after


def test_after_a_flush_of_sas_traffic_drops_until_policies_go(lab: Lab) -> None:
    lab.peers.up(*KINDS)
    assert totals(lab.router.wait_equal()) == (len(KINDS), 2 * len(KINDS), len(KINDS))
    run("ip", "xfrm", "state", "flush")
    actual = lab.router.wait_equal()
    assert totals(actual) == (0, 0, len(KINDS))
    assert list(actual.routes.values()) == [NO_INDEX] * len(
        KINDS
    )  # packets that the rules match are dropped, not sent unencrypted
    run("ip", "xfrm", "policy", "flush")
    assert totals(lab.router.wait_equal()) == NOTHING
    lab.peers.all_down()
    lab.peers.up(GCM)
    assert totals(lab.router.wait_equal()) == (1, 2, 1)


def test_only_events_told_the_service(lab: Lab) -> None:
    dumps = lab.router.ask("show sync")["resyncs"]
    lab.peers.up(GCM, SIX)
    before = kernel_spis(GCM)
    lab.peers.rekey(GCM)
    replaced(GCM, before)
    lab.peers.down(SIX)
    lab.router.wait_equal()
    flush()
    assert totals(lab.router.wait_equal()) == NOTHING
    assert lab.router.ask("show sync")["resyncs"] == dumps


def test_restarted_service_adopts_what_is_right_and_corrects_the_rest(lab: Lab) -> None:
    lab.peers.up(GCM, CBC, SIX)
    before = sad_ids(lab.router.wait_equal())
    rekeyed, untouched = kernel_spis(CBC), kernel_spis(GCM)
    lab.router.end_service(kill=True)
    lab.peers.rekey(CBC)
    lab.peers.down(SIX)
    lab.peers.up(NATT)
    new = replaced(CBC, rekeyed)
    assert sad_ids(lab.router.holdings()) == before
    lab.router.start_service()
    after = sad_ids(lab.router.wait_equal())
    assert after.keys() == untouched | new | kernel_spis(NATT)
    assert {spi: after[spi] for spi in untouched} == {spi: before[spi] for spi in untouched}


def test_service_that_is_ended_leaves_vpp_as_it_is(lab: Lab) -> None:
    lab.peers.up(GCM, ESN)
    before = lab.router.wait_equal()
    lab.router.end_service()
    assert lab.router.holdings() == before
    lab.peers.down(ESN)
    until("the end of the deleted SAs", lambda: not kernel_spis(ESN))
    assert lab.router.holdings() == before
    lab.router.start_service()
    assert totals(lab.router.wait_equal()) == (1, 2, 1)


def test_killed_vpp_gets_new_sas_from_the_ike_daemon(lab: Lab) -> None:
    lab.peers.up(*KINDS)
    before = lab.router.wait_equal()
    used = {sa.spec.spi for sa in before.sas if not sa.spec.inbound}
    assert len(used) == len(KINDS)
    lab.router.kill_vpp()
    until("the service's notice of it", lambda: lab.router.ask("show sync")["state"] == "disconnected")
    lab.router.bring_vpp_back()
    actual = lab.router.wait_equal()  # long before the peers' next planned rekey, which is in an hour
    assert not used & sad_ids(actual).keys()
    assert len([sa for sa in actual.sas if not sa.spec.inbound]) == len(KINDS)
    assert lab.router.ask("show sync")["rekeys"] >= len(KINDS)
    for child in KINDS:
        lab.peers.ping(child)


@pytest.mark.parametrize("child", [GCM, SIX], ids=lambda child: child.name)
def test_traffic_through_vpp_brings_up_what_a_trap_policy_waits_for(lab: Lab, child: Child) -> None:
    lab.peers.a.load(child)  # with start_action = trap
    try:
        with Lan(lab.router) as lan:
            assert totals(lab.router.wait_equal()) == (0, 0, 1)
            asked = lab.router.ask("show sync")["acquires"]
            time.sleep(4 * COUNTER_POLL_S)
            assert lab.router.ask("show sync")["acquires"] == asked  # no packet has come yet
            lan.send(child)
            until("the SAs that traffic asks for", lambda: len(kernel_spis(child)) == 2)
            actual = lab.router.wait_equal()
            assert sad_ids(actual).keys() == kernel_spis(child)
            assert lab.router.ask("show sync")["acquires"] == asked + 1
            assert "which has no SA: the IKE daemon is asked for one" in lab.router.show("events")
            assert lan.is_carried(child)
            lab.peers.ping(child)
            lab.peers.all_down()
            until("the end of the SAs", lambda: not kernel_spis(child))
            assert totals(lab.router.wait_equal()) == (0, 0, 1)
            # the first poll cannot distinguish dropped packets from those that the tunnel carried
            time.sleep(4 * COUNTER_POLL_S)
            lan.send(child)
            until("new SAs", lambda: len(kernel_spis(child)) == 2)
            lab.router.wait_equal()
    finally:
        lab.peers.a.load()
    lab.peers.all_down()
    until("the end of the trap policy", lambda: not run("ip", "xfrm", "policy", "list", "dir", "out").strip())


def burst(tunnels: int) -> str:
    """Return the lines of `ip -batch` that add tunnels to 200 peers behind the router's address."""
    lines = []
    for number in range(tunnels):
        remote = f"10.9.0.{10 + number % 200}"
        inner = f"172.{16 + (number >> 8)}.{number & 255}.0/24"
        key = f"aead rfc4106(gcm(aes)) 0x{number + 1:040x} 128"
        tail = f"proto esp reqid {number + 1} mode tunnel"
        for spi, ends in ((0x10000, f"src 10.9.0.1 dst {remote}"), (0x20000, f"src {remote} dst 10.9.0.1")):
            lines.append(f"xfrm state add {ends} spi {spi + number:#x} {tail} {key}")
        template = f"tmpl src 10.9.0.1 dst {remote} {tail}"
        lines.append(f"xfrm policy add src 10.1.1.0/24 dst {inner} dir out {template}")
    return "\n".join(lines) + "\n"


def test_a_thousand_tunnels_in_one_burst_and_none_is_lost(lab: Lab) -> None:
    dumps = lab.router.ask("show sync")["resyncs"]
    run("ip", "-batch", "-", text=burst(1000))
    assert totals(lab.router.wait_equal()) == (1000, 2000, 1000)
    view = lab.router.ask("show sync")
    assert (view["counts"]["synced"], view["overflows"], view["resyncs"]) == (2000, 0, dumps)
    flush()
    assert totals(lab.router.wait_equal()) == NOTHING


def test_overflow_of_the_smallest_buffer_is_counted_and_ends_equal(lab: Lab) -> None:
    lab.router.end_service()
    lab.router.start_service(rx_buffer_size=RX_BUFFER_SIZE.low)
    try:
        lab.router.wait_equal()
        lab.router.signal_service(signal.SIGSTOP)
        run("ip", "-batch", "-", text=burst(300))
        lab.router.signal_service(signal.SIGCONT)
        assert totals(lab.router.wait_equal()) == (300, 600, 300)
        view = lab.router.ask("show sync")
        assert (view["overflows"], view["resyncs"]) == (1, 2)
    finally:
        lab.router.end_service()
        lab.router.start_service()


@pytest.mark.parametrize(
    ("tunnels", "rx_buffer_size", "overflows"), [(1000, RX_BUFFER_SIZE.default, 0), (300, RX_BUFFER_SIZE.low, 1)]
)
def test_socket_tells_of_every_sa_or_that_it_lost_some(
    lab: Lab, tunnels: int, rx_buffer_size: int, overflows: int
) -> None:
    lab.router.end_service()  # it would read the same burst, on the only processor
    try:
        told = asyncio.run(told_of_burst(tunnels, rx_buffer_size))
        assert told.count(Overflow()) == overflows
        assert (sum(isinstance(event, SaAdded) for event in told) == 2 * tunnels) is not bool(overflows)
    finally:
        lab.router.start_service()


async def told_of_burst(tunnels: int, rx_buffer_size: int) -> list[Event | Overflow]:
    """Return a socket's events of a burst while nothing reads, and check that a dump has all SAs."""
    ear = XfrmSocket(rx_buffer_size)
    try:
        run("ip", "-batch", "-", text=burst(tunnels))
        dumped = await ear.dump_sas()
        assert {sa.spi for sa in dumped} == kernel_spis()
        assert len(dumped) == 2 * tunnels
        told: list[Event | Overflow] = []
        while True:
            try:
                async with asyncio.timeout(0.5):  # all events have come; the timeout shows the end
                    told += await ear.read(10_000)
            except TimeoutError:
                return told
    finally:
        ear.close()
