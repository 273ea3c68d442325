"""Beside linux-cp: what the kernel sends comes in on a tap of VPP's, and is not steered."""

from __future__ import annotations

from types import SimpleNamespace

from support.build import make_policy, sa_in, sa_out
from support.lanwan import make_loopback, set_pair
from support.rig import Rig, play
from vppipsec.sync.preview import dry_run


def asked(rig: Rig) -> set[int]:
    """Return the interfaces on which VPP asks outbound policies."""
    assert rig.standin is not None
    return {key.sw_if_index for key in rig.standin.world.abf_attachments}


def test_linux_cp_tap_asks_no_layers_whenever_it_comes() -> None:
    async def story(rig: Rig) -> None:
        admin = await rig.admin()
        first = await set_pair(admin, rig.wan, "wan")
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        plan = await dry_run(rig.settings, rig.kernel)
        assert [line.rpartition(" ")[2] for line in plan if line.startswith("attach")] == ["loop0"]
        rig.start()
        await rig.settle()
        assert asked(rig) == {rig.wan}
        lan = await make_loopback(admin)
        second = await set_pair(admin, lan, "lan")
        await rig.settle()
        assert asked(rig) == {rig.wan, lan}
        assert len({first, second} | asked(rig)) == 4
        await set_pair(admin, lan, "lan", False)
        await rig.settle()
        assert asked(rig) == {rig.wan, lan}

    play("standin", story)


def test_tap_that_was_asked_before_linux_cp_took_it_is_asked_no_more() -> None:
    """An earlier version of the service knew nothing of pairs, and attached policies to taps."""

    async def story(rig: Rig) -> None:
        rig.start()
        rig.kernel.add(sa_in(1), sa_out(2), make_policy())
        await rig.settle()
        tap = await set_pair(await rig.admin(), rig.wan, "wan")
        await rig.stop()
        assert rig.standin is not None
        (number,) = rig.standin.world.abf_policies
        attach = SimpleNamespace(policy_id=number, sw_if_index=tap, priority=1 << 30, is_ipv6=False)
        rig.standin.world.handle("abf_itf_attach_add_del", SimpleNamespace(is_add=True, attach=attach))
        await rig.restart_engine()
        await rig.settle()
        assert asked(rig) == {rig.wan}

    play("standin", story)
