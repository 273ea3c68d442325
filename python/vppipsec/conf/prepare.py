"""Prepares VPP's startup.conf for the service. The edit replaces the existing file as a whole, or leaves it as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vppipsec.conf.replace import replace_file
from vppipsec.conf.settings import NetlinkSettings, SettingsError, load_settings
from vppipsec.conf.startup import StartupError, edit, has_c_engine

STARTUP_CONFS = (Path("/run/vpp/vpp.conf"), Path("/etc/vpp/startup.conf"))
"""Possible paths of VPP's startup.conf. VyOS renders the first before each start. VPP's package installs the second."""


class PrepareError(Exception):
    """VPP's startup.conf stays as it was; the text says why."""


@dataclass(frozen=True, slots=True)
class Edit:
    """A file and its new content."""

    path: Path
    content: bytes


def prepare(config: Path | None, files: Sequence[Path] = STARTUP_CONFS) -> Path | None:
    """Edit the first existing file of VPP. Return its path if its content changed, else None.

    `config` is the service's config.toml, or None. Acceleration is on if it is given, or if the file has a section for VPP's own
    engine. Else the file stays as it was. Raises PrepareError.
    """
    path = _first(files)
    if path is None:
        return None
    try:
        planned = plan_edit(load_settings(config).netlink if config is not None else None, files)
        if planned is None:
            return None
        replace_file(planned.path, planned.content)
    except SettingsError as error:
        raise PrepareError(f"{error}; {path} stays as it was") from error
    except OSError as error:
        raise PrepareError(f"{path} cannot be edited: {error.strerror}; it stays as it was") from error
    return planned.path


def plan_edit(netlink: NetlinkSettings | None, files: Sequence[Path] = STARTUP_CONFS) -> Edit | None:
    """Return the edit that `prepare` would make with these settings, or None. Raises PrepareError and OSError."""
    path = _first(files)
    if path is None:
        return None
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    if netlink is None and not has_c_engine(text):
        return None
    try:
        edited = edit(text, netlink)
    except StartupError as error:
        raise PrepareError(f"{path}, {error}; the file stays as it was") from error
    return Edit(path, edited.encode("utf-8", "surrogateescape")) if edited != text else None


def _first(files: Sequence[Path]) -> Path | None:
    return next((file for file in files if file.exists()), None)
