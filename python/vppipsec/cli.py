"""vpp-ipsec: the command line. Each command is one call into the library."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vppipsec import __version__
from vppipsec.conf.settings import FALLBACK_CONFIG, SettingsError, find_config
from vppipsec.daemon import read_config
from vppipsec.status.select import SelectionError, parse_peer, parse_spi
from vppipsec.status.server import StatusUnavailable, ask
from vppipsec.status.text import EVENTS_SHOWN, TEXTS, events_text, sa_detail_text
from vppipsec.vpp.api.errors import VppError

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 3
"""Exit status if the service or VPP does not answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status. Errors go to stderr, in one line."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (StatusUnavailable, VppError) as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE
    except (SettingsError, OSError) as error:
        print(_sentence(error), file=sys.stderr)
        return EXIT_FAILED


def _sentence(error: Exception) -> str:
    """Return an error as a sentence: with the file that it concerns, without Python's error number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vpp-ipsec", description="looks at, and tests, IPsec acceleration by VPP")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", type=Path, help="the service's config.toml")
    parser.add_argument("--socket", help="the service's status socket (default: as the configuration says)")
    where = argparse.ArgumentParser(add_help=False)  # the same options, after the command
    where.add_argument("--config", type=Path, default=argparse.SUPPRESS, help="the service's config.toml")
    where.add_argument("--socket", default=argparse.SUPPRESS, help="the service's status socket")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="show what the service says, or the committed configuration")
    shown = show.add_subparsers(required=True, metavar="WHAT", dest="what")
    for what, (about, options) in _SHOWN.items():
        one = shown.add_parser(what, help=about, parents=[where])
        one.add_argument("--raw", action="store_true", help="as JSON")
        for option in options:
            one.add_argument(f"--{option}", **_OPTIONS[option])
        one.set_defaults(run=_show)
    config = shown.add_parser("config", help="the committed configuration, as set commands", parents=[where])
    config.set_defaults(run=_show_config)

    reset = commands.add_parser("reset", help="read the kernel's tables anew", parents=[where])
    reset.add_argument("what", choices=("sync",))
    reset.set_defaults(run=_reset)

    commit = commands.add_parser("commit", help="make a file of set commands the whole configuration, off VyOS")
    commit.add_argument("file", type=Path)
    commit.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    commit.set_defaults(run=_commit)

    decode = commands.add_parser("decode", help="decode recorded netlink messages (`hex` of each line) to JSON lines")
    decode.add_argument("file", type=Path)
    decode.add_argument("--show-keys", action="store_true", help="print keys, which are hidden otherwise")
    decode.set_defaults(run=_decode_command)

    plan = commands.add_parser(
        "plan", help="say what would change in VPP now, in order, without doing it", parents=[where]
    )
    plan.set_defaults(run=_plan_command)
    return parser


def _option(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser of an option's value. argparse prints the text of its error."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except SelectionError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _parse_lines(text: str) -> int:
    """Return a number of lines. Raises SelectionError."""
    if not text.isdecimal() or int(text) < 1:
        raise SelectionError(f"'{text}' is not a number of lines")
    return int(text)


_SHOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "sync": ("how far VPP is", ()),
    "sa": ("every SA, and whether VPP carries it or why not", ("peer", "spi", "detail")),
    "policy": ("every policy, and where VPP leads its packets", ("peer",)),
    "tunnel": ("every tunnel with its interface in VPP", ("peer",)),
    "events": ("what happened lately", ("last",)),
    "counters": ("packets, bytes and errors of every SA, as VPP counted them", ("peer", "spi")),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "peer": {"type": _option(parse_peer), "metavar": "ADDRESS", "help": "only those with this end"},
    "spi": {"type": _option(parse_spi), "metavar": "SPI", "help": "only the SA with this SPI"},
    "detail": {"action": "store_true", "help": "all there is to know, keys aside"},
    "last": {"type": _option(_parse_lines), "metavar": "N", "default": EVENTS_SHOWN, "help": "so many lines"},
}


def _ask(arguments: argparse.Namespace, question: str, **about: Any) -> Any:
    path = arguments.socket or read_config(find_config(arguments.config)).status.socket
    return ask(path, question, **about)


def _show(arguments: argparse.Namespace) -> int:
    about = {name: value for name in ("peer", "spi", "detail") if (value := getattr(arguments, name, None)) is not None}
    answer = _ask(arguments, f"show {arguments.what}", **about)
    if arguments.raw:
        print(json.dumps(answer, indent=2))
    elif arguments.what == "events":
        print(events_text(answer, arguments.last))
    else:
        print(sa_detail_text(answer) if about.get("detail") else TEXTS[arguments.what](answer))
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    from vppipsec.activation.commit import show_config

    return show_config(arguments.config or FALLBACK_CONFIG)


def _reset(arguments: argparse.Namespace) -> int:
    _ask(arguments, f"reset {arguments.what}")
    print("The kernel's SAs and policies are being read anew.")
    return 0


def _commit(arguments: argparse.Namespace) -> int:
    from vppipsec.activation.commit import commit

    return commit(arguments.file, arguments.config or FALLBACK_CONFIG, dry_run=arguments.dry_run)


def _decode_command(arguments: argparse.Namespace) -> int:
    from vppipsec.kernel.xfrm.recordings import decode_file

    return decode_file(arguments.file, arguments.show_keys, sys.stdout)


def _plan_command(arguments: argparse.Namespace) -> int:
    from vppipsec.kernel.route.follower import open_follower
    from vppipsec.kernel.xfrm.socket import XfrmSocket
    from vppipsec.sync.preview import dry_run

    async def run() -> list[str]:
        settings = read_config(find_config(arguments.config))
        with (
            contextlib.closing(XfrmSocket(settings.netlink.rx_buffer_size)) as source,
            contextlib.closing(open_follower(settings.netlink.rx_buffer_size)) as routes,
        ):
            return await dry_run(settings, source, routes)

    lines = asyncio.run(run())
    print("\n".join(lines) if lines else "VPP is equal to the kernel: nothing to do.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
