#!/usr/bin/env python3
"""Prints the peers or the SPIs of the service, for completion. Prints nothing if the service does not answer."""

import argparse
import sys

from vppipsec.conf.settings import SettingsError, find_config
from vppipsec.daemon import read_config
from vppipsec.status.select import peers, spis
from vppipsec.status.server import StatusUnavailable, ask

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("peer", "spi"))
    parser.add_argument("--socket", help="the service's status socket")
    arguments = parser.parse_args()
    try:
        socket = arguments.socket or read_config(find_config(None)).status.socket
        rows = ask(socket, "show sa", timeout_s=2.0)
    except (SettingsError, StatusUnavailable):
        sys.exit(0)
    print(" ".join(peers(rows) if arguments.what == "peer" else spis(rows)))
