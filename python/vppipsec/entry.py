"""Entry points of the commands. A missing Python module gives one sentence, not a traceback."""

from __future__ import annotations

import importlib
import sys

EXIT_LACKING = 2


def vpp_ipsec() -> int:
    """Run the command line. Returns its exit status."""
    return _run_module("vpp-ipsec", "vppipsec.cli")


def vpp_ipsecd() -> int:
    """Run the service. Returns its exit status."""
    return _run_module("vpp-ipsecd", "vppipsec.daemon")


def _run_module(command: str, module: str) -> int:
    try:
        status: int = importlib.import_module(module).main()
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("vpp_papi"):
            raise
        print(
            f"{command} needs VPP's Python module vpp_papi: install VPP's package python3-vpp-api, 25.06 or newer",
            file=sys.stderr,
        )
        return EXIT_LACKING
    return status
