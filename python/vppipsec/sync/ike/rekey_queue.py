"""SAs for which the IKE daemon is asked to rekey: at once, and at growing intervals while the SA remains."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from vppipsec.kernel.xfrm.values import SaId

REKEY_REPEAT_FIRST_S = 30.0
REKEY_REPEAT_MAX_S = 600.0


@dataclass(slots=True)
class _PendingRekey:
    """Time of the next request for an SA (time of the event loop, s), and the delay until the following one."""

    due: float
    delay_s: float = REKEY_REPEAT_FIRST_S


class RekeyQueue:
    """SAs to rekey. Each is due at once, and at growing intervals while it remains."""

    def __init__(self) -> None:
        self._pending: dict[SaId, _PendingRekey] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, sa_id: SaId) -> bool:
        return sa_id in self._pending

    def add(self, sa_id: SaId) -> None:
        """Add an SA, unless it is in the queue already."""
        if sa_id not in self._pending:
            self._pending[sa_id] = _PendingRekey(asyncio.get_running_loop().time())
            self._changed.set()

    def discard(self, sa_id: SaId) -> None:
        """Remove an SA."""
        self._pending.pop(sa_id, None)

    def clear(self) -> None:
        """Remove all SAs."""
        self._pending.clear()

    async def next(self) -> SaId:
        """Wait until an SA is due, and return it; it is due again later."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            sa_id, pending = min(self._pending.items(), key=lambda item: item[1].due, default=(None, None))
            if sa_id is not None and pending is not None and pending.due <= loop.time():
                pending.due = loop.time() + pending.delay_s
                pending.delay_s = min(2 * pending.delay_s, REKEY_REPEAT_MAX_S)
                return sa_id
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if pending is None else max(0.0, pending.due - loop.time())):
                    await self._changed.wait()
