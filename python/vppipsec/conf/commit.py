"""`vpp-ipsec commit FILE` and `vpp-ipsec show config`: what a commit does on VyOS, for machines without VyOS."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vppipsec.conf.cli import format_commands, parse_commands, read_cli
from vppipsec.conf.settings import Settings, SettingsError, load_settings, render_settings
from vppipsec.conf.switch import SwitchError, Unit, leave_nothing
from vppipsec.conf.verify import ConfigRefused, granted_buffer, interfaces_in_vpp, verify
from vppipsec.vpp.errors import VppError

COMMANDS_NAME = "config.commands"
"""Beside config.toml: the committed configuration as `set` commands."""


def commit(file: Path, config_path: Path, unit: Unit | None = None) -> int:
    """Make a file of `set` commands, which is the whole configuration, the running one. Returns an exit status.

    Nothing is changed where the file is wrong. Settings of `config_path` that have no command are kept. The file is the switch:
    the service starts, and VPP's start-up configuration is edited, where it is there; so it has another name while off.
    """
    unit = unit or Unit()
    off_path = config_path.with_name(f"{config_path.name}.off")
    try:
        tree = parse_commands(_read(file), str(file))
        known = next((path for path in (config_path, off_path) if path.exists()), None)
        base = load_settings(known) if known is not None else Settings()
        config = read_cli(tree.get("vpp", {}), tree.get("vpn", {}).get("ipsec", {}), base)
        warnings = verify(config, lambda: config.interfaces or interfaces_in_vpp(config.settings), granted_buffer)
    except (SettingsError, ConfigRefused) as error:
        print(error, file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    _write(config_path.with_name(COMMANDS_NAME), "".join(f"{line}\n" for line in format_commands(config)))
    try:
        if config.accelerated:
            _write(config_path, render_settings(config.settings))
            off_path.unlink(missing_ok=True)
            print(unit.turn_on())
            if told := unit.prepare_vpp(config_path):
                print(told)
        else:
            unit.turn_off()
            print(leave_nothing(config.settings))
            _write(off_path, render_settings(config.settings))
            config_path.unlink(missing_ok=True)
    except (SwitchError, VppError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def show_config(config_path: Path) -> int:
    """Print the committed configuration as `set` commands. Returns an exit status."""
    try:
        print(config_path.with_name(COMMANDS_NAME).read_text(encoding="utf-8"), end="")
    except FileNotFoundError:
        print("Nothing was committed here: 'vpp-ipsec commit FILE' does so.", file=sys.stderr)
        return 1
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{path} cannot be read: {reason}") from error


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that who reads meanwhile sees the old or the new one."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
