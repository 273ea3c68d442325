"""Reads and writes a configuration as `set` commands, one a line. Errors name the lines that are wrong."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vppipsec.conf.cli import CliConfig, Tree, default_of
from vppipsec.conf.nodes import (
    ACCELERATION,
    ENFORCEMENT,
    INTERFACE,
    LEAVES,
    complaint_about_command,
    edits,
    joined,
    shown,
)
from vppipsec.conf.settings import SettingsError

_VALUELESS = (
    ACCELERATION,
    ENFORCEMENT,
    f"{INTERFACE} *",
    "vpn ipsec esp-group * compression",
    "vpn ipsec esp-group * proposal *",
    "vpn ipsec site-to-site peer * disable",
    "vpn ipsec site-to-site peer * tunnel * disable",
    "vpn ipsec site-to-site peer * tunnel *",
    "vpn ipsec remote-access connection * disable",
    "vpn ipsec profile * disable",
)
"""Nodes without a value. If a pattern ends with the name of a tag node, all nodes below count as that node."""
_VALUED = (
    *LEAVES,
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

_WORD = re.compile(r"""(?:[^ \t'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
_MAX_COMPLAINTS = 10
"""The reader stops after this number of wrong lines."""


@dataclass(slots=True)
class Commands:
    """Parsed `set` commands. `tree` is as vyos.config returns it. `lines` maps a leaf to its line. `number` counts commands."""

    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    number: int = 0

    @property
    def vpp(self) -> Tree:
        """The tree at `vpp`."""
        vpp: Tree = self.tree.get("vpp", {})
        return vpp

    @property
    def ipsec(self) -> Tree:
        """The tree at `vpn ipsec`."""
        ipsec: Tree = self.tree.get("vpn", {}).get("ipsec", {})
        return ipsec


def parse_commands(text: str, name: str) -> Commands:
    """Parse `set` commands, one a line. Lines end with LF or CRLF.

    Commands that do not concern IPsec acceleration are skipped, so that a router's whole configuration is valid input. Raises
    SettingsError with the wrong lines and their numbers. It does not repeat a line without `vpp`, which may contain a secret.
    """
    commands = Commands()
    complaints = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            _enter_line(commands, line.removesuffix("\r"), number)
        except _WrongLine as wrong:
            complaints.append(f"{name}, line {number}: {wrong}")
            if len(complaints) == _MAX_COMPLAINTS:
                complaints.append(f"{name}: the lines after line {number} were not read")
                break
    if complaints:
        raise SettingsError("\n".join(complaints))
    return commands


def format_commands(config: CliConfig) -> list[str]:
    """Return the `set` commands of a configuration: the service's own, without defaults."""
    lines = [f"set {INTERFACE} {name}" for name in config.interfaces]
    if config.accelerated:
        lines.append(f"set {ACCELERATION}")
    for path, (section, key) in LEAVES.items():
        value = getattr(getattr(config.settings, section), key)
        if value != default_of(section, key):
            lines.append(f"set {path} {shlex.quote(str(value))}")
    if not config.settings.offload.selector_enforcement:
        lines.append(f"set {ENFORCEMENT}")
    return lines


class _WrongLine(Exception):
    """A line is not a valid command; the text says why."""


def _enter_line(commands: Commands, line: str, number: int) -> None:
    """Add the command of one line, if it has one. Raises _WrongLine."""
    if (control := _CONTROL.search(line)) is not None:
        raise _WrongLine(f"it has a control character, {shown(control[0])}; lines end with LF or CRLF")
    if line.split(maxsplit=1)[:1] == ["comment"]:  # VyOS writes such lines, and does not escape their text
        return
    words = _words_of(line)
    if not words:
        return
    if words[0] != "set":
        raise _WrongLine(_complaint_about_verb(words))
    if len(words) == 1 or words[1] in ("", "set"):
        raise _WrongLine("after 'set' comes a path")
    if (complaint := complaint_about_command(words[1:])) is not None:
        raise _WrongLine(complaint)
    commands.number += 1
    _put(commands, words[1:], number)


def _words_of(line: str) -> list[str]:
    """Return a line's words without quotes. A word that begins with `#` starts a comment. Raises _WrongLine."""
    words = []
    at = 0
    while at < len(line):
        if line[at] in " \t":
            at += 1
            continue
        if line[at] == "#":
            break
        found = _WORD.match(line, at)
        at = found.end() if found is not None else at
        if at < len(line) and line[at] not in " \t":
            raise _WrongLine("it ends with a backslash" if line[at] == "\\" else "a quote is not closed")
        word = found[0] if found is not None else ""
        words += shlex.split(word) if {*word} & {*"'\"\\"} else [word]
    return words


def _complaint_about_verb(words: Sequence[str]) -> str:
    """Return what is wrong with a line that is not a `set` command."""
    verb = words[0]
    if words[-1] in ("{", "}"):
        return "this is a line of VyOS's config.boot; 'show configuration commands' gives set commands"
    what = f"'{joined(words)}'" if "vpp" in words[:2] else "this"
    if verb == "delete":
        return f"{what} is not a set command: the file is the whole configuration, so leave out what is to go"
    if verb == "vpp":
        return f"{what} is not a set command; did you mean 'set {joined(words)}'?"
    if edits("set", verb.casefold(), 1) <= 1:
        return f"{what} is not a set command: it begins with '{shown(verb)}'; did you mean 'set'?"
    return f"{what} is not a set command"


def _put(commands: Commands, words: Sequence[str], number: int) -> None:
    """Add the path of one command to the tree. Raises _WrongLine if a leaf of the service gets a second value."""
    for pattern in _VALUED:
        names = pattern.split()
        if _matches_pattern(names, words[:-1]):
            place = _descend(commands.tree, names[:-1], words)
            key = names[-1].replace("-", "_")
            if pattern in LEAVES:
                if place.get(key, words[-1]) != words[-1]:
                    raise _WrongLine(f"'{pattern}' has another value in line {commands.lines[pattern]}")
                commands.lines.setdefault(pattern, number)
            place[key] = words[-1]
            return
    for pattern in _VALUELESS:
        names = pattern.split()
        longer_is_known = names[-1] == "*"
        if _matches_pattern(names, words[: len(names)] if longer_is_known else words):
            _descend(commands.tree, names, words)
            return


def _matches_pattern(names: Sequence[str], words: Sequence[str]) -> bool:
    return len(names) == len(words) and all(name in ("*", word) for name, word in zip(names, words, strict=True))


def _descend(place: dict[str, Any], names: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    for name, word in zip(names, words, strict=False):
        place = place.setdefault(word if name == "*" else name.replace("-", "_"), {})
    return place
