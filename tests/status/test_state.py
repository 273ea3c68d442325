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
    Standing,
    say_refusals,
    standing_of,
    verdict_on,
)
from vppipsec.sync.actual.backoff import Refusal
from vppipsec.sync.actual.vpp_state import GroupState
from vppipsec.sync.desired.state import Fate, Verdict
from vppipsec.vpp.api.interface import SetItfUp
from vppipsec.vpp.api.ip import ChangeRoute
from vppipsec.vpp.api.ipsec import AddSa, CreateItf, DelSa, Protect, SetSaPorts
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.state.tunnels import HeldSa, HeldTunnel
from vppipsec.vpp.types import NO_INDEX, Prefix, Protection, SaSpec

SPIS = (1, 2, 3, 4)
INDEX = 7


def hold(
    state: GroupState, *spis: int, protection: tuple[int, tuple[int, ...]] | None = None, up: bool = True
) -> GroupState:
    """Let VPP hold SAs, numbered by their SPIs, and a protection."""
    lender = state.desired.tunnel.lender if state.desired.tunnel is not None else None
    state.held = HeldTunnel(3, INDEX, "tag", lender, up=up)
    state.held.sas = {spi: HeldSa(spec_of(state, spi), 100 + spi) for spi in spis}
    state.held.protection = Protection(*protection) if protection is not None else None
    return state


def refuse(state: GroupState, key: SaSpec | Request, reason: str = "INVALID_VALUE (-7)") -> GroupState:
    state.refusals[key] = Refusal(reason, 1.0, 0.0)
    return state


def standings(state: GroupState) -> list[tuple[str, str]]:
    """Return state and reason of each SA by SPI."""
    by_spi = {sa_id.spi: standing_of(verdict, state) for sa_id, verdict in state.desired.verdicts.items()}
    return [by_spi[spi][:2] for spi in sorted(by_spi)]


GOOD, BUSY = (SYNCED, ""), (PENDING, "being programmed")
OLDER = (SYNCED, "a newer one is used")


def test_nothing_held_is_pending() -> None:
    assert standings(group()) == [BUSY] * 4


def test_held_without_protection_is_not_synced() -> None:
    assert standings(hold(group(), *SPIS)) == [BUSY] * 4


def test_an_old_outbound_sa_that_a_newer_one_supersedes_is_synced_and_says_so() -> None:
    assert standings(hold(group(), *SPIS, protection=(4, (1, 3)))) == [GOOD, OLDER, GOOD, GOOD]


def test_a_new_outbound_sa_is_not_synced_before_the_protection_uses_it() -> None:
    assert standings(hold(group(), *SPIS, protection=(2, (1,)))) == [GOOD, GOOD, BUSY, BUSY]


def test_no_sa_of_an_interface_that_is_down_is_synced() -> None:
    assert standings(hold(group(), *SPIS, protection=(4, (1, 3)), up=False)) == [BUSY] * 4


def test_no_sa_of_an_interface_that_passes_no_ipv6_is_synced_where_ipv6_is_wanted() -> None:
    six = make_policy(src="fd01::/64", dst="fd02::/64")
    state = hold(group((OLD_IN, OLD_OUT), (six,)), 1, 2, protection=(2, (1,)))
    assert standings(state) == [BUSY] * 2
    state.held.ip6 = True
    assert standings(state) == [GOOD] * 2


def test_numbers_are_those_by_which_vpp_holds_the_sas() -> None:
    state = hold(group(), *SPIS, protection=(4, (1, 3)))
    assert {standing_of(v, state).sad_id for v in state.desired.verdicts.values()} == {1, 2, 3, 4}


def test_of_two_alike_the_one_that_protects_counts() -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (11,)))
    state.held.sas[11] = HeldSa(spec_of(state, 1), 111)
    verdict = state.desired.verdicts[OLD_IN.id]
    assert standing_of(verdict, state) == Standing(SYNCED, "", 11)


def test_a_refused_sa_alone_is_refused_and_those_that_vpp_carries_stay_synced() -> None:
    state = hold(group(), 1, 2, 3, protection=(2, (1, 3)))
    refuse(state, spec_of(state, 4), "KEY_LENGTH (-156)")
    assert standings(state) == [GOOD, GOOD, GOOD, (REFUSED, "KEY_LENGTH (-156)")]


def test_an_sa_that_is_held_but_waits_for_its_refused_counterpart_is_pending_and_says_for_which() -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1)
    refuse(state, spec_of(state, 2), "UNIMPLEMENTED (-9)")
    waits = (PENDING, "its counterpart 0x00000002 was refused: UNIMPLEMENTED (-9)")
    assert standings(state) == [waits, (REFUSED, "UNIMPLEMENTED (-9)")]


def test_a_refused_interface_is_told_of_all_its_sas() -> None:
    state = refuse(group((OLD_IN, OLD_OUT)), CreateItf(NO_INDEX), "INVALID_REGISTRATION (-31)")
    assert standings(state) == [(REFUSED, "ipsec_itf_create: INVALID_REGISTRATION (-31)")] * 2


def test_a_refused_protection_is_told_of_those_sas_only_that_are_not_in_the_one_that_is() -> None:
    state = hold(group(), *SPIS, protection=(2, (1,)))
    refuse(state, Protect(INDEX, 4, (1, 3)))
    refused = (REFUSED, "ipsec_tunnel_protect_update: INVALID_VALUE (-7)")
    assert standings(state) == [GOOD, GOOD, refused, refused]


def test_an_interface_that_vpp_does_not_set_up_leaves_none_of_its_sas_synced() -> None:
    state = refuse(hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (1,)), up=False), SetItfUp(INDEX))
    assert standings(state) == [(REFUSED, "sw_interface_set_flags: INVALID_VALUE (-7)")] * 2


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (ChangeRoute(INDEX, Prefix(bytes((10, 0, 0, 0)), 8), 1, True), "route 10.0.0.0/8"),
        (DelSa(99), "ipsec_sad_entry_del"),
    ],
    ids=["route", "deletion of another SA"],
)
def test_what_vpp_refused_beside_the_sas_leaves_them_synced_and_is_told_of_the_tunnel(
    request_: Request, what: str
) -> None:
    state = refuse(hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (1,))), request_)
    assert standings(state) == [GOOD] * 2
    assert say_refusals(state.refusals) == [f"{what}: INVALID_VALUE (-7)"]


def test_a_refused_change_of_ports_is_told_of_the_sa_that_it_was_for() -> None:
    before, after = Encap(2, 4500, 4500, bytes(4)), Encap(2, 4500, 40123, bytes(4))
    now = group((sa_in(1, encap=before), sa_out(2, encap=after)))
    old = group((sa_in(1, encap=before), sa_out(2, encap=before)))
    hold(now, 1, 2, protection=(2, (1,)))
    now.held.sas[2].spec = spec_of(old, 2)
    refuse(now, SetSaPorts(2, 4500, 40123))
    assert standings(now) == [GOOD, (REFUSED, "ipsec_sad_entry_update: INVALID_VALUE (-7)")]


def test_a_refusal_that_is_being_tried_again_is_told_until_vpp_accepts() -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1)
    state.refusals.past[spec_of(state, 2)] = Refusal("BUSY (-167)", 1.0, 0.0)
    assert standings(state)[1] == (REFUSED, "BUSY (-167)")
    refuse(state, spec_of(state, 2), "BUSY (-167)")
    assert say_refusals(state.refusals) == ["SA 0x00000002: BUSY (-167)"]


def test_what_translate_says_against_an_sa_is_passed_on() -> None:
    state = group((OLD_IN, OLD_OUT, sa_out(5, aead=None, crypt=None, auth=None, comp=OLD_IN.aead)))
    verdict = next(v for i, v in state.desired.verdicts.items() if i.spi == 5)
    assert standing_of(verdict, state) == Standing(UNSUPPORTED, verdict.reason)
    assert verdict.reason


@pytest.mark.parametrize("fate", [Fate.CARRIED, Fate.PENDING])
def test_while_vpp_is_away_no_sa_is_synced(fate: Fate) -> None:
    state = hold(group((OLD_IN, OLD_OUT)), 1, 2, protection=(2, (1,)))
    if fate is Fate.PENDING:
        state.desired.verdicts[OLD_IN.id] = Verdict(fate, "whatever", None, "in")  # type: ignore[index]  # a dict
    away = verdict_on(OLD_IN.id, state, False)
    assert (standing_of(away, state), away.direction) == (Standing(PENDING, "VPP is not connected"), "in")


def test_what_vpp_cannot_carry_is_told_also_while_it_is_away() -> None:
    state = group((OLD_IN, OLD_OUT), (make_policy(mark=Mark(1, 1)),))
    away = verdict_on(OLD_IN.id, state, False)
    assert away.fate is Fate.UNSUPPORTED
    assert "firewall mark" in away.reason


def test_an_sa_that_was_not_looked_at_is_pending() -> None:
    assert standing_of(verdict_on(OLD_IN.id, None, True), None) == Standing(PENDING, "not looked at yet")


def test_refusals_are_of_what_was_asked() -> None:
    state = group((OLD_IN, OLD_OUT))
    refuse(state, AddSa(1, spec_of(state, 1)).sa)
    assert say_refusals(state.refusals) == ["SA 0x00000001: INVALID_VALUE (-7)"]
