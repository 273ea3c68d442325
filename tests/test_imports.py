"""Rooms of the library import in one direction only, and each knows no more than it has to."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "python/vppipsec"

GROUND = ("kernel", "vpp", "conf", "unix_listener")
ORDER = (
    "sync.journal",
    "sync.desired",
    "sync.ike",
    "sync.actual",
    "sync.plan",
    "sync.apply",
    "sync.engine",
    "status",
    "activation",
    "daemon",
    "cli",
)
"""Each room may import those before it, and the ground. A room of the ground imports no other room."""
MODULES = {
    "sync.journal": "sync.journal",
    "sync.work_queue": "sync.journal",
    "sync.engine": "sync.engine",
    "sync.kernel_watcher": "sync.engine",
    "sync.preview": "sync.engine",
    "sync.cleanup": "sync.engine",
    "entry": "daemon",
}
"""Modules that are in no package of their room."""
PURE = {"sync.desired": ("sync.journal",)}
"""Rooms that may not import these besides, as they do no I/O and keep no state."""
OF_KERNEL = {"netlink": (), "xfrm": ("netlink",), "route": ("netlink",), "hostpath": ("netlink", "xfrm")}
"""Packages of `kernel`, and which others of it each may import; modules beside them are for all."""


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the library's modules by their name below the library."""
    for path in sorted(LIBRARY.rglob("*.py")):
        name = ".".join(path.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, path


def room_of(module: str) -> str | None:
    """Return the room of a module, None for the library's own `__init__`."""
    for name, room in MODULES.items():
        if module == name or module.startswith(f"{name}."):
            return room
    for room in (*GROUND, *ORDER):
        if module == room or module.startswith(f"{room}."):
            return room
    return None if module in ("", "sync") else f"no room: {module}"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the modules of the library that are imported, anywhere: within functions and for type checkers, too."""
    found: dict[tuple[int, str], None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            module = node.module or ""
            names = [name if is_module(name := f"{module}.{alias.name}") else module for alias in node.names]
        else:
            continue
        for name in names:
            if name == "vppipsec" or name.startswith("vppipsec."):
                found[node.lineno, name.removeprefix("vppipsec").removeprefix(".")] = None
    yield from sorted(found)


def is_module(name: str) -> bool:
    place = LIBRARY.parent.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def why_not(importer: str, imported: str) -> str:
    """Return the rule against an import, as a sentence; nothing where it is allowed."""
    of, to = room_of(importer), room_of(imported)
    if of is None or to is None:
        return ""
    for room in (of, to):
        if room.startswith("no room"):
            return f"{room}: say in `MODULES` where it belongs"
    if of == to:
        return why_not_in_kernel(importer, imported) if of == "kernel" else ""
    if of in GROUND:
        return f"`{of}` imports no other room"
    if to in PURE.get(of, ()):
        return f"`{of}` is pure and may not import `{to}`"
    if to not in GROUND and ORDER.index(to) > ORDER.index(of):
        return f"`{of}` may import what comes before it: {', '.join((*GROUND, *ORDER[: ORDER.index(of)]))}"
    return ""


def why_not_in_kernel(importer: str, imported: str) -> str:
    of, to = (module.split(".")[1] if "." in module else "" for module in (importer, imported))
    if of in OF_KERNEL and to in OF_KERNEL and of != to and to not in OF_KERNEL[of]:
        return f"of the packages of `kernel`, `{of}` may import {' and '.join(OF_KERNEL[of]) or 'none'}"
    return ""


def test_each_module_imports_only_what_its_room_may() -> None:
    wrong = [
        f"{path.relative_to(LIBRARY.parents[1])}:{line}: imports vppipsec.{imported}, but {why}"
        for name, path in modules()
        for line, imported in imports(ast.parse(path.read_text()))
        if (why := why_not(name, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported", "rule"),
    [
        ("kernel.xfrm.socket", "vpp.types", "`kernel` imports no other room"),
        ("vpp.guard", "kernel.xfrm.values", "`vpp` imports no other room"),
        ("conf.cli", "sync.desired.tunnel", "`conf` imports no other room"),
        ("sync.desired.tunnel", "sync.plan.tunnel", "`sync.desired` may import what comes before it"),
        ("sync.desired.tunnel", "sync.journal", "`sync.desired` is pure"),
        ("sync.plan.tunnel", "sync.apply.tunnels", "`sync.plan` may import what comes before it"),
        ("sync.engine", "status.server", "`sync.engine` may import what comes before it"),
        ("status.server", "activation.switch", "`status` may import what comes before it"),
        ("kernel.netlink.wire", "kernel.xfrm.values", "`netlink` may import none"),
        ("elsewhere", "kernel.text", "no room: elsewhere"),
        ("sync.apply.tunnels", "sync.plan.tunnel", ""),
        ("cli", "activation.commit", ""),
    ],
)
def test_rule_against_an_import_is_told(importer: str, imported: str, rule: str) -> None:
    why = why_not(importer, imported)
    assert rule in why
    assert bool(rule) == bool(why)


def test_imports_are_found_wherever_they_stand() -> None:
    text = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vppipsec.sync import engine\n"
        "def late() -> None:\n    import vppipsec.vpp.types\nfrom vppipsec import __version__\n"
    )
    assert list(imports(ast.parse(text))) == [(3, "sync.engine"), (5, "vpp.types"), (6, "")]


def test_each_package_says_what_it_may_import() -> None:
    for room in ("kernel", "vpp", "conf", "sync", "status", "activation"):
        for path in (LIBRARY / room).rglob("__init__.py"):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert "import" in text.lower(), f"{path} does not say what its room may import"


def scripts() -> Iterator[Path]:
    """Yield the Python programs that VyOS and systemd start, with a suffix or without."""
    root = LIBRARY.parents[1]
    for path in sorted((*(root / "src").rglob("*"), *(root / "smoketest").rglob("*"))):
        if path.is_file() and (path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/python3")):
            yield path


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_scripts_import_names_that_the_library_has(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vppipsec":
            module = importlib.import_module(str(node.module))
            missing += [f"{node.module}.{name.name}" for name in node.names if not hasattr(module, name.name)]
    assert missing == []


def test_scripts_without_a_suffix_are_among_those_looked_at() -> None:
    assert {"vpp-ipsec-image", "vpp-ipsec-startup"} <= {path.name for path in scripts()}
