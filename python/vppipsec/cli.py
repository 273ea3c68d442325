"""vpp-ipsec: the command line off VyOS, and what op mode calls. Thin: each command is one call into the library."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vppipsec import __version__
from vppipsec.conf.settings import FALLBACK_CONFIG, SettingsError, find_config
from vppipsec.daemon import read_config
from vppipsec.status.socket import StatusUnavailable, ask
from vppipsec.status.text import sa_text, sync_text
from vppipsec.vpp.errors import VppError

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 3
"""The service, or VPP, does not answer."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; complaints go to stderr in one line."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except (StatusUnavailable, VppError) as error:
        print(error, file=sys.stderr)
        return EXIT_UNAVAILABLE
    except (SettingsError, OSError) as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vpp-ipsec", description="looks at, and tests, IPsec acceleration by VPP")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", type=Path, help="the service's config.toml")
    parser.add_argument("--socket", help="the service's status socket (default: as the configuration says)")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="show what the service says, or the committed configuration")
    show.add_argument("what", choices=("sync", "sa", "config"))
    show.add_argument("--raw", action="store_true", help="as JSON")
    show.set_defaults(run=_show)

    reset = commands.add_parser("reset", help="read the kernel's tables anew")
    reset.add_argument("what", choices=("sync",))
    reset.set_defaults(run=_reset)

    commit = commands.add_parser("commit", help="make a file of set commands the whole configuration, off VyOS")
    commit.add_argument("file", type=Path)
    commit.set_defaults(run=_commit)

    decode = commands.add_parser("decode", help="decode recorded netlink messages (`hex` of each line) to JSON lines")
    decode.add_argument("file", type=Path)
    decode.add_argument("--show-keys", action="store_true", help="print keys, which are hidden otherwise")
    decode.set_defaults(run=_decode)

    plan = commands.add_parser("plan", help="say what would change in VPP now, in order, without doing it")
    plan.add_argument("--config", type=Path, default=argparse.SUPPRESS, help="the service's config.toml")
    plan.set_defaults(run=_plan)

    standin = commands.add_parser("standin", help="run the VPP stand-in in the foreground", add_help=False)
    standin.add_argument("rest", nargs=argparse.REMAINDER)
    standin.set_defaults(run=_standin)
    return parser


def _ask(arguments: argparse.Namespace, question: str) -> object:
    path = arguments.socket or read_config(find_config(arguments.config)).status.socket
    return ask(path, question)


def _show(arguments: argparse.Namespace) -> int:
    if arguments.what == "config":
        from vppipsec.conf.commit import show_config

        return show_config(arguments.config or FALLBACK_CONFIG)
    answer = _ask(arguments, f"show {arguments.what}")
    texts: dict[str, Callable[..., str]] = {"sync": sync_text, "sa": sa_text}
    print(json.dumps(answer, indent=2) if arguments.raw else texts[arguments.what](answer))
    return 0


def _reset(arguments: argparse.Namespace) -> int:
    _ask(arguments, f"reset {arguments.what}")
    print("The kernel's SAs and policies are being read anew.")
    return 0


def _commit(arguments: argparse.Namespace) -> int:
    from vppipsec.conf.commit import commit

    return commit(arguments.file, arguments.config or FALLBACK_CONFIG)


def _decode(arguments: argparse.Namespace) -> int:
    from vppipsec.xfrm.jsonl import decode_file

    return decode_file(arguments.file, arguments.show_keys, sys.stdout)


def _plan(arguments: argparse.Namespace) -> int:
    from vppipsec.sync.dryrun import dry_run
    from vppipsec.xfrm.socket import XfrmSocket

    async def run() -> list[str]:
        settings = read_config(find_config(arguments.config))
        source = XfrmSocket(settings.netlink.rx_buffer_size)
        try:
            return await dry_run(settings, source)
        finally:
            source.close()

    lines = asyncio.run(run())
    print("\n".join(lines) if lines else "VPP is equal to the kernel: nothing to do.")
    return 0


def _standin(arguments: argparse.Namespace) -> int:
    from vppipsec.standin.__main__ import main as standin_main

    return standin_main(arguments.rest)


if __name__ == "__main__":
    sys.exit(main())
