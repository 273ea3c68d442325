"""`vpp-ipsec commit FILE` and `vpp-ipsec show config`: a commit as on VyOS, for machines without VyOS."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vppipsec.activation.switch import SwitchError, Unit, remove_everything
from vppipsec.activation.verify import ConfigRefused, granted_buffer, interfaces_in_vpp, verify
from vppipsec.conf.cli import CliConfig, read_cli
from vppipsec.conf.commands import Commands, format_commands, parse_commands
from vppipsec.conf.nodes import ENFORCEMENT, INTERFACE, LEAVES
from vppipsec.conf.settings import Settings, SettingsError, load_settings, render_settings
from vppipsec.vpp.api.errors import VppError

COMMANDS_NAME = "config.commands"
"""File next to config.toml with the committed configuration as `set` commands."""
_CONSEQUENCE = {
    (False, True): "; vpp-ipsecd starts",
    (True, False): "; vpp-ipsecd ends, and what it made in VPP is removed",
    (True, True): "",
    (False, False): "",
}
_MAX_BYTES = 64 << 20
"""No router's configuration is longer. A device such as /dev/zero would be."""


def commit(file: Path, config_path: Path, unit: Unit | None = None, dry_run: bool = False) -> int:
    """Commit a file of `set` commands as the whole configuration. Returns an exit status.

    It first prints the changes; a dry run does nothing else. After an error in the file or in VPP's startup.conf nothing changes.
    Settings in `config_path` without a command stay as they are. `config_path` is the switch: if it exists, the service starts,
    and VPP's startup.conf is edited. So it has another name while acceleration is off.
    """
    unit = unit or Unit()
    off_path = config_path.with_name(f"{config_path.name}.off")
    try:
        commands = _read_commands(file)
        known = next((path for path in (config_path, off_path) if path.exists()), None)
        base = load_settings(known) if known is not None else Settings()
        places = {path: f"{file}, line {number}" for path, number in commands.lines.items()}
        config = read_cli(commands.vpp, commands.ipsec, base, places)
        warnings = verify(config, lambda: config.interfaces or interfaces_in_vpp(config.settings), granted_buffer)
        to_edit = unit.file_to_edit(config.settings) if config.accelerated else None
    except (SettingsError, ConfigRefused, SwitchError) as error:
        print(error, file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    commands_path = config_path.with_name(COMMANDS_NAME)
    before = CliConfig(config_path.exists(), _committed_interfaces(commands_path), base)
    print("\n".join(_changes(before, config, to_edit)), flush=True)
    if dry_run:
        print("This was a dry run: nothing is changed.")
        return 0
    _write_file(commands_path, "".join(f"{line}\n" for line in format_commands(config)))
    outcome: list[str] = []  # printed at the end, so that a closed pipe does not stop the commit
    try:
        if config.accelerated:
            _write_file(config_path, render_settings(config.settings))
            off_path.unlink(missing_ok=True)
            outcome.append(unit.turn_on())
            outcome.append(unit.prepare_vpp(config_path))
        else:
            unit.turn_off()
            outcome.append(remove_everything(config.settings))
            _write_file(off_path, render_settings(config.settings))
            config_path.unlink(missing_ok=True)
    except (SwitchError, VppError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for sentence in filter(None, outcome):
            print(sentence)
    return 0


def show_config(config_path: Path) -> int:
    """Print the committed configuration as `set` commands. Returns an exit status."""
    try:
        print(config_path.with_name(COMMANDS_NAME).read_text(encoding="utf-8"), end="")
    except FileNotFoundError:
        print("Nothing was committed here: 'vpp-ipsec commit FILE' does so.", file=sys.stderr)
        return 1
    return 0


def _changes(before: CliConfig, after: CliConfig, to_edit: Path | None) -> Iterator[str]:
    """Yield a line about the switch, one for each changed setting, and one if VPP's startup.conf needs an edit."""
    switch = _arrow(*(_on_off(config.accelerated) for config in (before, after)))
    yield f"IPsec acceleration: {switch}{_CONSEQUENCE[before.accelerated, after.accelerated]}"
    values = zip(_values(before), _values(after), strict=True)
    changed = [f"{path}: {_arrow(old, new)}" for (path, old), (_, new) in values if old != new]
    yield from changed or ["settings: no change"]
    if to_edit is not None:
        yield f"{to_edit}: edited for the service"


def _values(config: CliConfig) -> Iterator[tuple[str, str]]:
    """Yield the path of each setting that has a command, and its value as text."""
    yield INTERFACE, ", ".join(config.interfaces) or "none"
    for path, (section, key) in LEAVES.items():
        value = getattr(getattr(config.settings, section), key)
        yield path, "none" if value == "" else str(value)
    yield ENFORCEMENT.removesuffix(" disable"), _on_off(config.settings.offload.selector_enforcement)


def _on_off(flag: bool) -> str:
    return "on" if flag else "off"


def _arrow(old: str, new: str) -> str:
    return f"{old} -> {new}" if old != new else f"{new}, no change"


def _read_commands(path: Path) -> Commands:
    """Return the parsed commands of a file. Raises SettingsError, also for a file without commands, such as a truncated one."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{path} cannot be read: {reason}") from error
    if len(content) > _MAX_BYTES:
        raise SettingsError(f"{path} cannot be read: it is too long to be a configuration")
    commands = parse_commands(text, str(path))
    if not commands.number:
        raise SettingsError(
            f"{path} has no command, so nothing is changed. To turn IPsec acceleration off with all settings at their"
            " defaults, commit 'set vpp ipsec unsupported kernel'"
        )
    return commands


def _committed_interfaces(path: Path) -> tuple[str, ...]:
    """Return the interfaces of the last commit, none if its file is missing or wrong."""
    try:
        return read_cli(parse_commands(path.read_text(encoding="utf-8"), path.name).vpp, {}).interfaces
    except (OSError, ValueError):
        return ()


def _write_file(path: Path, text: str) -> None:
    """Replace a file in one step, so that a reader sees the old or the new one."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
