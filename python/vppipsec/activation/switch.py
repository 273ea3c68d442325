"""Turns acceleration on and off: the service's systemd unit, and the removal of its state from VPP."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vppipsec.conf.prepare import STARTUP_CONFS, PrepareError, plan_edit, prepare
from vppipsec.conf.settings import Settings
from vppipsec.status.server import StatusUnavailable, ask
from vppipsec.sync.cleanup import clean_up
from vppipsec.vpp.api.errors import VppUnavailable

UNIT = "vpp-ipsecd.service"
_SYSTEMD_RUNS = Path("/run/systemd/system")  # sd_booted(3)


class SwitchError(Exception):
    """The service cannot be turned on or off; the text says why and what to do."""


class Unit:
    """The systemd unit of the service. Without systemd, the operator starts and stops the service."""

    @property
    def managed(self) -> bool:
        """True if systemd runs."""
        return _SYSTEMD_RUNS.is_dir()

    def turn_on(self) -> str:
        """Start the service now and at each boot, or reload its configuration. Raises SwitchError.

        Returns a sentence for the operator.
        """
        if not self.managed:
            return "IPsec acceleration is configured. systemd does not run here: start vpp-ipsecd, or send it SIGHUP."
        _systemctl("enable", "--quiet", UNIT)
        _systemctl("reload-or-restart", UNIT)
        return "IPsec acceleration is on."

    def prepare_vpp(self, config: Path, files: Sequence[Path] = STARTUP_CONFS) -> str:
        """Edit VPP's startup.conf for the service. Return a sentence for the operator, empty if the file did not change.

        Raises SwitchError if the file cannot be edited.
        """
        try:
            edited = prepare(config, files)
        except PrepareError as error:
            raise SwitchError(str(error)) from error
        if edited is None:
            return ""
        return f"{edited} was edited for the service. VPP reads it when it is started again: 'systemctl restart vpp'."

    def file_to_edit(self, settings: Settings, files: Sequence[Path] = STARTUP_CONFS) -> Path | None:
        """Return the file that `prepare_vpp` would edit with these settings, or None. Raises SwitchError as that does."""
        try:
            planned = plan_edit(settings.netlink, files)
        except PrepareError as error:
            raise SwitchError(str(error)) from error
        return planned.path if planned is not None else None

    def turn_off(self) -> None:
        """Stop the service, now and for later boots. Raises SwitchError."""
        if self.managed:
            _systemctl("disable", "--quiet", "--now", UNIT)


def remove_everything(settings: Settings) -> str:
    """Remove all objects of the service from VPP, after it has ended. Return a sentence about the removed objects.

    Raises SwitchError if a service still answers, VppError if an object stays in VPP.
    """
    try:
        ask(settings.status.socket, "show sync", timeout_s=2.0)
    except StatusUnavailable:
        pass
    else:
        raise SwitchError("vpp-ipsecd still runs, and would put back what is removed: end it, then commit again")
    try:
        cleared = asyncio.run(clean_up(settings))
    except VppUnavailable:
        return "IPsec acceleration is off. VPP does not answer; once it is started it holds nothing of ours."
    if not cleared:
        return "IPsec acceleration is off. VPP holds nothing of ours."
    return (
        f"IPsec acceleration is off: {cleared} were removed from VPP. What VPP forwards, it no longer encrypts: where the"
        " kernel's policies ask for encryption, give the interfaces back to the kernel."
    )


def _systemctl(*arguments: str) -> None:
    ran = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SwitchError(f"systemctl {' '.join(arguments)}: {ran.stderr.strip() or 'it failed'}")
