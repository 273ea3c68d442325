"""Runs part of a test in a network namespace of its own, in a thread, so that the machine stays unchanged."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Callable

import pytest

from support.recorded import PATIENCE_S

_CLONE_NEWNET = 0x40000000


def in_new_netns(work: Callable[[], None], limit_s: float = PATIENCE_S + 20) -> None:
    """Run `work` in a new network namespace and pass on what it raises; skip without the permission to create one."""
    trouble: list[BaseException] = []
    refused: list[str] = []

    def run() -> None:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            refused.append(os.strerror(ctypes.get_errno()))
            return
        try:
            work()
        except BaseException as error:  # handed to the test's own thread
            trouble.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive()
    if refused:
        pytest.skip(f"no network namespace can be made here: {refused[0]}")
    if trouble:
        raise trouble[0]


def ip(*lines: str) -> None:
    """Run commands of `ip` in the namespace of the calling thread; all must succeed."""
    subprocess.run(
        ["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True, capture_output=True, timeout=30
    )
