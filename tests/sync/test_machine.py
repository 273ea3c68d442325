"""Whatever happens to the kernel, VPP and the service, in whatever order: no invariant breaks for a moment, and all ends equal.

A story is a list of steps drawn by Hypothesis and told in a loop whose time jumps, so that it takes the same way each time. With
VPPIPSEC_LONG=1 there are 2,000 stories of 30 steps, else as many as fit into half a minute. A story that fails is printed step by
step, with the line that tells it again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from support.charon import Child
from support.faults import OWN_CHANGES, of_kind
from support.story import Story, play_story
from vppipsec.kernel.xfrm.values import NO_LIMITS, Sa
from vppstandin.server import Busy, End

LONG = os.environ.get("VPPIPSEC_LONG") == "1"
STORIES, STEPS = (2000, 30) if LONG else (250, 20)
NOTHING = "nothing"
"""The simplest step: what Hypothesis puts in place of those that a failure does not need."""
PAUSES_S = (0.01, 0.3, 2.5, 45.0, 130.0)
BUSY_S = (0.5, 20.0, 59.0, 61.0, 150.0)


class Step(NamedTuple):
    """One thing that happens. `then` says what comes before the next one."""

    act: str
    child: int
    number: int
    then: str


Act = Callable[[Story, Child, int], object]


def _some(story: Story, child: Child, number: int) -> list[Sa]:
    sa = story.kernel.some_sa(child, number)
    return [] if sa is None else [sa]


def _rekey(story: Story, child: Child, number: int) -> None:
    if child.pairs:
        story.kernel.rekey_child(child, child.pairs[number % len(child.pairs)])


def _limits(story: Story, child: Child, number: int) -> None:
    for sa in _some(story, child, number):
        story.kernel.add(sa._replace(limits=NO_LIMITS._replace(soft_bytes=1 + number)))


def _delete_sa(story: Story, child: Child, number: int) -> None:
    story.kernel.remove(*_some(story, child, number))


def _expire(story: Story, child: Child, number: int) -> None:
    for sa in _some(story, child, number):
        story.kernel.expire_hard(sa)


def _vanish(story: Story, child: Child, number: int) -> None:
    story.kernel.silent = True
    _delete_sa(story, child, number)
    story.kernel.silent = False


KERNEL: dict[str, Act] = {
    NOTHING: lambda story, child, number: None,
    "establish": lambda story, child, number: story.kernel.establish(child),
    "rekey": _rekey,
    "rekey from both sides": lambda story, child, number: story.kernel.rekey_from_both_sides(child),
    "terminate": lambda story, child, number: story.kernel.terminate(child),
    "update": _limits,
    "delete an SA": _delete_sa,
    "hard expiry": _expire,
    "delete policies": lambda story, child, number: story.kernel.uninstall_policies(child),
    "add policies": lambda story, child, number: story.kernel.add(*child.policies()),
    "priority": lambda story, child, number: story.kernel.prefer(child, 900 + number),
    "another address": lambda story, child, number: story.kernel.move(child),
    "a NAT comes or goes": lambda story, child, number: story.kernel.toggle_nat(child),
    "another port": lambda story, child, number: story.kernel.change_port(child, 40000 + number),
    "flush SAs": lambda story, child, number: story.kernel.flush_sas(),
    "flush policies": lambda story, child, number: story.kernel.flush_policies(),
}
CHANGES = [act for act in KERNEL if act != NOTHING]


def _overflow(story: Story, child: Child, number: int) -> None:
    def changes() -> None:
        for act in (CHANGES[number % len(CHANGES)], CHANGES[number // 3 % len(CHANGES)]):
            KERNEL[act](story, child, number)

    story.kernel.overflow(changes)


def _refuse(story: Story, child: Child, number: int) -> None:
    message = OWN_CHANGES[number % len(OWN_CHANGES)].message
    story.trouble.refuse(of_kind(message), -1, (1, 3, None)[number // len(OWN_CHANGES) % 3])


def _deaf(story: Story, child: Child, number: int) -> None:
    story.kernel.deaf_to = number % 3


FAULTS: dict[str, Act] = {
    "silent removal": _vanish,
    "overflow": _overflow,
    "resync": lambda story, child, number: story.rig.engine.request_resync(),
    "VPP dies": lambda story, child, number: story.vpp_dies(number / 10),
    "VPP dies at": lambda story, child, number: story.vpp_dies_at(1 + number, 0.5),
    "service dies": lambda story, child, number: story.service_dies(number / 10),
    "service dies at": lambda story, child, number: story.service_dies_at(1 + number, 0.1),
    "connection ends at": lambda story, child, number: story.trouble.at(1 + number, End.CONNECTION),
    "busy": lambda story, child, number: story.trouble.at(1 + number // 5, Busy(BUSY_S[number % 5])),
    "refusal": _refuse,
    "no rekey when asked": _deaf,
}
ACTS = KERNEL | FAULTS
PAUSES: dict[str, Callable[[Story, int], Awaitable[None]]] = {
    "at once": lambda story, number: asyncio.sleep(0),
    "soon": lambda story, number: _turns(number),
    "later": lambda story, number: asyncio.sleep(PAUSES_S[number % len(PAUSES_S)]),
    "settle": lambda story, number: story.settle(),
}


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def tell(story: Story, steps: list[Step]) -> None:
    """Let the steps of a story happen, to three tunnels that are up and two that are not."""
    for child in story.kernel.children[:3]:
        story.kernel.establish(child)
    await story.begin()
    for step in steps:
        ACTS[step.act](story, story.kernel.children[step.child], step.number)
        await PAUSES[step.then](story, step.number)
        story.look()


STEP = st.builds(
    Step,
    st.sampled_from([NOTHING, *2 * CHANGES, *FAULTS]),
    st.integers(0, 4),
    st.integers(0, 35),
    st.sampled_from(list(PAUSES)),
)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600 if LONG else 1800)
@settings(
    max_examples=STORIES,
    deadline=None,
    print_blob=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.lists(STEP, min_size=STEPS, max_size=STEPS))
def test_random_histories_end_with_vpp_equal_to_the_kernel(steps: list[Step]) -> None:
    for step in steps:
        if step.act != NOTHING:
            note(str(tuple(step)))
    play_story(lambda story: tell(story, steps))


def test_readded_policy_keeps_its_place_among_equal_priorities() -> None:
    steps = [Step("establish", 3, 0, "at once"), Step("priority", 0, 0, "at once"), Step("establish", 3, 0, "at once")]
    play_story(lambda story: tell(story, steps))
