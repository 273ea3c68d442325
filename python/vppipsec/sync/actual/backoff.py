"""Records requests that VPP refused or the guard withheld, and their next try. The delay grows with each refusal."""

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
"""Owner of requests that belong to no single tunnel."""


@dataclass(slots=True)
class RefusedRequest:
    """A request that VPP refused, and the time of its next try (time of the event loop, s)."""

    reason: str
    delay_s: float
    retry_at: float


def refusal_key(request: Request) -> SaSpec | Request:
    """Return the key of a refusal. An SA is its own key, without the number that it would have had."""
    if isinstance(request, SadEntryAdd):
        return request.sa
    return IpsecItfCreate(NO_INDEX) if isinstance(request, IpsecItfCreate) else request


class Refusals(dict[SaSpec | Request, RefusedRequest]):
    """Requests that are not to be tried now, of one tunnel or of all outbound policies together (`owner`).

    `retrying` are refusals that are due: their delays count if VPP refuses again.
    """

    __slots__ = ("owner", "retrying")

    def __init__(self, owner: TunnelKey | str) -> None:
        super().__init__()
        self.owner = owner
        self.retrying: dict[SaSpec | Request, RefusedRequest] = {}

    @property
    def all(self) -> Mapping[SaSpec | Request, RefusedRequest]:
        """All refusals, including those that are being retried."""
        return {**self.retrying, **self} if self.retrying else self

    @property
    def next_retry(self) -> float:
        """Time of the next retry (time of the event loop, s), infinity where there is none."""
        return min((refusal.retry_at for refusal in self.values()), default=float("inf"))

    def note_refused(self, request: Request, reason: str) -> bool:
        """Record a refusal, and set the time of the next try. Return whether the refusal or its reason is new."""
        key = refusal_key(request)
        before = self.get(key) or self.retrying.get(key)
        delay_s = RETRY_FIRST_S if before is None else min(2 * before.delay_s, RETRY_MAX_S)
        self[key] = RefusedRequest(reason, delay_s, asyncio.get_running_loop().time() + delay_s)
        return before is None or before.reason != reason

    def note_accepted(self, request: Request) -> None:
        """Record that VPP accepted a request."""
        if self.retrying:
            self.retrying.pop(refusal_key(request), None)

    def release_due(self) -> None:
        """Allow requests that are due."""
        if not self:
            return
        now = asyncio.get_running_loop().time()
        self.retrying = {key: refusal for key, refusal in self.items() if refusal.retry_at <= now}
        for key in self.retrying:
            del self[key]

    def retain_only(self, is_wanted: Callable[[SaSpec | Request], bool]) -> None:
        """Forget the refusals of requests that are no longer wanted, and those that were being retried."""
        for key in [key for key in self if not is_wanted(key)]:
            del self[key]
        self.retrying = {}
