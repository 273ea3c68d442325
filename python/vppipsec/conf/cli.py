"""From the CLI's configuration to typed settings: from VyOS's configuration dictionaries, or from what `set` commands make.

Both ways meet in `read_cli`, so that paths, checks and messages are the same on VyOS and off it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vppipsec.conf.nodes import ACCELERATION, ENFORCEMENT, INTERFACE, LEAVES, shown
from vppipsec.conf.settings import Settings, complaint_about

Tree = Mapping[str, Any]
"""Configuration as vyos.config gives it: nested, `-` in names of nodes as `_`, values as strings, {} where there is none."""

_MOST_DIGITS = 4000  # Python refuses to read numbers that are a little longer


@dataclass(frozen=True, slots=True)
class EspUse:
    """A proposal of an ESP group, and who uses the group: `user` as in `peer "west"`."""

    user: str
    group: str
    number: str
    proposal: Proposal


@dataclass(frozen=True, slots=True)
class CliConfig:
    """What the CLI says of IPsec acceleration. `interfaces` are those that are given to VPP; `complaints` are about values."""

    accelerated: bool = False
    interfaces: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    uses: tuple[EspUse, ...] = ()
    complaints: tuple[str, ...] = ()


def read_cli(
    vpp: Tree, ipsec: Tree, base: Settings | None = None, places: Mapping[str, str] | None = None
) -> CliConfig:
    """Return what the trees at `vpp` and at `vpn ipsec` say. What is wrong with values is in `complaints`.

    `base` gives the settings of which the CLI says nothing, such as where VPP's socket is; `places` say where in a file a
    leaf is, such as `west.conf, line 2`.
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
    """Return the value of a setting that holds where none is given."""
    return getattr(getattr(Settings(), section), key)


def _value(text: str) -> str | int:
    """Return a value as a number where it is one."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else text


def _at(vpp: Tree, path: str) -> Any:
    """Return what is at a path that begins with `vpp`, or None."""
    place: Any = vpp
    for name in path.split()[1:]:
        place = place.get(name.replace("-", "_")) if isinstance(place, Mapping) else None
    return place


def _esp_uses(ipsec: Tree) -> Iterator[EspUse]:
    """Yield each proposal of each ESP group for each who uses it; what is disabled is left out."""
    tunnels: Tree = ipsec.get("esp_group", {})
    for who, name in _group_users(ipsec):
        group = tunnels.get(name, {})
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
    """Yield who uses an ESP group, and its name: each pair once. Defaults as vyos-1x's own (vpn_ipsec.xml.in)."""
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
    """One ESP proposal as it is configured. The hash of a proposal with an AEAD cipher counts for nothing."""

    encryption: str
    hash: str
    mode: str
    compression: bool
