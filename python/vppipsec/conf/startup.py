"""Reads, edits and writes VPP's startup.conf. An edit keeps all other content byte for byte.

VPP's rules for the file (src/vpp/vnet/main.c, unformat_string in src/vppinfra/unformat.c, src/vlib/init.c):
- `#` begins a comment, which ends with the line. Line ends have no other meaning.
- At the top are pairs of a name and a value. A value is a word or a `{ block }`. VPP joins blocks with the same name.
- Braces count everywhere, unless after a backslash. Quotes have no meaning.
- VPP does not start if a section belongs to a plugin that is not loaded.
- VPP does not start if a plugin or crypto engine is named twice. So an edit changes an existing entry, or else adds one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vppipsec.conf.settings import NetlinkSettings

C_ENGINE = "linux-xfrm-nl"
"""The section that starts VPP's own engine, which would program the same SAs as the service."""


class SwitchSection(NamedTuple):
    """A section with entries `name { enable }` and `name { disable }`. `keyword` comes before each entry, if not empty."""

    section: str
    keyword: str = ""


PLUGINS = SwitchSection("plugins", "plugin")
CRYPTO_ENGINES = SwitchSection("crypto-engines")

NEEDED_PLUGINS: Mapping[str, bool] = {"abf_plugin.so": True, "acl_plugin.so": True, "linux_cp_plugin.so": False}
"""The plugins that the service uses, and whether VPP loads them by default."""

NEEDED_ENGINES: Mapping[str, bool] = {"native": True, "openssl": True}
"""The crypto engines that together have all offloaded algorithms, and whether VPP uses them by default."""

ROUTE_MIRROR: Mapping[str, bool] = {"linux_nl_plugin.so": False}
"""The plugin of the section linux-nl, and whether VPP loads it by default."""

MAX_DEPTH = 64
"""Maximum nesting of sections; the file itself counts as one level. VPP's own have three."""

_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)|(?P<comment>#[^\r\n]*)|(?P<open>\{)|(?P<close>\})|(?P<word>(?:\\[^#\r\n]|[^ \t\r\n{}#])+)"
)
"""Splits any text into tokens: a token can begin at every character."""


class StartupError(ValueError):
    """VPP could not read this startup.conf; `line` is the place, counted from 1."""

    def __init__(self, line: int, complaint: str) -> None:
        super().__init__(f"line {line}: {complaint}")
        self.line = line


class Space(NamedTuple):
    """Blanks and line ends."""

    text: str


class Comment(NamedTuple):
    """A comment from its `#` on, without the line end."""

    text: str


class Word(NamedTuple):
    """A name or a value, and its line."""

    text: str
    line: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """The items between two braces, and the line of the opening one."""

    items: tuple[Item, ...]
    line: int = 0


Item = Space | Comment | Word | Block


class Setting(NamedTuple):
    """A name and its value. `first` and `last` are their indices among the items of their level."""

    name: Word
    value: Word | Block
    first: int
    last: int


def parse(text: str) -> tuple[Item, ...]:
    """Return the items of a startup.conf. `write` restores the same text. Raises StartupError."""
    items = _items(text)
    for _ in settings_of(items):
        pass  # raises for a name without value
    return items


def write(items: Iterable[Item]) -> str:
    """Return the text of items."""
    return "".join(f"{{{write(item.items)}}}" if isinstance(item, Block) else item.text for item in items)


def settings_of(items: Sequence[Item]) -> Iterator[Setting]:
    """Yield pairs of names and values, as VPP pairs them at the top of the file. Raises StartupError."""
    name: tuple[int, Word] | None = None
    for index, item in enumerate(items):
        if isinstance(item, Space | Comment):
            continue
        if name is not None:
            yield Setting(name[1], item, name[0], index)
            name = None
        elif isinstance(item, Block):
            raise StartupError(item.line, "a '{' without a section's name before it")
        else:
            name = (index, item)
    if name is not None:
        raise StartupError(name[1].line, f"'{name[1].text}' has neither a value nor a {{ section }} after it")


def edit(text: str, netlink: NetlinkSettings | None) -> str:
    """Return a startup.conf that fits vpp-ipsecd, with as few changes to `text` as possible. Raises StartupError.

    The edit removes the C engine's section, and enables the needed plugins and crypto engines. If the router mirrors routes with
    linux-nl, that section gets the netlink values, unless they are None. A second edit changes nothing.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    items = parse(_without_section(text, C_ENGINE))
    items = _enabled(items, PLUGINS, NEEDED_PLUGINS, newline)
    if _sections(items, "linux-nl"):  # VPP would not start without its plugin
        items = _enabled(items, PLUGINS, ROUTE_MIRROR, newline)
    if _sections(items, CRYPTO_ENGINES.section):  # without this section VPP uses all engines
        items = _enabled(items, CRYPTO_ENGINES, NEEDED_ENGINES, newline)
    if netlink is not None and not _switched_off(items, PLUGINS, ROUTE_MIRROR):
        items = _with_values(items, "linux-nl", _linux_nl(netlink), newline)
    return write(items)


def has_c_engine(text: str) -> bool:
    """Return whether the file starts the C engine. VyOS writes that section if its own switch is on. Raises StartupError."""
    return any(pair.name.text == C_ENGINE for pair in settings_of(parse(text)))


def _items(text: str) -> tuple[Item, ...]:
    """Return the items in the text of a file or a block. Raises StartupError."""
    levels: list[tuple[int, list[Item]]] = [(0, [])]
    line = 1
    for match in _TOKEN.finditer(text):
        token = match[0]
        items = levels[-1][1]
        match match.lastgroup:
            case "space":
                items.append(Space(token))
            case "comment":
                items.append(Comment(token))
            case "word":
                items.append(Word(token, line))
            case "open":
                levels.append((line, []))
                if len(levels) > MAX_DEPTH:
                    raise StartupError(line, f"sections are nested more than {MAX_DEPTH} deep")
            case _:
                if len(levels) == 1:
                    raise StartupError(line, "the '}' closes nothing: remove it, or add the '{' that it belongs to")
                opened, inner = levels.pop()
                levels[-1][1].append(Block(tuple(inner), opened))
        line += token.count("\n")
    if len(levels) > 1:
        raise StartupError(levels[-1][0], "the '{' is never closed: add the '}' that it belongs to")
    return tuple(levels[0][1])


def _linux_nl(netlink: NetlinkSettings) -> dict[str, str]:
    """Return the settings with the names of VPP's section linux-nl (src/plugins/linux-cp/lcp_nl.c)."""
    return {
        "nl-rx-buffer-size": str(netlink.rx_buffer_size),
        "nl-batch-size": str(netlink.batch_size),
        "nl-batch-delay-ms": str(netlink.batch_delay_ms),
    }


def _sections(items: Sequence[Item], name: str) -> list[Block]:
    """Return the blocks of a section. A file may have several."""
    return [pair.value for pair in settings_of(items) if pair.name.text == name and isinstance(pair.value, Block)]


def _in_sections(items: Sequence[Item], name: str, change: Callable[[Block], Block]) -> tuple[Item, ...]:
    """Return the items, with `change` applied to every block of a section."""
    changed = list(items)
    for pair in settings_of(items):
        if pair.name.text == name and isinstance(pair.value, Block):
            changed[pair.last] = change(pair.value)
    return tuple(changed)


def _without_section(text: str, name: str) -> str:
    """Return the text without a section. Also removes the section's lines if they have nothing else."""
    items = parse(text)
    found = next((pair for pair in settings_of(items) if pair.name.text == name), None)
    if found is None:
        return text
    head, tail = write(items[: found.first]), write(items[found.last + 1 :])
    indent = head.rpartition("\n")[2]
    line_end = re.match(r"[ \t\r]*(?:\n|\Z)", tail)
    if not indent.strip(" \t") and line_end:
        head, tail = head[: len(head) - len(indent)], tail[line_end.end() :]
    return _without_section(head + tail, name)


def _switches(block: Block, keyword: str) -> Iterator[Setting]:
    """Yield the entries of a block: name and `{ enable }`. Raises StartupError for an entry that VPP would refuse."""
    words = [(index, item) for index, item in enumerate(block.items) if not isinstance(item, Space | Comment)]
    position = 0
    while position < len(words):
        first, item = words[position]
        if keyword and isinstance(item, Word) and item.text != keyword:  # such as `path /usr/lib/vpp_plugins`
            position += 2
            continue
        position += bool(keyword)
        match words[position : position + 2]:
            case [(_, Word() as name), (last, Block() as value)]:
                yield Setting(name, value, first, last)
            case _:
                entry = f"{keyword} NAME".strip()
                raise StartupError(item.line, f"here must stand '{entry} {{ enable }}' or '{entry} {{ disable }}'")
        position += 2


def _switched_off(items: Sequence[Item], kind: SwitchSection, names: Mapping[str, bool]) -> list[str]:
    """Return the names that VPP would not load. The values of `names` say whether VPP loads them by default."""
    entries = [pair for block in _sections(items, kind.section) for pair in _switches(block, kind.keyword)]
    default = [_words(pair.value)[:1] for pair in entries if pair.name.text == "default"]
    off = []
    for name, unasked in names.items():
        states = {word for pair in entries if pair.name.text == name for word in _words(pair.value)}
        if "disable" in states or ("enable" not in states and (not unasked or default[-1:] == [["disable"]])):
            off.append(name)
    return off


def _words(value: Word | Block) -> list[str]:
    return [item.text for item in value.items if isinstance(item, Word)] if isinstance(value, Block) else [value.text]


def _enabled(items: Sequence[Item], kind: SwitchSection, names: Mapping[str, bool], newline: str) -> tuple[Item, ...]:
    """Return items that enable all `names`. Changes existing entries, and adds missing ones."""
    off = _switched_off(items, kind, names)
    entries = [pair for block in _sections(items, kind.section) for pair in _switches(block, kind.keyword)]
    there = {pair.name.text for pair in entries}

    def change(block: Block) -> Block:
        changed = list(block.items)
        for pair in _switches(block, kind.keyword):
            if pair.name.text in off and isinstance(pair.value, Block):
                changed[pair.last] = _switched_on(pair.value)
        return replace(block, items=tuple(changed))

    new = [f"{kind.keyword} {name} {{ enable }}".strip() for name in off if name not in there]
    return _with_entries(_in_sections(items, kind.section, change), kind.section, new, newline)


def _switched_on(block: Block) -> Block:
    """Return a block with `enable` in place of `disable`. Other words stay."""
    if "enable" not in _words(block) and "disable" not in _words(block):
        return _appended(block, ["enable"], "\n")
    enable = (Word("enable") if isinstance(item, Word) and item.text == "disable" else item for item in block.items)
    return replace(block, items=tuple(enable))


def _with_values(items: Sequence[Item], section: str, values: Mapping[str, str], newline: str) -> tuple[Item, ...]:
    """Return items in which a section has these values. Changes existing entries, and adds missing ones."""
    named = {word for block in _sections(items, section) for word in _words(block)}

    def change(block: Block) -> Block:
        changed = list(block.items)
        for pair in settings_of(block.items):
            if pair.name.text in values:
                changed[pair.last] = Word(values[pair.name.text])
        return replace(block, items=tuple(changed))

    new = [f"{key} {value}" for key, value in values.items() if key not in named]
    return _with_entries(_in_sections(items, section, change), section, new, newline)


def _with_entries(items: tuple[Item, ...], section: str, entries: Sequence[str], newline: str) -> tuple[Item, ...]:
    """Return items with new entries at the end of a section's last block, or in a new section at the end."""
    if not entries:
        return items
    blocks = [pair.last for pair in settings_of(items) if pair.name.text == section and isinstance(pair.value, Block)]
    if blocks:
        last = items[blocks[-1]]
        assert isinstance(last, Block)
        return (*items[: blocks[-1]], _appended(last, entries, newline), *items[blocks[-1] + 1 :])
    text = write(items)
    gap = newline if text.endswith("\n") else newline * 2 if text else ""
    lines = [f"{section} {{", *(f"    {entry}" for entry in entries), "}", ""]
    return parse(text + gap + newline.join(lines))


def _appended(block: Block, entries: Sequence[str], newline: str) -> Block:
    """Return a block with new entries at its end, one a line if the closing brace has its own line."""
    before, line_end, indent = write(block.items).rpartition("\n")
    if line_end and not indent.strip(" \t\r"):
        found = re.search(r"\n([ \t]*)[^ \t\r\n]", before)
        deeper = found[1] if found else indent + "    "
        text = before + line_end + "".join(f"{deeper}{entry}{newline}" for entry in entries) + indent
    else:
        inside = write(block.items)
        text = inside + ("" if inside[-1:] in (" ", "\t") else " ") + " ".join(entries) + " "
    return replace(block, items=_items(text))
