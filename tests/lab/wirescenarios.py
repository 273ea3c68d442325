"""Scenarios on wires: VPP, the kernel and the service of a router between a LAN host and a peer with ESP.

`test_wires` runs them in the guest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from peers import run, until
from traffic import ESP, TALK_PORT, Calls, Datagram, End, Stream, call, cast, ping, talk
from wires import (
    IN_VRF,
    LAN_HOST,
    LAN_NET,
    LOCAL,
    LOWER_NET,
    OTHER_HOST,
    REMOTE,
    REMOTE_HOST,
    REMOTE_NET,
    ROUTER,
    UPPER_NET,
    VTI,
    Network,
    Tunnel,
)

SHOWN_LINES = 15
CAMELLIA, CAST5 = (
    f"enc cbc({name}) 0x{{0:.32}} auth-trunc hmac(sha256) 0x{{0:.64}} 128" for name in ("camellia", "cast5")
)
"""What VPP has no cipher for."""
GCM = "aead rfc4106(gcm(aes)) 0x{0:.40} 128"
FAMILIES = pytest.mark.parametrize("family", [0, 1], ids=("ip4", "ip6"))
PINGS = 5
REKEYS = 3
BLOCKS = 10
IF_ID = 42
TABLE = 10
ICMP, UDP = (1, 58), 17
HOPS = 64
LONG = 3000
IKE_PORT = 500


@pytest.fixture(scope="session")
def running() -> Network:
    """The network, started; it ends with the guest."""
    network = Network(Path("/run/lab"))
    network.start()
    return network


@pytest.fixture
def network(running: Network) -> Iterator[Network]:
    """The network without tunnels. Afterwards pytest shows the end of the service's log for a failure."""
    running.reset()
    yield running
    print("--- vpp-ipsecd", *running.router.log.read_text(errors="replace").splitlines()[-SHOWN_LINES:], sep="\n")


def seqs_by_spi(received: list[Datagram], family: int = 0) -> dict[int, list[int]]:
    """Return the sequence numbers of packets by SPI, after a check that all are ESP from the router to the peer."""
    assert {(packet.src, packet.dst, packet.proto) for packet in received} == {(LOCAL[family], REMOTE[family], ESP)}
    found: dict[int, list[int]] = {}
    for packet in received:
        found.setdefault(packet.spi, []).append(packet.seq)
    return found


def test_what_vpp_lacks_is_encrypted_by_the_kernel_or_dropped(network: Network) -> None:
    tunnels = [Tunnel(CAMELLIA), Tunnel(CAST5, family=1)]
    network.have(*tunnels)
    for tunnel, here, there in zip(tunnels, LAN_HOST, REMOTE_HOST, strict=True):
        assert ping(here, there, PINGS) == PINGS
        assert seqs_by_spi(network.ear.received(), tunnel.family) == {tunnel.spis[0]: [*range(1, PINGS + 1)]}
    assert network.errors() == {}
    assert network.router.show("sa").count("the kernel has its packets") == 4
    network.router.end_service()
    network.router.start_service(unsupported="drop")
    try:
        network.router.carries(4, 6)
        assert [ping(here, there, PINGS) for here, there in zip(LAN_HOST, REMOTE_HOST, strict=True)] == [0, 0]
        assert network.ear.received() == []
        shown = network.router.show("sa")
        assert shown.count("; its packets are dropped") == shown.count("unsupported: VPP has no cbc(") == 4
    finally:
        network.router.end_service()
        network.router.start_service()


@FAMILIES
def test_no_packet_is_lost_in_rekeys_that_make_before_they_break(network: Network, family: int) -> None:
    tunnel = Tunnel(GCM, family)
    network.have(tunnel)
    with Stream(LAN_HOST[family], REMOTE_HOST[family]) as stream:
        stream.go_on()
        for _ in range(REKEYS):
            tunnel = network.rekey(tunnel, stream)
            stream.go_on()
    assert stream.lost == []
    by_spi = seqs_by_spi(network.ear.received(), family)
    assert [*by_spi] == [replace(tunnel, generation=number).spis[0] for number in range(REKEYS + 1)]
    for seqs in by_spi.values():
        assert seqs == [*range(1, len(seqs) + 1)]
    assert network.errors() == {}


def test_no_packet_for_the_peer_is_lost_while_strongswan_rekeys(network: Network) -> None:
    """Some answers are lost: those that the peer sends with a new SA before VPP has it."""
    with network.negotiated():
        network.router.carries(2, 3)
        with Stream(LAN_HOST[0], REMOTE_HOST[0]) as stream:
            for _ in range(REKEYS):
                network.renegotiate()
                network.router.carries(2, 3)
                stream.go_on()
    assert stream.unheard == []
    by_spi = seqs_by_spi([packet for packet in network.ear.received() if packet.proto != UDP])
    assert len(by_spi) == REKEYS + 1
    for seqs in by_spi.values():
        assert seqs == [*range(1, len(seqs) + 1)]
    assert network.errors() == {}


@pytest.mark.parametrize(
    ("family", "if_id", "remote"),
    [(0, 0, ""), (1, 0, ""), (0, 0, "0.0.0.0/0"), (1, 0, "::/0"), (0, IF_ID, ""), (1, IF_ID, "")],
    ids=("ip4 policy", "ip6 policy", "ip4 policy for all", "ip6 policy for all", "ip4 vti", "ip6 vti"),
)
def test_router_and_lan_are_one_sender(network: Network, family: int, if_id: int, remote: str) -> None:
    tunnel = Tunnel(GCM, family, if_id, remote)
    here, there = ROUTER[family], REMOTE_HOST[family]
    peer = [End("peer", REMOTE[family])] if remote else []  # even packets for the peer itself, except ESP
    with network.strict(), network.vti(tunnel) if if_id else contextlib.nullcontext():
        network.have(tunnel)
        with Stream(LAN_HOST[family], REMOTE_HOST[family]) as stream:
            stream.go_on()
            for end in (there, *peer):
                assert ping(here, end, PINGS) == PINGS, network.errors()
                assert call(here, end, LONG)
            assert (talk(there, here, BLOCKS), talk(here, there, BLOCKS)) == (BLOCKS, BLOCKS)
            stream.go_on()
    assert stream.lost == []
    (seqs,) = seqs_by_spi(network.ear.received(), family).values()
    assert sorted(seqs) == [*range(1, len(seqs) + 1)]  # VPP sends fragments of its ESP later than following packets
    assert len(seqs) > stream.sent + PINGS + 2 * BLOCKS
    assert network.errors() == {}


def test_router_and_lan_are_one_sender_from_the_first_packet(network: Network) -> None:
    """The kernel sends until the service stops it.

    VPP never sends with the same SA, so strongSwan has to replace it.
    """
    with Calls(ROUTER[0], REMOTE_HOST[0]) as calls, network.negotiated():
        network.router.carries(2, 3)
        with Stream(LAN_HOST[0], REMOTE_HOST[0]) as stream:
            stream.go_on()
            calls.go_on()
        errors = network.errors()
    assert stream.lost == []
    by_spi = seqs_by_spi([packet for packet in network.ear.received() if packet.proto == ESP])
    for seqs in by_spi.values():
        assert seqs == [*range(1, len(seqs) + 1)]
    assert errors.keys() <= {"XfrmInTmplMismatch of peer"}, "all but what the router sent before it had a policy"
    assert len(by_spi) > 1, "nothing was sent in the first moment"


@FAMILIES
def test_what_passes_all_policies_goes_in_clear_beside_one_for_all(network: Network, family: int) -> None:
    network.have(Tunnel(GCM, family, remote=("0.0.0.0/0", "::/0")[family]))
    here, peer = ROUTER[family], End("peer", REMOTE[family])
    assert call(here, peer, PINGS, IKE_PORT)
    assert [each for each in network.ear.received() if each.proto != ESP] == [Datagram(here.address, peer.address, UDP)]
    assert call(here, peer, PINGS)
    assert len(seqs_by_spi(network.ear.received(), family)) == 1
    assert network.errors() == {}


@FAMILIES
def test_ospf_goes_over_a_vti_both_ways_and_router_and_lan_are_one_sender(network: Network, family: int) -> None:
    tunnel = Tunnel(GCM, family, IF_ID)
    here, there = ROUTER[family], REMOTE_HOST[family]
    with network.strict(), network.vti(tunnel), network.groups(tunnel):
        network.have(tunnel)
        with Stream(LAN_HOST[family], there) as stream:
            stream.go_on()
            assert cast(here, VTI, there, "p0", PINGS) == PINGS
            assert cast(there, "p0", here, VTI, PINGS) == PINGS
            assert cast(LAN_HOST[family], "l0", here, "lan", PINGS) == PINGS, "what others take, too, they still do"
            stream.go_on()
    (seqs,) = seqs_by_spi(network.ear.received(), family).values()
    assert seqs == [*range(1, len(seqs) + 1)]
    assert stream.lost == []
    assert network.errors() == {}


@FAMILIES
def test_vti_moves_into_and_out_of_a_vrf_with_one_sender(network: Network, family: int) -> None:
    tunnel = Tunnel(GCM, family, IF_ID)
    here, there, lan = ROUTER[family], REMOTE_HOST[family], LAN_HOST[family]
    cli = network.router.box.cli
    with network.strict(), network.vti(tunnel):
        network.have(tunnel)
        assert ping(here, there, PINGS) == PINGS
        assert _pair_of_tunnel(cli("show lcp"))
        with network.vrf(TABLE, family):
            network.router.carries(2, 3)
            until("the tunnel's interface in the VRF", lambda: f"ip4 table-id {TABLE}" in cli("show interface address"))
            network.router.carries(2, 3)
            assert not cli("show interface address").count("unnumbered")
            for end in (ends[family] for ends in IN_VRF):
                assert ping(end, there, PINGS) == PINGS
                assert (talk(there, end, BLOCKS), talk(end, there, BLOCKS)) == (BLOCKS, BLOCKS)
            run("ip", "route", "add", REMOTE_NET[family], "dev", VTI)
            network.router.carries(2, 3)
            assert ping(lan, there, 1) == 0, "answers are looked up in the VRF, where the LAN is not"
            cli(f"ip route add {LAN_NET[family]} table {TABLE} via {lan.address} host-vlan")
            assert ping(lan, there, PINGS) == PINGS
        run("ip", "route", "replace", REMOTE_NET[family], "dev", VTI)
        until("the tunnel's interface in the main table", lambda: "unnumbered" in cli("show interface address"))
        network.router.carries(2, 3)
        assert ping(lan, there, PINGS) == PINGS
        assert ping(here, there, PINGS) == PINGS
    (seqs,) = seqs_by_spi(network.ear.received(), family).values()
    assert seqs == [*range(1, len(seqs) + 1)]
    assert len(seqs) > 5 * PINGS + 4 * BLOCKS
    assert network.errors() == {}


def test_bgp_goes_over_a_vti_with_link_local_addresses(network: Network) -> None:
    tunnel = Tunnel(GCM, 0, IF_ID)
    with network.strict(), network.vti(tunnel), network.link_local(tunnel) as (here, there):
        network.have(tunnel)
        assert ping(here, there, PINGS) == PINGS
        assert (talk(there, here, BLOCKS), talk(here, there, BLOCKS)) == (BLOCKS, BLOCKS)
    (seqs,) = seqs_by_spi(network.ear.received()).values()
    assert seqs == [*range(1, len(seqs) + 1)]
    assert network.errors() == {}


def _pair_of_tunnel(pairs: str) -> str:
    """Return the line of linux-cp's pair for a tunnel; empty where there is none."""
    return next((line for line in pairs.splitlines() if "ipsec" in line), "")


@FAMILIES
def test_each_child_of_a_vti_has_router_and_lan_for_one_sender(network: Network, family: int) -> None:
    lower, upper = (Tunnel(GCM, family, IF_ID, net[family]) for net in (LOWER_NET, UPPER_NET))
    here = ROUTER[family]
    with network.vti(lower):
        network.have(lower, upper)
        with contextlib.ExitStack() as stack:
            there = REMOTE_HOST[family], OTHER_HOST[family]
            streams = [stack.enter_context(Stream(LAN_HOST[family], each)) for each in there]
            for end, stream in zip(there, streams, strict=True):
                stream.go_on()
                assert ping(here, end, PINGS) == PINGS
                assert (talk(end, here, BLOCKS), talk(here, end, BLOCKS)) == (BLOCKS, BLOCKS)
                stream.go_on()
    assert [stream.lost for stream in streams] == [[], []]
    by_spi = seqs_by_spi(network.ear.received(), family)
    assert {*by_spi} == {lower.spis[0], upper.spis[0]}
    for tunnel, stream in zip((lower, upper), streams, strict=True):
        seqs = by_spi[tunnel.spis[0]]
        assert seqs == [*range(1, len(seqs) + 1)]
        assert len(seqs) > stream.sent + PINGS + 2 * BLOCKS
    assert network.errors() == {}


@FAMILIES
def test_vti_children_by_port_have_one_sender_each(network: Network, family: int) -> None:
    web, rest = (Tunnel(GCM, family, IF_ID, REMOTE_NET[family], port) for port in (TALK_PORT, 0))
    here, there = ROUTER[family], REMOTE_HOST[family]
    with network.vti(web):
        network.have(web, rest)
        with Stream(LAN_HOST[family], there) as stream, ThreadPoolExecutor() as pool:
            stream.go_on()
            other_links = pool.submit(talk, OTHER_HOST[family], LAN_HOST[family], BLOCKS, HOPS)
            assert talk(there, here, BLOCKS) == BLOCKS
            assert other_links.result() == BLOCKS
            assert ping(here, there, PINGS) == PINGS
            stream.go_on()
    assert stream.lost == []
    by_spi = seqs_by_spi(network.ear.received(), family)
    assert {*by_spi} == {web.spis[0], rest.spis[0]}
    for seqs in by_spi.values():
        assert seqs == [*range(1, len(seqs) + 1)]
    assert len(by_spi[web.spis[0]]) > 4 * BLOCKS
    assert len(by_spi[rest.spis[0]]) >= stream.sent + PINGS
    assert network.errors() == {}


@FAMILIES
def test_tcp_port_policy_has_one_sender_and_bypasses_the_rest(network: Network, family: int) -> None:
    tunnel = Tunnel(GCM, family, port=TALK_PORT)
    here, there = ROUTER[family], REMOTE_HOST[family]
    network.have(tunnel)
    with ThreadPoolExecutor() as pool:
        other_links = pool.submit(talk, OTHER_HOST[family], LAN_HOST[family], BLOCKS, HOPS)
        assert talk(there, here, BLOCKS) == BLOCKS
        assert other_links.result() == BLOCKS
    assert ping(here, there, PINGS) == PINGS
    received = network.ear.received()
    clear = [packet for packet in received if packet.proto != ESP]
    assert [(packet.src, packet.proto) for packet in clear] == [(here.address, ICMP[family])] * PINGS
    (seqs,) = seqs_by_spi([packet for packet in received if packet.proto == ESP], family).values()
    assert seqs == [*range(1, len(seqs) + 1)]
    assert len(seqs) > 4 * BLOCKS
    assert network.errors() == {}


@FAMILIES
def test_echo_request_policy_has_one_sender_and_bypasses_the_rest(network: Network, family: int) -> None:
    tunnel = Tunnel(GCM, family, echo=True)
    here, there = ROUTER[family], REMOTE_HOST[family]
    network.have(tunnel)
    assert [ping(end, there, PINGS) for end in (here, LAN_HOST[family], here)] == [PINGS] * 3
    assert call(here, there, PINGS)
    received = network.ear.received()
    assert [packet for packet in received if packet.proto != ESP] == [Datagram(here.address, there.address, UDP)]
    (seqs,) = seqs_by_spi([packet for packet in received if packet.proto == ESP], family).values()
    assert seqs == [*range(1, len(seqs) + 1)]
    assert len(seqs) >= 3 * PINGS
    assert network.errors() == {}


def test_a_child_of_a_vti_that_vpp_lacks_has_the_kernel_for_its_sender(network: Network) -> None:
    """The peer's answers are lost, as VPP cannot distinguish its ESP from that of the other child."""
    lower, upper = Tunnel(GCM, 0, IF_ID, LOWER_NET[0]), Tunnel(CAMELLIA, 0, IF_ID, UPPER_NET[0])
    with network.vti(lower):
        network.have(lower, upper)
        assert ping(ROUTER[0], OTHER_HOST[0], PINGS) == 0
        assert [ping(here, REMOTE_HOST[0], PINGS) for here in (ROUTER[0], LAN_HOST[0])] == [PINGS, PINGS]
    by_spi = seqs_by_spi(network.ear.received())
    seqs = by_spi.pop(lower.spis[0])
    assert seqs == [*range(1, len(seqs) + 1)]
    assert len(seqs) >= 2 * PINGS
    assert by_spi == {upper.spis[0]: [*range(1, PINGS + 1)]}
    assert network.errors() == {}


def test_router_stays_one_sender_while_the_service_restarts(network: Network) -> None:
    tunnel = Tunnel(GCM, family=1)
    network.have(tunnel)
    assert ping(ROUTER[1], REMOTE_HOST[1], PINGS) == PINGS
    network.router.end_service(kill=True)
    assert ping(ROUTER[1], REMOTE_HOST[1], PINGS) == PINGS
    network.router.start_service()
    network.router.carries(2, 3)
    assert ping(ROUTER[1], REMOTE_HOST[1], PINGS) == PINGS
    (seqs,) = seqs_by_spi(network.ear.received(), 1).values()
    assert len(seqs) >= 3 * PINGS
    assert seqs == [*range(1, len(seqs) + 1)]
    assert network.errors() == {}


def test_own_packets_stay_encrypted_while_vpp_restarts(network: Network) -> None:
    tunnel = Tunnel(GCM, family=1)
    network.have(tunnel)
    with Calls(ROUTER[1], REMOTE_HOST[1]) as calls:
        calls.go_on()
        network.router.kill_vpp()
        network.router.bring_vpp_back()
        calls.go_on()
    assert {*seqs_by_spi(network.ear.received(), 1)} == {tunnel.spis[0]}
    tunnel = network.renew(tunnel)
    network.router.carries(2, 3)
    assert ping(ROUTER[1], REMOTE_HOST[1], PINGS) == PINGS
    (seqs,) = seqs_by_spi(network.ear.received(), 1).values()
    assert seqs == [*range(1, len(seqs) + 1)]
