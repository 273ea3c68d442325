#!/usr/bin/env python3
"""Commits the service and its settings: 'vpp ipsec', 'vpp settings ipsec-acceleration', 'vpp settings lcp netlink'."""

import os
from dataclasses import asdict
from pathlib import Path
from sys import exit

from vyos import ConfigError, airbag
from vyos.base import Warning
from vyos.config import Config
from vyos.template import render
from vyos.utils.process import call
from vyos.xml_ref import cli_defined

try:
    from vppipsec.activation.switch import UNIT, SwitchError, Unit, remove_everything
    from vppipsec.activation.verify import ConfigRefused, interfaces_in_vpp
    from vppipsec.activation.verify import verify as verify_config
    from vppipsec.conf.cli import read_cli
    from vppipsec.conf.prepare import STARTUP_CONFS
    from vppipsec.vpp.api.errors import VppError
except ImportError as missing:  # vpp_papi comes with VPP; configd imports this script and must run without it
    if not (missing.name or "").startswith("vpp_papi"):
        raise
    read_cli = None

airbag.enable()

service_conf = "/run/vpp-ipsecd/config.toml"
vpp_confs = () if read_cli is None else STARTUP_CONFS


def vyos_configures_vpp():
    return cli_defined(["vpp", "settings"], "interface")


def get_config(config=None):
    conf = config or Config()
    if read_cli is None:
        if conf.exists(["vpp", "settings", "ipsec-acceleration"]):
            raise ConfigError("IPsec acceleration needs Python's vpp_papi, which comes with VPP: install VPP")
        return None
    vpp, ipsec = (
        conf.get_config_dict(
            base,
            key_mangling=("-", "_"),
            get_first_key=True,
            no_tag_node_value_mangle=True,
            with_recursive_defaults=True,
        )
        for base in (["vpp"], ["vpn", "ipsec"])
    )
    return read_cli(vpp, ipsec)


def verify(config):
    if config is None:
        return

    def interfaces():
        # without a VyOS CLI for VPP's interfaces, ask VPP itself
        return config.interfaces if vyos_configures_vpp() else interfaces_in_vpp(config.settings)

    try:
        for warning in verify_config(config, interfaces):
            Warning(warning)
    except ConfigRefused as error:
        raise ConfigError(". ".join(error.complaints)) from error


def generate(config):
    if config and config.accelerated:
        about = {"settings": asdict(config.settings)}
        render(service_conf, "vpp-ipsec/config.toml.j2", about)
        if not vyos_configures_vpp() and not any(path.exists() for path in vpp_confs):
            render(str(vpp_confs[-1]), "vpp-ipsec/startup.conf.j2", about)


def apply(config):
    if config is None:
        return
    if config.accelerated:
        call(f"systemctl reload-or-restart {UNIT}")
        if not vyos_configures_vpp():
            try:
                if message := Unit().prepare_vpp(Path(service_conf), vpp_confs):
                    print(message)
            except SwitchError as error:
                raise ConfigError(str(error)) from error
    elif os.path.exists(service_conf):
        call(f"systemctl stop {UNIT}")
        try:
            print(remove_everything(config.settings))
        except (SwitchError, VppError) as error:
            raise ConfigError(str(error)) from error
        os.unlink(service_conf)


if __name__ == "__main__":
    try:
        c = get_config()
        verify(c)
        generate(c)
        apply(c)
    except ConfigError as e:
        print(e)
        exit(1)
