"""A debug archive for fault reports: the service's answers, tables of kernel and VPP, logs, settings. Never contains a key."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vppipsec.status.server import StatusUnavailable

QUESTIONS = ("sync", "sa", "policy", "tunnel", "events", "counters")
"""Questions to the service, without `show`."""

COMMANDS = (
    "uname -a",
    "ip -s xfrm state list nokeys",
    "ip -s xfrm policy list",
    "ip address",
    "ip rule",
    "ip route show table all",
    "ip -6 route show table all",
    "swanctl --list-sas",
    "swanctl --list-conns",
    "systemctl status --no-pager vpp-ipsecd.service vpp.service",
    "journalctl --boot --no-hostname --no-pager --lines=5000 --unit=vpp-ipsecd.service --unit=vpp.service",
    "vppctl show version verbose",
    "vppctl show interface",
    "vppctl show interface address",
    "vppctl show ipsec protect",
    "vppctl show errors",
    "vppctl show lcp",
)
"""Commands whose output is archived. VPP's `show ipsec sa` and `ip xfrm state` without `nokeys` print keys: never add them."""

FILES = (
    "/run/vpp-ipsecd/config.toml",
    "/etc/vpp-ipsecd/config.toml",
    "/etc/vpp-ipsecd/config.commands",
    "/run/vpp/vpp.conf",
    "/etc/vpp/startup.conf",
    "/proc/net/xfrm_stat",
)
_COMMAND_TIMEOUT_S = 20.0


def write_archive(directory: Path, ask: Callable[[str], Any]) -> Path:
    """Write an archive that only its owner may read into `directory`, and return its path. Raises OSError.

    `ask` sends a question such as `show sa` to the service. For a missing part the archive holds the reason in its place.
    """
    name = f"vpp-ipsec-debug_{time.strftime('%Y-%m-%dT%H-%M-%S')}"
    path = directory / f"{name}.tar.bz2"
    path.touch(mode=0o600, exist_ok=False)
    with tarfile.open(path, "w:bz2") as archive:
        for member, text in _contents(ask):
            content = text.encode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(f"{name}/{member}")
            info.size, info.mtime, info.mode = len(content), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(content))
    return path


def _contents(ask: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each file in the archive."""
    for what in QUESTIONS:
        try:
            yield f"show-{what}.json", json.dumps(ask(f"show {what}"), indent=2)
        except StatusUnavailable as error:
            yield f"show-{what}.txt", f"{error}\n"
    for command in COMMANDS:
        yield f"{command.replace('/', '-').replace(' ', '_')}.txt", _output(command)
    for name in FILES:
        try:
            yield f"files{name}", Path(name).read_bytes().decode("utf-8", "surrogateescape")
        except OSError as error:
            yield f"files{name}.absent", f"{error.strerror}\n"


def _output(command: str) -> str:
    """Return a command's output, followed by its exit status if that is not 0."""
    try:
        ran = subprocess.run(
            command.split(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command}: {error.strerror if isinstance(error, OSError) else f'no end within {_COMMAND_TIMEOUT_S:.0f} s'}\n"
    end = f"\n(exit status {ran.returncode})\n" if ran.returncode else ""
    return ran.stdout.decode("utf-8", "surrogateescape") + end
