"""SAs that the IKE daemon is asked to rekey: each at once, and again, ever more seldom, while it is there."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from vppipsec.kernel.xfrm.values import SaId

REKEY_REPEAT_FIRST_S = 30.0
REKEY_REPEAT_MAX_S = 600.0


@dataclass(slots=True)
class _PendingRekey:
    """When an SA's rekeying is asked for next (time of the event loop, s), and how long after that again."""

    due: float
    delay_s: float = REKEY_REPEAT_FIRST_S


class RekeyQueue:
    """SAs whose rekeying is wished for: each is asked for at once, and again, ever more seldom, while it is still there."""

    def __init__(self) -> None:
        self._pending: dict[SaId, _PendingRekey] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, sa_id: SaId) -> bool:
        return sa_id in self._pending

    def add(self, sa_id: SaId) -> None:
        """Wish for the rekeying of an SA, if that is not wished for already."""
        if sa_id not in self._pending:
            self._pending[sa_id] = _PendingRekey(asyncio.get_running_loop().time())
            self._changed.set()

    def discard(self, sa_id: SaId) -> None:
        """Wish no longer."""
        self._pending.pop(sa_id, None)

    def clear(self) -> None:
        """Wish for nothing."""
        self._pending.clear()

    async def next(self) -> SaId:
        """Wait until an SA's rekeying is due to be asked for, and return the SA; it is due again later."""
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
