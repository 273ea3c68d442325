"""The VPP of tests and benchmarks: a real one from VPP_BIN, in a directory of its own, on 4k pages; or the stand-in."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from support.recorded import ROOT

_CONFIG = """
unix {{ nodaemon log {dir}/vpp.log cli-listen {dir}/cli.sock poll-sleep-usec 100 runtime-dir {dir} }}
socksvr {{ socket-name {dir}/api.sock }}
memory {{ main-heap-size {heap} main-heap-page-size 4k }}
buffers {{ buffers-per-numa 4096 page-size 4k }}
statseg {{ size 128M page-size 4k socket-name {dir}/stats.sock }}
plugins {{
  path {plugins} plugin default {{ enable }}
  plugin linux_cp_plugin.so {{ enable }} plugin linux_nl_plugin.so {{ disable }}
}}
"""
_START_S = 120.0


def vpp_binary() -> Path | None:
    """Return the VPP to test with: VPP_BIN, else None."""
    name = os.environ.get("VPP_BIN")
    return Path(name) if name else None


def plugin_directory(binary: Path) -> Path:
    """Return the directory of a VPP's plugins."""
    root = binary.resolve().parent.parent
    found = [*root.glob("lib*/*/vpp_plugins"), *root.glob("lib*/vpp_plugins")]
    return found[0] if found else Path("/usr/lib/x86_64-linux-gnu/vpp_plugins")


def listens(path: str, patience_s: float, alive: Callable[[], bool]) -> bool:
    """Wait until a process listens on a unix socket; return False if none does in time or the process has ended."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and alive():
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == 0:
                return True
        time.sleep(0.02)
    return False


def start_standin(api_socket: str, stats_socket: str | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Start the stand-in as a process from the source tree; `options` are those of Popen."""
    command = [sys.executable, "-m", "vppstandin", "--api-socket", api_socket]
    command += ["--stats-socket", stats_socket] if stats_socket is not None else []
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT / "python")}, **options)


class VppBox:
    """One running VPP; `change` edits its startup.conf. Use it as a context manager."""

    def __init__(self, heap: str = "1G", change: Callable[[str], str] = str) -> None:
        binary = vpp_binary()
        if binary is None:
            pytest.skip("VPP_BIN does not name a VPP")
        self._binary = binary
        self.dir = Path(tempfile.mkdtemp(prefix="vpp-"))
        self.api_socket = str(self.dir / "api.sock")
        self.stats_socket = str(self.dir / "stats.sock")
        self.plugins = plugin_directory(binary)
        self._config = self.dir / "startup.conf"
        self._config.write_text(change(_CONFIG.format(dir=self.dir, heap=heap, plugins=self.plugins)))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        """Process number of VPP."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while VPP runs."""
        return self._process is not None and self._process.poll() is None

    def has_plugin(self, name: str) -> bool:
        """Return whether VPP has a plugin."""
        return (self.plugins / f"{name}_plugin.so").exists()

    def cli(self, command: str) -> str:
        """Return the output of a VPP CLI command."""
        vppctl = [self._binary.with_name("vppctl"), "-s", self.dir / "cli.sock", command]
        return subprocess.run(vppctl, capture_output=True, text=True, check=True, timeout=30).stdout

    def start(self) -> None:
        """Start VPP and wait until its API socket answers."""
        Path(self.api_socket).unlink(missing_ok=True)
        with (self.dir / "out").open("wb") as out:
            self._process = subprocess.Popen([self._binary, "-c", self._config], stdout=out, stderr=subprocess.STDOUT)
        if listens(self.api_socket, _START_S, lambda: self.alive):
            return
        output = (self.dir / "out").read_text(errors="replace")[-2000:]
        self.stop()
        raise RuntimeError(f"VPP did not start: {output}")

    def kill(self) -> None:
        """End VPP as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End VPP and remove its directory."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self.dir, ignore_errors=True)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for VPP to end by itself and return its status."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def __enter__(self) -> VppBox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
