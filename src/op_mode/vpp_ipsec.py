#!/usr/bin/env python3
"""Shows the state of IPsec acceleration, resets it, and writes an archive for support."""

import sys
import typing
from pathlib import Path

import vyos.opmode
from vyos.configquery import ConfigTreeQuery

from vppipsec.conf.settings import SettingsError, find_config
from vppipsec.daemon import read_config
from vppipsec.status.archive import write_archive
from vppipsec.status.select import SelectionError, parse_peer, parse_spi
from vppipsec.status.server import StatusUnavailable, ask
from vppipsec.status.text import TEXTS, sa_detail_text


def _ask(question, **about):
    """Return the answer of the service. Raises vyos.opmode's errors, with one line, if it is off or does not answer."""
    if not ConfigTreeQuery().exists(["vpp", "settings", "ipsec-acceleration"]):
        raise vyos.opmode.UnconfiguredSubsystem(
            "IPsec acceleration is off: 'vpp settings ipsec-acceleration' is not set"
        )
    try:
        return ask(read_config(find_config(None)).status.socket, question, **about)
    except (SettingsError, StatusUnavailable) as error:
        raise vyos.opmode.DataUnavailable(str(error)) from error


def _show(what, raw):
    answer = _ask(f"show {what}")
    return answer if raw else TEXTS[what](answer)


def show_summary(raw: bool):
    return _show("sync", raw)


def show_sa(
    raw: bool,
    peer: typing.Optional[str],  # noqa: UP045  # vyos.opmode recognises optional arguments only in this spelling
    spi: typing.Optional[str],  # noqa: UP045  # vyos.opmode reads only typing's form
    detail: typing.Optional[bool],  # noqa: UP045  # likewise
):
    try:
        about = {"peer": parse_peer(peer) if peer else None, "spi": parse_spi(spi) if spi else None}
    except SelectionError as error:
        raise vyos.opmode.IncorrectValue(str(error)) from error
    answer = _ask("show sa", detail=bool(detail), **about)
    if raw:
        return answer
    return sa_detail_text(answer) if detail else TEXTS["sa"](answer)


def show_policy(raw: bool):
    return _show("policy", raw)


def show_tunnel(raw: bool):
    return _show("tunnel", raw)


def show_events(raw: bool):
    return _show("events", raw)


def show_counters(raw: bool):
    return _show("counters", raw)


def reset_sync():
    _ask("reset sync")
    print("The kernel's SAs and policies are being read anew.")


def generate_debug_archive(raw: bool):
    socket = read_config(find_config(None)).status.socket
    path = write_archive(Path("/tmp"), lambda question: ask(socket, question))
    return {"archive": str(path)} if raw else f"The archive is {path}"


if __name__ == "__main__":
    try:
        res = vyos.opmode.run(sys.modules[__name__])
        if res:
            print(res)
    except (ValueError, vyos.opmode.Error) as e:
        print(e)
        sys.exit(1)
