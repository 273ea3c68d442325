"""Whatever the kernel is made to say, VPP is never sent what it would refuse or die of, and a good tunnel goes on.

VPPIPSEC_LONG=1 makes it 100,000 SAs and policies instead of 3,000. VPPIPSEC_SEED begins elsewhere.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable

import pytest

from support.build import LOCAL, make_policy, make_sa
from support.hostile import Flood
from support.netlink_kernel import WireKernel
from support.netlink_rig import WireRig, play
from support.recorded import PATIENCE_S
from support.rig import KINDS
from vppipsec.conf.settings import NetlinkSettings
from vppipsec.kernel.text import parse_addr
from vppipsec.kernel.xfrm.values import MsgType, Sa
from vppipsec.status.summary import NO_FILTER, detail_rows, event_rows, sa_rows, sync_view
from vppipsec.status.text import TEXTS, sa_detail_text
from vppipsec.status.tunnels import policy_rows, tunnel_rows

LONG = bool(os.environ.get("VPPIPSEC_LONG"))
ITEMS = 100_000 if LONG else 3000
SEED = int(os.environ.get("VPPIPSEC_SEED", "1"))
PORTION = 100
LIMIT_S = 3600.0 if LONG else PATIENCE_S

PEER = parse_addr("192.0.2.250")
"""The good tunnel's; no hostile policy's destination is within the network of that address and covers it."""
REQID = 0xC0FFEE
SAS = [make_sa(0xC0000001, PEER, LOCAL, REQID), make_sa(0xD0000001, LOCAL, PEER, REQID)]
POLICY = make_policy(src="172.31.0.0/16", dst="10.250.0.0/16", reqid=REQID, ends=(LOCAL, PEER), priority=0)


class HostileKernel(WireKernel):
    """Has the good tunnel, and whatever the flood says."""

    def __init__(self, rx_buffer_size: int) -> None:
        super().__init__(rx_buffer_size)
        self.flood = Flood(SEED)
        self.items = 0
        self._told = self.flood.told()

    def be_hostile(self, items: int) -> None:
        """Say so many SAs and policies, and what else comes to mind meanwhile."""
        until = self.items + items
        while self.items < until:
            message, is_item = next(self._told)
            self.say(message)
            self.items += is_item

    def calm_down(self) -> None:
        """Have nothing left but the good tunnel, without a word."""
        self.flood.sas.clear()
        self.flood.policies.clear()

    async def expire(self, sa: Sa, hard: bool = False) -> None:
        """Take an EXPIRE; the IKE daemon does nothing of the kind."""
        self.expired.append(sa.id)

    def _tables(self, kind: MsgType) -> Iterable[bytes]:
        table = self.flood.sas if kind == MsgType.GETSA else self.flood.policies
        return itertools.chain(reversed(table.values()), super()._tables(kind))


def good(rig: WireRig) -> list[tuple[str, str, int | None]]:
    """Return SPI, state and number of the SAs of the good tunnel."""
    return [(row["spi"], row["state"], row["sad_id"]) for row in sa_rows(rig.engine) if row["reqid"] == REQID]


def check_answers(rig: WireRig) -> None:
    """Make every answer of op mode."""
    engine = rig.engine
    rows = {"sa": sa_rows(engine), "policy": policy_rows(engine), "tunnel": tunnel_rows(engine)}
    answers = {name: list(each) for name, each in rows.items()} | {
        "events": event_rows(engine),
        "sync": sync_view(engine),
    }
    details = list(detail_rows(engine, None, frozenset(), NO_FILTER))
    assert sa_detail_text({"problem": "", "rows": json.loads(json.dumps(details))})
    for name, answer in answers.items():
        assert TEXTS[name](json.loads(json.dumps(answer)))
    assert all(row["state"] == "synced" or row["reason"] for row in answers["sa"])


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_sas_and_policies_harm_neither_vpp_nor_a_good_tunnel(kind: str) -> None:
    async def story(rig: WireRig) -> None:
        kernel = rig.kernel
        assert isinstance(kernel, HostileKernel)
        kernel.add(*SAS, POLICY)
        rig.start()
        await rig.until(lambda: rig.engine.in_sync and len(good(rig)) == 2)
        before, engine = good(rig), rig.engine
        assert {state for _, state, _ in before} == {"synced"}
        most: Counter[str] = Counter()
        while kernel.items < ITEMS:
            kernel.be_hostile(PORTION)
            await all_received(rig, kernel)
            assert good(rig) == before, f"after {kernel.items} with seed {SEED}"
            check_answers(rig)
            most |= Counter(sync_view(engine)["counts"])
            if not kernel.items % (10 * PORTION):
                engine.request_resync()  # what a dump says then comes as a surprise
        assert kernel.overflows == 0
        assert kernel.malformed > ITEMS // 20
        assert (engine.counters.reconnects, engine.counters.withheld) == (0, 0)  # the guard was not needed
        assert most["synced"] > 50  # VPP had hostile ones to carry
        assert most["unsupported"] > 50
        kernel.calm_down()
        engine.request_resync()
        await rig.resynced(engine.counters.resyncs)
        vpp = sync_view(engine)["vpp"]
        assert (good(rig), vpp["sas"], vpp["tunnels"], vpp["routes"]) == (before, 2, 1, 1)
        assert await rig.differences() == []

    play(story, NetlinkSettings(rx_buffer_size=64 << 20, batch_delay_ms=0), kind, HostileKernel, LIMIT_S)


async def all_received(rig: WireRig, kernel: WireKernel) -> None:
    """Wait until all that was said has been read, and what it made dirty looked at."""
    mark = SAS[1]._replace(limits=SAS[1].limits._replace(hard_add_s=kernel.said))
    kernel.add(mark)  # what was said before it has been read when this has
    await rig.until(lambda: rig.engine.model.find(mark.id) == mark)
    await rig.until(lambda: not rig.engine.queue_length and not rig.engine._is_working)
