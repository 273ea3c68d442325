"""`vpp-ipsec standin`: run the stand-in in the foreground until SIGTERM, SIGINT, or until VPP would have died."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

from vppipsec.standin.server import StandIn
from vppipsec.standin.stats import StatsServer

EXIT_DIED = 139
"""What a shell says of a process that was hit by SIGSEGV."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run. Returns 0 after a signal, 139 where VPP would have died, which is then said in a sentence."""
    parser = argparse.ArgumentParser(prog="vpp-ipsec standin", description="a VPP stand-in for machines without VPP")
    parser.add_argument("--api-socket", required=True, metavar="PATH", help="where to listen, as VPP's socksvr does")
    parser.add_argument(
        "--stats-socket", metavar="PATH", help="where to hand out the stats segment, as VPP's statseg does"
    )
    arguments = parser.parse_args(argv)
    try:
        return asyncio.run(_run(arguments.api_socket, arguments.stats_socket))
    except OSError as error:
        print(
            f"the stand-in cannot listen on {error.filename or arguments.api_socket}: {error.strerror}", file=sys.stderr
        )
        return 1


async def _run(path: str, stats_path: str | None) -> int:
    standin = StandIn(path)
    stats = StatsServer(standin.world, stats_path) if stats_path is not None else None
    if stats is not None:
        stats.start()
    await standin.start()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    waits = [asyncio.create_task(event.wait()) for event in (ended, standin.died)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()
    await standin.stop()
    if stats is not None:
        stats.stop()
    if standin.death is not None:
        print(f"VPP would have died: {standin.death}", file=sys.stderr)
        return EXIT_DIED
    return 0


if __name__ == "__main__":
    sys.exit(main())
