"""The state of a tunnel of which VPP holds nothing yet."""

from __future__ import annotations

from collections.abc import Sequence

from support.build import ENV, make_policy, sa_in, sa_out
from vppipsec.kernel.xfrm.sad_spd import KernelModel
from vppipsec.kernel.xfrm.values import Policy, Sa
from vppipsec.sync.actual.vpp_state import TunnelState
from vppipsec.sync.desired.tunnel import translate
from vppipsec.vpp.types import SaSpec

OLD_IN, OLD_OUT, NEW_IN, NEW_OUT = sa_in(1), sa_out(2), sa_in(3), sa_out(4)


def group(
    sas: Sequence[Sa] = (OLD_IN, OLD_OUT, NEW_IN, NEW_OUT), policies: Sequence[Policy] = (make_policy(),)
) -> TunnelState:
    """Return the state of a tunnel of which VPP holds nothing yet."""
    model = KernelModel()
    model.replace(list(reversed(sas)), policies)
    ((key, found),) = model.tunnels.items()
    return TunnelState(translate(key, found, ENV))


def spec_of(state: TunnelState, spi: int) -> SaSpec:
    return next(v.spec for v in state.desired.decisions.values() if v.spec is not None and v.spec.spi == spi)
