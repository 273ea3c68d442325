"""Installs the service's CLI into a VyOS image, and removes it: missing nodes, configd's list, the reference cache.

Some images contain parts of this CLI in vyos-1x, and a node.def can belong to one package only. So the package keeps its
templates elsewhere, and copies only the node.def files that the image lacks. Some nodes run a script. If vyos-1x has such a node,
this module adds nothing below it: leaves there would run the script of vyos-1x.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

NODE_DEFS = Path("usr/share/vyos-vpp-ipsec")
"""The package's sources of the copies: templates/cfg, templates/op, xml_ref."""
TEMPLATES = {
    NODE_DEFS / "templates/cfg": Path("opt/vyatta/share/vyatta-cfg/templates"),
    NODE_DEFS / "templates/op": Path("opt/vyatta/share/vyatta-op/templates"),
}
PLACED = Path("var/lib/vyos-vpp-ipsec/placed")
"""Lists the copied files, one a line, without the leading slash."""
CONFIGD_LIST = Path("usr/share/vyos/configd-include.json")
SCRIPT = "vpp_ipsec.py"
XML_REF = Path("usr/lib/python3/dist-packages/vyos/xml_ref")
CACHES = XML_REF / "pkg_cache"
CACHE = "vyos_vpp_ipsec_cache.py"
_OWNER = "\nend: "  # begins the line of a node.def that runs a script


class ImageError(Exception):
    """The image is not as expected; the text says why."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a run: the installed files, and whether configd must read its list again."""

    placed: tuple[Path, ...]
    configd_changed: bool


def install(root: Path = Path("/")) -> Outcome:
    """Install missing files into the image at `root`. Repeat it whenever vyos-1x changes. Raises ImageError and OSError."""
    _remove_recorded(root)
    copies: dict[Path, Path] = {}
    for carried, target in TEMPLATES.items():
        if (root / target).is_dir():
            copies |= _missing_nodes(root / carried, root, target)
    if (root / CACHES).is_dir():
        copies[CACHES / CACHE] = root / NODE_DEFS / "xml_ref" / CACHE
    for path, source in copies.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, root / path)
    (root / PLACED).parent.mkdir(parents=True, exist_ok=True)
    (root / PLACED).write_text("".join(f"{path}\n" for path in copies), encoding="utf-8")
    _refresh_reference(root)
    return Outcome(tuple(copies), _list_script(root, wanted=True))


def remove(root: Path = Path("/")) -> Outcome:
    """Remove from the image at `root` all files of `install`. Raises ImageError and OSError."""
    _remove_recorded(root)
    (root / PLACED).unlink(missing_ok=True)
    _refresh_reference(root)
    return Outcome((), _list_script(root, wanted=False))


def _missing_nodes(node_defs: Path, root: Path, target: Path) -> dict[Path, Path]:
    """Return the files to install, and the source of each. Omits existing files, and all below an existing node with a script."""
    missing = {}
    existing: list[Path] = []
    for source in sorted(node_defs.rglob("node.def"), key=lambda path: len(path.parts)):  # parents first
        path = target / source.relative_to(node_defs)
        if any(node in path.parents for node in existing):
            continue
        if not (root / path).exists():
            missing[path] = source
        elif _OWNER in source.read_text(encoding="utf-8"):
            existing.append(path.parent)
    return missing


def _remove_recorded(root: Path) -> None:
    """Remove the files of an earlier `install`, except those that now belong to a package."""
    try:
        recorded = [Path(line) for line in (root / PLACED).read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return
    of_packages = _package_owned(root, recorded)
    for path in recorded:
        if path in of_packages:
            continue
        (root / path).unlink(missing_ok=True)
        for parent in path.parents:
            if parent in (*TEMPLATES.values(), CACHES) or not _remove_if_empty(root / parent):
                break


def _remove_if_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


def _package_owned(root: Path, paths: Sequence[Path]) -> set[Path]:
    """Return the files that belong to a package (dpkg-query(1) prints a line `package: /path` for each)."""
    if not paths:
        return set()
    command = ["dpkg-query", f"--admindir={root / 'var/lib/dpkg'}", "--search", *(f"/{path}" for path in paths)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # 1 if some belong to none
    if ran.returncode not in (0, 1):
        raise ImageError(f"dpkg-query cannot say whose files are in the image: {ran.stderr.strip()}")
    return {Path(line.split(": /", 1)[1]) for line in ran.stdout.splitlines() if ": /" in line}


def _list_script(root: Path, wanted: bool) -> bool:
    """Add the service's script to configd's list, or remove it. Return whether the list changed."""
    path = root / CONFIGD_LIST
    if not path.exists():
        return False
    try:
        scripts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ImageError(f"/{CONFIGD_LIST} is not JSON: {error}") from error
    new = sorted({*scripts, SCRIPT}) if wanted else [name for name in scripts if name != SCRIPT]
    if (SCRIPT in scripts) == wanted:
        return False
    path.write_text(json.dumps(new, indent=0) + "\n", encoding="utf-8")
    return True


def _refresh_reference(root: Path) -> None:
    """Run vyos-1x's merge of the reference caches of all packages. Its own values win. Raises ImageError."""
    script = root / XML_REF / "update_cache.py"
    if not script.exists():
        return
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if ran.returncode:
        reason: Iterable[str] = ran.stderr.strip().splitlines()[-1:]
        raise ImageError(f"vyos-1x cannot merge its reference caches: {' '.join(reason)}")
