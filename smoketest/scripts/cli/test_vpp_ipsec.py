#!/usr/bin/env python3
"""Smoke test of 'vpp ipsec' and 'vpp settings ipsec-acceleration', for VyOS's own runner (/usr/libexec/vyos/tests/smoke/cli)."""

import tomllib
import unittest
from pathlib import Path

from base_vyostest_shim import VyOSUnitTestSHIM
from vyos.configsession import ConfigSessionError
from vyos.utils.process import is_systemd_service_running

base_path = ["vpp", "ipsec"]
switch_path = ["vpp", "settings", "ipsec-acceleration"]
interface_path = ["vpp", "settings", "interface", "eth1"]
config_file = Path("/run/vpp-ipsecd/config.toml")
unit = "vpp-ipsecd.service"


class TestVPPIPsec(VyOSUnitTestSHIM.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.cli_delete(cls, ["vpp"])

    def setUp(self):
        self.cli_set(interface_path)
        self.cli_set(switch_path)

    def tearDown(self):
        self.cli_delete(["vpp"])
        self.cli_commit()
        self.assertFalse(is_systemd_service_running(unit))
        self.assertFalse(config_file.exists())

    def test_service_runs_with_its_defaults(self):
        self.cli_commit()
        self.assertTrue(is_systemd_service_running(unit))
        offload = tomllib.loads(config_file.read_text())["offload"]
        self.assertEqual(offload["unsupported"], "kernel")
        self.assertEqual(offload["restart_rekey_rate"], 50)

    def test_options_reach_the_service(self):
        self.cli_set([*base_path, "unsupported", "drop"])
        self.cli_set([*base_path, "restart-rekey-rate", "7"])
        self.cli_set([*base_path, "selector-enforcement", "disable"])
        self.cli_commit()
        offload = tomllib.loads(config_file.read_text())["offload"]
        self.assertEqual(offload["unsupported"], "drop")
        self.assertEqual(offload["restart_rekey_rate"], 7)
        self.assertFalse(offload["selector_enforcement"])

    def test_values_out_of_range_are_refused(self):
        for name, value in (("restart-rekey-rate", "0"), ("statistics-interval", "3601"), ("unsupported", "forward")):
            with self.assertRaises(ConfigSessionError):
                self.cli_set([*base_path, name, value])

    def test_acceleration_without_an_interface_is_refused(self):
        self.cli_delete(interface_path)
        with self.assertRaises(ConfigSessionError):
            self.cli_commit()
        self.cli_set(interface_path)


if __name__ == "__main__":
    unittest.main(verbosity=2)
