"""startup.conf files for tests: made up by hypothesis, and read as VPP reads them without the parser under test."""

from __future__ import annotations

import re

from hypothesis import strategies as st

# What hypothesis writes: files such as operators and VyOS write them, ours and other sections mixed.
spaces = st.sampled_from([" ", "  ", "\t", " \t "])
line_ends = st.sampled_from(["\n", "\n\n", "\r\n", "\n    ", "\n\t", "  \n", "\r\n\r\n  "])
comments = st.sampled_from(
    [
        "# plain",
        "#",
        "## { unbalanced",
        "# } closes nothing",
        '# "quoted"',
        "#plugins { plugin a { enable } }",
        "# größer",
    ]
).flatmap(lambda text: line_ends.map(lambda end: text + end))
gaps = st.one_of(
    spaces, line_ends, st.tuples(line_ends, comments).map("".join), st.tuples(spaces, comments).map("".join)
)
no_gaps = st.one_of(st.just(""), gaps)
words = st.sampled_from(
    [
        "log",
        "/var/log/vpp.log",
        "gid",
        "vpp",
        "0000:02:00.0",
        "2-3,18-19",
        "1G",
        '"a',
        'b"',
        "a\\{b",
        "c\\}",
        "\\\\",
        "on",
    ]
)


def joined(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return texts that are one of each part, in order."""
    return st.tuples(*parts).map("".join)


def braced(inside: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return blocks that hold some of `inside`."""
    some = st.lists(joined(no_gaps, inside, gaps), max_size=4).map("".join)
    return joined(st.just("{"), some, no_gaps, st.just("}"))


blocks = st.recursive(braced(words), lambda inner: braced(st.one_of(words, joined(words, spaces, inner))), max_leaves=6)
foreign_names = st.sampled_from(
    ["unix", "api-trace", "cpu", "buffers", "dpdk", "logging", "statseg", "linux-cp", "l2fib"]
)
foreign_sections = joined(foreign_names, gaps, st.one_of(blocks, words))
switches = joined(
    st.sampled_from(
        ["default", "dpdk_plugin.so", "acl_plugin.so", "abf_plugin.so", "linux_cp_plugin.so", "linux_nl_plugin.so"]
    ),
    gaps,
    st.sampled_from(["{ enable }", "{enable}", "{ disable }", "{ skip-version-check }", "{ # why\n disable }", "{}"]),
)
plugin_entries = st.one_of(joined(st.just("plugin"), gaps, switches), joined(st.just("add-path"), spaces, words))
engine_entries = joined(
    st.sampled_from(["default", "native", "openssl", "ipsecmb"]),
    gaps,
    st.sampled_from(["{ enable }", "{disable}", "{}"]),
)
nl_entries = joined(
    st.sampled_from(["nl-rx-buffer-size", "nl-batch-size", "nl-batch-delay-ms"]),
    gaps,
    st.sampled_from(["1", "2048", "0x10"]),
)
Chunk = tuple[str, str]
"""What a piece of a file is, and its text."""


def chunks(kind: str, texts: st.SearchStrategy[str]) -> st.SearchStrategy[Chunk]:
    """Return pieces of one kind."""
    return st.tuples(st.just(kind), texts)


sections = st.one_of(
    chunks("foreign", joined(foreign_names, gaps, st.one_of(blocks, words))),
    chunks("known", joined(st.just("plugins"), gaps, braced(plugin_entries))),
    chunks("known", joined(st.just("crypto-engines"), gaps, braced(engine_entries))),
    chunks("known", joined(st.just("linux-nl"), gaps, braced(nl_entries))),
    chunks("c-engine", joined(st.just("linux-xfrm-nl"), gaps, blocks)),
)
pieces = st.tuples(
    chunks("gap", no_gaps),
    st.lists(st.tuples(sections, chunks("gap", gaps)), max_size=6),
    st.sampled_from(["", "# the end"]),
).map(lambda file: [file[0], *(chunk for both in file[1] for chunk in both), ("foreign", file[2])])


def together(file: list[Chunk]) -> str:
    """Return the text of pieces."""
    return "".join(text for _, text in file)


files = pieces.map(together)


ADDED = r"(?:\s*+(?:(?:plugin )?\w++(?:\.so)? \{ enable \}|enable|nl-[a-z-]++ \d++))*+\s*+"
NEW_SECTIONS = r"(?:\s*+(?:plugins|linux-nl) \{" + ADDED + r"\})*+\s*+"


def edited_from(file: list[Chunk]) -> str:
    """Return a pattern of what a file may become by an edit: the same bytes, but for what edits add, change and remove."""
    kinds = ["", *(kind for kind, _ in file), ""]
    pattern = ""
    for before, (kind, text), after in zip(kinds, file, kinds[2:], strict=False):
        if kind == "foreign":
            pattern += re.escape(text)
        elif kind == "known":
            pattern += edited_section(text)
        elif kind == "gap":  # the lines of a C engine's section go with it
            head = re.match(r"[ \t\r]*\n?", text)[0] if before == "c-engine" else ""  # type: ignore[index]  # it matches always
            rest = text[len(head) :]
            kept = rest.rstrip(" \t") if after == "c-engine" else rest
            pattern += f"(?:{re.escape(head)})?{re.escape(kept)}(?:{re.escape(rest[len(kept) :])})?"
    return pattern + NEW_SECTIONS


def edited_section(text: str) -> str:
    """Return a pattern of what a section may become in which entries are switched on, set and added."""
    pattern = ""
    key = ""
    for token in re.findall(r"#[^\r\n]*|[ \t\r\n]*\}|[ \t\r\n]+|\{|(?:\\.|[^\s{}#])+", text):
        if token.endswith("}") and not token.startswith("#"):
            end = token[:-1].rfind("\n") + 1
            pattern += re.escape(token[:end]) + ADDED + re.escape(token[end:].lstrip(" \t"))
        elif token == "disable":
            pattern += "(?:disable|enable)"
        elif key.startswith("nl-") and not token.isspace() and not token.startswith("#"):
            pattern += r"\d+"
        else:
            pattern += re.escape(token)
        if not token.isspace() and not token.startswith("#"):
            key = token
    return pattern


def merged(text: str, name: str) -> list[str]:
    """Return the words of all sections of a name, as VPP merges them, read with nothing of the parser under test."""
    tokens = re.findall(r"[{}]|(?:\\.|[^\s{}])+", re.sub(r"#[^\r\n]*", "", text))
    found: list[str] = []
    depth, section, expects_name = 0, "", True
    for token in tokens:
        if depth == 0 and token != "{":
            section, expects_name = (token, False) if expects_name else ("", True)
            continue
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth == 0:
            expects_name = True
        elif section == name and not (token == "{" and depth == 1):
            found.append(token)
    return found


def plugins_that_vpp_loads(text: str, unasked: set[str]) -> set[str]:
    """Return what VPP would load of what a file names and of what it loads unasked, after src/vlib/unix/plugin.c."""
    said: dict[str, set[str]] = {}
    default: list[str] = []
    words = merged(text, "plugins")
    for index, word in enumerate(words):
        if word == "plugin" and words[index + 2] == "{":
            options = words[index + 3 : words.index("}", index)]
            said.setdefault(words[index + 1], set()).update(options)
            default = options if words[index + 1] == "default" else default
    off_unasked = default[:1] == ["disable"]
    names = {name for name in {*said, *unasked} if name != "default"}
    return {
        name
        for name in names
        if "disable" not in said.get(name, set())
        and ("enable" in said.get(name, set()) or (name in unasked and not off_unasked))
    }
