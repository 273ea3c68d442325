"""The Debian package, built and then installed, removed and purged on a plain Debian 12 and on a make-believe VyOS."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.recorded import ROOT

pytestmark = [
    pytest.mark.package,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("package"),  # one built package, and one Debian that it comes into and goes from
]

CFG = "opt/vyatta/share/vyatta-cfg/templates"
CONFIGD_LIST = "usr/share/vyos/configd-include.json"
XML_REF = "usr/lib/python3/dist-packages/vyos/xml_ref"
BOOKS = ("var/lib/dpkg", "var/log", "var/cache", "tmp")
"""Where dpkg, and not a package, keeps what it did."""

Run = subprocess.CompletedProcess[str]


def run(*command: str | Path, where: Path | None = None, path: str | None = None) -> Run:
    """Run a command; the test fails with what it said if it fails."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    environment |= {"PATH": path} if path else {}
    ran = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"
    return ran


def need(*programs: str) -> None:
    """Skip where a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built while another python3 comes first in the PATH and fails whenever it is run."""
    need("dpkg-buildpackage", "dh", "dh_python3")
    missing = subprocess.run(["dpkg-checkbuilddeps"], cwd=ROOT, capture_output=True, text=True, check=False)
    if missing.returncode:
        pytest.skip(missing.stderr.strip())
    out = tmp_path_factory.mktemp("deb")
    trap = tmp_path_factory.mktemp("trap")
    for name in ("python3", "python3.11"):
        (trap / name).write_text("#!/bin/sh\necho 'another Python' >&2\nexit 99\n")
        (trap / name).chmod(0o755)
    run(ROOT / "tools/deb.sh", out, path=f"{trap}:{os.environ['PATH']}")
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Debian 12 with what the package depends on, from the mirror that this machine uses."""
    need("debootstrap")
    if os.getuid() != 0:
        pytest.skip("only root can run debootstrap")
    root = tmp_path_factory.mktemp("debian")
    sources = "".join(path.read_text() for path in Path("/etc/apt").glob("sources.list*/**/*") if path.is_file())
    mirrors = re.findall(r"^(?:URIs:|deb)\s+(?:\[.*\]\s*)?(\S+/debian/?)(?:\s|$)", sources, re.MULTILINE)
    command = [
        "debootstrap",
        "--variant=minbase",
        "--merged-usr",
        "--include=python3,iproute2,nftables,python3-pyroute2",
        "bookworm",
        root,
        *mirrors[:1],
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if ran.returncode:
        pytest.skip(f"debootstrap failed: {ran.stdout.strip().splitlines()[-1:]}")
    return root


@pytest.fixture
def plain(debian: Path, deb: Path) -> Iterator[Path]:
    """The plain Debian, with the package's file in /tmp and the package not installed, before and after."""
    shutil.copy(deb, debian / "tmp/package.deb")
    yield debian
    subprocess.run(["chroot", debian, "dpkg", "--purge", "vyos-vpp-ipsec", "vyos-1x"], capture_output=True, check=False)


def files(root: Path) -> dict[str, bytes]:
    """Return all files and links of a system with what they hold, but for dpkg's books; directories as such."""
    found: dict[str, bytes] = {}
    for directory, names, members in os.walk(root):
        place = Path(directory).relative_to(root)
        names[:] = [name for name in names if str(place / name) not in (*BOOKS, "proc", "sys", "dev")]
        for name in (*names, *members):
            path = Path(directory, name)
            if path.is_symlink():
                found[str(place / name)] = os.readlink(path).encode()
            else:
                found[str(place / name)] = path.read_bytes() if path.is_file() else b""
    return found


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    """Return what is there in only one of two states, or differs."""
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def test_lintian_finds_no_fault(deb: Path) -> None:
    need("lintian")
    ran = run("lintian", "--allow-root", "--fail-on", "error,warning", deb)
    assert ran.stdout == ""


def test_the_scripts_run_debians_python(deb: Path, tmp_path: Path) -> None:
    run("dpkg-deb", "--extract", deb, tmp_path)
    for name in ("usr/sbin/vpp-ipsec", "usr/sbin/vpp-ipsecd", "usr/libexec/vyos/vpp-ipsec-startup"):
        assert (tmp_path / name).read_text().splitlines()[0] == "#!/usr/bin/python3"
    installed = {path.name for path in tmp_path.glob("usr/lib/python3/dist-packages/*")}
    assert {name for name in installed if not name.endswith(".dist-info")} == {"vppipsec"}
    assert not list(tmp_path.rglob("*vppstandin*"))
    assert not list(tmp_path.glob("usr/lib/python3.*"))


def test_on_plain_debian_it_comes_and_goes_without_a_trace(plain: Path) -> None:
    before = files(plain)
    run("chroot", plain, "dpkg", "--install", "/tmp/package.deb")
    added = changed(before, files(plain))
    assert {
        "usr/lib/systemd/system/vpp-ipsecd.service",
        "usr/libexec/vyos/conf_mode/vpp_ipsec.py",
        "usr/sbin/vpp-ipsecd",
        "usr/share/vyos-vpp-ipsec/templates/cfg/vpp/ipsec/node.def",
    } <= added
    assert not [path for path in added if path.startswith(("opt/", "etc/systemd/"))]
    run("chroot", plain, "dpkg", "--install", "/tmp/package.deb")  # as an upgrade
    (plain / "etc/vpp-ipsecd").mkdir()
    (plain / "etc/vpp-ipsecd/config.toml").write_text("")
    run("chroot", plain, "dpkg", "--remove", "vyos-vpp-ipsec")
    kept = changed(before, files(plain))
    assert not [path for path in kept if not path.startswith(("etc/commit", "etc/vpp-ipsecd", "var/lib/systemd/"))]
    assert "etc/vpp-ipsecd/config.toml" in kept
    run("chroot", plain, "dpkg", "--purge", "vyos-vpp-ipsec")
    assert changed(before, files(plain)) == set()


def test_on_plain_debian_its_commands_work_with_debians_python_alone(plain: Path) -> None:
    run("chroot", plain, "dpkg", "--install", "/tmp/package.deb")
    (plain / "tmp/vpp.conf").write_text("linux-xfrm-nl { interface ipsec }\n")
    run("chroot", plain, "/usr/libexec/vyos/vpp-ipsec-startup", "/tmp/vpp.conf")
    assert (plain / "tmp/vpp.conf").read_text() == "plugins {\n    plugin linux_cp_plugin.so { enable }\n}\n"
    lacking = subprocess.run(["chroot", plain, "vpp-ipsecd"], capture_output=True, text=True, timeout=60, check=False)
    assert (lacking.returncode, lacking.stdout) == (2, "")
    assert lacking.stderr.startswith("vpp-ipsecd needs VPP's Python module vpp_papi: install ")
    assert lacking.stderr.count("\n") == 1


def vyos_package(directory: Path, version: str, nodes: tuple[str, ...]) -> Path:
    """Build a package that has of vyos-1x what ours looks at."""
    root = directory / version
    update = 'import os\nhere = os.path.dirname(__file__)\nnames = sorted(os.listdir(here + "/pkg_cache"))\n'
    for path, text in {
        "DEBIAN/control": f"Package: vyos-1x\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n",
        CONFIGD_LIST: '[\n"vpn_ipsec.py"\n]\n',
        f"{XML_REF}/update_cache.py": update + 'open(here + "/merged", "w").write(" ".join(names))\n',
        f"{XML_REF}/pkg_cache/vyos_1x_cache.py": "",
        "DEBIAN/postrm": f"#!/bin/sh\n[ $1 = upgrade ] || rm -f /{XML_REF}/merged\n",
        **{f"{CFG}/{node}/node.def": "help: vyos-1x's own\n" for node in nodes},
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "DEBIAN/postrm").chmod(0o755)
    run("dpkg-deb", "--root-owner-group", "--build", root, directory / f"{version}.deb")
    return directory / f"{version}.deb"


def test_package_follows_vyos_upgrades_and_leaves_no_trace(plain: Path, tmp_path: Path) -> None:
    nodes = ("vpp", "vpp/settings")
    for version, more in {"1": ("vpp/settings/lcp/netlink",), "2": ("vpp/settings/ipsec-acceleration",)}.items():
        shutil.copy(vyos_package(tmp_path, version, nodes + more), plain / f"tmp/vyos-{version}.deb")
    run("chroot", plain, "dpkg", "--install", "/tmp/vyos-1.deb")
    before = files(plain)

    def ours(node: str) -> bool:
        path = plain / CFG / node / "node.def"
        return path.exists() and path.read_text() != "help: vyos-1x's own\n"

    run("chroot", plain, "dpkg", "--install", "/tmp/package.deb")
    assert ours("vpp/ipsec")
    assert ours("vpp/settings/ipsec-acceleration")
    assert not ours("vpp/settings/lcp/netlink")
    assert json.loads((plain / CONFIGD_LIST).read_text()) == ["vpn_ipsec.py", "vpp_ipsec.py"]
    assert "vyos_vpp_ipsec_cache.py" in (plain / XML_REF / "merged").read_text()

    run("chroot", plain, "dpkg", "--install", "/tmp/vyos-2.deb")  # ours follows by trigger
    assert ours("vpp/ipsec")
    assert not ours("vpp/settings/ipsec-acceleration")
    assert ours("vpp/settings/lcp/netlink/batch-size")
    assert json.loads((plain / CONFIGD_LIST).read_text()) == ["vpn_ipsec.py", "vpp_ipsec.py"]
    assert "vyos_vpp_ipsec_cache.py" in (plain / XML_REF / "merged").read_text()

    run("chroot", plain, "dpkg", "--install", "/tmp/vyos-1.deb")
    run("chroot", plain, "dpkg", "--purge", "vyos-vpp-ipsec")
    left = changed(before, files(plain))
    assert left <= {CONFIGD_LIST, f"{XML_REF}/merged"}
    assert json.loads((plain / CONFIGD_LIST).read_text()) == ["vpn_ipsec.py"]
    assert (plain / XML_REF / "merged").read_text() == "vyos_1x_cache.py"
