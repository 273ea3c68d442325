"""Numbers that VPP refused to give a meaning come back: the engine loses none."""

from __future__ import annotations

from support.build import make_policy, sa_in, sa_out
from support.rig import Rig, play
from vppipsec.status.summary import sync_view
from vppipsec.vpp.ownership import INSTANCES


def test_refused_interfaces_cost_no_instance() -> None:
    refusals = iter([-31] * 3)

    def fault(name: str, request: object) -> int | None:
        return next(refusals, None) if name == "ipsec_itf_create" else None

    async def story(rig: Rig) -> None:
        rig.start()
        for number in range(4):  # a refusal each, but for the last
            policy = make_policy(dst=f"10.9.{number}.0/24", reqid=number + 1)
            rig.kernel.add(sa_in(number + 1, number + 1), sa_out(0x100 + number, number + 1), policy)
        await rig.settle()
        assert sync_view(rig.engine)["counts"]["synced"] == 8
        assert rig.engine.vpp.numbers.shortage(0, len(INSTANCES) - 4) == ""

    play("standin", story, fault)
