"""What VPP refused, or the guard held back, and when it is tried again: ever more seldom, as often as it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vppipsec.kernel.xfrm.sad_spd import TunnelKey
from vppipsec.vpp.api.ipsec import IpsecItfCreate, SadEntryAdd
from vppipsec.vpp.api.request import Request
from vppipsec.vpp.types import NO_INDEX, SaSpec

RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0
OUTBOUND_POLICIES = "the outbound policies"
"""Whose a request is that is no single group's."""


@dataclass(slots=True)
class RefusedRequest:
    """A request that VPP refused, and when it is tried again (time of the event loop, s)."""

    reason: str
    delay_s: float
    retry_at: float


def refusal_key(request: Request) -> SaSpec | Request:
    """Return what a refusal is remembered by: an SA by what it is, not by the number that it would have had."""
    if isinstance(request, SadEntryAdd):
        return request.sa
    return IpsecItfCreate(NO_INDEX) if isinstance(request, IpsecItfCreate) else request


class Refusals(dict[SaSpec | Request, RefusedRequest]):
    """What is not to be tried now, of one group or of all outbound policies together (`owner`).

    `retrying` are refusals whose time has come: kept for their delay, in case VPP refuses again.
    """

    __slots__ = ("owner", "retrying")

    def __init__(self, owner: TunnelKey | str) -> None:
        super().__init__()
        self.owner = owner
        self.retrying: dict[SaSpec | Request, RefusedRequest] = {}

    @property
    def all(self) -> Mapping[SaSpec | Request, RefusedRequest]:
        """What was refused, that which is being tried again included."""
        return {**self.retrying, **self} if self.retrying else self

    @property
    def next_retry(self) -> float:
        """When something is tried again (time of the event loop, s), infinity where there is nothing."""
        return min((refusal.retry_at for refusal in self.values()), default=float("inf"))

    def note_refused(self, request: Request, reason: str) -> bool:
        """Remember a refusal, and set the time of the next try. Tell whether it is news."""
        key = refusal_key(request)
        before = self.get(key) or self.retrying.get(key)
        delay_s = RETRY_FIRST_S if before is None else min(2 * before.delay_s, RETRY_MAX_S)
        self[key] = RefusedRequest(reason, delay_s, asyncio.get_running_loop().time() + delay_s)
        return before is None or before.reason != reason

    def note_accepted(self, request: Request) -> None:
        """Note that VPP took a request."""
        if self.retrying:
            self.retrying.pop(refusal_key(request), None)

    def release_due(self) -> None:
        """Take the bar off requests whose time has come."""
        if not self:
            return
        now = asyncio.get_running_loop().time()
        self.retrying = {key: refusal for key, refusal in self.items() if refusal.retry_at <= now}
        for key in self.retrying:
            del self[key]

    def retain_only(self, is_wanted: Callable[[SaSpec | Request], bool]) -> None:
        """Forget the refusals of what is not wanted any more, and those whose time had come."""
        for key in [key for key in self if not is_wanted(key)]:
            del self[key]
        self.retrying = {}
