"""What the tests of this directory send is what decodes into the values that it was made of."""

from __future__ import annotations

import pytest

from support import netlink_encode
from support.build import CBC, GCM128, LOCAL6, REMOTE6, SHA256, make_policy, make_sa, sa_in, sa_out
from vppipsec.kernel.xfrm.events import PolicyAdded, PolicyDeleted, PolicyExpired, SaAdded, SaDeleted, SaExpired
from vppipsec.kernel.xfrm.values import Encap, Limits, Mark, Policy, PolicyDir, Sa, Usage
from vppipsec.kernel.xfrm.wire import decode_xfrm

SAS = (
    sa_in(1),
    sa_out(2, if_id=7, mark=Mark(1, 2), direction=2, tfcpad=9, set_mark=Mark(3, 0xFF), extra_flags=1),
    make_sa(3, LOCAL6, REMOTE6, aead=None, crypt=CBC, auth=SHA256, encap=Encap(2, 4500, 4501, bytes(16))),
    sa_in(4, aead=None, crypt=CBC, auth=SHA256._replace(icv_bits=0), mode=0, proto=51, reqid=9),
    sa_in(5, aead=GCM128, limits=Limits(*range(8)), usage=Usage(1, 2, 3, 4)),
)
POLICIES = (
    make_policy(),
    make_policy(PolicyDir.FWD, "fd00::/64", "fd01::1/128", ends=(LOCAL6, REMOTE6), mark=Mark(1, 1), if_id=3, type=1),
    make_policy(templates=(), action=1, priority=0),
    make_policy(templates=make_policy().templates * 3),
)


@pytest.mark.parametrize("sa", SAS, ids=lambda sa: f"{sa.spi}")
def test_sa_survives_encoding_and_decoding(sa: Sa) -> None:
    assert decode_xfrm(netlink_encode.new_sa(sa)) == SaAdded(sa)
    assert decode_xfrm(netlink_encode.new_sa(sa, updated=True)) == SaAdded(sa, updated=True)
    assert decode_xfrm(netlink_encode.del_sa(sa)) == SaDeleted(sa.id, sa)
    expired = decode_xfrm(netlink_encode.expire_sa(sa, hard=True))
    assert isinstance(expired, SaExpired)
    assert (expired.sa.id, expired.hard) == (sa.id, True)


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_policy_survives_encoding_and_decoding(policy: Policy) -> None:
    assert decode_xfrm(netlink_encode.new_policy(policy)) == PolicyAdded(policy)
    assert decode_xfrm(netlink_encode.del_policy(policy)) == PolicyDeleted(policy.id)
    assert decode_xfrm(netlink_encode.expire_policy(policy, hard=True)) == PolicyExpired(policy, hard=True)


def test_window_beyond_a_byte_goes_into_the_attribute_for_it() -> None:
    event = decode_xfrm(netlink_encode.new_sa(sa_in(1, replay_window=1 << 31)))
    assert isinstance(event, SaAdded)
    assert event.sa.replay_window == 1 << 31
