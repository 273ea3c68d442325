"""What the Debian package says of itself holds: versions, dependencies, files, manual pages, the unit's sandbox."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from setuptools import find_packages

import vppipsec
from support.recorded import ROOT
from vppipsec import entry
from vppipsec.cli import main

UNIT = ROOT / "src/systemd/vpp-ipsecd.service"
DROP_IN = ROOT / "src/systemd/vpp.service.d/vpp-ipsec.conf"
INSTALL = [line.split() for line in (ROOT / "debian/vyos-vpp-ipsec.install").read_text().splitlines()]
NOT_DEBIANS = {"vpp_papi": "VPP", "vyos": "vyos-1x"}
"""Modules that neither Python nor Debian brings, and who does."""
DEBIANS = {"pyroute2": "python3-pyroute2"}
"""Modules that Debian brings, and the package of each."""
ONLY_WITH_VPP = "python/vppipsec/vpp/api/codec.py"


def sources() -> list[Path]:
    """Return the library's modules and all scripts in Python."""
    scripts = [path for path in (ROOT / "src").rglob("*") if path.is_file() and b"python" in path.read_bytes()[:40]]
    return [*(ROOT / "python/vppipsec").rglob("*.py"), *scripts]


def imported(path: Path) -> set[str]:
    """Return the top-level names of all modules that a source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_versions_of_project_library_and_package_are_equal() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    package = re.match(r"vyos-vpp-ipsec \((.+?)\) ", (ROOT / "debian/changelog").read_text())
    assert package is not None
    assert project["version"] == vppipsec.__version__ == package[1]


def test_nothing_is_imported_that_the_package_does_not_depend_on() -> None:
    foreign = {name for path in sources() for name in imported(path)} - sys.stdlib_module_names - {"vppipsec"}
    assert foreign == {*NOT_DEBIANS, *DEBIANS}, "name its package in Depends of debian/control, and here"
    (depends,) = re.findall(r"^Depends: (.*)$", (ROOT / "debian/control").read_text(), re.MULTILINE)
    assert set(DEBIANS.values()) <= set(depends.split(", "))


def test_vyos_is_needed_by_scripts_only_and_vpp_papi_by_one_module() -> None:
    library = {str(path.relative_to(ROOT)): imported(path) for path in (ROOT / "python/vppipsec").rglob("*.py")}
    assert not [path for path, names in library.items() if "vyos" in names]
    assert [path for path, names in library.items() if "vpp_papi" in names] == [ONLY_WITH_VPP]


def test_the_library_and_the_scripts_do_not_know_the_stand_in() -> None:
    assert [path for path in sources() if "vppstandin" in path.read_text()] == []


def test_the_stand_in_is_neither_installed_nor_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_packages(ROOT / "python", include=setuptools["packages"]["find"]["include"])
    other_links = {path.parent.name for path in (ROOT / "python").glob("*/__init__.py")}
    assert {name.split(".")[0] for name in packages} == {"vppipsec"} == other_links - {"vppstandin"}
    assert set(setuptools["package-data"]) == {"vppipsec"}
    assert not [source for source, _ in INSTALL if source.startswith("python")]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "stand" not in capsys.readouterr().out


def test_every_script_unit_and_template_is_installed_where_vyos_looks() -> None:
    files = [
        path for base in ("src", "data", "smoketest/scripts") for path in (ROOT / base).rglob("*") if path.is_file()
    ]
    shown = [str(path.relative_to(ROOT)) for path in files if not {"__pycache__", ".ruff_cache"} & {*path.parts}]
    patterns = [source for source, _ in INSTALL]
    assert [path for path in shown if not any(fnmatch(path, f"{pattern}*") for pattern in patterns)] == []
    assert {target for source, target in INSTALL if source.startswith("src/conf_mode")} == {
        "usr/libexec/vyos/conf_mode"
    }


def test_each_command_is_in_the_manual_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert "show" in commands
    page = (ROOT / "debian/vpp-ipsec.8").read_text()
    assert [command for command in commands if f"\\fB{command}" not in page] == []


@pytest.mark.parametrize("command", ["vpp_ipsec", "vpp_ipsecd"])
def test_without_vpp_papi_a_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def lacks(name: str) -> None:
        raise ModuleNotFoundError("No module named 'vpp_papi'", name="vpp_papi.vpp_papi")

    monkeypatch.setattr(entry.importlib, "import_module", lacks)
    assert getattr(entry, command)() == 2
    name = command.replace("_", "-")
    complaint = f"{name} needs VPP's Python module vpp_papi: install VPP's package python3-vpp-api, 25.06 or newer\n"
    assert capsys.readouterr().err == complaint


def test_any_other_missing_module_is_not_blamed_on_vpp(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(name: str) -> None:
        raise ModuleNotFoundError("No module named 'vppipsec.lost'", name="vppipsec.lost")

    monkeypatch.setattr(entry.importlib, "import_module", lacks)
    with pytest.raises(ModuleNotFoundError, match="lost"):
        entry.vpp_ipsecd()


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with programs that are there, and a VPP's beside them."""
    (tmp_path / "vpp.service.d").mkdir()
    for path in (UNIT, DROP_IN):
        text = re.sub(r"^(ExecStart(?:Pre)?=-?)/usr/\S+", r"\1/bin/true", path.read_text(), flags=re.MULTILINE)
        (tmp_path / path.relative_to(ROOT / "src/systemd")).write_text(text)
    (tmp_path / "vpp.service").write_text("[Unit]\nDescription=VPP\n[Service]\nExecStart=/bin/true\n")
    return tmp_path


def analyze(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    """Ask systemd about units in a directory."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = ["systemd-analyze", "--no-pager", *arguments]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60, check=False)


def test_systemd_takes_the_units(units: Path) -> None:
    ran = analyze("verify", "--man=no", "./vpp-ipsecd.service", "./vpp.service", where=units)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_sandbox_leaves_the_service_one_right(units: Path) -> None:
    ran = analyze("security", "--offline=yes", "--threshold=25", "./vpp-ipsecd.service", where=units)
    assert ran.returncode == 0, ran.stdout
    capabilities = re.findall(r"^✗ CapabilityBoundingSet=~(\S+)", ran.stdout, re.MULTILINE)
    assert capabilities == ["CAP_NET_ADMIN"]


def test_vpp_starts_whatever_the_edit_does() -> None:
    before = re.findall(r"^ExecStartPre=(.*)$", DROP_IN.read_text(), re.MULTILINE)
    assert before == ["-/usr/libexec/vyos/vpp-ipsec-startup"]
    assert re.findall(r"^(Requires|Requisite|BindsTo|PartOf|Conflicts|Wants)=", UNIT.read_text(), re.MULTILINE) == []
