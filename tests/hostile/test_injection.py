"""Nobody without CAP_NET_ADMIN can make the service believe something about the kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from support import netlink_encode
from support.build import sa_in
from support.netns import in_new_netns
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.kernel.xfrm.values import MulticastGroup

TRANSPORTS = {
    "to its port": "({port}, 0)",
    f"to group {MulticastGroup.SA.name}": f"(0, {1 << (MulticastGroup.SA - 1)})",
}
UNKNOWN = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
WITHOUT = ("setpriv", "--bounding-set=-net_admin")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("way", TRANSPORTS)
@pytest.mark.parametrize(
    ("wrap", "received"), [(UNKNOWN, False), (WITHOUT, False), ((), True)], ids=["nobody", "root-without", "root"]
)
def test_only_privileged_senders_reach_the_event_socket(way: str, wrap: tuple[str, ...], received: bool) -> None:
    def story() -> None:
        ear = XfrmSocket()
        try:
            address = TRANSPORTS[way].format(port=ear.port_id)
            program = f"import socket; socket.socket(16, 3, 6).sendto({netlink_encode.new_sa(sa_in(1))!r}, {address})"
            ran = subprocess.run(
                [*wrap, sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
            )
            assert (ran.returncode == 0) == received
            assert received or "PermissionError" in ran.stderr
            if received:
                assert ear._events.recv(1 << 16)
            else:
                with pytest.raises(BlockingIOError):
                    ear._events.recv(1)
        finally:
            ear.close()

    in_new_netns(story)
