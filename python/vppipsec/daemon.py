"""vpp-ipsecd: the service. It follows the kernel, keeps VPP in sync, and answers on the status socket.

SIGTERM and SIGINT end it; VPP's state stays as it is. SIGHUP reloads the configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from vppipsec.conf.settings import (
    DEFAULT_CONFIG,
    FALLBACK_CONFIG,
    OffloadSettings,
    Settings,
    SettingsError,
    find_config,
    load_settings,
)
from vppipsec.kernel.hostpath.apply import apply_host_redirects
from vppipsec.kernel.route.follower import RouteFollower, open_follower
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.status.server import StatusServer
from vppipsec.sync.engine import Engine

log = logging.getLogger("vpp-ipsecd")

_PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service. Returns 0 after SIGTERM or SIGINT, 2 if the configuration is wrong or rights are missing."""
    parser = argparse.ArgumentParser(prog="vpp-ipsecd", description="keeps VPP's IPsec equal to the kernel's")
    parser.add_argument("--config", type=Path, help=f"default: {DEFAULT_CONFIG}, else {FALLBACK_CONFIG}")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=arguments.log_level.upper(), format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("vpp_papi").setLevel(logging.WARNING)  # its debug messages contain keys
    _forbid_core_dumps()
    spare_collector()
    try:
        asyncio.run(_serve(arguments.config))
    except (SettingsError, OSError) as error:
        log.error("%s", error.strerror if isinstance(error, OSError) and error.strerror else error)
        return 2
    return 0


def read_config(path: Path | None) -> Settings:
    """Return the settings of a file, the defaults for None. Raises SettingsError."""
    return Settings() if path is None else load_settings(path)


def notify(message: str, patience_s: float = 5.0) -> None:
    """Send a message to systemd (sd_notify(3)). Without systemd, or if it does not accept it in time, nothing happens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.settimeout(patience_s)
        out.connect(address)
        out.sendall(message.encode())


async def _serve(given: Path | None) -> None:
    """Start all parts, run until a signal ends the service, and stop them. `given` is the configuration's path, or None."""
    settings = read_config(find_config(given))
    _warn_of_unused(settings)
    with contextlib.ExitStack() as sockets:
        source = sockets.enter_context(contextlib.closing(XfrmSocket(settings.netlink.rx_buffer_size)))
        routes = sockets.enter_context(contextlib.closing(open_follower(settings.netlink.rx_buffer_size)))
        engine = Engine(settings, source, routes=routes, apply_hosts=apply_host_redirects)
        status = StatusServer(engine, settings.status.socket)
        await status.start()
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        loop.add_signal_handler(signal.SIGHUP, _reload, engine, (source, routes), given)
        work = loop.create_task(engine.run())
        watchdog = loop.create_task(_feed_watchdog(engine))
        end = loop.create_task(ended.wait())
        notify("READY=1\nSTATUS=following the kernel")
        try:
            await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            notify("STOPPING=1")
            for task in (work, watchdog, end):
                task.cancel()
            await asyncio.gather(work, watchdog, end, return_exceptions=True)
            await status.stop()
    log.info("ended; VPP keeps what it has")


def _reload(engine: Engine, sources: Sequence[XfrmSocket | RouteFollower], given: Path | None) -> None:
    """Reload the configuration. A wrong one changes nothing."""
    notify("RELOADING=1")
    try:
        settings = read_config(find_config(given))
    except SettingsError as error:
        log.error("the configuration stays as it was: %s", error)
    else:
        _warn_of_unused(settings)
        if settings.vpp != engine.settings.vpp:
            log.warning("[vpp] counts from the next connection to VPP on")
        if settings.status != engine.settings.status:
            log.warning("[status] counts from the next start of the service on")
        for source in sources:
            source.set_receive_buffer(settings.netlink.rx_buffer_size)
        engine.reload(settings)
        engine.request_resync()  # ends the wait for the next dump, which had the old length
        log.info("configuration read again")
    notify("READY=1")


def _warn_of_unused(settings: Settings) -> None:
    """Warn of settings that this version accepts but does not use."""
    if settings.offload.statistics_interval_s != OffloadSettings().statistics_interval_s:
        log.warning("of [offload] statistics_interval_s is not acted on in this version")
    if settings.metrics.listen_address:
        log.warning("[metrics] is not acted on in this version")


async def _feed_watchdog(engine: Engine) -> None:
    """Send systemd's watchdog a message in half of the allowed time (sd_watchdog_enabled(3))."""
    allowed_us = os.environ.get("WATCHDOG_USEC", "")
    while True:
        state = "in sync" if engine.in_sync else engine.kernel_problem or engine.vpp_problem or "converging"
        notify(f"WATCHDOG=1\nSTATUS={state}", patience_s=0.0)  # the service does not wait for systemd
        await asyncio.sleep(int(allowed_us) / 2e6 if allowed_us.isdigit() and int(allowed_us) else 10.0)


def spare_collector() -> None:
    """Make Python search for reference cycles rarely.

    The tables have no cycles. Walking them takes a fifth of the time for a burst of events.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def _forbid_core_dumps() -> None:
    """Forbid core dumps, which would contain keys, and access to the memory by other processes of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
