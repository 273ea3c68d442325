"""What VPP cannot carry goes to the kernel over linux-cp's tap, or is dropped with a reason; it is never in clear."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from support.build import ENV, LOCAL, LOCAL6, REMOTE, REMOTE6, SHA256, WAN, make_policy, make_sa, sa_in, sa_out
from support.invariants import our_routes, targets
from support.lanwan import make_loopback, set_pair
from support.packet_path import decide_by
from support.recorded import PATIENCE_S
from support.rig import Rig, play
from support.spd import UDP, Packet
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey
from vppipsec.kernel.xfrm.values import Algorithm, Encap, Policy, Sa
from vppipsec.status.summary import sa_view
from vppipsec.status.tunnels import policy_rows
from vppipsec.sync.cleanup import clean_up
from vppipsec.sync.desired.kernel_fallback import KernelFallback, fallback_inbound_rules, kernel_fallbacks
from vppipsec.sync.desired.policy_layers import Action, KernelTap, PolicyRules, compute_steering
from vppipsec.sync.desired.tunnel import translate
from vppipsec.sync.preview import dry_run
from vppipsec.vpp.api.ip import NeighborAddDel, RouteAddDel
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.guard import GuardError, check_kernel_tap_request
from vppipsec.vpp.ownership import KERNEL_NEXT_HOP
from vppipsec.vpp.types import ANY_PORT, NO_INDEX, Prefix, Rule, everything

CAMELLIA: dict[str, Any] = {"aead": None, "crypt": Algorithm("cbc(camellia)", bytes(16)), "auth": SHA256}
TAP = 9
LACKING = (sa_in(1, **CAMELLIA), sa_out(2, **CAMELLIA), make_policy())
OTHER = (sa_in(3, 2), sa_out(4, 2), make_policy(dst="10.3.0.0/24", reqid=2))
PENDING_OTHER = (sa_in(3, 2), make_policy(dst="10.3.0.0/24", reqid=2))
ESP = Rule(True, Prefix(REMOTE, 32), Prefix(LOCAL, 32), 50)
OUT = Packet(parse_addr("10.1.0.9"), parse_addr("10.2.0.9"), UDP, 1, 2)
IN = Packet(REMOTE, LOCAL, 50, 0, 0)


def found(items: Sequence[Sa | Policy], taps: dict[int, int] | None = None, **env: Any) -> dict[int, KernelFallback]:
    """Return the fall-backs by reqid. VPP has sent with SA 0x99."""
    model = KernelModel()
    model.replace([it for it in items if isinstance(it, Sa)], [it for it in items if isinstance(it, Policy)])
    environment = replace(ENV, **env)
    desired = [translate(key, tunnel, environment) for key, tunnel in model.tunnels.items()]
    taps = {WAN: TAP} if taps is None else taps
    made = kernel_fallbacks(desired, model.tunnels, environment, taps, lambda sa: sa.spi == 0x99)
    return {key.reqid: fallback for key, fallback in made.items()}


ENCAP = {"encap": Encap(2, 4500, 40000, bytes(4))}
BACK = {"encap": Encap(2, 40000, 4500, bytes(4))}
NAT = ESP._replace(proto=17, sports=ANY_PORT, dports=(4500, 4500))


@pytest.mark.parametrize(
    ("items", "rules"),
    [
        (LACKING, (ESP,)),
        ((sa_in(1, **CAMELLIA, **BACK), sa_out(2, **CAMELLIA, **ENCAP), make_policy()), (NAT, ESP)),
        ((sa_in(1, mode=0), sa_out(2, mode=0), make_policy()), (ESP,)),
        ((sa_in(1, proto=51), sa_out(2, proto=51), make_policy()), (ESP._replace(proto=51),)),
        ((*LACKING, *PENDING_OTHER), (ESP,)),
        ((sa_in(1, if_id=7, **CAMELLIA), sa_out(2, if_id=7, **CAMELLIA), make_policy(if_id=7)), (ESP,)),
    ],
    ids=["plain", "behind a NAT", "transport mode", "AH", "another is pending", "of a VTI"],
)
def test_kernel_gets_what_vpp_cannot_carry(items: Sequence[Sa | Policy], rules: tuple[Rule, ...]) -> None:
    assert found(items) == {1: KernelFallback(KernelTap(TAP), "", rules)}


@pytest.mark.parametrize(
    ("items", "taps", "env", "reason"),
    [
        (LACKING, {}, {}, "no linux-cp pair"),
        (LACKING, {WAN + 1: TAP}, {}, "no linux-cp pair"),
        (LACKING, None, {"addresses": {}}, "no interface of VPP has its local address"),
        (LACKING, None, {"unreachable": frozenset((REMOTE,))}, "as soon as there is a route"),
        ((*LACKING, *OTHER), None, {}, "cannot tell their ESP apart"),
        ((sa_in(1, **CAMELLIA), sa_out(0x99, **CAMELLIA), make_policy()), None, {}, "VPP has sent with its SA"),
    ],
)
def test_else_it_is_dropped_and_said_why(
    items: Sequence[Sa | Policy], taps: dict[int, int] | None, env: dict[str, Any], reason: str
) -> None:
    fallback = found(items, taps, **env)[1]
    assert fallback.target is None
    assert reason in fallback.reason
    assert fallback.inbound_rules == ()


@pytest.mark.parametrize(
    "items", [OTHER, PENDING_OTHER, (make_policy(),), (sa_in(1, **CAMELLIA), sa_out(2), make_policy())[1:]]
)
def test_what_vpp_carries_or_may_carry_is_not_the_kernels(items: Sequence[Sa | Policy]) -> None:
    assert found(items) == {}


def test_two_groups_of_a_peer_share_a_rule() -> None:
    second = (sa_in(3, 2, **CAMELLIA), sa_out(4, 2, **CAMELLIA), make_policy(dst="10.3.0.0/24", reqid=2))
    made = found((*LACKING, *second))
    model = KernelModel()
    model.replace([], [make_policy(), make_policy(dst="10.3.0.0/24", reqid=2)])
    assert fallback_inbound_rules(dict(zip(model.tunnels, made.values(), strict=True))) == [(ESP, KernelTap(TAP))]


# In VPP


async def paired(rig: Rig) -> int:
    """Give the WAN a pair; return its tap."""
    return await set_pair(await rig.admin(), rig.wan, "wan")


def goes(rig: Rig, packet: Packet) -> object:
    """Return where VPP leads a packet that comes on the WAN: a sw_if_index, or DROP or CLEAR."""
    assert rig.standin is not None
    world = rig.standin.world
    index = targets(world, rig.wan, packet)
    lacks_sas = index in {state.actual.sw_if_index for state in rig.engine.tunnels.values()} - world.protections.keys()
    return Action.DISCARD if index == NO_INDEX or lacks_sas else index


def told(rig: Rig, reqid: int = 1) -> set[tuple[str, str]]:
    """Return fall-back and reason of a tunnel's SAs."""
    return {(row["fallback"], row["fallback_reason"]) for row in sa_view(rig.engine) if row["reqid"] == reqid}


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.01)


def test_packets_of_both_ways_and_both_families_go_to_the_tap() -> None:
    async def story(rig: Rig) -> None:
        tap = await paired(rig)
        mixed = make_policy(src="fd01::/64", dst="fd02::/64")
        rig.kernel.add(*LACKING, mixed)
        six = (make_sa(7, REMOTE6, LOCAL6, 3, **CAMELLIA), make_sa(8, LOCAL6, REMOTE6, 3, **CAMELLIA))
        rig.kernel.add(*six, make_policy(dst="10.4.0.0/24", reqid=3, ends=(LOCAL6, REMOTE6)))
        rig.start()
        await rig.settle()
        packets = (
            OUT,
            OUT._replace(dst=parse_addr("10.4.0.9")),
            Packet(parse_addr("fd01::9"), parse_addr("fd02::9"), UDP, 1, 2),
            IN,
            Packet(REMOTE6, LOCAL6, 50, 0, 0),
        )
        assert [goes(rig, packet) for packet in packets] == [tap] * 5
        others = IN._replace(src=parse_addr("192.0.2.3")), IN._replace(proto=UDP)
        assert [goes(rig, packet) for packet in others] == [
            Action.BYPASS
        ] * 2  # to VPP itself, and by linux-cp to the kernel
        assert rig.standin is not None
        world = rig.standin.world
        hops = {
            len(net.address): path.next_hop
            for fib in world.fibs.values()
            for net, (path, *_) in fib.of_source(23)
            if path.sw_if_index == tap
        }
        assert hops == {4: KERNEL_NEXT_HOP[False], 16: KERNEL_NEXT_HOP[True]}
        macs = {key.address: neighbor.mac for key, neighbor in world.neighbors.by_key.items() if key.sw_if_index == tap}
        assert macs == dict.fromkeys(KERNEL_NEXT_HOP.values(), world.interfaces[rig.wan].mac)
        assert told(rig) == told(rig, 3) == {("kernel", "")}
        assert {row["steering"] for row in policy_rows(rig.engine)} == {"to the kernel"}

    play("standin", story)


def test_without_a_pair_or_where_the_operator_says_so_it_is_dropped() -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(*LACKING)
        rig.start()
        await rig.settle()
        assert [goes(rig, packet) for packet in (OUT, IN)] == [Action.DISCARD, Action.BYPASS]
        ((what, why),) = told(rig)
        assert (what, "no linux-cp pair" in why) == ("drop", True)
        (row,) = policy_rows(rig.engine)
        assert (row["steering"], "no linux-cp pair" in row["reason"]) == ("dropped", True)
        tap = await paired(rig)
        await until(lambda: goes(rig, OUT) == goes(rig, IN) == tap)
        await rig.settle()
        settings = replace(rig.settings, offload=replace(rig.settings.offload, unsupported="drop"))
        rig.engine.reload(settings)
        await rig.settle()
        assert [goes(rig, packet) for packet in (OUT, IN)] == [Action.DISCARD, Action.BYPASS]
        assert told(rig) == {("drop", "")}
        rig.engine.reload(rig.settings)
        await rig.settle()
        assert goes(rig, OUT) == goes(rig, IN) == tap

    play("standin", story)


def test_offloaded_tunnel_with_the_same_ends_suspends_the_fallback() -> None:
    async def story(rig: Rig) -> None:
        tap = await paired(rig)
        rig.kernel.add(*LACKING)
        rig.start()
        await rig.settle()
        rig.kernel.add(*OTHER)
        await rig.settle()
        assert [goes(rig, packet) for packet in (OUT, IN)] == [Action.DISCARD, Action.BYPASS]
        ((what, why),) = told(rig)
        assert (what, "cannot tell their ESP apart" in why) == ("drop", True)
        rig.kernel.delete(*OTHER)
        await rig.settle()
        assert goes(rig, OUT) == goes(rig, IN) == tap

    play("standin", story)


def test_change_from_the_one_to_the_other_and_back_is_never_in_clear() -> None:
    async def story(rig: Rig) -> None:
        tap = await paired(rig)
        rig.kernel.add(*LACKING)
        rig.start()
        await rig.settle()
        assert rig.standin is not None
        seen: set[object] = set()
        rig.standin.watch = lambda name, request, retval: seen.add(goes(rig, OUT))
        for number in (0x10, 0x20):
            rig.kernel.add(sa_in(number), sa_out(number + 1))
            rig.kernel.delete(*[sa for sa in rig.kernel.sas.values() if sa.crypt is not None])
            await rig.settle()
            assert goes(rig, OUT) not in (Action.DISCARD, tap)
            assert {row["state"] for row in sa_view(rig.engine)} == {"synced"}
            before = list(rig.kernel.sas.values())
            rig.kernel.add(sa_in(number + 2, **CAMELLIA), sa_out(number + 3, **CAMELLIA))
            rig.kernel.delete(*before)
            await rig.settle()
            assert goes(rig, OUT) == goes(rig, IN) == tap
        assert Action.BYPASS not in seen

    play("standin", story)


def test_sa_the_kernel_sent_with_is_rekeyed_before_vpp_sends() -> None:
    async def story(rig: Rig) -> None:
        tap = await paired(rig)
        rig.kernel.rekeys_when_asked = False
        rig.kernel.add(sa_in(1, **CAMELLIA), sa_out(2), make_policy())
        rig.start()
        await rig.settle()
        assert goes(rig, OUT) == tap
        rig.kernel.add(sa_in(3))
        await until(lambda: rig.kernel.expired == [sa_out(2).id])
        await until(lambda: goes(rig, OUT) is Action.DISCARD)
        rig.kernel.rekey(sa_out(2))
        await until(lambda: "synced" in {row["state"] for row in sa_view(rig.engine)})
        await rig.settle()
        assert goes(rig, OUT) not in (Action.DISCARD, tap)

    play("standin", story)


def test_start_anew_goes_on_without_a_change() -> None:
    async def story(rig: Rig) -> None:
        await paired(rig)
        rig.kernel.add(*LACKING, make_policy(src="0.0.0.0/0", dst="10.9.9.9/32"))
        rig.start()
        await rig.settle()
        await rig.stop()
        assert await dry_run(rig.settings, rig.kernel) == []
        assert rig.standin is not None
        rig.standin.requests.clear()
        await rig.restart_engine()
        await rig.settle()
        changing = {name for name in rig.standin.requests if "_add_del" in name or "_replace" in name}
        assert changing == set()

    play("standin", story)


def test_all_of_it_goes_with_the_rest() -> None:
    async def story(rig: Rig) -> None:
        await paired(rig)
        rig.kernel.add(*LACKING)
        rig.start()
        await rig.settle()
        await rig.stop()
        cleared = await clean_up(rig.settings)
        assert (cleared.routes, cleared.tables, cleared.neighbors) == (2, 1, 2)
        assert rig.standin is not None
        assert rig.standin.world.neighbors.by_key == {}
        assert our_routes(rig.standin.world) == {}

    play("standin", story)


@pytest.mark.parametrize("others", [0, 1], ids=["same number", "another number"])
def test_pair_that_goes_and_comes_again_is_used_again(others: int) -> None:
    async def story(rig: Rig) -> None:
        tap = await paired(rig)
        rig.kernel.add(*LACKING)
        rig.start()
        await rig.settle()
        admin = await rig.admin()
        await set_pair(admin, rig.wan, "wan", False)
        for _ in range(others):
            await make_loopback(admin)
        again = await paired(rig)
        assert (again == tap) == (not others)
        await rig.settle()
        await until(lambda: goes(rig, OUT) == goes(rig, IN) == again)
        await set_pair(admin, rig.wan, "wan", False)
        await rig.settle()
        assert [goes(rig, packet) for packet in (OUT, IN)] == [Action.DISCARD, Action.BYPASS]

    play("standin", story)


def test_what_is_to_be_done_can_be_read_before() -> None:
    async def story(rig: Rig) -> None:
        await paired(rig)
        rig.kernel.add(*LACKING)
        assert [line for line in await dry_run(rig.settings, rig.kernel) if "tap" in line or "kernel" in line] == [
            "let IPv4 packets on tap4096 reach the kernel",
            "let IPv6 packets on tap4096 reach the kernel",
            "route 192.0.2.1/32 in table 0x49500000 into tap4096",
            "route 10.2.0.0/24 in table 0x49500000 into tap4096",
        ]

    play("standin", story)


# The rules


WIDE = PolicyRules((Rule(True, everything(False), everything(False)),), TunnelKey(LOCAL, REMOTE, 1, 2, 0))


@pytest.mark.parametrize(
    "wanted", [(), (WIDE,), (WIDE._replace(target=Action.DISCARD),), (WIDE._replace(target=KernelTap(TAP)),)]
)
def test_rules_for_what_peers_send_come_first_and_move_no_others(wanted: tuple[PolicyRules, ...]) -> None:
    steering = compute_steering(wanted, {LOCAL}, {REMOTE}, [(ESP, KernelTap(TAP))]).ip4
    assert len(steering.layers) == 1
    assert decide_by(steering, IN) == KernelTap(TAP)
    assert decide_by(steering, IN._replace(proto=UDP)) is Action.BYPASS
    assert decide_by(steering, OUT) == (wanted[0].target if wanted else Action.BYPASS)


MAC = bytes(range(2, 8))


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (NeighborAddDel(TAP, True, MAC), ""),
        (NeighborAddDel(TAP, True, MAC, False), ""),
        (NeighborAddDel(TAP, True, bytes(6)), "no tap of linux-cp's with that MAC"),
        (NeighborAddDel(TAP + 1, False, MAC), "no tap of linux-cp's"),
        (RouteAddDel(TAP, Prefix(LOCAL, 32), 23, True, 7, KERNEL_NEXT_HOP[False]), ""),
        (RouteAddDel(TAP, Prefix(LOCAL, 32), 23, True, 7, KERNEL_NEXT_HOP[True]), "does not lead to the kernel"),
        (RouteAddDel(TAP + 1, Prefix(LOCAL, 32), 23, True, 7, KERNEL_NEXT_HOP[False]), "does not lead to the kernel"),
        (RouteAddDel(TAP, Prefix(LOCAL, 32), 23, True), "next hop"),
    ],
)
def test_guard_lets_nothing_else_lead_to_a_tap(request_: Request, complaint: str) -> None:
    if not complaint:
        check_kernel_tap_request(request_, {TAP: MAC})
        return
    with pytest.raises(GuardError, match=complaint):
        check_kernel_tap_request(request_, {TAP: MAC})
