#!/usr/bin/env python3
"""Builds the files of VyOS's CLI from the XML definitions: node.def trees of config and op mode, and a cache for vyos.xml_ref.

    tools/templates.py --out build

writes build/templates/{cfg,op}/.../node.def and build/xml_ref/vyos_vpp_ipsec_cache.py. VyOS builds its files with scripts that
are installed neither on routers nor on other machines. So this script writes the same format; a test compares the two. It needs
only Python, and knows only the XML elements of this project.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

PACKAGE = "vyos-vpp-ipsec"
TAG = "node.tag"
"""The directory below a tag node that stands for any value."""
_INCLUDE = re.compile(r"^ *#include <(.+)>$", re.MULTILINE)
_POSITION = re.compile(r"\$\{?([0-9]+)")

CONFIG_ELEMENTS: Mapping[str, str] = {
    "interfaceDefinition": "node syntaxVersion",
    "node": "properties children",
    "leafNode": "properties defaultValue",
    "children": "node leafNode",
    "properties": "help valueHelp constraint constraintErrorMessage completionHelp valueless priority",
    "valueHelp": "format description",
    "constraint": "regex validator",
    "completionHelp": "list script",
}
"""Allowed child elements of each element in interface-definitions."""

OP_ELEMENTS: Mapping[str, str] = {
    "interfaceDefinition": "node",
    "node": "properties children command",
    "tagNode": "properties children command",
    "leafNode": "properties command",
    "children": "node tagNode leafNode",
    "properties": "help completionHelp",
    "completionHelp": "list script",
}
"""Allowed child elements of each element in op-mode-definitions."""


class TemplateError(Exception):
    """The XML is wrong; the text names the file and the node, and says what to change."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the CLI. `path` is also its directory. `kind` is the name of its element."""

    path: tuple[str, ...]
    kind: str
    file: str
    element: Element

    @property
    def properties(self) -> Element | None:
        """The node's properties, None for a node that only contains others."""
        return self.element.find("properties")

    @property
    def owner(self) -> str | None:
        """The script that a commit runs for this node."""
        return self.element.get("owner")

    def text(self, name: str) -> str | None:
        """Return the text of a property, or of an element of the node itself, or None."""
        for holder in (self.properties, self.element):
            found = holder.find(name) if holder is not None else None
            if found is not None:
                return (found.text or "").strip()
        return None

    def has(self, name: str) -> bool:
        """Return whether the node has a property."""
        return self.properties is not None and self.properties.find(name) is not None

    def wrong(self, complaint: str) -> TemplateError:
        """Return an error about this node."""
        return TemplateError(f"{self.file}: '{' '.join(self.path)}' {complaint}")


def transclude(path: Path, inside: tuple[Path, ...] = ()) -> str:
    """Return a file's text with its `#include <...>` lines replaced. Paths are relative to the outermost file."""
    top = (inside or (path,))[0]
    if path in inside:
        raise TemplateError(f"{inside[-1].name}: {path.name} includes itself")

    def included(match: re.Match[str]) -> str:
        target = top.parent / match[1]
        if not target.is_file():
            raise TemplateError(f"{path.name}: there is no {match[1]} to include")
        return transclude(target, (*inside, path)).rstrip("\n")

    return _INCLUDE.sub(included, path.read_text(encoding="utf-8"))


def read_nodes(directory: Path, elements: Mapping[str, str]) -> list[Node]:
    """Return all nodes of a directory's *.xml.in, parents first. Raises TemplateError for any error in them."""
    nodes: dict[tuple[str, ...], Node] = {}
    for path in sorted(directory.glob("*.xml.in")):
        for node in _walk(_parse(path), elements, path.name, ()):
            known = nodes.get(node.path)
            if known is None or (known.kind == node.kind == "node" and known.properties is None):
                nodes[node.path] = node
            elif node.kind != "node" or node.properties is not None:
                raise node.wrong(f"is defined in {known.file} already")
    for node in nodes.values():
        _check(node, op=elements is OP_ELEMENTS)
    return list(nodes.values())


def config_def(node: Node) -> str:
    """Return the node.def of a config-mode node, empty if the node has no properties."""
    properties = node.properties
    if properties is None:
        return ""
    default = node.text("defaultValue")
    note = f" (default: {default})" if default is not None else ""
    lines = []
    if node.kind == "leafNode" and not node.has("valueless"):
        lines.append("type: txt")
    if node.has("priority"):
        lines.append(f"priority: {node.text('priority')}")
    lines.append(f"help: {_wrapped((node.text('help') or '') + note)}")
    for value in properties.iterfind("valueHelp"):
        form, what = value.findtext("format", ""), value.findtext("description", "")
        lines.append(f"val_help: {form}; {what}" + (" (default)" if form == default else ""))
    completions = _completions(properties, script='sh -c "{}"')
    if completions:
        # the backend reads only one `allowed`
        lines.append("allowed: " + ' && echo " " && '.join(completions))
    constraint = properties.find("constraint")
    if constraint is not None:
        regexes = " ".join(f"--regex \\'{_escaped(regex.text)}\\'" for regex in constraint.iterfind("regex"))
        validators = " ".join(
            f'--exec \\"${{vyos_validators_dir}}/{validator.get("name")} {validator.get("argument", "")}\\"'
            for validator in constraint.iterfind("validator")
        )
        message = node.text("constraintErrorMessage") or "Invalid value"
        lines.append(
            f'syntax:expression: exec "${{vyos_libexec_dir}}/validate-value {regexes} {validators} '
            f' --value \\\'$VAR(@)\\\'"; "{message}"'
        )
    if node.owner is not None:
        lines.append(f'end: sudo sh -c "${{vyshim}} {node.owner}"')
    return "\n".join(lines) + "\n"


def op_defs(node: Node) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield path and text of the node.def files of an op-mode node. A tag node has two, a node without properties none."""
    properties = node.properties
    if properties is None:
        return
    lines = [f"help: {_wrapped(node.text('help') or '')}"]
    directory = node.path
    if node.kind == "tagNode":
        yield directory, f"help: {node.text('help')}\n"
        directory = (*directory, TAG)
    completions = _completions(properties, script="{}")
    if completions:
        lines.append("allowed: " + " ; ".join(completions))
    command = node.text("command")
    if command is not None:
        lines.append(f"run: {command}")
    yield directory, "\n".join(lines) + "\n"


def reference(nodes: Iterable[Node], versions: Mapping[str, str]) -> dict[str, Any]:
    """Return the cache of config-mode nodes for vyos.xml_ref: nested dictionaries with `node_data` at each node."""
    root: dict[str, Any] = {"node_data": _node_data(None)}
    for node in nodes:
        place = root
        for name in node.path:
            place = place.setdefault(name, {})
        place["node_data"] = _node_data(node)
    root["component_version"] = dict(versions)
    return root


def component_versions(directory: Path) -> dict[str, str]:
    """Return the versions of the syntax components that a directory's *.xml.in declare."""
    found = (element for path in sorted(directory.glob("*.xml.in")) for element in _parse(path).iter("syntaxVersion"))
    return {element.get("component", ""): element.get("version", "") for element in found}


def build(root: Path, out: Path) -> list[Path]:
    """Build all files of the project at `root` below `out`; replace those of an earlier run. Returns the files."""
    config = read_nodes(root / "interface-definitions", CONFIG_ELEMENTS)
    op = read_nodes(root / "op-mode-definitions", OP_ELEMENTS)
    texts = {Path("templates/cfg", *node.path, "node.def"): config_def(node) for node in config}
    texts |= {Path("templates/op", *path, "node.def"): text for node in op for path, text in op_defs(node)}
    cache = reference(config, component_versions(root / "interface-definitions"))
    texts[Path("xml_ref", f"{PACKAGE.replace('-', '_')}_cache.py")] = f"reference = {cache!r}\n"
    for name in ("templates", "xml_ref"):
        shutil.rmtree(out / name, ignore_errors=True)
    written = []
    for path, text in texts.items():
        if text:  # an empty node.def would hide help and priority of the same node in another package
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            (out / path).write_text(text, encoding="utf-8")
            written.append(out / path)
    return written


def main() -> int:
    """Build the files. Returns the exit status, 1 after an error in the XML."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="builds VyOS command templates from the XML definitions")
    parser.add_argument("--root", type=Path, default=root, help="where the definitions lie (default: this project)")
    parser.add_argument("--out", type=Path, default=root / "build", help="where to write (default: build)")
    arguments = parser.parse_args()
    try:
        written = build(arguments.root, arguments.out)
    except TemplateError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(written)} files written below {arguments.out}")
    return 0


def _parse(path: Path) -> Element:
    try:
        return ElementTree.fromstring(transclude(path))
    except ElementTree.ParseError as error:
        raise TemplateError(f"{path.name}: after its includes it is not XML: {error}") from error


def _walk(element: Element, elements: Mapping[str, str], file: str, above: tuple[str, ...]) -> Iterator[Node]:
    """Yield the nodes in an element, parents first. Raises TemplateError for an element that `elements` does not allow."""
    where = f"'{' '.join(above)}'" if above else "the top"
    path = above
    if element.tag in ("node", "tagNode", "leafNode"):
        name = element.get("name")
        if not name:
            raise TemplateError(f"{file}: a <{element.tag}> below {where} has no name")
        path = (*above, name)
        where = f"'{' '.join(path)}'"
        yield Node(path, element.tag, file, element)
        if element.tag == "tagNode":
            path = (*path, TAG)
    for inner in element:
        if inner.tag not in elements.get(element.tag, "").split():
            raise TemplateError(f"{file}: at {where} there must be no <{inner.tag}> in <{element.tag}>")
        yield from _walk(inner, elements, file, path)


def _check(node: Node, op: bool) -> None:
    """Raise TemplateError if VyOS would refuse a node, or would misread it."""
    if (node.properties is not None or node.kind != "node") and not node.text("help"):
        raise node.wrong("has no <help>")
    if node.owner is not None and not (node.text("priority") or "").isdigit():
        raise node.wrong("has an owner but no <priority>: give it a number above that of the node it is in")
    if node.has("valueless") and (
        node.kind != "leafNode"
        or node.text("defaultValue") is not None
        or node.has("valueHelp")
        or node.has("constraint")
    ):
        raise node.wrong("is <valueless/>: that goes with a leaf without default, value help and constraint only")
    if '"' in (node.text("constraintErrorMessage") or ""):
        raise node.wrong("has a <constraintErrorMessage> with a double quote, which ends the message in node.def")
    command = node.text("command") if op else None
    if op and node.kind == "leafNode" and not command:
        raise node.wrong("has no <command>")
    words = len(node.path) + (node.kind == "tagNode")
    for position in _POSITION.findall(command or ""):
        if int(position) > words:
            raise node.wrong(f"runs a command with ${position}, but has {words} words")


def _completions(properties: Element, script: str) -> list[str]:
    """Return the shell commands that print completions."""
    return [
        f'echo "{source.text}"' if source.tag == "list" else script.format(source.text)
        for source in properties.iterfind("completionHelp/*")
    ]


def _escaped(regex: str | None) -> str:
    return (regex or "").strip().replace("\\", "\\\\")


def _wrapped(text: str) -> str:
    """Return a help text with line breaks for the CLI's two columns."""
    return textwrap.fill(text, width=64, subsequent_indent="\t\t\t")


def _node_data(node: Node | None) -> dict[str, object]:
    kinds = {"leafNode": "leaf", "tagNode": "tag"}
    return {
        "node_type": kinds.get(node.kind, "other") if node else "other",
        "multi": False,
        "valueless": node is not None and node.has("valueless"),
        "default_value": node.text("defaultValue") if node else None,
        "owner": node.owner if node else None,
        "priority": node.text("priority") if node else None,
    }


if __name__ == "__main__":
    sys.exit(main())
