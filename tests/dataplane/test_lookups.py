"""On the wires of a real VPP: packets of any kind go where the kernel's lookup in any small set of policies sends them."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest
import scapy.packet as scapy_packet
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6

from support.gateway import CLEAR, DROP, Gateway, Tunnel, tell
from support.policy_sets import packets, policies
from support.spd import TCP, UDP, Packet, lookup, target_of
from support.vpp_box import vpp_binary
from vppipsec.kernel.text import format_addr
from vppipsec.kernel.xfrm.values import Policy
from vppipsec.sync.desired.policy_layers import Action

pytestmark = [pytest.mark.vpp, pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")]

SETS = 30
TUNNELS = {reqid: Tunnel(reqid) for reqid in (1, 2, 3)}
"""Those that are up; policies are for a fourth one, too."""


def stories(ip6: bool) -> list[tuple[list[Policy], list[Packet]]]:
    """Return sets of policies, each with packets that they may be for."""
    found = []

    @settings(max_examples=SETS, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        some = data.draw(st.lists(policies(ip6), min_size=3, max_size=8, unique_by=lambda policy: policy.id))
        found.append((some, data.draw(st.lists(packets(ip6, some), min_size=12, max_size=12))))

    draw()
    return found


def on_the_wire(packet: Packet) -> scapy_packet.Packet:
    """Return a packet with just as much of a header as tells its ports, or its type and code."""
    src, dst = format_addr(packet.src), format_addr(packet.dst)
    if packet.proto == UDP:
        head = struct.pack("!HHHH", packet.sport, packet.dport, 8 + 16, 0)
    elif packet.proto == TCP:
        head = struct.pack("!HHIIBBHHH", packet.sport, packet.dport, 1, 0, 5 << 4, 2, 1024, 0, 0)
    else:
        head = bytes((packet.sport, packet.dport, *bytes(6)))
    layer = (
        IPv6(src=src, dst=dst, nh=packet.proto) if len(packet.dst) == 16 else IP(src=src, dst=dst, proto=packet.proto)
    )
    return layer / scapy_packet.Raw(head)


def outcome_of(packet: Packet, actual: Sequence[Policy]) -> str:
    """Return what becomes of a packet by the kernel's lookup."""
    target = target_of(lookup(actual, packet))
    if isinstance(target, Action):
        return CLEAR if target is Action.BYPASS else DROP
    return TUNNELS[target.reqid].name if target.reqid in TUNNELS else DROP


@pytest.mark.parametrize("ip6", [False, True], ids=("ip4", "ip6"))
def test_packets_go_where_the_kernel_s_lookup_sends_them(ip6: bool) -> None:
    chance = random.Random(1)

    async def story(site: Gateway) -> None:
        await site.have(*(sa for tunnel in TUNNELS.values() for sa in tunnel.pair()))
        seen = set()
        for wanted, sent in stories(ip6):
            old = site.kernel.policies
            changes = [policy for policy in wanted if old.get(policy.id) != policy]
            changes += (policy for key, policy in old.items() if key not in {it.id for it in wanted})
            chance.shuffle(changes)
            for policy in changes:
                if policy in wanted:
                    site.kernel.add(policy)
                else:
                    site.kernel.delete(policy)
            await site.settle()
            actual = list(site.kernel.policies.values())
            expected = [outcome_of(packet, actual) for packet in sent]
            assert await site.fates(*(on_the_wire(packet) for packet in sent)) == expected
            seen |= set(expected)
        assert seen == {CLEAR, DROP, *(tunnel.name for tunnel in TUNNELS.values())}

    tell(story)
