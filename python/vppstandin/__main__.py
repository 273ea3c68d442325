"""`python -m vppstandin`: run the stand-in in the foreground until SIGTERM, SIGINT, or a request that would crash VPP."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from vppstandin.server import StandIn
from vppstandin.stats import StatsServer

EXIT_DIED = 139
"""Exit status that a shell reports after a SIGSEGV."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stand-in. Returns 0 after a signal, 1 if it cannot listen, 139 if VPP would have crashed. Prints the reason."""
    parser = argparse.ArgumentParser(prog="vppstandin", description="a VPP stand-in for machines without VPP")
    parser.add_argument("--api-socket", required=True, metavar="PATH", help="where to listen, as VPP's socksvr does")
    parser.add_argument(
        "--stats-socket", metavar="PATH", help="where to hand out the stats segment, as VPP's statseg does"
    )
    arguments = parser.parse_args(argv)
    try:
        return asyncio.run(_run(arguments.api_socket, arguments.stats_socket))
    except _CannotListen as error:
        print(error, file=sys.stderr)
        return 1


class _CannotListen(Exception):
    """A socket cannot be opened; the text says which and why."""


async def _run(path: str, stats_path: str | None) -> int:
    standin = StandIn(path)
    stats = StatsServer(standin.world, stats_path) if stats_path is not None else None
    opening = path
    try:
        await standin.start()
        if stats is not None:
            opening = stats.path
            stats.start()
        await _wait_for_end(standin.died)
    except OSError as error:
        raise _CannotListen(f"the stand-in cannot listen on {opening}: {error.strerror or error}") from error
    finally:
        await standin.stop()
        if stats is not None:
            stats.stop()
    if standin.death is not None:
        print(f"VPP would have died: {standin.death}", file=sys.stderr)
        return EXIT_DIED
    return 0


async def _wait_for_end(died: asyncio.Event) -> None:
    """Wait for a signal, or for the stand-in's death."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    waits = [asyncio.create_task(event.wait()) for event in (ended, died)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()


if __name__ == "__main__":
    sys.exit(main())
