"""SAs that the IKE daemon is asked to rekey: each at once, and again, ever more seldom, while it is there."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from vppipsec.kernel.xfrm.values import SaId

ASK_AGAIN_FIRST_S = 30.0
ASK_AGAIN_LONGEST_S = 600.0


@dataclass(slots=True)
class _Wish:
    """When an SA's rekeying is asked for next (time of the event loop, s), and how long after that again."""

    due: float
    delay_s: float = ASK_AGAIN_FIRST_S


class Wishes:
    """SAs whose rekeying is wished for: each is asked for at once, and again, ever more seldom, while it is still there."""

    def __init__(self) -> None:
        self._wishes: dict[SaId, _Wish] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._wishes)

    def __contains__(self, sa_id: SaId) -> bool:
        return sa_id in self._wishes

    def add(self, sa_id: SaId) -> None:
        """Wish for the rekeying of an SA, if that is not wished for already."""
        if sa_id not in self._wishes:
            self._wishes[sa_id] = _Wish(asyncio.get_running_loop().time())
            self._changed.set()

    def drop(self, sa_id: SaId) -> None:
        """Wish no longer."""
        self._wishes.pop(sa_id, None)

    def clear(self) -> None:
        """Wish for nothing."""
        self._wishes.clear()

    async def next(self) -> SaId:
        """Wait until an SA's rekeying is due to be asked for, and return the SA; it is due again later."""
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            sa_id, wish = min(self._wishes.items(), key=lambda item: item[1].due, default=(None, None))
            if sa_id is not None and wish is not None and wish.due <= loop.time():
                wish.due = loop.time() + wish.delay_s
                wish.delay_s = min(2 * wish.delay_s, ASK_AGAIN_LONGEST_S)
                return sa_id
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if wish is None else max(0.0, wish.due - loop.time())):
                    await self._changed.wait()
