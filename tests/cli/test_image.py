"""The CLI in three generations of images: what is put in place, what stays vyos-1x's, and what is left when it goes."""

import json
import shutil
import subprocess
import sys

import pytest
import templates

from support.recorded import ROOT
from vppipsec.conf.image import CACHE, CACHES, CONFIGD_LIST, NODE_DEFS, PLACED, XML_REF, ImageError, install, remove

CFG = "opt/vyatta/share/vyatta-cfg/templates"
OP = "opt/vyatta/share/vyatta-op/templates"
NETLINK = {f"vpp/settings/lcp/netlink{leaf}" for leaf in ("", "/batch-delay-ms", "/batch-size", "/rx-buffer-size")}
PARENTS = {"vpp", "vpp/settings", "vpp/settings/lcp"}
SWITCH = {"vpp/settings/ipsec-acceleration"}

GENERATIONS = {
    "before 2025": {CFG: set(), OP: {"show"}},
    "2025": {CFG: PARENTS | NETLINK | {"vpp/settings/ipsec/interface-type"}, OP: {"show", "show/vpp"}},
    "2026": {CFG: PARENTS | SWITCH, OP: {"show", "show/vpp"}},
}
"""The nodes among ours, and some others, that vyos-1x has itself."""
OURS_OF_CFG = {
    "before 2025": PARENTS | SWITCH | NETLINK,
    "2025": SWITCH,
    "2026": NETLINK,
}
"""Beside `vpp ipsec` and all below it, which no image has."""
FOREIGN_NODES = "help: vyos-1x's own\n"

UPDATE_CACHE = """\
import os
here = os.path.dirname(os.path.abspath(__file__))
names = sorted(os.listdir(os.path.join(here, "pkg_cache")))
open(os.path.join(here, "cache.py"), "w").write(" ".join(names))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("build")
    templates.build(ROOT, out)
    return out


@pytest.fixture
def image(built, tmp_path):
    """Make the root directory of an image of some generation, with our package's files in it and vyos-1x's in dpkg's books."""

    def make(generation):
        root = tmp_path / "root"
        shutil.copytree(built, root / NODE_DEFS)
        for path, text in {
            CONFIGD_LIST: '[\n"vpn_ipsec.py",\n"vrf.py"\n]\n',
            XML_REF / "update_cache.py": UPDATE_CACHE,
            CACHES / "vyos_1x_cache.py": "reference = {}\n",
            "var/lib/dpkg/status": "",
        }.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        vyos_has(root, generation)
        return root

    return make


def vyos_has(root, generation):
    """Let vyos-1x be of some generation: as dpkg would leave files and books after an upgrade."""
    info = root / "var/lib/dpkg/info"
    info.mkdir(exist_ok=True)
    books = info / "vyos-1x.list"
    old = books.read_text().splitlines() if books.exists() else []
    new = [f"/{base}/{node}/node.def" for base, nodes in GENERATIONS[generation].items() for node in nodes]
    for path in set(old) - set(new):
        (root / path[1:]).unlink()
    for base in (CFG, OP):
        (root / base).mkdir(parents=True, exist_ok=True)
    for path in new:
        (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (root / path[1:]).write_text(FOREIGN_NODES)
    books.write_text("".join(f"{path}\n" for path in new))
    (root / "var/lib/dpkg/status").write_text(
        "Package: vyos-1x\nStatus: install ok installed\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n\n"
    )


def nodes(root, base):
    return {str(path.parent.relative_to(root / base)) for path in (root / base).rglob("node.def")}


def content(root):
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_relative_to(root / NODE_DEFS)
    }


@pytest.mark.parametrize("generation", GENERATIONS)
def test_only_the_nodes_that_the_image_lacks_are_put_in_place(image, generation):
    root = image(generation)
    install(root)
    ours = {node for node in nodes(root, CFG) if (root / CFG / node / "node.def").read_text() != FOREIGN_NODES}
    assert {node for node in ours if not node.startswith("vpp/ipsec")} == OURS_OF_CFG[generation]
    assert "vpp/ipsec/metrics/port" in ours
    assert nodes(root, CFG) - ours == GENERATIONS[generation][CFG]
    assert {"show/vpp/ipsec", "show/vpp", "reset/vpp", "show/vpp/ipsec/sa/peer/node.tag"} <= nodes(root, OP)
    assert (root / OP / "show/node.def").read_text() == FOREIGN_NODES


@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_was_put_there_can_be_repeated_and_goes_without_a_trace(image, generation):
    root = image(generation)
    before = content(root)
    install(root)
    first = content(root)
    install(root)
    assert content(root) == first
    remove(root)
    left = content(root)
    left.pop(XML_REF / "cache.py")
    left[CONFIGD_LIST] = json.loads(left[CONFIGD_LIST])
    assert left == before | {CONFIGD_LIST: json.loads(before[CONFIGD_LIST])}
    assert not [path for path in (root / CFG).rglob("*") if path.is_dir() and not any(path.iterdir())]


@pytest.mark.parametrize(("old", "new"), [("before 2025", "2025"), ("2025", "2026"), ("2026", "2025")])
def test_after_an_upgrade_of_vyos_the_image_is_as_if_it_had_been_new(image, old, new):
    root = image(old)
    install(root)
    vyos_has(root, new)  # dpkg overwrites what belongs to nobody, and removes what is gone
    install(root)
    upgraded = content(root)
    shutil.rmtree(root)
    root = image(new)
    install(root)
    fresh = content(root)
    assert upgraded.keys() == fresh.keys()
    assert {path: text for path, text in upgraded.items() if path.name == "node.def"} == {
        path: text for path, text in fresh.items() if path.name == "node.def"
    }


def test_a_leaf_of_ours_is_not_put_below_a_node_whose_script_is_not_ours(image):
    root = image("2025")
    (root / CFG / "vpp/settings/lcp/netlink/batch-size/node.def").unlink()
    install(root)
    assert not (root / CFG / "vpp/settings/lcp/netlink/batch-size/node.def").exists()


def test_configd_is_told_of_the_script_once(image):
    root = image("2026")
    assert install(root).configd_changed
    assert not install(root).configd_changed
    assert json.loads((root / CONFIGD_LIST).read_text()) == ["vpn_ipsec.py", "vpp_ipsec.py", "vrf.py"]
    assert remove(root).configd_changed
    assert json.loads((root / CONFIGD_LIST).read_text()) == ["vpn_ipsec.py", "vrf.py"]


def test_the_reference_is_merged_with_ours_and_again_without(image):
    root = image("2025")
    install(root)
    assert (root / XML_REF / "cache.py").read_text() == f"vyos_1x_cache.py {CACHE}"
    remove(root)
    assert (root / XML_REF / "cache.py").read_text() == "vyos_1x_cache.py"


def test_on_a_machine_without_vyos_nothing_is_put_anywhere(built, tmp_path):
    shutil.copytree(built, tmp_path / NODE_DEFS)
    assert install(tmp_path).placed == ()
    assert set(content(tmp_path)) == {PLACED}
    remove(tmp_path)
    assert content(tmp_path) == {}


def test_a_list_that_is_no_json_is_named_and_left(image):
    root = image("2026")
    (root / CONFIGD_LIST).write_text("[")
    with pytest.raises(ImageError, match=r"^/usr/share/vyos/configd-include\.json is not JSON: "):
        install(root)
    assert (root / CONFIGD_LIST).read_text() == "["


def test_the_command_does_both_and_says_in_one_line_what_is_wrong(image):
    root = image("2026")
    command = [sys.executable, ROOT / "src/helpers/vpp-ipsec-image"]
    for what in ("install", "remove"):
        subprocess.run([*command, what, "--root", root], check=True, timeout=30)
    assert (root / CFG / "vpp/ipsec").exists() is False
    (root / XML_REF / "update_cache.py").write_text("raise SystemExit('no')")
    ran = subprocess.run([*command, "install", "--root", root], check=False, timeout=30, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "vyos-1x cannot merge its reference caches: no\n")
