"""Puts our CLI into a VyOS image and takes it out again: the nodes that the image lacks, configd's list, the reference cache.

Images differ in what of our CLI vyos-1x has itself, and a node.def can belong to one package only. So the package carries its
templates elsewhere, and copies of them the node.def files that the image lacks. Where vyos-1x has a node that runs a script
of ours with us, what is below that node stays vyos-1x's too: our leaves there would run its script.
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
"""Where the package has what is copied from: templates/cfg, templates/op, xml_ref."""
TEMPLATES = {
    NODE_DEFS / "templates/cfg": Path("opt/vyatta/share/vyatta-cfg/templates"),
    NODE_DEFS / "templates/op": Path("opt/vyatta/share/vyatta-op/templates"),
}
PLACED = Path("var/lib/vyos-vpp-ipsec/placed")
"""The files that were copied, a line each, without the leading slash."""
CONFIGD_LIST = Path("usr/share/vyos/configd-include.json")
SCRIPT = "vpp_ipsec.py"
XML_REF = Path("usr/lib/python3/dist-packages/vyos/xml_ref")
CACHES = XML_REF / "pkg_cache"
CACHE = "vyos_vpp_ipsec_cache.py"
_OWNER = "\nend: "  # the line of a node.def that runs a script


class ImageError(Exception):
    """The image is not as expected; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done: files that are in place now, and whether configd must read its list again."""

    placed: tuple[Path, ...]
    configd_changed: bool


def install(root: Path = Path("/")) -> Outcome:
    """Put into the image at `root` what it lacks; repeat it whenever vyos-1x changes. Raises ImageError and OSError."""
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
    """Take out of the image at `root` all that `install` put there. Raises ImageError and OSError."""
    _remove_recorded(root)
    (root / PLACED).unlink(missing_ok=True)
    _refresh_reference(root)
    return Outcome((), _list_script(root, wanted=False))


def _missing_nodes(node_defs: Path, root: Path, target: Path) -> dict[Path, Path]:
    """Return the files to place, and what each is a copy of: what the image has stays, and so does all below a script's node."""
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
    """Remove what an earlier `install` placed, but for files that have since become those of a package."""
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
    """Return those of some files that belong to a package (dpkg-query(1): a line `package: /path` for each)."""
    if not paths:
        return set()
    command = ["dpkg-query", f"--admindir={root / 'var/lib/dpkg'}", "--search", *(f"/{path}" for path in paths)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # 1 where some belong to none
    if ran.returncode not in (0, 1):
        raise ImageError(f"dpkg-query cannot say whose files are in the image: {ran.stderr.strip()}")
    return {Path(line.split(": /", 1)[1]) for line in ran.stdout.splitlines() if ": /" in line}


def _list_script(root: Path, wanted: bool) -> bool:
    """Enter our script in configd's list, or strike it out; return whether the list was another before."""
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
    """Let vyos-1x merge the reference caches of all packages anew; its own values win."""
    script = root / XML_REF / "update_cache.py"
    if not script.exists():
        return
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    if ran.returncode:
        reason: Iterable[str] = ran.stderr.strip().splitlines()[-1:]
        raise ImageError(f"vyos-1x cannot merge its reference caches: {' '.join(reason)}")
