"""What VPP refused, or the guard held back, and when it is tried again: ever more seldom, as often as it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vppipsec.kernel.xfrm.sad_spd import GroupKey
from vppipsec.vpp.api.ipsec import AddSa, CreateItf
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.types import NO_INDEX, SaSpec

RETRY_FIRST_S = 1.0
RETRY_LONGEST_S = 60.0
OUTBOUND = "the outbound policies"
"""Whose a request is that is no single group's."""


@dataclass(slots=True)
class Refusal:
    """A request that VPP refused, and when it is tried again (time of the event loop, s)."""

    reason: str
    delay_s: float
    retry_at: float


def refusal_key(request: Request) -> SaSpec | Request:
    """Return what a refusal is remembered by: an SA by what it is, not by the number that it would have had."""
    if isinstance(request, AddSa):
        return request.sa
    return CreateItf(NO_INDEX) if isinstance(request, CreateItf) else request


class Refusals(dict[SaSpec | Request, Refusal]):
    """What is not to be tried now, of one group or of all outbound policies together (`whose`).

    `past` are refusals whose time has come: kept for their delay, in case VPP refuses again.
    """

    __slots__ = ("past", "whose")

    def __init__(self, whose: GroupKey | str) -> None:
        super().__init__()
        self.whose = whose
        self.past: dict[SaSpec | Request, Refusal] = {}

    @property
    def every(self) -> Mapping[SaSpec | Request, Refusal]:
        """What was refused, that which is being tried again included."""
        return {**self.past, **self} if self.past else self

    @property
    def next_retry(self) -> float:
        """When something is tried again (time of the event loop, s), infinity where there is nothing."""
        return min((refusal.retry_at for refusal in self.values()), default=float("inf"))

    def refuse(self, request: Request, reason: str) -> bool:
        """Remember a refusal, and set the time of the next try. Tell whether it is news."""
        key = refusal_key(request)
        before = self.get(key) or self.past.get(key)
        delay_s = RETRY_FIRST_S if before is None else min(2 * before.delay_s, RETRY_LONGEST_S)
        self[key] = Refusal(reason, delay_s, asyncio.get_running_loop().time() + delay_s)
        return before is None or before.reason != reason

    def accepted(self, request: Request) -> None:
        """Note that VPP took a request."""
        if self.past:
            self.past.pop(refusal_key(request), None)

    def let_due_be_tried(self) -> None:
        """Take the bar off requests whose time has come."""
        if not self:
            return
        now = asyncio.get_running_loop().time()
        self.past = {key: refusal for key, refusal in self.items() if refusal.retry_at <= now}
        for key in self.past:
            del self[key]

    def forget_all_but(self, is_wanted: Callable[[SaSpec | Request], bool]) -> None:
        """Forget the refusals of what is not wanted any more, and those whose time had come."""
        for key in [key for key in self if not is_wanted(key)]:
            del self[key]
        self.past = {}
