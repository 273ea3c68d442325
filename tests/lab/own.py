"""The guest on the machine's own kernel: namespaces of its own, and no boot.

An ordinary Debian kernel has ESP. The job gets the machine's files under a throw-away overlay, and a network, mounts
and processes of its own. Modules that the kernel loads for the job are removed at the end.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from guest import HERE, PATH, Guest

_MODULES = Path("/proc/modules")
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
    """Remove the kernel modules that are not in `before`; return those that the kernel does not release in time."""
    deadline = time.monotonic() + patience_s
    while left := loaded_modules() - before:
        for name in sorted(left):
            subprocess.run(["rmmod", name], capture_output=True, env={"PATH": PATH}, timeout=patience_s)
        if loaded_modules() - before == left:
            if time.monotonic() > deadline:
                break
            _free_random_generator()
            time.sleep(0.2)  # the kernel ends namespaces, with their SAs, some time after their last process
    return left


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
    programs: ClassVar = {"unshare": "util-linux"}
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        unload_all_but(self._modules)
