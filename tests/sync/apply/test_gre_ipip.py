"""Interfaces of others, gre and ipip: who protects them, and that they are muted while nobody can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from support.build import CBC, ENV, LOCAL, REMOTE, SHA256, host_policies, make_policy, sa_in, sa_out, transport
from support.lanwan import make_ipip
from support.rig import KINDS, Rig, play
from vppipsec.kernel.xfrm.sad_spd import KernelModel, TunnelKey, tunnel_keys_of_policy
from vppipsec.kernel.xfrm.values import Encap, Policy, SaExtraFlag, SaFlag
from vppipsec.status.summary import sa_view, sync_view
from vppipsec.status.text import policy_text
from vppipsec.status.tunnels import policy_rows, tunnel_rows
from vppipsec.sync.cleanup import clean_up
from vppipsec.sync.desired.gre_ipip import GreIpipClaims, cleartext_discard_rules, gre_ipip_claims
from vppipsec.sync.desired.outbound_policy import outbound_policies
from vppipsec.sync.desired.policy_layers import Action, KernelTap, PlacementKind, PolicyRules, compute_steering
from vppipsec.sync.desired.state import OffloadStatus
from vppipsec.sync.desired.tunnel import translate
from vppipsec.sync.engine import Engine
from vppipsec.sync.plan.gre_ipip import gre_ipip_requests
from vppipsec.sync.preview import dry_run
from vppipsec.vpp.api.client import VppClient
from vppipsec.vpp.api.ipsec import SadEntryAdd, SadEntryDel, TunnelProtect, TunnelUnprotect
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION, BLOCK_SA, GreIpipInterface
from vppipsec.vpp.inventory import read_protections
from vppipsec.vpp.ownership import BLOCK_SAD_ID
from vppipsec.vpp.types import Prefix, Protection, Rule, SadFlag, TunnelFlag

ONE, TWO = TunnelKey(LOCAL, REMOTE, 0, 1, 0), TunnelKey(LOCAL, REMOTE, 0, 2, 0)
GRE = GreIpipInterface(7, "gre0", LOCAL, REMOTE, (47,))
IPIP = GreIpipInterface(8, "ipip0", LOCAL, REMOTE, (4, 41))
HOSTS = Prefix(LOCAL, 32), Prefix(REMOTE, 32)
IN_SA, OUT_SA = sa_in(1, mode=0), sa_out(2, mode=0)

# Whose an interface is


def says(gre_ipip_interfaces: Sequence[GreIpipInterface], *policies: Policy) -> GreIpipClaims:
    return gre_ipip_claims(gre_ipip_interfaces, outbound_policies(policies))


def test_transport_mode_policy_belongs_to_the_tunnel_of_its_hosts() -> None:
    assert [tunnel_keys_of_policy(policy) for policy in host_policies(47)] == 3 * [(ONE,)]
    wide = transport(make_policy(src="10.1.0.0/24"))
    assert tunnel_keys_of_policy(wide) == (TunnelKey(bytes(4), bytes(4), 0, 1, 0),)


@pytest.mark.parametrize("proto", [0, 47])
def test_an_interface_is_the_groups_whose_policy_covers_its_packets(proto: int) -> None:
    assert says([GRE], *host_policies(proto)) == GreIpipClaims({GRE: ONE}, {ONE: GRE})


@pytest.mark.parametrize(
    "policies",
    [
        (),
        host_policies(4),
        host_policies(47, ends=(LOCAL, bytes((192, 0, 2, 9)))),
        (make_policy(),),
        host_policies(47, if_id=5),
        host_policies(47)[1:],
        (make_policy(src="192.0.2.1/32", dst="192.0.2.2/32", templates=()), *host_policies(47, priority=2000)),
    ],
    ids=["none", "another protocol", "another peer", "others' packets", "a VTI's", "inbound ones", "a bypass before"],
)
def test_an_interface_whose_packets_go_their_normal_way_is_left_alone(policies: Sequence[Policy]) -> None:
    assert says([GRE], *policies) == GreIpipClaims({}, {})


@pytest.mark.parametrize(
    "policy",
    [
        make_policy(src="0.0.0.0/0", dst="0.0.0.0/0"),
        make_policy(src="192.0.2.1/32", dst="192.0.2.2/32"),
        make_policy(src="192.0.2.0/24", dst="192.0.2.0/24", action=1),
        transport(make_policy(src="192.0.2.0/24", dst="192.0.2.0/24")),
    ],
    ids=["in tunnel mode, for everything", "in tunnel mode", "a block", "in transport mode, for a net"],
)
def test_an_interface_that_nobodys_sas_can_protect_is_guarded_all_the_same(policy: Policy) -> None:
    claims = says([GRE], policy, *host_policies(47, priority=2000))
    assert claims.must_encrypt.keys() == {GRE}
    assert claims.must_encrypt[GRE] not in (ONE,)


def test_of_two_interfaces_for_one_tunnel_one_is_blocked() -> None:
    assert says([IPIP, GRE], *host_policies(0)) == GreIpipClaims({GRE: ONE, IPIP: None}, {ONE: GRE})
    assert says([IPIP, GRE], *host_policies(47), *host_policies(4, 2)) == GreIpipClaims(
        {GRE: ONE, IPIP: TWO}, {ONE: GRE, TWO: IPIP}
    )


def test_gre_ipip_with_two_tunnels_for_its_families_has_none() -> None:
    assert says([IPIP], *host_policies(4), *host_policies(41)) == GreIpipClaims({IPIP: ONE}, {ONE: IPIP})
    assert says([IPIP], *host_policies(4), *host_policies(41, 2)) == GreIpipClaims({IPIP: None}, {})


def test_an_interface_that_vpp_cannot_protect_goes_after_one_that_it_can() -> None:
    unsupported_reason = GRE._replace(sw_if_index=5, name="gre1", unsupported_reason="it has a key")
    assert says([unsupported_reason], *host_policies(47)) == GreIpipClaims(
        {unsupported_reason: None}, {ONE: unsupported_reason}
    )
    assert says([unsupported_reason, GRE], *host_policies(47)) == GreIpipClaims(
        {GRE: ONE, unsupported_reason: None}, {ONE: GRE}
    )
    many = GRE._replace(remote=bytes(4), unsupported_reason="it has several remotes")
    assert says([many], make_policy(src="0.0.0.0/0", dst="0.0.0.0/0")) == GreIpipClaims({}, {})
    assert says([many], *host_policies(47)) == GreIpipClaims({}, {ONE: many})
    assert says([many, GRE], *host_policies(47)) == GreIpipClaims({GRE: ONE}, {ONE: GRE})


def test_cleartext_discard_rules_come_from_inbound_policies() -> None:
    back = Rule(True, HOSTS[1], HOSTS[0], 47)
    assert cleartext_discard_rules([GRE], host_policies(47)) == [back]
    assert cleartext_discard_rules([IPIP], host_policies(0)) == [back._replace(proto=4), back._replace(proto=41)]
    optional = [replace(it, templates=(replace(it.templates[0], optional=True),)) for it in host_policies(47)]
    for policies in (host_policies(47)[:1], host_policies(4), host_policies(47, if_id=3), optional):
        assert cleartext_discard_rules([GRE], policies) == []


def test_cleartext_discard_rules_come_first_and_disturb_no_others() -> None:
    back, esp = Rule(True, HOSTS[1], HOSTS[0], 47), Rule(True, HOSTS[1], HOSTS[0], 50)
    wanted = [PolicyRules((Rule(True, Prefix(bytes(4), 0), Prefix(bytes((10, 2, 0, 0)), 16)),), ONE)]
    found = compute_steering(wanted, [LOCAL], [], [(esp, KernelTap(9)), (back, Action.DISCARD)])
    drops, others = found.ip4.layers
    assert (drops.rules, drops.routes) == ((back,), {HOSTS[0]: Action.DISCARD})
    assert (others.rules[0], others.routes[HOSTS[0]]) == (esp, KernelTap(9))
    (place,) = found.placements
    assert (place.kind, place.layers) == (PlacementKind.LAYER, (1,))
    assert compute_steering((), [], [], [(back, Action.DISCARD)]).ip4.layers == (drops,)


def test_block_sa_comes_first_and_goes_last() -> None:
    assert gre_ipip_requests({GRE: None}, [GRE], [], False) == [SadEntryAdd(BLOCK_SAD_ID, BLOCK_SA)]
    assert gre_ipip_requests({GRE: None}, [GRE], [IPIP], True) == [
        TunnelProtect(7, BLOCK_SAD_ID, ()),
        TunnelUnprotect(8),
    ]
    assert gre_ipip_requests({}, [], [IPIP], True) == [TunnelUnprotect(8)]
    assert gre_ipip_requests({}, [], [], True) == [SadEntryDel(BLOCK_SAD_ID)]
    assert gre_ipip_requests({}, [], [], False) == []


# What protects it


def test_transport_mode_sas_protect_gre_ipip_and_create_no_interface() -> None:
    model = KernelModel()
    encap = Encap(2, 4500, 4501, bytes(4))
    flagged = {"flags": SaFlag.DECAP_DSCP | SaFlag.NOECN, "extra_flags": SaExtraFlag.DONT_ENCAP_DSCP, "encap": encap}
    model.replace([OUT_SA._replace(**flagged), IN_SA._replace(**flagged)], host_policies(47))
    desired = translate(ONE, model.tunnels[ONE], replace(ENV, gre_ipip={ONE: GRE}))
    tunnel = desired.tunnel
    assert tunnel is not None
    assert (tunnel.gre_ipip, tunnel.inbound_rules, [it.spi for it in (*tunnel.inbound, *tunnel.outbound)]) == (
        GRE,
        None,
        [1, 2],
    )
    for spec in (*tunnel.inbound, *tunnel.outbound):
        assert not spec.flags & SadFlag.IS_TUNNEL
        assert spec.flags & SadFlag.UDP_ENCAP
        assert spec.tunnel_flags == TunnelFlag.NONE


@pytest.mark.parametrize(
    ("gre_ipip_interfaces", "reason"),
    [
        ({}, "transport mode: VPP has no gre or ipip interface between these hosts that its policy is for"),
        (
            {ONE: GRE._replace(unsupported_reason="it has a key")},
            "transport mode for gre0, which sends nothing: it has a key",
        ),
        (
            {ONE: GRE._replace(remote=bytes(4), unsupported_reason="it has several remotes")},
            "transport mode for gre0, which goes on in clear: it has several remotes",
        ),
    ],
)
def test_without_an_interface_that_fits_transport_mode_is_the_kernels(
    gre_ipip_interfaces: dict[TunnelKey, GreIpipInterface], reason: str
) -> None:
    model = KernelModel()
    model.replace([OUT_SA, IN_SA], host_policies(47))
    desired = translate(ONE, model.tunnels[ONE], replace(ENV, gre_ipip=gre_ipip_interfaces))
    assert desired.tunnel is None
    assert (OffloadStatus.UNSUPPORTED, reason) in {(it.status, it.reason) for it in desired.decisions.values()}


# In VPP


async def made(rig: Rig) -> int:
    """Have an ipip interface in VPP, known to a running engine."""
    index = await make_ipip(await rig.admin(), "192.0.2.1", "192.0.2.2")
    if rig.work is None:
        rig.start()
    await until(lambda: any(it.sw_if_index == index for it in rig.engine.environment.gre_ipip))
    await rig.settle()
    return index


async def until(told: Callable[[], bool]) -> None:
    while not told():  # noqa: ASYNC110  # VPP's events reach the engine alone
        await asyncio.sleep(0.001)


async def protection_of(rig: Rig, index: int) -> Protection | None:
    """Return what protects an interface, in VPP's own words."""
    return (await read_protections(rig.admins[0], index)).get(index)


POLICIES = host_policies(4)


@pytest.mark.parametrize("kind", KINDS)
def test_gre_ipip_is_blocked_whenever_its_policy_has_no_sas(kind: str) -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        assert await protection_of(rig, index) is None
        rig.kernel.add(*POLICIES)
        await rig.settle()
        assert await protection_of(rig, index) == BLOCK_PROTECTION
        rig.kernel.add(IN_SA)
        await rig.settle()
        assert await protection_of(rig, index) == BLOCK_PROTECTION
        rig.kernel.add(OUT_SA)
        await rig.settle()
        assert [row["state"] for row in sa_view(rig.engine)] == ["synced", "synced"]
        assert {row["tunnel"] for row in sa_view(rig.engine)} == {"ipip0"}
        (row,) = tunnel_rows(rig.engine)
        assert (row["tunnel"], row["mode"], row["state"], row["routes"]) == ("ipip0", "transport", "synced", [])
        (policy,) = [row for row in policy_rows(rig.engine) if row["direction"] == "out"]
        assert (policy["steering"], policy["by"], policy["tunnel"]) == ("routed", "protection", "ipip0")
        assert "  into ipip0 by protection" in policy_text([policy])
        assert sync_view(rig.engine)["vpp"]["tunnels"] == 1
        rig.kernel.rekey(OUT_SA)
        await rig.settle()
        rig.kernel.delete(*list(rig.kernel.sas.values()))
        await rig.settle()
        assert await protection_of(rig, index) == BLOCK_PROTECTION
        (policy,) = [row for row in policy_rows(rig.engine) if row["direction"] == "out"]
        assert (policy["steering"], policy["reason"]) == ("dropped", "there is no SA")
        rig.kernel.delete(*POLICIES)
        await rig.settle()
        assert await protection_of(rig, index) is None

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_interface_without_a_supported_tunnel_stays_blocked(kind: str) -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        lacking = {"mode": 0, "aead": None, "crypt": CBC._replace(name="cbc(camellia)"), "auth": SHA256}
        rig.kernel.add(*POLICIES, sa_in(1, **lacking), sa_out(2, **lacking))
        await rig.settle()
        assert await protection_of(rig, index) == BLOCK_PROTECTION
        assert {row["state"] for row in sa_view(rig.engine)} == {"unsupported"}
        rig.kernel.add(sa_in(3, mode=0), sa_out(4, mode=0))
        await rig.settle()
        assert await protection_of(rig, index) not in (None, BLOCK_PROTECTION)

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_in_tunnel_mode_mutes_an_interface_and_says_so(kind: str) -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        rig.kernel.add(sa_in(1), sa_out(2), make_policy(src="192.0.2.1/32", dst="192.0.2.2/32"), make_policy())
        await rig.settle()
        assert await protection_of(rig, index) == BLOCK_PROTECTION
        rows = {row["selector"]: row["reason"] for row in policy_rows(rig.engine, REMOTE)}
        assert rows["192.0.2.1/32 > 192.0.2.2/32"].endswith("ipip0 sends nothing")
        assert rows["10.1.0.0/24 > 10.2.0.0/24"] == ""

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_another_group_takes_an_interface_over(kind: str) -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        await rig.settle()
        before = await protection_of(rig, index)
        others = sa_in(3, 2, mode=0), sa_out(4, 2, mode=0)
        rig.kernel.add(*others, *host_policies(0, 2, priority=5))
        await rig.settle()
        after = await protection_of(rig, index)
        assert None not in (before, after)
        assert before != after != BLOCK_PROTECTION
        rig.kernel.delete(*host_policies(0, 2, priority=5))
        await rig.settle()
        rig.kernel.delete(*others)
        await rig.settle()

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interface_that_goes_and_comes_is_protected_again(kind: str) -> None:
    async def story(rig: Rig) -> None:
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        rig.start()
        await rig.settle()
        assert {row["state"] for row in sa_view(rig.engine)} == {"unsupported"}
        index = await made(rig)
        assert await protection_of(rig, index) not in (None, BLOCK_PROTECTION)
        admin = await rig.admin()
        await admin.call("ipip_del_tunnel", {"sw_if_index": index})
        again = await make_ipip(admin, "192.0.2.1", "192.0.2.2")  # before the engine can have looked
        while await protection_of(rig, again) in (None, BLOCK_PROTECTION):  # noqa: ASYNC110  # it is VPP that is asked
            await asyncio.sleep(0.001)
        await rig.settle()
        await admin.call("ipip_del_tunnel", {"sw_if_index": again})
        await until(lambda: not rig.engine.environment.gre_ipip)
        await rig.settle()
        assert not rig.engine.vpp.has_block_sa

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [False, True])
def test_restarted_service_keeps_right_protections_and_blocks_the_rest(kind: str, changes: bool) -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        await rig.settle()
        before = await protection_of(rig, index)
        await rig.stop()
        if changes:
            rig.kernel.delete(IN_SA, OUT_SA)
        await rig.restart_engine()
        await rig.settle()
        assert await protection_of(rig, index) == (BLOCK_PROTECTION if changes else before)
        await rig.stop()
        rig.kernel.delete(*list(rig.kernel.policies.values()))
        await rig.restart_engine()
        await rig.settle()
        assert await protection_of(rig, index) is None

    play(kind, story)


def test_restarted_service_unprotects_nothing_before_it_knows_policies() -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        await rig.settle()
        await rig.stop()
        assert rig.standin is not None
        asked = len(rig.standin.requests)
        rig.kernel.forget_listener()
        engine = rig.engine = Engine(rig.settings, rig.kernel)
        adopt_vpp = engine.adopt_vpp

        async def interrupted(client: VppClient) -> None:
            await adopt_vpp(client)
            engine._on_interface_event(index)

        engine.adopt_vpp = interrupted  # type: ignore[method-assign]  # to be interrupted
        rig.start()
        await rig.settle()
        more = rig.standin.requests[asked:]
        assert "gre_tunnel_v2_dump" in more
        assert not {"ipsec_tunnel_protect_del", "ipsec_tunnel_protect_update"} & set(more)

    play("standin", story)


@pytest.mark.parametrize("kind", KINDS)
def test_clearing_lets_go_of_interfaces_and_leaves_nothing(kind: str) -> None:
    async def story(rig: Rig) -> None:
        index = await made(rig)
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        await rig.settle()
        await rig.stop()
        assert "3 SAs" in str(await clean_up(rig.settings))
        assert await protection_of(rig, index) is None
        assert await (await rig.admin()).dump("ipsec_sa_v5_dump") == []

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_tells_of_muting_and_protecting(kind: str) -> None:
    async def story(rig: Rig) -> None:
        await make_ipip(await rig.admin(), "192.0.2.1", "192.0.2.2")
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        lines = await dry_run(rig.settings, rig.kernel)
        assert f"add the SA {BLOCK_SAD_ID:#x} that sends nothing" in lines
        assert "let ipip0 send nothing" in lines
        assert any(line.startswith("protect ipip0 with SA 0x49500001 out") for line in lines)

    play(kind, story)


@pytest.mark.parametrize("kind", KINDS)
def test_what_others_protect_is_left_to_them(kind: str) -> None:
    async def story(rig: Rig) -> None:
        admin = await rig.admin()
        index = await make_ipip(admin, "192.0.2.1", "192.0.2.2")
        assert [reply.retval for reply in await admin.run([SadEntryAdd(5, BLOCK_SA), TunnelProtect(index, 5, ())])] == [
            0,
            0,
        ]
        rig.kernel.add(*POLICIES, IN_SA, OUT_SA)
        rig.start()
        await rig.settle()
        assert await protection_of(rig, index) == Protection(5, ())
        assert {row["state"] for row in sa_view(rig.engine)} == {"unsupported"}

    play(kind, story)
