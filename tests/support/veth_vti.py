"""VTIs in a test's network namespace: xfrm interfaces where the kernel has them, else veth pairs in their place."""

from __future__ import annotations

import subprocess

from vppipsec.kernel.route.follower import RouteSocket
from vppipsec.kernel.route.wire import Link, LinkEvent


class VethsAsVtis(RouteSocket):
    """Treats a link named `vti` and a number as an xfrm interface with that number as its if_id."""

    def _decode_event(self, message: memoryview) -> LinkEvent | None:
        event = super()._decode_event(message)
        if isinstance(event, Link) and event.name.startswith("vti"):
            return event._replace(if_id=int(event.name[3:]))
        return event


def links(*names: str) -> list[str]:
    """Return commands that create links and set them up.

    `vti` and a number is an xfrm interface where the kernel has them.
    """
    commands = []
    for name in names:
        if name.startswith("vti") and makes_vti(name):
            commands += [f"link set {name} up"]
        else:
            commands += [f"link add {name} type veth peer name p{name}", f"link set {name} up", f"link set p{name} up"]
    return commands


def makes_vti(name: str) -> bool:
    command = ["ip", "link", "add", name, "type", "xfrm", "dev", "lo", "if_id", name[3:]]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
