"""From the CLI's configuration to typed settings: from VyOS's configuration dictionaries, or from a file of `set` commands.

Both ways meet in `read_cli`, so that paths, checks and messages are the same on VyOS and off it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vppipsec.conf.proposals import Proposal
from vppipsec.conf.settings import Settings, SettingsError, complaint_about

Tree = Mapping[str, Any]
"""Configuration as vyos.config gives it: nested, `-` in names of nodes as `_`, values as strings, {} where there is none."""

ACCELERATION = "vpp settings ipsec-acceleration"

_LEAVES: Mapping[str, tuple[str, str]] = {
    "vpp settings lcp netlink batch-delay-ms": ("netlink", "batch_delay_ms"),
    "vpp settings lcp netlink batch-size": ("netlink", "batch_size"),
    "vpp settings lcp netlink rx-buffer-size": ("netlink", "rx_buffer_size"),
    "vpp ipsec metrics listen-address": ("metrics", "listen_address"),
    "vpp ipsec metrics port": ("metrics", "port"),
    "vpp ipsec restart-rekey-rate": ("offload", "restart_rekey_rate"),
    "vpp ipsec statistics-interval": ("offload", "statistics_interval_s"),
    "vpp ipsec unsupported": ("offload", "unsupported"),
}
"""Nodes with a value, and the setting that each gives."""
_ENFORCEMENT = "vpp ipsec selector-enforcement disable"
_OURS = (ACCELERATION, "vpp settings lcp netlink", "vpp ipsec")
"""Below these, and nowhere else, a command that is not known is a mistake of the operator's."""

_VALUELESS = (
    ACCELERATION,
    _ENFORCEMENT,
    "vpp settings interface *",
    "vpn ipsec esp-group * compression",
    "vpn ipsec esp-group * proposal *",
    "vpn ipsec site-to-site peer * disable",
    "vpn ipsec site-to-site peer * tunnel * disable",
    "vpn ipsec site-to-site peer * tunnel *",
    "vpn ipsec remote-access connection * disable",
    "vpn ipsec profile * disable",
)
"""Nodes without a value; where a pattern ends with the name of a tag node, whatever is below it counts as that node."""
_VALUED = (
    *_LEAVES,
    "vpn ipsec esp-group * mode",
    "vpn ipsec esp-group * proposal * encryption",
    "vpn ipsec esp-group * proposal * hash",
    "vpn ipsec site-to-site peer * default-esp-group",
    "vpn ipsec site-to-site peer * tunnel * esp-group",
    "vpn ipsec site-to-site peer * vti bind",
    "vpn ipsec site-to-site peer * vti esp-group",
    "vpn ipsec remote-access connection * esp-group",
    "vpn ipsec profile * esp-group",
)


@dataclass(frozen=True, slots=True)
class EspUse:
    """A proposal of an ESP group, and who uses the group: `who` as in `peer "west"`."""

    who: str
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


def read_cli(vpp: Tree, ipsec: Tree, base: Settings | None = None) -> CliConfig:
    """Return what the trees at `vpp` and at `vpn ipsec` say. What is wrong with values is in `complaints`.

    `base` gives the settings of which the CLI says nothing, such as where VPP's socket is.
    """
    base = base or Settings()
    sections: dict[str, Any] = {"netlink": base.netlink, "offload": base.offload, "metrics": base.metrics}
    complaints = []
    for path, (section, key) in _LEAVES.items():
        text = _at(vpp, path)
        value = _default(section, key) if text is None else int(text) if str(text).isdecimal() else text
        complaint = complaint_about(section, key, value)
        if complaint is None:
            sections[section] = replace(sections[section], **{key: value})
        else:
            complaints.append(f"'{path}' {complaint}, not {text}")
    enforcement = _at(vpp, _ENFORCEMENT) is None
    sections["offload"] = replace(sections["offload"], selector_enforcement=enforcement)
    return CliConfig(
        accelerated=_at(vpp, ACCELERATION) is not None,
        interfaces=tuple(_at(vpp, "vpp settings interface") or ()),
        settings=replace(base, **sections),
        uses=tuple(_esp_uses(ipsec)),
        complaints=tuple(complaints),
    )


def parse_commands(text: str, name: str) -> Tree:
    """Return the tree that `set` commands make, a line each, as vyos.config would give it.

    What has nothing to do with IPsec acceleration is left out, so that a router's whole configuration can be given. Raises
    SettingsError with the line for a command that is none, and for one below our own nodes that is not known.
    """
    root: dict[str, Any] = {}
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}, line {number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise SettingsError(f"{where}: {error}") from error
        if not words:
            continue
        if words[0] != "set" or len(words) < 2:
            raise SettingsError(f"{where}: '{line.strip()}' is not a set command")
        _put(root, words[1:], where)
    return root


def format_commands(config: CliConfig) -> list[str]:
    """Return the `set` commands that give a configuration: all of ours that differ from the default."""
    lines = [f"set vpp settings interface {name}" for name in config.interfaces]
    if config.accelerated:
        lines.append(f"set {ACCELERATION}")
    for path, (section, key) in _LEAVES.items():
        value = getattr(getattr(config.settings, section), key)
        if value != _default(section, key):
            lines.append(f"set {path} {value}")
    if not config.settings.offload.selector_enforcement:
        lines.append(f"set {_ENFORCEMENT}")
    return lines


def _default(section: str, key: str) -> Any:
    return getattr(getattr(Settings(), section), key)


def _put(root: dict[str, Any], words: Sequence[str], where: str) -> None:
    """Enter one command's path into the tree."""
    for pattern in _VALUED:
        names = pattern.split()
        if _matches(names, words[:-1]):
            place = _descend(root, names[:-1], words)
            place[names[-1].replace("-", "_")] = words[-1]
            return
        if _matches(names, words) and pattern in _LEAVES:
            raise SettingsError(f"{where}: '{pattern}' needs a value")
    for pattern in _VALUELESS:
        names = pattern.split()
        longer_is_known = names[-1] == "*"
        if _matches(names, words[: len(names)] if longer_is_known else words):
            _descend(root, names, words)
            return
    text = " ".join(words)
    if any(text == path or text.startswith(f"{path} ") for path in _OURS):
        raise SettingsError(f"{where}: there is no '{text}'")


def _matches(names: Sequence[str], words: Sequence[str]) -> bool:
    return len(names) == len(words) and all(name in ("*", word) for name, word in zip(names, words, strict=True))


def _descend(place: dict[str, Any], names: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    for name, word in zip(names, words, strict=False):
        place = place.setdefault(word if name == "*" else name.replace("-", "_"), {})
    return place


def _at(vpp: Tree, path: str) -> Any:
    """Return what is at a path that begins with `vpp`, or None."""
    place: Any = vpp
    for name in path.split()[1:]:
        place = place.get(name.replace("-", "_")) if isinstance(place, Mapping) else None
    return place


def _esp_uses(ipsec: Tree) -> Iterator[EspUse]:
    """Yield each proposal of each ESP group for each who uses it; what is disabled is left out."""
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
