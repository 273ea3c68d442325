"""What an earlier run left in VPP: it goes to the group whose it is, and what is nobody's goes away."""

from __future__ import annotations

import asyncio

import pytest

from support.build import LOCAL, REMOTE, make_policy, sa_in, sa_out
from support.faults import Trouble, of_kind
from support.rig import Rig, play_jumping
from support.small_vpp import ADMITTED, in_spec, out_spec
from vppipsec.kernel.xfrm.values import SaId
from vppipsec.status.summary import sa_view
from vppipsec.sync.actual.adoption import Leftovers
from vppipsec.vpp.api.interface import TagItf
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, Protect
from vppipsec.vpp.inventory import FoundAcl, FoundItf, FoundSa, Inventory
from vppipsec.vpp.ownership import INSTANCES, IP6_TAG, SAD_ID_FIRST
from vppipsec.vpp.state.tunnels import HeldSa, HeldTunnel
from vppipsec.vpp.types import Protection
from vppstandin.server import End

OUT, IN = out_spec(5), in_spec(6)
ACLS = (FoundAcl(5, "tag", ADMITTED), FoundAcl(6, "another", ADMITTED))


def found(*interfaces: FoundItf) -> Inventory:
    sas = (FoundSa(1, OUT, 11), FoundSa(2, IN, 12), FoundSa(3, in_spec(7), 13))
    return Inventory(interfaces, sas, ACLS, {}, 23, frozenset(), frozenset())


def test_tunnel_is_claimed_by_its_tag_with_the_sas_that_protect_it_and_those_that_wait() -> None:
    left = Leftovers(found(FoundItf(4, 9, "tag" + IP6_TAG, 2, True, Protection(1, (2,)), 5)))
    assert (len(left), str(left)) == (3, "1 tunnel, 1 SA and 1 ACL")
    held = left.claim("tag", [SaId(LOCAL, 7, 50), SaId(REMOTE, 8, 50)])
    sas = {1: HeldSa(OUT, 11), 2: HeldSa(IN, 12), 3: HeldSa(in_spec(7), 13)}
    assert held == HeldTunnel(4, 9, "tag" + IP6_TAG, 2, True, True, Protection(1, (2,)), sas, 5, ADMITTED, True)
    waiting = left.claim("another", [])
    assert waiting == HeldTunnel(acl=6, rules=ADMITTED)
    assert (len(left), left.rest()) == (0, [])


def test_what_nobody_claims_is_the_rest_and_of_two_tunnels_with_one_tag_one_is() -> None:
    left = Leftovers(found(*(FoundItf(n, n, "tag", None, False, None, None) for n in (4, 5))))
    assert left.claim("tag", []).sw_if_index == 4
    assert left.claim("tag", []).empty
    assert [(held.sw_if_index, list(held.sas)) for held in left.rest()] == [
        (5, []),
        (None, [1]),
        (None, [2]),
        (None, [3]),
        (None, []),
    ]
    assert left.rest() == []
    assert not left


@pytest.mark.parametrize("ends_at", [8, 9])
def test_sa_that_was_added_and_protects_nothing_yet_is_used_by_the_next_service(ends_at: int) -> None:
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


def test_interface_that_was_made_and_has_no_tag_yet_goes_and_one_of_others_stays() -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        await (await rig.admin()).run([CreateItf(INSTANCES[0] - 1)])
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
        made = (await admin.run([CreateItf(INSTANCES[-1])]))[0].extra
        await admin.run([AddSa(sad_ids[0], IN), AddSa(sad_ids[1], OUT), Protect(made, sad_ids[1], (sad_ids[0],))])
        rig.start()
        await rig.settle()
        assert rig.standin is not None
        assert rig.standin.world.protections.keys() == {made}

    play_jumping(story)


def test_interface_that_vpp_refused_to_tag_is_told_by_its_sas() -> None:
    trouble = Trouble()

    async def story(rig: Rig) -> None:
        trouble.refuse(of_kind(TagItf.message))
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
