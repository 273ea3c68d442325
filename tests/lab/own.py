"""The guest on the machine's own kernel: namespaces of its own, and no boot.

An ordinary Debian kernel has ESP. The job gets the machine's files under a throw-away overlay, and a network, mounts
and processes of its own. Modules that the kernel loads for the job are removed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import struct
import subprocess
import time
from pathlib import Path
from typing import ClassVar

from guest import HERE, PATH, Guest

_MODULES = Path("/proc/modules")
_MADE_BY_MODULES = (
    "dummy0",
    "erspan0",
    "gre0",
    "gretap0",
    "ip6gre0",
    "ip6tnl0",
    "ip6_vti0",
    "ip_vti0",
    "sit0",
    "tunl0",
)
"""Links that a module makes by itself when it is loaded. Nobody uses them while they are down."""
_UNLOAD_S = 30.0
"""Time limit for the kernel to release modules after its namespaces have ended, s."""
_NETLINK_CRYPTO = 21
_CRYPTO_MSG_DELRNG = struct.pack("=IHHII", 16, 0x14, 1, 0, 0)
"""A netlink header without a body: length, type, NLM_F_REQUEST, sequence, port (include/uapi/linux/cryptouser.h)."""


def loaded_modules() -> set[str]:
    """Return the names of the modules that the kernel has loaded; none where it has no modules."""
    lines = _MODULES.read_text().splitlines() if _MODULES.exists() else []
    return {line.split()[0] for line in lines}


def unload_all_but(before: set[str], patience_s: float = _UNLOAD_S) -> set[str]:
    """Remove from the kernel the modules that are not among `before`; return those that it does not let go of in time.

    What something else has begun to use meanwhile stays.
    """
    deadline = time.monotonic() + patience_s
    while left := _not_used_elsewhere(loaded_modules() - before):
        for name in sorted(left):
            subprocess.run(["rmmod", name], capture_output=True, env={"PATH": PATH}, timeout=patience_s)
        if loaded_modules() >= left:
            if time.monotonic() > deadline:
                break
            _free_random_generator()
            time.sleep(0.2)  # the kernel ends namespaces, with their SAs, some time after their last process
    return left


def _not_used_elsewhere(modules: set[str]) -> set[str]:
    """Return those modules that drive no device, and that have no link in the network namespace of any process.

    The kernel counts neither as a use. It would remove the device, or the link, with the module.
    """
    free = {name for name in modules if not any(Path("/sys/module", name).glob("drivers/*"))}
    kinds = _kinds_of_links() if free else set()
    return {name for name in free if kinds.isdisjoint(_kinds_of_module(name))}


@functools.cache
def _kinds_of_module(name: str) -> frozenset[str]:
    """Return the kinds of link that a module makes: as its aliases say, or by its own name, as with `tun`."""
    command = ["modinfo", "-F", "alias", name]
    aliases = subprocess.run(command, capture_output=True, text=True, env={"PATH": PATH}, timeout=_UNLOAD_S).stdout
    return frozenset(re.findall(r"^rtnl-link-(\S+)", aliases, re.MULTILINE)) | {name}


def _kinds_of_links() -> set[str]:
    """Return the kinds of all links in the network namespaces of processes and in those with a name."""
    namespaces: dict[int, Path] = {}
    for path in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/run/netns").glob("*")):
        with contextlib.suppress(OSError):  # the process has ended
            namespaces.setdefault(path.stat().st_ino, path)
    kinds = set()
    for path in namespaces.values():
        command = ["nsenter", f"--net={path}", "ip", "-json", "-details", "link"]
        told = subprocess.run(command, capture_output=True, text=True, env={"PATH": PATH}, timeout=_UNLOAD_S).stdout
        for link in json.loads(told or "[]"):
            if link.get("ifname") not in _MADE_BY_MODULES or "UP" in link.get("flags", ()):
                kinds.add(link.get("linkinfo", {}).get("info_kind", ""))
    return kinds


def _free_random_generator() -> None:
    """Make the kernel release its default random generator, which it keeps from its first ESP SA on.

    A generator in use is no error. Source: crypto_del_default_rng in crypto/rng.c, which only this message of
    crypto_user reaches.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_CRYPTO) as crypto:
            crypto.send(_CRYPTO_MSG_DELRNG)
    except OSError:
        pass  # a kernel without crypto_user


class OwnKernel(Guest):
    """A guest in namespaces of the machine's own kernel."""

    name = "this machine's own kernel"
    programs: ClassVar = {"unshare": "util-linux", "nsenter": "util-linux"}
    start_s = 30.0

    def __init__(self, memory_mb: int = 2048) -> None:
        """Record which modules the machine has loaded. Raises GuestError where this kind cannot run."""
        super().__init__(memory_mb)
        self._modules = loaded_modules()

    def _command_line(self) -> list[str]:
        return [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
            *("sh", str(HERE / "own.sh"), str(self.directory)),
        ]

    def _clean_up(self) -> None:
        super()._clean_up()
        unload_all_but(self._modules)
