"""Knows the CLI nodes of the service and VyOS's own nodes below `vpp`, and explains errors in `set` commands."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

ACCELERATION = "vpp settings ipsec-acceleration"
INTERFACE = "vpp settings interface"
ENFORCEMENT = "vpp ipsec selector-enforcement disable"
LEAVES: Mapping[str, tuple[str, str]] = {
    "vpp settings lcp netlink batch-delay-ms": ("netlink", "batch_delay_ms"),
    "vpp settings lcp netlink batch-size": ("netlink", "batch_size"),
    "vpp settings lcp netlink rx-buffer-size": ("netlink", "rx_buffer_size"),
    "vpp ipsec metrics listen-address": ("metrics", "listen_address"),
    "vpp ipsec metrics port": ("metrics", "port"),
    "vpp ipsec restart-rekey-rate": ("offload", "restart_rekey_rate"),
    "vpp ipsec statistics-interval": ("offload", "statistics_interval_s"),
    "vpp ipsec unsupported": ("offload", "unsupported"),
}
"""Nodes with a value, and the setting of each: section and key."""

_SERVICE_LEAVES = (ACCELERATION, *LEAVES, ENFORCEMENT)
_VYOS = (
    "vpp acl",
    "vpp interfaces",
    "vpp ipfix",
    "vpp kernel-interfaces",
    "vpp nat",
    "vpp nat44",
    "vpp settings allow-unsupported-nics",
    "vpp settings buffers",
    "vpp settings cpu",
    "vpp settings host-resources",
    "vpp settings ignore-kernel-routes",
    "vpp settings interface-rx-mode",
    "vpp settings ipsec interface-type",
    "vpp settings ipsec netlink",
    "vpp settings ipv6",
    "vpp settings l2learn",
    "vpp settings lcp ignore-kernel-routes",
    "vpp settings lcp route-no-paths",
    "vpp settings logging",
    "vpp settings memory",
    "vpp settings nat44",
    "vpp settings physmem",
    "vpp settings poll-sleep-usec",
    "vpp settings resource-allocation",
    "vpp settings statseg",
    "vpp settings unix",
    "vpp sflow",
)
"""VyOS's own nodes below `vpp` (vyos-1x, interface-definitions/vpp.xml.in, 2025 and 2026). VyOS checks the nodes below them."""
_VYOS_OF_INTERFACE = (
    "dpdk-options",
    "driver",
    "num-rx-desc",
    "num-rx-queues",
    "num-tx-desc",
    "num-tx-queues",
    "rx-mode",
    "xdp-options",
)
_KNOWN = (*_SERVICE_LEAVES, INTERFACE, *_VYOS)

_INTERFACE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*")
_HEAD_WORDS = 3
_HEADS = {" ".join(path.split()[:_HEAD_WORDS]) for path in (*_SERVICE_LEAVES, INTERFACE)} | {ACCELERATION.split()[-1]}
"""Commands outside `vpp` are compared with these. The switch's last word alone counts, since a typo there ends the service."""
_LETTERS_PER_EDIT = 4
"""With one wrong letter in this many, a text may mean a node of the service."""
_LETTERS_PER_SLIP = 6
"""With one wrong letter in this many, a text surely means the node."""
_MAX_SHOWN_LETTERS = 100


def complaint_about_command(words: Sequence[str]) -> str | None:
    """Return what is wrong with a command without its `set`. None: it is right, or does not concern the service.

    Commands below `vpp` must be known. A command of another tree is wrong only if it resembles one of the service.
    """
    if words[0] != "vpp":
        return _unknown(words, (*_SERVICE_LEAVES, INTERFACE)) if _looks_like_acceleration(words) else None
    if _begins(words, INTERFACE):
        return _complaint_about_interface(words[len(INTERFACE.split()) :])
    for path in _SERVICE_LEAVES:
        if _begins(words, path):
            return _complaint_about_value(path, words[len(path.split()) :])
    if any(_begins(words, path) for path in _VYOS):
        return None
    longer = [names for names in map(str.split, _KNOWN) if names[: len(words)] == list(words)]
    if any(" ".join(names) in _SERVICE_LEAVES for names in longer):
        following = sorted({names[len(words)] for names in longer})
        return f"'{joined(words)}' is not complete: it goes on with {', '.join(following)}"
    return _unknown(words, _KNOWN)


def shown(text: str) -> str:
    """Return a text that is safe to print: shortened, with escapes for control characters and all others that are not ASCII."""
    begin = "".join(letter if " " <= letter <= "~" else ascii(letter)[1:-1] for letter in text[:_MAX_SHOWN_LETTERS])
    return begin if len(text) <= _MAX_SHOWN_LETTERS else f"{begin}..."


def joined(words: Sequence[str]) -> str:
    """Return words as one text that is safe to print. Words with a blank get quotes."""
    return shown(" ".join(word if word and " " not in word else f'"{word}"' for word in words))


def edits(path: str, text: str, limit: int) -> int:
    """Return how many letters must change so that the text begins with the path, as whole words; at most `limit` + 1."""
    row = list(range(len(text) + 1))
    for i, letter in enumerate(path, 1):
        above, row = row, [i]
        for j, other in enumerate(text, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other)))
        if min(row) > limit:
            return limit + 1
    return min(count for j, count in enumerate(row) if j == len(text) or text[j] == " ")


def _begins(words: Sequence[str], path: str) -> bool:
    names = path.split()
    return list(words[: len(names)]) == names


def _complaint_about_value(path: str, values: Sequence[str]) -> str | None:
    """Return what is wrong with the words after a node of the service, or None."""
    if path not in LEAVES:
        return f"'{path}' takes no value, but '{joined(values)}' follows" if values else None
    if not values or not values[0]:
        return f"'{path}' needs a value"
    return f"'{path}' takes one value, not '{joined(values)}'" if len(values) > 1 else None


def _complaint_about_interface(words: Sequence[str]) -> str | None:
    """Return what is wrong with the words after `vpp settings interface`, or None."""
    if not words or not words[0]:
        return f"'{INTERFACE}' needs the name of an interface"
    if not _INTERFACE_NAME.fullmatch(words[0]):
        return f"'{INTERFACE}' needs the name of an interface, not '{shown(words[0])}'"
    if len(words) == 1 or words[1] in _VYOS_OF_INTERFACE:
        return None
    interface = f"{INTERFACE} {words[0]}"
    return _unknown([*interface.split(), *words[1:]], [f"{interface} {name}" for name in _VYOS_OF_INTERFACE])


def _unknown(words: Sequence[str], paths: Iterable[str]) -> str:
    """Return a sentence: the command does not exist, and the nearest known path."""
    nearest = min(paths, key=lambda path: _distance(words, path))
    about = words[: max(len(nearest.split()), _HEAD_WORDS)]
    return f"there is no '{joined(about)}'; did you mean '{nearest}'?"


def _distance(words: Sequence[str], path: str) -> tuple[int, int, int]:
    """Return the distance of a command from a path, to compare paths.

    Nearest are paths with few wrong letters, and few words after them. Next are nodes of the service whose last word occurs
    anywhere. Then come paths by the number of common first words, and by the likeness of the next word.
    """
    text = " ".join(words).casefold()[:_MAX_SHOWN_LETTERS]
    names = path.split()
    slips = len(path) // _LETTERS_PER_SLIP
    wrong = 0 if path in _SERVICE_LEAVES and path.startswith(text) else edits(path, text, slips)
    if wrong <= slips:
        return 0, wrong + 2 * max(0, len(words) - len(names)), 0
    if path in _SERVICE_LEAVES and any(_is_near(names[-1], word) for word in text.split()):
        return 1, 0, 0
    common = next((i for i, (name, word) in enumerate(zip(names, words, strict=False)) if name != word), len(words))
    name, word = ("".join(some[common : common + 1])[:_MAX_SHOWN_LETTERS] for some in (names, words))
    return 2, -common, 100 * edits(name, word, len(name) + len(word)) // max(len(name), len(word))


def _max_edits(text: str) -> int:
    """Return the number of wrong letters with which a text is still recognised."""
    return len(text) // _LETTERS_PER_EDIT


def _is_near(name: str, word: str) -> bool:
    return edits(name, word[:_MAX_SHOWN_LETTERS], _max_edits(name)) <= _max_edits(name)


def _looks_like_acceleration(words: Sequence[str]) -> bool:
    """Return whether a command resembles one of the service, from its first or from its second word on."""
    second = words[1 : _HEAD_WORDS + 1] if words[1:2] == ["vpp"] else words[1:2]
    return any(_is_near_ours(" ".join(some)) for some in (words[: _HEAD_WORDS + 1], second))


@lru_cache(maxsize=65_536)  # the beginnings of a router's commands are few
def _is_near_ours(beginning: str) -> bool:
    text = beginning.casefold()
    for head in _HEADS:
        limit = _max_edits(head)
        missing = (Counter(head) - Counter(text)).total()  # in letters; each is one edit
        if missing <= limit and edits(head, text[: len(head) + limit + 1], limit) <= limit:
            return True
    return False
