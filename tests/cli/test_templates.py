"""The XML definitions and what is built from them: the schema, the templates, the reference cache, the errors."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import templates
from templates import CONFIG_ELEMENTS, OP_ELEMENTS, TemplateError, build, read_nodes

from support.recorded import ROOT, shared_data
from vppipsec.conf import settings

MODES = {
    "interface-definitions": ("interface_definition.rng", CONFIG_ELEMENTS),
    "op-mode-definitions": ("op-mode-definition.rng", OP_ELEMENTS),
}
XML = sorted(path for directory in MODES for path in (ROOT / directory).glob("*.xml.in"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("build")
    build(ROOT, out)
    return out


@pytest.fixture(scope="module")
def reference(built):
    return runpy.run_path(str(built / "xml_ref" / "vyos_vpp_ipsec_cache.py"))["reference"]


def config_nodes():
    return read_nodes(ROOT / "interface-definitions", CONFIG_ELEMENTS)


def at(reference, path):
    for name in path:
        reference = reference[name]
    return reference["node_data"]


@pytest.mark.parametrize("path", XML, ids=lambda path: path.name)
def test_xml_is_valid_after_its_includes(path, tmp_path):
    if shutil.which("xmllint") is None:
        pytest.skip("xmllint is not on this machine (Debian: libxml2-utils)")
    schema = shared_data("vyos", MODES[path.parent.name][0])
    whole = tmp_path / path.stem
    whole.write_text(templates.transclude(path))
    ran = subprocess.run(
        ["xmllint", "--noout", "--relaxng", schema, whole], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("directory", MODES)
def test_every_node_of_ours_has_help(directory):
    nodes = read_nodes(ROOT / directory, MODES[directory][1])
    bare = [" ".join(node.path) for node in nodes if not node.text("help")]
    assert bare == ([] if directory == "interface-definitions" else ["generate", "monitor", "reset", "show"])


def test_no_node_def_is_empty_and_none_lies_where_only_vyos_has_properties(built):
    defs = sorted((built / "templates").rglob("node.def"))
    assert len(defs) > 30
    assert [path for path in defs if not path.read_text().strip()] == []
    top = {path.name for path in (built / "templates" / "op").iterdir()}
    assert top == {"generate", "monitor", "reset", "show"}
    assert [name for name in top if (built / "templates" / "op" / name / "node.def").exists()] == []


NODE_DEFS = {
    "cfg/vpp/settings/ipsec-acceleration": """\
priority: 910
help: Let VPP carry the IPsec traffic
end: sudo sh -c "${vyshim} ${vyos_conf_scripts_dir}/vpp_ipsec.py"
""",
    "cfg/vpp/settings/lcp/netlink/batch-delay-ms": """\
type: txt
help: How long events are gathered before they are handled (default:
\t\t\t50)
val_help: u32:0-60000; Time in milliseconds
syntax:expression: exec "${vyos_libexec_dir}/validate-value  \
--exec \\"${vyos_validators_dir}/numeric --range 0-60000\\"  --value \\'$VAR(@)\\'"; \
"The batch delay must be from 0 to 60000 milliseconds"
""",
    "cfg/vpp/ipsec/unsupported": """\
type: txt
help: What is done with traffic of SAs that VPP cannot carry (default:
\t\t\tkernel)
val_help: kernel; The kernel carries it (default)
val_help: drop; It is dropped
allowed: echo "kernel drop"
syntax:expression: exec "${vyos_libexec_dir}/validate-value --regex \\'(kernel|drop)\\'   --value \\'$VAR(@)\\'"; \
"It must be either kernel or drop"
""",
    "cfg/vpp/ipsec/selector-enforcement/disable": "help: Forward decrypted packets whatever their addresses\n",
    "op/show/vpp/ipsec": """\
help: Show IPsec acceleration
run: sudo ${vyos_op_scripts_dir}/vpp_ipsec.py show_summary
""",
    "op/show/vpp/ipsec/sa/peer": "help: Show the SAs with one peer\n",
    "op/show/vpp/ipsec/sa/peer/node.tag": """\
help: Show the SAs with one peer
allowed: sudo ${vyos_completion_dir}/list_vpp_ipsec.py peer
run: sudo ${vyos_op_scripts_dir}/vpp_ipsec.py show_sa --peer="$6"
""",
}


@pytest.mark.parametrize("path", NODE_DEFS)
def test_node_def_is_written_as_vyos_reads_it(built, path):
    assert (built / "templates" / path / "node.def").read_text() == NODE_DEFS[path]


def test_templates_equal_those_of_vyos_own_builders(built, tmp_path):
    checkout = Path(os.environ.get("VYOS_1X", "/nonexistent"))
    if not checkout.is_dir():
        pytest.skip("VYOS_1X names no checkout of vyos-1x")
    pytest.importorskip("lxml", reason="vyos-1x's builders need lxml")
    for kind, directory, builder, schema in (
        ("cfg", "interface-definitions", "build-command-templates", "interface_definition.rng"),
        ("op", "op-mode-definitions", "build-command-op-templates", "op-mode-definition.rng"),
    ):
        theirs = tmp_path / kind
        theirs.mkdir()
        for path in (ROOT / directory).glob("*.xml.in"):
            whole = tmp_path / path.stem
            whole.write_text(templates.transclude(path))
            command = [sys.executable, checkout / "scripts" / builder, whole, checkout / "schema" / schema, theirs]
            subprocess.run(command, check=True, timeout=60, capture_output=True)
        wanted = {path.relative_to(theirs): path.read_text() for path in theirs.rglob("node.def")}
        ours = built / "templates" / kind
        assert {path.relative_to(ours): path.read_text() for path in ours.rglob("node.def")} == {
            path: text for path, text in wanted.items() if text
        }


NUMBERS = {
    "vpp settings lcp netlink batch-delay-ms": settings.BATCH_DELAY_MS,
    "vpp settings lcp netlink batch-size": settings.BATCH_SIZE,
    "vpp settings lcp netlink rx-buffer-size": settings.RX_BUFFER_SIZE,
    "vpp ipsec restart-rekey-rate": settings.RESTART_REKEY_RATE,
    "vpp ipsec statistics-interval": settings.STATISTICS_INTERVAL_S,
    "vpp ipsec metrics port": settings.PORT,
}


def test_ranges_and_defaults_are_those_of_the_settings():
    numeric = {}
    for node in config_nodes():
        ranges = set(re.findall(r"(?:u32:|--range )(\d+)-(\d+)", templates.config_def(node)))
        if ranges:
            assert len(ranges) == 1, f"{node.path}: help and constraint differ"
            low, high = ranges.pop()
            assert f"from {low} to {high}" in (node.text("constraintErrorMessage") or "")
            numeric[" ".join(node.path)] = settings.Range(int(low), int(high), int(node.text("defaultValue") or -1))
    assert numeric == NUMBERS


def test_the_default_of_unsupported_is_that_of_the_settings(reference):
    assert at(reference, ("vpp", "ipsec", "unsupported"))["default_value"] == settings.OffloadSettings().unsupported


def test_only_owner_nodes_run_a_script_and_after_vpn_ipsec():
    owned = {" ".join(node.path): (node.owner, node.text("priority")) for node in config_nodes() if node.owner}
    script = "${vyos_conf_scripts_dir}/vpp_ipsec.py"
    # a leaf without an owner here would run vyos-1x's vpp.py, which restarts VPP; vpp is 295, vpn ipsec 901
    assert owned == {
        "vpp ipsec": (script, "910"),
        "vpp settings ipsec-acceleration": (script, "910"),
        "vpp settings lcp netlink": (script, "910"),
    }
    leaves = [" ".join(node.path) for node in config_nodes() if node.kind == "leafNode"]
    assert [leaf for leaf in leaves if not leaf.startswith(tuple(owned))] == []


def test_reference_cache_agrees_with_the_xml(reference):
    nodes = config_nodes()
    for node in nodes:
        assert at(reference, node.path) == {
            "node_type": "leaf" if node.kind == "leafNode" else "other",
            "multi": False,
            "valueless": node.has("valueless"),
            "default_value": node.text("defaultValue"),
            "owner": node.owner,
            "priority": node.text("priority"),
        }

    def paths(inner, above):
        for name, value in inner.items():
            if name not in ("node_data", "component_version"):
                yield (*above, name)
                yield from paths(value, (*above, name))

    assert set(paths(reference, ())) == {node.path for node in nodes}
    assert reference["component_version"] == {"vpp-ipsec": "1"}


WRONG = {
    "a leaf without help": (
        "interface-definitions",
        '<node name="vpp"><children><leafNode name="x"><properties/></leafNode></children></node>',
        "wrong.xml.in: 'vpp x' has no <help>",
    ),
    "an owner without priority": (
        "interface-definitions",
        '<node name="vpp" owner="x.py"><properties><help>h</help></properties></node>',
        "wrong.xml.in: 'vpp' has an owner but no <priority>: give it a number above that of the node it is in",
    ),
    "a valueless leaf with a default": (
        "interface-definitions",
        '<node name="a"><children><leafNode name="b"><properties><help>h</help><valueless/></properties>'
        "<defaultValue>1</defaultValue></leafNode></children></node>",
        "wrong.xml.in: 'a b' is <valueless/>: that goes with a leaf without default, value help and constraint only",
    ),
    "a double quote in a message": (
        "interface-definitions",
        '<node name="a"><children><leafNode name="b"><properties><help>h</help>'
        '<constraintErrorMessage>not "b"</constraintErrorMessage></properties></leafNode></children></node>',
        "wrong.xml.in: 'a b' has a <constraintErrorMessage> with a double quote, which ends the message in node.def",
    ),
    "an element that is not known": (
        "interface-definitions",
        '<node name="a"><children><tagNode name="b"/></children></node>',
        "wrong.xml.in: at 'a' there must be no <tagNode> in <children>",
    ),
    "a node without a name": (
        "interface-definitions",
        '<node name="a"><children><node/></children></node>',
        "wrong.xml.in: a <node> below 'a' has no name",
    ),
    "a node that is defined twice": (
        "interface-definitions",
        '<node name="a"><properties><help>h</help></properties></node>'
        '<node name="a"><properties><help>i</help></properties></node>',
        "wrong.xml.in: 'a' is defined in wrong.xml.in already",
    ),
    "broken markup": (
        "interface-definitions",
        '<node name="a">',
        "wrong.xml.in: after its includes it is not XML: mismatched tag: line 3, column 2",
    ),
    "an include that is absent": (
        "interface-definitions",
        "\n  #include <include/absent.xml.i>\n",
        "wrong.xml.in: there is no include/absent.xml.i to include",
    ),
    "an include of itself": (
        "interface-definitions",
        "\n  #include <wrong.xml.in>\n",
        "wrong.xml.in: wrong.xml.in includes itself",
    ),
    "a command with a word too many": (
        "op-mode-definitions",
        '<node name="show"><children><tagNode name="sa"><properties><help>h</help></properties>'
        '<command>x "$4"</command></tagNode></children></node>',
        "wrong.xml.in: 'show sa' runs a command with $4, but has 3 words",
    ),
    "an op-mode leaf without a command": (
        "op-mode-definitions",
        '<node name="show"><children><leafNode name="a"><properties><help>h</help></properties></leafNode>'
        "</children></node>",
        "wrong.xml.in: 'show a' has no <command>",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_xml_is_refused_with_file_and_node(case, tmp_path):
    directory, body, sentence = WRONG[case]
    (tmp_path / "wrong.xml.in").write_text(f"<interfaceDefinition>\n{body}\n</interfaceDefinition>\n")
    with pytest.raises(TemplateError) as caught:
        read_nodes(tmp_path, MODES[directory][1])
    assert str(caught.value) == sentence


def test_node_takes_its_properties_from_the_file_that_defines_it(tmp_path):
    for name, properties in (("a", ""), ("b", "<properties><help>h</help></properties>"), ("c", "")):
        text = f'<interfaceDefinition><node name="vpp">{properties}</node></interfaceDefinition>'
        (tmp_path / f"{name}.xml.in").write_text(text)
    (node,) = read_nodes(tmp_path, CONFIG_ELEMENTS)
    assert node.text("help") == "h"


def test_the_command_says_what_is_wrong_and_leaves_the_last_build(tmp_path):
    for directory in MODES:
        shutil.copytree(ROOT / directory, tmp_path / directory)
    command = [sys.executable, ROOT / "tools" / "templates.py", "--root", tmp_path, "--out", tmp_path / "build"]
    assert subprocess.run(command, timeout=30, check=False).returncode == 0
    before = sorted((tmp_path / "build").rglob("*"))
    (tmp_path / "interface-definitions" / "z.xml.in").write_text("<interfaceDefinition><node/></interfaceDefinition>")
    ran = subprocess.run(command, timeout=30, check=False, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "z.xml.in: a <node> below the top has no name\n")
    assert sorted((tmp_path / "build").rglob("*")) == before
