"""Defines the service's settings: names, ranges and defaults. Reads them from config.toml, and writes them.

Unknown keys and wrong values raise an error with the name of the key and, if the parser knows it, the line.
"""

from __future__ import annotations

import ipaddress
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEFAULT_CONFIG = Path("/run/vpp-ipsecd/config.toml")
FALLBACK_CONFIG = Path("/etc/vpp-ipsecd/config.toml")


class SettingsError(ValueError):
    """A configuration is wrong; the text says where and what to change."""


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest, largest and default value of a number."""

    low: int
    high: int
    default: int


BATCH_DELAY_MS = Range(0, 60_000, 50)
BATCH_SIZE = Range(1, 1_000_000, 10_000)
RX_BUFFER_SIZE = Range(65_536, 1_073_741_824, 268_435_456)
RESYNC_INTERVAL_S = Range(1, 86_400, 60)
STATISTICS_INTERVAL_S = Range(1, 3_600, 10)
RESTART_REKEY_RATE = Range(1, 10_000, 50)
PORT = Range(1, 65_535, 9_477)


@dataclass(frozen=True, slots=True)
class VppSettings:
    """[vpp]: paths of VPP's sockets."""

    api_socket: str = "/run/vpp/api.sock"
    stats_socket: str = "/run/vpp/stats.sock"


@dataclass(frozen=True, slots=True)
class NetlinkSettings:
    """[netlink]: receive buffer in bytes; size and delay of a batch of events; interval of dumps."""

    rx_buffer_size: int = RX_BUFFER_SIZE.default
    batch_size: int = BATCH_SIZE.default
    batch_delay_ms: int = BATCH_DELAY_MS.default
    resync_interval_s: int = RESYNC_INTERVAL_S.default


@dataclass(frozen=True, slots=True)
class StatusSettings:
    """[status]: path of the socket on which the service answers op mode."""

    socket: str = "/run/vpp-ipsecd/status.sock"


@dataclass(frozen=True, slots=True)
class OffloadSettings:
    """[offload]: packets that VPP cannot carry go to the kernel or are dropped; checks of inbound packets; rates."""

    unsupported: str = "kernel"
    selector_enforcement: bool = True
    restart_rekey_rate: int = RESTART_REKEY_RATE.default
    statistics_interval_s: int = STATISTICS_INTERVAL_S.default


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """[metrics]: address and port of the metrics server. An empty `listen_address` turns it off."""

    listen_address: str = ""
    port: int = PORT.default


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of the service."""

    vpp: VppSettings = VppSettings()
    netlink: NetlinkSettings = NetlinkSettings()
    status: StatusSettings = StatusSettings()
    offload: OffloadSettings = OffloadSettings()
    metrics: MetricsSettings = MetricsSettings()


Check = Callable[[Any], str | None]


def _number_check(limits: Range) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int):
            return "must be a whole number"
        if not limits.low <= value <= limits.high:
            return f"must be from {limits.low} to {limits.high}"
        return None

    return check


def _path_check(value: Any) -> str | None:
    # sun_path has room for 107 bytes and a zero (unix(7))
    if not isinstance(value, str) or not value.startswith("/"):
        return "must be an absolute path"
    if "\0" in value:
        return "must not contain a zero byte"
    return None if len(value.encode()) <= 107 else "must be at most 107 bytes long"


def _unsupported_check(value: Any) -> str | None:
    return None if value in ("kernel", "drop") else "must be 'kernel' or 'drop'"


def _flag_check(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _address_check(value: Any) -> str | None:
    if value == "":
        return None
    try:
        ipaddress.ip_address(value if isinstance(value, str) else "")  # ip_address() accepts numbers too
    except ValueError:
        return "must be an IP address"
    return None


_CHECKS: Mapping[str, tuple[type, Mapping[str, Check]]] = {
    "vpp": (VppSettings, {"api_socket": _path_check, "stats_socket": _path_check}),
    "netlink": (
        NetlinkSettings,
        {
            "rx_buffer_size": _number_check(RX_BUFFER_SIZE),
            "batch_size": _number_check(BATCH_SIZE),
            "batch_delay_ms": _number_check(BATCH_DELAY_MS),
            "resync_interval_s": _number_check(RESYNC_INTERVAL_S),
        },
    ),
    "status": (StatusSettings, {"socket": _path_check}),
    "offload": (
        OffloadSettings,
        {
            "unsupported": _unsupported_check,
            "selector_enforcement": _flag_check,
            "restart_rekey_rate": _number_check(RESTART_REKEY_RATE),
            "statistics_interval_s": _number_check(STATISTICS_INTERVAL_S),
        },
    ),
    "metrics": (MetricsSettings, {"listen_address": _address_check, "port": _number_check(PORT)}),
}


def complaint_about(section: str, key: str, value: Any) -> str | None:
    """Return what is wrong with the value of a setting, such as `must be from 1 to 3600`, or None."""
    return _CHECKS[section][1][key](value)


def parse_settings(text: str, name: str = "config.toml") -> Settings:
    """Return the settings in the text of a config.toml. Raises SettingsError with name and line."""
    try:
        tables = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and numbers that are too long for Python
        raise SettingsError(f"{name}: {error}") from error
    except RecursionError as error:
        raise SettingsError(f"{name}: it is nested too deeply") from error
    sections: dict[str, Any] = {}
    for section, values in tables.items():
        if section not in _CHECKS:
            raise SettingsError(f"{_key_name(name, text, None, section)}: there is no section or key {section!r}")
        if not isinstance(values, dict):
            raise SettingsError(f"{_key_name(name, text, None, section)}: {section!r} must be a section, [{section}]")
        kind, checks = _CHECKS[section]
        for key, value in values.items():
            if key not in checks:
                where = _key_name(name, text, section, key)
                raise SettingsError(f"{where}: [{section}] has no key {key!r}; it has {', '.join(checks)}")
            complaint = complaint_about(section, key, value)
            if complaint is not None:
                where = _key_name(name, text, section, key)
                raise SettingsError(f"{where}: {section}.{key} {complaint}, not {value!r}")
        sections[section] = kind(**values)
    return Settings(**sections)


def load_settings(path: Path) -> Settings:
    """Return the settings of a config.toml. Raises SettingsError, also if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{path}: cannot be read: {reason}") from error
    return parse_settings(text, str(path))


def find_config(path: Path | None) -> Path | None:
    """Return the configuration file to read: the given one, else the first default that exists, else None."""
    if path is not None:
        return path
    return next((candidate for candidate in (DEFAULT_CONFIG, FALLBACK_CONFIG) if candidate.exists()), None)


def render_settings(settings: Settings) -> str:
    """Return the text of a config.toml with these settings."""
    lines = []
    for section in fields(settings):
        lines.append(f"[{section.name}]")
        values = getattr(settings, section.name)
        for key in fields(values):
            value = getattr(values, key.name)
            lines.append(f"{key.name} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: str | int | bool) -> str:
    """Return a value in TOML: as in JSON, except for DEL, which TOML requires to be escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key_name(name: str, text: str, section: str | None, key: str) -> str:
    """Return name and line of a key or a section: the first line after which the parser finds it, in any spelling."""
    lines = text.split("\n")
    understood = 0
    for number in range(1, len(lines) + 1):
        try:
            tables = tomllib.loads("\n".join([*lines[:number], ""]))
        except tomllib.TOMLDecodeError:  # in the middle of a value of several lines
            continue
        found = tables if section is None else tables.get(section)
        if isinstance(found, dict) and key in found:
            break
        understood = number
    return f"{name}, line {understood + 1}"
