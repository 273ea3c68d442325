"""What an earlier run left in VPP: it goes to the group whose it is, and what is nobody's goes away."""

from __future__ import annotations

import asyncio

import pytest

from support.build import LOCAL, REMOTE, make_policy, sa_in, sa_out
from support.faults import Trouble, of_kind
from support.rig import Rig, play_jumping
from support.small_vpp import INBOUND_RULES, in_spec, out_spec
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.status.summary import sa_view
from vppipsec.sync.actual.adoption import Adoption
from vppipsec.vpp.api.interface import SetInterfaceTag
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd, TunnelProtect
from vppipsec.vpp.inventory import FoundAcl, FoundInterface, FoundSa, Inventory
from vppipsec.vpp.ownership import INSTANCES, IP6_TAG, SAD_ID_FIRST
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel
from vppipsec.vpp.types import Protection
from vppstandin.server import End

OUT, IN = out_spec(5), in_spec(6)
ACLS = (FoundAcl(5, "tag", INBOUND_RULES), FoundAcl(6, "another", INBOUND_RULES))


def found(*interfaces: FoundInterface) -> Inventory:
    sas = (FoundSa(1, OUT, 11), FoundSa(2, IN, 12), FoundSa(3, in_spec(7), 13))
    return Inventory(interfaces, sas, ACLS, {}, 23, frozenset(), frozenset())


def test_tunnel_is_adopted_by_its_tag_with_its_sas() -> None:
    left = Adoption(found(FoundInterface(4, 9, "tag" + IP6_TAG, 2, True, Protection(1, (2,)), 5)))
    assert (len(left), str(left)) == (3, "1 tunnel, 1 SA and 1 ACL")
    actual = left.adopt("tag", [SaId(LOCAL, 7, 50), SaId(REMOTE, 8, 50)])
    sas = {1: ActualSa(OUT, 11), 2: ActualSa(IN, 12), 3: ActualSa(in_spec(7), 13)}
    assert actual == ActualTunnel(
        4, 9, "tag" + IP6_TAG, 2, True, True, Protection(1, (2,)), sas, 5, INBOUND_RULES, True
    )
    waiting = left.adopt("another", [])
    assert waiting == ActualTunnel(acl=6, rules=INBOUND_RULES)
    assert (len(left), left.pop_unclaimed()) == (0, [])


def test_unclaimed_state_includes_one_of_two_tunnels_with_one_tag() -> None:
    left = Adoption(found(*(FoundInterface(n, n, "tag", None, False, None, None) for n in (4, 5))))
    assert left.adopt("tag", []).sw_if_index == 4
    assert left.adopt("tag", []).is_empty
    assert [(actual.sw_if_index, list(actual.sas)) for actual in left.pop_unclaimed()] == [
        (5, []),
        (None, [1]),
        (None, [2]),
        (None, [3]),
        (None, []),
    ]
    assert left.pop_unclaimed() == []
    assert not left


@pytest.mark.parametrize("ends_at", [8, 9])
def test_added_sa_without_protection_is_adopted(ends_at: int) -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        rig.start()
        assert rig.work is not None
        trouble.at(ends_at, End.CONNECTION, rig.work.cancel)  # the policy's rules, interface, ACL, one SA or both
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await asyncio.wait([rig.work])
        assert rig.standin is not None
        before = set(rig.standin.world.sas)
        await rig.restart_engine()
        await rig.settle()
        assert before
        assert before <= {row["sad_id"] for row in sa_view(rig.engine)}
        assert rig.standin.requests.count("ipsec_sad_entry_add_v2") == 2

    play_jumping(story, trouble)


def test_untagged_own_interface_goes_and_a_foreign_one_stays() -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        await (await rig.admin()).run([IpsecItfCreate(INSTANCES[0] - 1)])
        rig.start()
        assert rig.work is not None
        trouble.at(5, End.CONNECTION, rig.work.cancel)
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await asyncio.wait([rig.work])
        assert rig.standin is not None
        assert [itf.instance for itf in rig.standin.world.interfaces.values()][2:] == [INSTANCES[0] - 1, INSTANCES[0]]
        rig.kernel.delete(sa_in(1), sa_out(2), make_policy())
        await rig.restart_engine()
        await rig.settle()
        assert [itf.instance for itf in rig.standin.world.interfaces.values()][2:] == [INSTANCES[0] - 1]

    play_jumping(story, trouble)


@pytest.mark.parametrize("sad_ids", [(1, 2), (SAD_ID_FIRST, 2)])
def test_interface_without_a_tag_that_sas_of_others_protect_stays(sad_ids: tuple[int, int]) -> None:
    async def story(rig: Rig) -> None:
        admin = await rig.admin()
        made = (await admin.run([IpsecItfCreate(INSTANCES[-1])]))[0].value
        await admin.run(
            [SadEntryAdd(sad_ids[0], IN), SadEntryAdd(sad_ids[1], OUT), TunnelProtect(made, sad_ids[1], (sad_ids[0],))]
        )
        rig.start()
        await rig.settle()
        assert rig.standin is not None
        assert rig.standin.world.protections.keys() == {made}

    play_jumping(story)


def test_interface_that_vpp_refused_to_tag_is_told_by_its_sas() -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        trouble.refuse(of_kind(SetInterfaceTag.message))
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await asyncio.sleep(0.5)
        assert rig.standin is not None
        (made,) = rig.standin.world.protections
        trouble.heal()
        await rig.restart_engine()
        await rig.settle()
        itfs = [index for index, itf in rig.standin.world.interfaces.items() if itf.instance in INSTANCES]
        assert itfs == list(rig.standin.world.protections) == [made]
        assert rig.kernel.expired == []

    play_jumping(story, trouble)
