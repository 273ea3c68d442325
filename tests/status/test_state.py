"""How far VPP is with an SA is told by what VPP holds, and a refusal is laid to the SA that it belongs to."""

from __future__ import annotations

import pytest

from support.build import make_policy, sa_in, sa_out
from support.tunnel_states import OLD_IN, OLD_OUT, group, spec_of
from vppipsec.kernel.xfrm.values import Encap, Mark
from vppipsec.status.state import (
    PENDING,
    REFUSED,
    SYNCED,
    UNSUPPORTED,
    SaState,
    current_decision,
    refusal_texts,
    sa_state_of,
)
from vppipsec.sync.actual.backoff import RefusedRequest
from vppipsec.sync.actual.vpp_state import TunnelState
from vppipsec.sync.desired.state import OffloadDecision, OffloadStatus
from vppipsec.vpp.api.interface import SetInterfaceUp
from vppipsec.vpp.api.ip import RouteAddDel
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd, SadEntryDel, SadEntryUpdate, TunnelProtect
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.state.tunnels import ActualSa, ActualTunnel
from vppipsec.vpp.types import NO_INDEX, Prefix, Protection, SaSpec

SPIS = (1, 2, 3, 4)
INDEX = 7


def hold(
    state: TunnelState, *spis: int, protection: tuple[int, tuple[int, ...]] | None = None, up: bool = True
) -> TunnelState:
    """Let VPP hold SAs, numbered by their SPIs, and a protection."""
    unnumbered_from = state.desired.tunnel.unnumbered_from if state.desired.tunnel is not None else None
    state.actual = ActualTunnel(3, INDEX, "tag", unnumbered_from, up=up)
    state.actual.sas = {spi: ActualSa(spec_of(state, spi), 100 + spi) for spi in spis}
    state.actual.protection = Protection(*protection) if protection is not None else None
    return state


def refuse(state: TunnelState, key: SaSpec | Request, reason: str = "INVALID_VALUE (-7)") -> TunnelState:
    state.refusals[key] = RefusedRequest(reason, 1.0, 0.0)
    return state


def sa_states(state: TunnelState) -> list[tuple[str, str]]:
    """Return state and reason of each SA by SPI."""
    by_spi = {sa_id.spi: sa_state_of(decision, state) for sa_id, decision in state.desired.decisions.items()}
    return [by_spi[spi][:2] for spi in sorted(by_spi)]


GOOD, BUSY = (SYNCED, ""), (PENDING, "being programmed")
OLDER = (SYNCED, "a newer one is used")


def test_nothing_in_vpp_is_pending() -> None:
    assert sa_states(group()) == [BUSY] * 4


def test_sa_in_vpp_without_protection_is_not_synced() -> None:
    assert sa_states(hold(group(), *SPIS)) == [BUSY] * 4


def test_superseded_outbound_sa_is_synced_and_says_so() -> None:
    assert sa_states(hold(group(), *SPIS, protection=(4, (1, 3)))) == [GOOD, OLDER, GOOD, GOOD]


def test_a_new_outbound_sa_is_not_synced_before_the_protection_uses_it() -> None:
    assert sa_states(hold(group(), *SPIS, protection=(2, (1,)))) == [GOOD, GOOD, BUSY, BUSY]


def test_no_sa_of_an_interface_that_is_down_is_synced() -> None:
    assert sa_states(hold(group(), *SPIS, protection=(4, (1, 3)), up=False)) == [BUSY] * 4


def test_no_sa_is_synced_while_the_interface_passes_no_needed_ipv6() -> None:
    six = make_policy(src="fd01::/64", dst="fd02::/64")
    state = hold(group((OLD_IN, OLD_OUT), (six,)), 1, 2, protection=(2, (1,)))
    assert sa_states(state) == [BUSY] * 2
    state.actual.ip6 = True
    assert sa_states(state) == [GOOD] * 2


def test_numbers_are_those_by_which_vpp_holds_the_sas() -> None:
    state = hold(group(), *SPIS, protection=(4, (1, 3)))
    assert {sa_state_of(v, state).sad_id for v in state.desired.decisions.values()} == {1, 2, 3, 4}


def test_of_two_alike_the_one_that_protects_counts() -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (11,)))
    state.actual.sas[11] = ActualSa(spec_of(state, 1), 111)
    decision = state.desired.decisions[OLD_IN.id]
    assert sa_state_of(decision, state) == SaState(SYNCED, "", 11)


def test_refused_sa_leaves_the_offloaded_ones_synced() -> None:
    state = hold(group(), 1, 2, 3, protection=(2, (1, 3)))
    refuse(state, spec_of(state, 4), "KEY_LENGTH (-156)")
    assert sa_states(state) == [GOOD, GOOD, GOOD, (REFUSED, "KEY_LENGTH (-156)")]


def test_sa_with_a_refused_counterpart_is_pending_and_names_it() -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1)
    refuse(state, spec_of(state, 2), "UNIMPLEMENTED (-9)")
    waits = (PENDING, "its counterpart 0x00000002 was refused: UNIMPLEMENTED (-9)")
    assert sa_states(state) == [waits, (REFUSED, "UNIMPLEMENTED (-9)")]


def test_a_refused_interface_is_told_of_all_its_sas() -> None:
    state = refuse(group((OLD_IN, OLD_OUT)), IpsecItfCreate(NO_INDEX), "INVALID_REGISTRATION (-31)")
    assert sa_states(state) == [(REFUSED, "ipsec_itf_create: INVALID_REGISTRATION (-31)")] * 2


def test_refused_protection_shows_at_sas_outside_the_current_one() -> None:
    state = hold(group(), *SPIS, protection=(2, (1,)))
    refuse(state, TunnelProtect(INDEX, 4, (1, 3)))
    refused = (REFUSED, "ipsec_tunnel_protect_update: INVALID_VALUE (-7)")
    assert sa_states(state) == [GOOD, GOOD, refused, refused]


def test_interface_vpp_does_not_set_up_has_no_synced_sa() -> None:
    state = refuse(hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (1,)), up=False), SetInterfaceUp(INDEX))
    assert sa_states(state) == [(REFUSED, "sw_interface_set_flags: INVALID_VALUE (-7)")] * 2


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (RouteAddDel(INDEX, Prefix(bytes((10, 0, 0, 0)), 8), 1, True), "route 10.0.0.0/8"),
        (SadEntryDel(99), "ipsec_sad_entry_del"),
    ],
    ids=["route", "deletion of another SA"],
)
def test_refusals_besides_sas_show_at_the_tunnel_alone(request_: Request, what: str) -> None:
    state = refuse(hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (1,))), request_)
    assert sa_states(state) == [GOOD] * 2
    assert refusal_texts(state.refusals) == [f"{what}: INVALID_VALUE (-7)"]


def test_a_refused_change_of_ports_is_told_of_the_sa_that_it_was_for() -> None:
    before, after = Encap(2, 4500, 4500, bytes(4)), Encap(2, 4500, 40123, bytes(4))
    now = group((sa_in(1, encap=before), sa_out(2, encap=after)))
    old = group((sa_in(1, encap=before), sa_out(2, encap=before)))
    hold(now, 1, 2, protection=(2, (1,)))
    now.actual.sas[2].spec = spec_of(old, 2)
    refuse(now, SadEntryUpdate(2, 4500, 40123))
    assert sa_states(now) == [GOOD, (REFUSED, "ipsec_sad_entry_update: INVALID_VALUE (-7)")]


def test_a_refusal_that_is_being_tried_again_is_told_until_vpp_accepts() -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1)
    state.refusals.retrying[spec_of(state, 2)] = RefusedRequest("BUSY (-167)", 1.0, 0.0)
    assert sa_states(state)[1] == (REFUSED, "BUSY (-167)")
    refuse(state, spec_of(state, 2), "BUSY (-167)")
    assert refusal_texts(state.refusals) == ["SA 0x00000002: BUSY (-167)"]


def test_what_translate_says_against_an_sa_is_passed_on() -> None:
    state = group((OLD_IN, OLD_OUT, sa_out(5, aead=None, crypt=None, auth=None, comp=OLD_IN.aead)))
    decision = next(v for i, v in state.desired.decisions.items() if i.spi == 5)
    assert sa_state_of(decision, state) == SaState(UNSUPPORTED, decision.reason)
    assert decision.reason


@pytest.mark.parametrize("outcome", [OffloadStatus.OFFLOADED, OffloadStatus.PENDING])
def test_while_vpp_is_away_no_sa_is_synced(outcome: OffloadStatus) -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (1,)))
    if outcome is OffloadStatus.PENDING:
        state.desired.decisions[OLD_IN.id] = OffloadDecision(outcome, "whatever", None, "in")  # type: ignore[index]  # a dict
    away = current_decision(OLD_IN.id, state, False)
    assert (sa_state_of(away, state), away.direction) == (SaState(PENDING, "VPP is not connected"), "in")


def test_what_vpp_cannot_carry_is_told_also_while_it_is_away() -> None:
    state = group((OLD_IN, OLD_OUT), (make_policy(mark=Mark(1, 1)),))
    away = current_decision(OLD_IN.id, state, False)
    assert away.status is OffloadStatus.UNSUPPORTED
    assert "firewall mark" in away.reason


def test_an_sa_that_was_not_looked_at_is_pending() -> None:
    assert sa_state_of(current_decision(OLD_IN.id, None, True), None) == SaState(PENDING, "not looked at yet")


def test_refusals_are_of_what_was_asked() -> None:
    state = group((OLD_IN, OLD_OUT))
    refuse(state, SadEntryAdd(1, spec_of(state, 1)).sa)
    assert refusal_texts(state.refusals) == ["SA 0x00000001: INVALID_VALUE (-7)"]
