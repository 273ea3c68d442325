"""How long packets may be that go into a tunnel: what the kernel says, from what VPP's link says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.build import CBC, ENV, LOCAL6, REMOTE, REMOTE6, SHA256, make_policy, make_sa, sa_in, sa_out
from support.rig import KINDS, Rig, play
from support.small_vpp import Bench, in_spec, out_spec, tunnel
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import Algorithm, Encap, Policy, Sa
from vppipsec.sync.desired.mtu import max_inner_packet
from vppipsec.sync.desired.state import DesiredTunnel
from vppipsec.sync.desired.tunnel import translate
from vppipsec.vpp.api.interface import SetInterfaceMtu
from vppipsec.vpp.types import MAX_MTU, NO_INDEX

CBC_SHA256 = {"aead": None, "crypt": CBC, "auth": SHA256}
NAT = {"encap": Encap(2, 4500, 4500, bytes(4))}


def wanted(link_mtu: int, *items: Sa | Policy, remote: bytes = REMOTE, if_id: int = 7) -> DesiredTunnel:
    model = KernelModel()
    sas = [it._replace(if_id=if_id) for it in items if isinstance(it, Sa)]
    model.replace(sas[::-1], [replace(it, if_id=if_id) for it in items if isinstance(it, Policy)])
    ((key, tunnel),) = model.tunnels.items()
    found = translate(key, tunnel, replace(ENV, link_mtus={remote: link_mtu})).tunnel
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("change", "link_mtu", "longest"),
    [
        ({}, 1500, 1446),
        ({}, 1501, 1446),
        ({}, 1499, 1442),
        ({}, 9000, 8946),
        (NAT, 1500, 1438),
        (CBC_SHA256, 1500, 1438),
        (CBC_SHA256 | NAT, 1500, 1422),
        (CBC_SHA256 | {"crypt": Algorithm("cbc(des3_ede)", bytes(24))}, 1500, 1446),
        (CBC_SHA256 | {"crypt": Algorithm("ecb(cipher_null)", b"")}, 1500, 1454),
        (CBC_SHA256 | {"auth": Algorithm("hmac(sha512)", bytes(64), 256)}, 1500, 1422),
        ({}, 100, 68),
    ],
)
def test_longest_packet_that_still_fits_the_link_in_esp(change: dict[str, object], link_mtu: int, longest: int) -> None:
    assert wanted(link_mtu, sa_in(1, **change), sa_out(2, **change), make_policy()).mtu == longest


def test_of_a_tunnel_over_ipv6_the_longer_header_counts() -> None:
    sas = make_sa(1, REMOTE6, LOCAL6), make_sa(2, LOCAL6, REMOTE6)
    assert wanted(1500, *sas, make_policy(ends=(LOCAL6, REMOTE6)), remote=REMOTE6).mtu == 1426


def test_mtu_follows_the_newest_sa_and_is_left_where_unknown() -> None:
    items = sa_in(1), sa_out(2, **CBC_SHA256), sa_out(3), make_policy()
    assert wanted(1500, *items).mtu == 1446
    assert wanted(0, *items).mtu == 0
    assert wanted(1500, *items, if_id=0).mtu == 0
    assert max_inner_packet(1 << 20, out_spec(1)) == MAX_MTU


def test_an_interface_is_told_before_it_is_up_and_again_where_that_changes() -> None:
    bench = Bench()
    want = replace(tunnel([in_spec(1)], [out_spec(2)]), mtu=1446)
    bench.want(0, want, {})
    bench.converge()
    index = bench.sides[0].actual.sw_if_index
    assert [it for it in bench.sent if isinstance(it, SetInterfaceMtu)] == [SetInterfaceMtu(index, 1446)]
    for mtu, told in ((1446, []), (1438, [SetInterfaceMtu(index, 1438)]), (0, [])):
        bench.want(0, replace(want, mtu=mtu), {})
        bench.converge()
        assert bench.sent == told


@pytest.mark.parametrize("kind", KINDS)
def test_tunnels_follow_the_link_that_they_leave_by(kind: str) -> None:
    async def story(rig: Rig) -> None:
        admin = await rig.admin()

        async def mtus() -> list[list[int]]:
            found = await admin.dump("sw_interface_dump", {"sw_if_index": NO_INDEX})
            return [list(itf.mtu) for itf in found if itf.interface_dev_type == "IPSEC Tunnel"]

        rig.kernel.add(sa_in(1, if_id=7), sa_out(2, if_id=7), make_policy(if_id=7))
        rig.start()
        await rig.settle()
        assert await mtus() == [[8946, 0, 0, 0]]
        for link, told in ((1500, [1446, 0, 0, 0]), (1200, [1146, 0, 1280, 0])):
            await admin.call("sw_interface_set_mtu", {"sw_if_index": rig.wan, "mtu": [link, 0, 0, 0]})
            rig.engine.request_resync()
            await rig.settle()
            assert await mtus() == [told]
        await rig.restart_engine()
        await rig.settle()
        assert await mtus() == [[1146, 0, 1280, 0]]

    play(kind, story)
