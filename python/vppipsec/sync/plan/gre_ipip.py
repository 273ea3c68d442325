"""Requests that block gre and ipip interfaces or end their protection. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.vpp.api.ipsec import SadEntryAdd, SadEntryDel, TunnelProtect, TunnelUnprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import BLOCK_PROTECTION, BLOCK_SA, GreIpipInterface
from vppipsec.vpp.ownership import BLOCK_SAD_ID


def gre_ipip_requests(
    guarded: Mapping[GreIpipInterface, TunnelKey | None],
    unblocked: Iterable[GreIpipInterface],
    surplus: Iterable[GreIpipInterface],
    has_block_sa: bool,
) -> list[Request]:
    """Return what to send now to block the interfaces in `unblocked` and to end the protection of those in `surplus`."""
    if guarded and not has_block_sa:
        return [SadEntryAdd(BLOCK_SAD_ID, BLOCK_SA)]
    requests: list[Request] = [
        TunnelProtect(it.sw_if_index, BLOCK_PROTECTION.outbound, BLOCK_PROTECTION.inbound) for it in unblocked
    ]
    requests += [TunnelUnprotect(it.sw_if_index) for it in surplus]
    if has_block_sa and not guarded and not requests:
        requests.append(SadEntryDel(BLOCK_SAD_ID))
    return requests
