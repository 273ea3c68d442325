"""Turns the CLI's configuration into typed settings.

The configuration comes from VyOS's dictionaries, or from a file of `set` commands. `read_cli` handles both, so that paths, checks
and messages are the same on VyOS and without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vppipsec.conf.nodes import ACCELERATION, ENFORCEMENT, INTERFACE, LEAVES, shown
from vppipsec.conf.settings import Settings, complaint_about

Tree = Mapping[str, Any]
"""Configuration as vyos.config returns it: nested, `_` for `-` in node names, values as strings, {} for no value."""

_MAX_DIGITS = 4000  # Python refuses to parse numbers that are slightly longer


@dataclass(frozen=True, slots=True)
class EspUse:
    """A proposal of an ESP group, and a user of that group, such as `peer "west"`."""

    user: str
    group: str
    number: str
    proposal: Proposal


@dataclass(frozen=True, slots=True)
class CliConfig:
    """The CLI's configuration of IPsec acceleration. `interfaces` are VPP's; `complaints` name wrong values."""

    accelerated: bool = False
    interfaces: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    uses: tuple[EspUse, ...] = ()
    complaints: tuple[str, ...] = ()


def read_cli(
    vpp: Tree, ipsec: Tree, base: Settings | None = None, places: Mapping[str, str] | None = None
) -> CliConfig:
    """Return the configuration in the trees at `vpp` and at `vpn ipsec`. Its `complaints` name wrong values.

    `base` has the settings without a CLI node, such as the path of VPP's socket. `places` maps a leaf to its place in a file,
    such as `west.conf, line 2`.
    """
    base = base or Settings()
    sections: dict[str, Any] = {"netlink": base.netlink, "offload": base.offload, "metrics": base.metrics}
    complaints = []
    for path, (section, key) in LEAVES.items():
        text = _at(vpp, path)
        value = default_of(section, key) if text is None else _value(str(text))
        complaint = complaint_about(section, key, value)
        if complaint is None:
            sections[section] = replace(sections[section], **{key: value})
        else:
            place = f"{places[path]}: " if places and path in places else ""
            complaints.append(f"{place}'{path}' {complaint}, not {shown(str(text))}")
    enforcement = _at(vpp, ENFORCEMENT) is None
    sections["offload"] = replace(sections["offload"], selector_enforcement=enforcement)
    return CliConfig(
        accelerated=_at(vpp, ACCELERATION) is not None,
        interfaces=tuple(_at(vpp, INTERFACE) or ()),
        settings=replace(base, **sections),
        uses=tuple(_esp_uses(ipsec)),
        complaints=tuple(complaints),
    )


def default_of(section: str, key: str) -> Any:
    """Return the default of a setting."""
    return getattr(getattr(Settings(), section), key)


def _value(text: str) -> str | int:
    """Return a value as a number if it is one, else as text."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS else text


def _at(vpp: Tree, path: str) -> Any:
    """Return the node at a path that begins with `vpp`, or None."""
    place: Any = vpp
    for name in path.split()[1:]:
        place = place.get(name.replace("-", "_")) if isinstance(place, Mapping) else None
    return place


def _esp_uses(ipsec: Tree) -> Iterator[EspUse]:
    """Yield each proposal of each ESP group for each user of the group. Disabled users do not count."""
    groups: Tree = ipsec.get("esp_group", {})
    for who, name in _group_users(ipsec):
        group = groups.get(name, {})
        for number, proposal in group.get("proposal", {}).items():
            yield EspUse(
                who,
                name,
                number,
                Proposal(
                    encryption=proposal.get("encryption", "aes128"),
                    hash=proposal.get("hash", "sha1"),
                    mode=group.get("mode", "tunnel"),
                    compression="compression" in group,
                ),
            )


def _group_users(ipsec: Tree) -> Iterator[tuple[str, str]]:
    """Yield each pair of a user and its ESP group once. Defaults are those of vyos-1x (vpn_ipsec.xml.in)."""
    found: dict[tuple[str, str], None] = {}
    for peer, settings in ipsec.get("site_to_site", {}).get("peer", {}).items():
        if "disable" in settings:
            continue
        default = settings.get("default_esp_group")
        tunnels = [tunnel for tunnel in settings.get("tunnel", {}).values() if "disable" not in tunnel]
        if "vti" in settings:
            tunnels.append(settings["vti"])
        for tunnel in tunnels:
            found[f'peer "{peer}"', tunnel.get("esp_group", default)] = None
    for title, users in (
        ("remote-access connection", ipsec.get("remote_access", {}).get("connection", {})),
        ("profile", ipsec.get("profile", {})),
    ):
        for name, settings in users.items():
            if "disable" not in settings:
                found[f'{title} "{name}"', settings.get("esp_group")] = None
    yield from ((who, group) for who, group in found if group is not None)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One configured ESP proposal. An AEAD cipher ignores the hash."""

    encryption: str
    hash: str
    mode: str
    compression: bool
