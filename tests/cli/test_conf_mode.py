"""The commit script as VyOS runs it: under vyos-1x's own library where there is one, else under a stand-in for it."""

import asyncio
import os
import stat
import subprocess
from pathlib import Path

import pytest
import templates

from support import vyos_box
from support.build import make_policy, sa_in, sa_out
from support.recorded import ROOT
from support.rig import play
from vppipsec.conf.settings import MetricsSettings, NetlinkSettings, OffloadSettings, Settings, load_settings
from vppipsec.conf.startup import edit

SCRIPT = ROOT / "src" / "conf_mode" / "vpp_ipsec.py"
HOOK = ROOT / "src" / "etc" / "commit" / "post-hooks.d" / "60vpp-ipsec"
OF_VYOS = {"multi": False, "valueless": False, "default_value": None, "owner": None, "priority": None}
VPP_CLI = {
    "vpp": {
        "node_data": {**OF_VYOS, "node_type": "other", "owner": "${vyos_conf_scripts_dir}/vpp.py", "priority": "295"},
        "settings": {
            "node_data": {**OF_VYOS, "node_type": "other"},
            "interface": {"node_data": {**OF_VYOS, "node_type": "tag"}},
        },
    }
}
"""What an image has that brings a CLI for VPP's interfaces."""
SWITCH = "set vpp settings ipsec-acceleration\n"
ON = SWITCH + "set vpp settings interface eth0\n"

pytestmark = [pytest.mark.versions, pytest.mark.parametrize("library", [vyos_box.LIBRARY])]


@pytest.fixture
def commit(tmp_path, tmp_path_factory):
    """Commit some `set` commands; returns what happened."""
    built = tmp_path_factory.mktemp("build")
    templates.build(ROOT, built)
    reference = built / "xml_ref" / "vyos_vpp_ipsec_cache.py"

    def run(commands, **more):
        job = {"script": str(SCRIPT), "commands": commands, "conf": str(tmp_path / "config.toml"), "vyos_has": VPP_CLI}
        sockets = [str(tmp_path / "api.sock"), str(tmp_path / "status.sock")]
        return vyos_box.run(job | {"reference": str(reference), "sockets": sockets} | more)

    return run


def test_a_commit_renders_the_settings_and_starts_the_service(library, commit, tmp_path):
    done = commit(
        ON + "set vpp settings lcp netlink rx-buffer-size 65536\n"
        "set vpp ipsec unsupported drop\n"
        "set vpp ipsec selector-enforcement disable\n"
        "set vpp ipsec restart-rekey-rate 7\n"
        "set vpp ipsec metrics listen-address 2001:db8::1\n"
    )
    assert (done["error"], done["out"]) == (None, "")
    assert done["calls"] == ["systemctl reload-or-restart vpp-ipsecd.service"]
    rendered = load_settings(tmp_path / "config.toml")
    assert (rendered.netlink, rendered.offload, rendered.metrics) == (
        NetlinkSettings(rx_buffer_size=65_536),
        OffloadSettings("drop", False, 7),
        MetricsSettings("2001:db8::1"),
    )


def test_what_is_rendered_of_defaults_are_the_defaults(library, commit, tmp_path):
    done = commit(ON, sockets=["/run/vpp/api.sock", "/run/vpp-ipsecd/status.sock"])
    assert done["error"] is None
    assert load_settings(tmp_path / "config.toml") == Settings()


def test_acceleration_needs_an_interface_where_vyos_has_a_cli_for_it(library, commit, tmp_path):
    done = commit(SWITCH)
    assert done["error"].startswith(
        "ConfigError: 'vpp settings ipsec-acceleration' needs an interface that VPP carries: "
    )
    assert done["calls"] == []
    assert not (tmp_path / "config.toml").exists()
    assert commit(ON)["error"] is None


def test_where_vyos_has_no_cli_for_interfaces_vpp_is_asked_and_may_be_down(library, commit, tmp_path):
    if vyos_box.has_cli_for_interfaces():
        pytest.skip("this vyos-1x has a CLI for VPP's interfaces")
    done = commit(SWITCH, vyos_has={}, vpp_confs=[str(tmp_path / "vpp.conf"), str(tmp_path / "startup.conf")])
    assert (done["error"], done["out"]) == (None, "")
    full = (tmp_path / "startup.conf").read_text()
    assert edit(full, NetlinkSettings()) == full
    assert not (tmp_path / "vpp.conf").exists()


def test_without_a_vpp_cli_startup_conf_is_edited_and_reported(library, commit, tmp_path):
    if vyos_box.has_cli_for_interfaces():
        pytest.skip("this vyos-1x has a CLI for VPP's interfaces")
    path = tmp_path / "startup.conf"
    path.write_text("unix { nodaemon }\n")
    done = commit(SWITCH, vyos_has={}, vpp_confs=[str(path)])
    assert done["error"] is None
    assert done["out"].startswith(f"{path} was edited for the service. VPP reads it when it is started again")
    assert path.read_text().startswith("unix { nodaemon }\n")
    path.write_text("unix { nodaemon\n")
    assert "the file stays as it was" in commit(SWITCH, vyos_has={}, vpp_confs=[str(path)])["error"]


def test_a_value_out_of_our_range_is_refused(library, commit):
    done = commit("set vpp settings lcp netlink batch-size 4294967295\n")
    assert done["error"] == (
        "ConfigError: 'vpp settings lcp netlink batch-size' must be from 1 to 1000000, not 4294967295"
    )


OLD_PEER = (
    "set vpn ipsec esp-group OLD proposal 1 hash aesxcbc\n"  # the encryption is vyos-1x's default, aes128
    "set vpn ipsec site-to-site peer west-1 default-esp-group OLD\n"
    "set vpn ipsec site-to-site peer west-1 tunnel 1 local prefix 10.0.0.0/24\n"
)


def test_a_proposal_that_vpp_cannot_carry_is_a_warning(library, commit):
    done = commit(ON + OLD_PEER)
    assert done["error"] is None
    text = " ".join(done["out"].split())
    assert 'WARNING: VPP cannot carry proposal 1 (aes128, aesxcbc) of esp-group "OLD", which peer "west-1" uses' in text


def test_the_same_proposal_is_refused_where_its_traffic_would_be_dropped(library, commit):
    done = commit(ON + OLD_PEER + "set vpp ipsec unsupported drop\n")
    assert done["error"].startswith("ConfigError: VPP cannot carry proposal 1 (aes128, aesxcbc) of esp-group")
    assert done["calls"] == []


def test_deleting_the_node_ends_the_service_and_leaves_nothing_in_vpp(library, commit, tmp_path):
    async def story(rig):
        rig.kernel.add(sa_out(0x100), sa_in(0x200), make_policy())
        rig.start()
        await rig.settle()
        await rig.stop()
        sockets = [rig.api_socket, str(tmp_path / "status.sock")]
        assert (await asyncio.to_thread(commit, ON, sockets=sockets))["error"] is None
        done = await asyncio.to_thread(commit, "set vpp ipsec unsupported drop\n", sockets=sockets)
        assert done["error"] is None
        assert done["calls"] == ["systemctl stop vpp-ipsecd.service"]
        assert done["out"].startswith(
            "IPsec acceleration is off: 2 SAs, 1 tunnel, 1 route, 2 ACLs and 1 FIB table were removed from VPP."
        )
        rig.kernel.delete(sa_out(0x100), sa_in(0x200), make_policy())
        assert await rig.differences() == []

    play("standin", story)
    assert not (tmp_path / "config.toml").exists()
    again = commit("set vpp ipsec unsupported drop\n")
    assert (again["error"], again["calls"], again["out"]) == (None, [], "")


def test_without_vpp_papi_configd_lives_and_only_acceleration_is_refused(library, commit):
    done = commit(ON, absent=["vpp_papi"])
    assert done["error"] == (
        "ConfigError: IPsec acceleration needs Python's vpp_papi, which comes with VPP: install VPP"
    )
    assert commit("set vpp ipsec unsupported drop\n", absent=["vpp_papi"])["error"] is None


@pytest.mark.parametrize(("there", "runs"), [(True, 1), (False, 0)])
def test_after_each_commit_the_service_is_as_the_node_of_vyos_says(library, tmp_path, there, runs):
    if Path("/run/vpp-ipsecd/config.toml").exists():
        pytest.skip("a service is configured on this machine")
    for name, text in {
        "cli-shell-api": f'echo "$*" >> {tmp_path}/asked; exit {0 if there else 1}',
        "sudo": f'echo "$*" >> {tmp_path}/run',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    script = tmp_path / "vpp_ipsec.py"
    hook = tmp_path / "hook"
    installed = "/usr/libexec/vyos/conf_mode/vpp_ipsec.py"
    assert f"script={installed}\n" in HOOK.read_text()
    hook.write_text(HOOK.read_text().replace(installed, str(script)))
    hook.chmod(stat.S_IRWXU)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([hook], env=environment, check=True, timeout=20)
    assert not (tmp_path / "asked").exists()  # the package is gone, its hook is not
    script.touch()
    subprocess.run([hook], env=environment, check=True, timeout=20)
    assert (tmp_path / "asked").read_text() == "existsActive vpp settings ipsec-acceleration\n"
    ran = (tmp_path / "run").read_text().splitlines() if (tmp_path / "run").exists() else []
    assert ran == [str(script)] * runs
