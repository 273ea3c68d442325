"""A status socket and a stats segment for a rig's engine, so that tests ask as an operator would."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.recorded import PATIENCE_S
from support.rig import Rig, play
from vppipsec.status.server import StatusServer, ask
from vppstandin.server import Fault
from vppstandin.stats import StatsSegment, StatsServer


@dataclass
class Asker:
    """Asks the service, and knows the stand-in's counters where there is a stand-in."""

    rig: Rig
    server: StatusServer
    segment: StatsSegment | None

    async def ask(self, question: str, **about: Any) -> Any:
        """Return the answer to a question, as JSON gives it."""
        return await asyncio.to_thread(ask, self.server.path, question, **about)

    async def rows(self, question: str, **about: Any) -> dict[str, Any]:
        """Return the rows of an answer by SPI."""
        answer = await self.ask(question, **about)
        return {row["spi"]: row for row in (answer["rows"] if isinstance(answer, dict) else answer)}


@contextlib.asynccontextmanager
async def asker(rig: Rig) -> AsyncIterator[Asker]:
    """Open a status socket for a rig's engine, and set VPP's stats socket in its settings."""
    with tempfile.TemporaryDirectory(prefix="status-") as directory:
        stats: StatsServer | None = None
        path = str(rig.box.dir / "stats.sock") if rig.box is not None else f"{directory}/stats.sock"
        if rig.standin is not None:
            stats = StatsServer(rig.standin.world, path)
            stats.start()
        rig.settings = replace(rig.settings, vpp=replace(rig.settings.vpp, stats_socket=path))
        rig.engine.reload(rig.settings)
        server = StatusServer(rig.engine, str(Path(directory) / "status.sock"))
        await server.start()
        try:
            yield Asker(rig, server, stats.segment if stats is not None else None)
        finally:
            await server.stop()
            if stats is not None:
                stats.stop()


def play_asking(kind: str, story: Callable[[Rig, Asker], Awaitable[None]], fault: Fault | None = None) -> None:
    """Run a test in a rig whose engine runs, with an `Asker`."""

    async def told(rig: Rig) -> None:
        async with asker(rig) as asking:
            rig.start()
            await story(rig, asking)

    play(kind, told, fault)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until a condition holds, for 20 s at most."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110  # any condition
            await asyncio.sleep(0.01)
