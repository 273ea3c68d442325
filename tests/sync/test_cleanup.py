"""Removing all that is ours from VPP, stand-in and real, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from support.build import make_policy, sa_in, sa_out
from support.rig import KINDS, Rig, play
from vppipsec.conf.settings import VppSettings
from vppipsec.kernel.hostpath.apply import HostRedirects
from vppipsec.sync import cleanup as clear_module
from vppipsec.sync.cleanup import CleanupReport, clean_up
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.api.errors import VppUnavailable

either_vpp = pytest.mark.parametrize("kind", KINDS)


async def program(rig: Rig) -> None:
    """Let the engine program a tunnel, and end it as SIGTERM would: VPP keeps what it has."""
    rig.kernel.add(sa_out(0x100), sa_in(0x200), make_policy())
    rig.start()
    await rig.settle()
    await rig.stop()


@either_vpp
def test_everything_of_ours_goes_and_is_counted(kind: str) -> None:
    async def scenario(rig: Rig) -> None:
        await program(rig)
        assert await clean_up(rig.settings) == CleanupReport(sas=2, tunnels=1, routes=1, acls=2, tables=1)
        rig.kernel.delete(sa_out(0x100), sa_in(0x200), make_policy())
        assert await rig.differences() == []
        assert not await clean_up(rig.settings)

    play(kind, scenario)


@either_vpp
def test_what_is_not_ours_stays(kind: str) -> None:
    async def scenario(rig: Rig) -> None:
        client = await connect(rig.api_socket, "another")
        made = await client.call("ipsec_itf_create", {"itf": {"user_instance": 77, "mode": 0, "sw_if_index": 0}})
        await program(rig)
        await clean_up(rig.settings)
        left = await client.dump("ipsec_itf_dump", {"sw_if_index": 0xFFFFFFFF})
        assert [details.itf.sw_if_index for details in left] == [made.sw_if_index]
        await client.close()

    play(kind, scenario)


@either_vpp
def test_without_vpp_cleanup_says_so_and_removes_the_redirects(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[HostRedirects] = []
    monkeypatch.setattr(clear_module, "apply_host_redirects", told.append)

    async def scenario(rig: Rig) -> None:
        with pytest.raises(VppUnavailable, match=r"cannot be opened"):
            await clean_up(replace(rig.settings, vpp=VppSettings(api_socket=str(tmp_path / "none.sock"))))
        assert told == [HostRedirects()]

    play(kind, scenario)


@pytest.mark.parametrize(
    ("cleared", "text"),
    [
        (CleanupReport(1, 1, 1, 1, 1), "1 SA, 1 tunnel, 1 route, 1 ACL and 1 FIB table"),
        (CleanupReport(20_000, 10_000, 0, 2, 0), "20,000 SAs, 10,000 tunnels, 0 routes, 2 ACLs and 0 FIB tables"),
    ],
)
def test_what_was_removed_is_told_in_words(cleared: CleanupReport, text: str) -> None:
    assert str(cleared) == text
