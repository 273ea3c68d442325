"""An event loop whose time jumps: where nothing is left to do, its clock advances to the next timer.

It is for tests that run in one process: delays of a minute cost nothing, and no machine is too slow. Data that the
process's sockets have for each other counts as something to do.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any

_BEYOND_S = 1e-6
"""How far the clock jumps beyond a timer, so that it counts as passed despite rounding."""


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: an event is either available already, or a matter of time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0:
            if timeout is None:
                raise RuntimeError("everybody waits, and there is nothing that could happen any more")
            self.now += timeout + _BEYOND_S
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """The loop. `time` includes seconds that were skipped."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return the time of the loop, s."""
        return self._jumping.now


def run_jumping(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, as `asyncio.run` does, in a loop whose time jumps."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(work)
