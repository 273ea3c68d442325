"""Requests that protect gre and ipip interfaces, or block what they would send in clear. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.vpp.api.ipsec import AddSa, DelSa, Protect, Unprotect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.gre_ipip import MUTE, MUTED, Overlay
from vppipsec.vpp.ownership import MUTE_SAD_ID


def next_requests(
    guarded: Mapping[Overlay, GroupKey | None],
    unmuted: Iterable[Overlay],
    surplus: Iterable[Overlay],
    has_mute: bool,
) -> list[Request]:
    """Return what to send now so that those of `unmuted` are muted and those of `surplus` are protected no more."""
    if guarded and not has_mute:
        return [AddSa(MUTE_SAD_ID, MUTE)]
    requests: list[Request] = [Protect(it.sw_if_index, MUTED.outbound, MUTED.inbound) for it in unmuted]
    requests += [Unprotect(it.sw_if_index) for it in surplus]
    if has_mute and not guarded and not requests:
        requests.append(DelSa(MUTE_SAD_ID))
    return requests
