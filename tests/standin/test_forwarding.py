"""What the stand-in shows of ACL-based forwarding to tests, and what its answers carry beyond a number."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from vpp_papi import VPPApiClient

from support.recorded import PATIENCE_S
from support.script import ALSO, NO_INDEX, Step, ask_all, itf, on
from support.script_forwarding import acl, attach, deag, drop, into, lists_on, loopback, policy, rule, table, via
from support.vpp_box import VppBox, listens, start_standin, vpp_binary
from vppipsec.vpp.api.client import connect
from vppstandin.acl import AclList, AclRule, InterfaceAcls
from vppstandin.fib import PATH_DROP, FibPath, Net
from vppstandin.server import StandIn
from vppstandin.world import World

pytestmark = pytest.mark.versions


def world_after(tmp_path: Path, *steps: Step) -> World:
    """Ask the stand-in and return what it keeps then."""

    async def run() -> World:
        standin = StandIn(str(tmp_path / "api.sock"))
        await standin.start()
        client = await connect(standin.api_socket, "forwarding", also=ALSO)
        await ask_all(client, steps)
        await client.close()
        await standin.stop()
        return standin.world

    return asyncio.run(run())


def test_what_was_asked_for_is_seen_in_the_world(tmp_path: Path) -> None:
    world = world_after(
        tmp_path,
        loopback("lan"),
        itf(7, "ipsec7"),
        table(5),
        via(5, "10.0.0.0/8", into("ipsec7")),
        acl(rule("10.1.0.0/16", "10.2.0.0/16", 0, 17, dstport_or_icmpcode_last=53), tag="mine"),
        lists_on("ipsec7", 0, inputs=1),
        policy(9, 0, deag(5)),
        attach(9, "lan", 3),
    )
    lan, ipsec7 = 1, 2
    src, dst = Net(bytes([10, 1, 0, 0]), 16), Net(bytes([10, 2, 0, 0]), 16)
    assert world.acls == {0: AclList("mine", (AclRule(0, src, dst, 17, (0, 65535), (0, 53)),))}
    assert world.interface_acls == {ipsec7: InterfaceAcls((0,), ())}
    assert {number: (actual.acl_index, actual.paths) for number, actual in world.abf_policies.items()} == {
        9: (0, (FibPath(NO_INDEX, is_ip6=False, table=(5, False)),))
    }
    ((key, attachment),) = world.abf_attachments.items()
    assert (key, attachment.priority, attachment.is_ip6) == ((9, lan), 3, False)
    assert world.fibs.keys() == {(0, False), (0, True), (5, False)}
    routes = dict(world.fibs[(5, False)].of_source(8))
    assert routes == {Net(bytes([10, 0, 0, 0]), 8): (FibPath(ipsec7, next_hop=bytes(4)),)}
    assert world.fib.best(Net(bytes(4), 0)) == (20, (FibPath(NO_INDEX, PATH_DROP),))
    assert world.leaks == []


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ((table(5), policy(1, 0, deag(5)), table(5, is_add=False)), "table 5 was deleted while paths lead into it"),
        ((table(5), via(5, "10.0.0.0/8", drop()), table(5, is_add=False)), "the route 0a000000/8 outlived its table"),
        (
            (loopback("lan"), acl(rule()), policy(1, 0, drop()), attach(1, "lan"), on("delete_loopback", "lan")),
            "policy 1 is attached to interface 1, which does not exist",
        ),
        (
            (loopback("lan"), policy(1, 0, drop()), attach(1, "lan")),
            "the list of policy 1 is not looked at on interface 1",
        ),
    ],
)
def test_what_goes_astray_is_told(tmp_path: Path, steps: Sequence[Step], sentence: str) -> None:
    assert world_after(tmp_path, *steps).leaks == [sentence]


@contextmanager
def standin_beside(tmp_path: Path) -> Iterator[str]:
    """Run a stand-in as a process of its own."""
    path = str(tmp_path / "api.sock")
    process = start_standin(path)
    try:
        assert listens(path, PATIENCE_S, lambda: process.poll() is None)
        yield path
    finally:
        process.kill()
        process.wait(10)


def assert_refusals_carry_the_number_that_was_asked_for(path: str) -> None:
    client = VPPApiClient(bootstrapapi=True, server_address=path)
    client.connect("numbers")
    wrong = rule(dstport_or_icmpcode_first=5, dstport_or_icmpcode_last=4)
    answers = [
        client.api.acl_add_replace(acl_index=index, tag="", count=len(rules), r=rules)
        for index, rules in ((3, []), (NO_INDEX, [wrong]), (4, [wrong]), (NO_INDEX, []), (0, [wrong]))
    ]
    client.disconnect()
    assert [(it.retval, it.acl_index) for it in answers] == [(-6, 3), (-8, NO_INDEX), (-8, 4), (0, 0), (-8, 0)]


def test_refused_lists_are_answered_with_their_number(tmp_path: Path) -> None:
    with standin_beside(tmp_path) as path:
        assert_refusals_carry_the_number_that_was_asked_for(path)


@pytest.mark.vpp
@pytest.mark.skipif(vpp_binary() is None, reason="VPP_BIN does not name a VPP")
def test_real_vpp_answers_refused_lists_so() -> None:
    with VppBox() as box:
        assert_refusals_carry_the_number_that_was_asked_for(box.api_socket)
