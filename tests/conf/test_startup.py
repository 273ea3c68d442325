"""VPP's startup.conf: what is read is written unchanged, and an edit changes what it must and nothing else."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.startup_files import Chunk, edited_from, files, merged, pieces, plugins_that_vpp_loads, together
from vppipsec.conf.settings import NetlinkSettings, Settings
from vppipsec.conf.startup import StartupError, edit, has_c_engine, parse, write

pytestmark = pytest.mark.versions

TEMPLATE = Path(__file__).resolve().parents[2] / "data/templates/vpp-ipsec/startup.conf.j2"
NETLINK = NetlinkSettings(rx_buffer_size=1_000_000, batch_size=300, batch_delay_ms=20)

VALUES = "nl-rx-buffer-size 1000000 nl-batch-size 300 nl-batch-delay-ms 20"
READY = "plugins {\n    plugin linux_cp_plugin.so { enable }\n}\n"
MIRRORING = "plugins {\n    plugin linux_cp_plugin.so { enable }\n    plugin linux_nl_plugin.so { enable }\n}\n"
NEW_PLUGINS = "\n" + READY


@settings(max_examples=200, deadline=None)
@given(files)
def test_what_is_parsed_is_written_unchanged(text: str) -> None:
    assert write(parse(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='ab{}#\\" \t\r\n', max_size=40))
def test_any_text_is_written_unchanged_or_refused_with_a_line_that_it_has(text: str) -> None:
    try:
        written, line = write(parse(text)), 1
    except StartupError as error:
        written, line = text, error.line
    assert written == text
    assert 1 <= line <= text.count("\n") + 1


@settings(max_examples=200, deadline=None)
@given(files, st.sampled_from([None, NETLINK, NetlinkSettings()]))
def test_editing_again_changes_nothing(text: str, netlink: NetlinkSettings | None) -> None:
    once = edit(text, netlink)
    assert edit(once, netlink) == once


@settings(max_examples=200, deadline=None)
@given(files)
def test_an_edited_file_has_no_c_engine_and_all_that_is_needed(text: str) -> None:
    edited = edit(text, NETLINK)
    assert not has_c_engine(edited)
    loaded = plugins_that_vpp_loads(edited, {"acl_plugin.so", "abf_plugin.so"})
    assert {"abf_plugin.so", "acl_plugin.so", "linux_cp_plugin.so"} <= loaded
    mirrored = "linux_nl_plugin.so" in loaded
    assert mirrored == bool(merged(edited, "linux-nl"))
    if mirrored:
        given_values = dict(zip(merged(edited, "linux-nl")[::2], merged(edited, "linux-nl")[1::2], strict=True))
        assert given_values == dict(zip(VALUES.split()[::2], VALUES.split()[1::2], strict=True))


@settings(max_examples=200, deadline=None)
@given(pieces)
def test_an_edit_keeps_everything_else_byte_for_byte(file: list[Chunk]) -> None:
    edited = edit(together(file), NETLINK)
    assert re.fullmatch(edited_from(file), edited), edited


EDITS = {
    "an empty file": ("", NEW_PLUGINS.lstrip()),
    "no plugins section: what VPP does not load unasked": (
        "unix { nodaemon }\n",
        "unix { nodaemon }\n" + NEW_PLUGINS,
    ),
    "a last line without end": ("cpu { main-core 1 } # one", "cpu { main-core 1 } # one\n" + NEW_PLUGINS),
    "all plugins off by default": (
        "plugins {\n  path /usr/lib/vpp\n  plugin default { disable } # lean\n  plugin dpdk_plugin.so { enable }\n}\n",
        "plugins {\n  path /usr/lib/vpp\n  plugin default { disable } # lean\n  plugin dpdk_plugin.so { enable }\n"
        "  plugin abf_plugin.so { enable }\n  plugin acl_plugin.so { enable }\n  plugin linux_cp_plugin.so { enable }\n}\n",
    ),
    "plugins on one line": (
        "plugins { plugin linux_nl_plugin.so {disable} plugin dpdk_plugin.so {disable}}\n",
        "plugins { plugin linux_nl_plugin.so {disable} plugin dpdk_plugin.so {disable}"
        " plugin linux_cp_plugin.so { enable } }\n",
    ),
    "a plugin that the operator had switched off": (
        "plugins {\n\tplugin acl_plugin.so { disable skip-version-check }\n\tplugin linux_cp_plugin.so {}\n}\n",
        "plugins {\n\tplugin acl_plugin.so { enable skip-version-check }\n\tplugin linux_cp_plugin.so { enable }\n}\n",
    ),
    "an empty plugins section, indented, with a comment": (
        "  plugins {\n    # none\n  }\n",
        "  plugins {\n    # none\n    plugin linux_cp_plugin.so { enable }\n  }\n",
    ),
    "two plugins sections: one file for VPP": (
        "plugins { plugin default { disable } }\nplugins {\n    plugin abf_plugin.so { enable }\n}\n",
        "plugins { plugin default { disable } }\nplugins {\n    plugin abf_plugin.so { enable }\n"
        "    plugin acl_plugin.so { enable }\n    plugin linux_cp_plugin.so { enable }\n}\n",
    ),
    "line ends of another system": (
        "plugins {\r\n}\r\n",
        "plugins {\r\n    plugin linux_cp_plugin.so { enable }\r\n}\r\n",
    ),
    "crypto engines off by default, as VyOS has them without its own acceleration": (
        f"crypto-engines {{\n    default {{ disable }}\n}}\n{READY}",
        f"crypto-engines {{\n    default {{ disable }}\n    native {{ enable }}\n    openssl {{ enable }}\n}}\n{READY}",
    ),
    "crypto engines on by default, but for one": (
        f"crypto-engines {{ native {{ disable }} ipsecmb {{ disable }} }}\n{READY}",
        f"crypto-engines {{ native {{ enable }} ipsecmb {{ disable }} }}\n{READY}",
    ),
    "other netlink values": (
        f"linux-nl {{\n    nl-rx-buffer-size 268435456 # large\n}}\n{MIRRORING}",
        f"linux-nl {{\n    nl-rx-buffer-size 1000000 # large\n    nl-batch-size 300\n    nl-batch-delay-ms 20\n}}\n{MIRRORING}",
    ),
    "two linux-nl sections, of which VPP would heed the last": (
        f"linux-nl {{ nl-batch-size 1 nl-batch-delay-ms 1 }}\nlinux-nl {{ nl-batch-size 2 }}\n{MIRRORING}",
        "linux-nl { nl-batch-size 300 nl-batch-delay-ms 20 }\n"
        f"linux-nl {{ nl-batch-size 300 nl-rx-buffer-size 1000000 }}\n{MIRRORING}",
    ),
    "routes mirrored, netlink values not given": (
        MIRRORING,
        MIRRORING + "\nlinux-nl {\n    nl-rx-buffer-size 1000000\n    nl-batch-size 300\n    nl-batch-delay-ms 20\n}\n",
    ),
    "linux-nl without its plugin: VPP would not start": (
        f"linux-nl {{ {VALUES} }}\n{READY}",
        f"linux-nl {{ {VALUES} }}\nplugins {{\n    plugin linux_cp_plugin.so {{ enable }}\n"
        "    plugin linux_nl_plugin.so { enable }\n}\n",
    ),
    "the C engine on lines of its own": (
        f"cpu {{}}\n\n  linux-xfrm-nl {{\n    enable-route-mode-ipsec\n    interface ipsec\n  }}\t\n\n{READY}",
        f"cpu {{}}\n\n\n{READY}",
    ),
    "the C engine on one line, last": (f"{READY}linux-xfrm-nl {{ interface ipsec }}", READY),
    "the C engine between others": (
        f"cpu {{ main-core 1 }} linux-xfrm-nl {{}} statseg {{}}\n{READY}",
        f"cpu {{ main-core 1 }}  statseg {{}}\n{READY}",
    ),
    "the C engine with braces and comments inside, and a comment after": (
        f"linux-xfrm-nl # why\n{{\n  # {{ not one\n  a {{ b {{}} }} # }}\n}} # C\n{READY}",
        f" # C\n{READY}",
    ),
    "the C engine twice, first and last": (
        f"linux-xfrm-nl {{}}\n{READY}linux-xfrm-nl {{\n}}\n",
        READY,
    ),
    "the C engine in a comment": (f"# linux-xfrm-nl {{ }}\n{READY}", f"# linux-xfrm-nl {{ }}\n{READY}"),
    "a section that only sounds like it": (
        f"logging {{ class linux-xfrm-nl {{ level debug }} }}\n{READY}",
        f"logging {{ class linux-xfrm-nl {{ level debug }} }}\n{READY}",
    ),
    "a comment where a brace or a value would be": (
        f"linux-nl # {{\n{{ nl-batch-size # of\n 5 nl-rx-buffer-size 1 nl-batch-delay-ms 2}}\n{MIRRORING}",
        f"linux-nl # {{\n{{ nl-batch-size # of\n 300 nl-rx-buffer-size 1000000 nl-batch-delay-ms 20}}\n{MIRRORING}",
    ),
}


@pytest.mark.parametrize(("text", "expected"), EDITS.values(), ids=EDITS)
def test_an_edit_makes_of(text: str, expected: str) -> None:
    assert edit(text, NETLINK) == expected
    assert edit(expected, NETLINK) == expected


def test_without_netlink_values_those_of_the_file_stay() -> None:
    text = f"linux-nl {{ nl-batch-size 7 }}\nlinux-xfrm-nl {{ nl-batch-size 8 }}\n{MIRRORING}"
    assert edit(text, None) == f"linux-nl {{ nl-batch-size 7 }}\n{MIRRORING}"


BROKEN = {
    "unix {\n  nodaemon\n": "line 1: the '{' is never closed: add the '}' that it belongs to",
    "unix {\n  a {\n  # }\n}\n": "line 1: the '{' is never closed: add the '}' that it belongs to",
    "a {}\nunix {\n  b {\n    c {}\n": "line 3: the '{' is never closed: add the '}' that it belongs to",
    "unix {\n}\n}\n": "line 3: the '}' closes nothing: remove it, or add the '{' that it belongs to",
    "unix { a \\}\n": "line 1: the '{' is never closed: add the '}' that it belongs to",
    "unix { }\n\n{ nodaemon }\n": "line 3: a '{' without a section's name before it",
    "unix { }\ncpu\n": "line 2: 'cpu' has neither a value nor a { section } after it",
    "cpu # { main-core 1 }\n": "line 1: 'cpu' has neither a value nor a { section } after it",
    "plugins {\n  plugin acl_plugin.so\n}\n": (
        "line 2: here must stand 'plugin NAME { enable }' or 'plugin NAME { disable }'"
    ),
    "plugins {\n\n  plugin { enable }\n}\n": (
        "line 3: here must stand 'plugin NAME { enable }' or 'plugin NAME { disable }'"
    ),
    "crypto-engines {\n  native enable\n}\n": "line 2: here must stand 'NAME { enable }' or 'NAME { disable }'",
    "plugins { plugin linux_nl_plugin.so { enable } }\nlinux-nl {\n  nl-batch-size\n}\n": (
        "line 3: 'nl-batch-size' has neither a value nor a { section } after it"
    ),
    "a {" * 70 + "}" * 70: "line 1: sections are nested more than 64 deep",
}


@pytest.mark.parametrize(("text", "complaint"), BROKEN.items(), ids=[f"{c} in {t[:30]!r}" for t, c in BROKEN.items()])
def test_a_broken_file_is_refused_with_the_line(text: str, complaint: str) -> None:
    with pytest.raises(StartupError) as caught:
        edit(text, NETLINK)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("given_devices", [None, {"eth1": "0000:02:00.0", "eth2": "0000:02:00.1"}])
def test_the_full_startup_conf_needs_no_edit(given_devices: dict[str, str] | None) -> None:
    template = jinja2.Environment(trim_blocks=True).from_string(TEMPLATE.read_text())
    more = {} if given_devices is None else {"devices": given_devices, "startup_commands": "/etc/vpp/bootstrap.vpp"}
    text = template.render(settings=asdict(Settings(netlink=NETLINK)), **more)
    assert edit(text, NETLINK) == text
    assert merged(text, "linux-nl") == VALUES.split()
    assert merged(text, "socksvr") == ["socket-name", "/run/vpp/api.sock"]
    assert ("0000:02:00.0" in merged(text, "dpdk")) == (given_devices is not None)
