"""Checks a CLI configuration across nodes, and against this machine. The results are sentences for the operator."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence

from vppipsec.activation.proposals import label_of, why_not_supported
from vppipsec.conf.cli import CliConfig
from vppipsec.conf.nodes import ACCELERATION
from vppipsec.conf.settings import Settings
from vppipsec.kernel.xfrm.socket import XfrmSocket
from vppipsec.vpp.api.client import connect
from vppipsec.vpp.api.errors import VppError
from vppipsec.vpp.types import NO_INDEX

_NETLINK_ROUTE = 0  # include/uapi/linux/netlink.h
_VPP_ANSWERS_S = 5.0
_LOCAL0 = 0  # an interface that every VPP has; it carries no packets


class ConfigRefused(Exception):
    """A configuration must not be committed. `complaints` say why and what to change. The text has one on each line."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = tuple(complaints)


def granted_buffer(size: int) -> int:
    """Return the receive buffer, in bytes, that the kernel grants for a request of `size` bytes. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_ROUTE) as probe:
        return XfrmSocket(size, probe).receive_buffer


def interfaces_in_vpp(settings: Settings) -> list[str] | None:
    """Return the names of VPP's interfaces, None if VPP does not answer."""

    async def names() -> list[str]:
        async with asyncio.timeout(_VPP_ANSWERS_S):
            client = await connect(settings.vpp.api_socket, "vpp-ipsec commit")
            try:
                found = await client.dump("sw_interface_dump", {"sw_if_index": NO_INDEX})
            finally:
                await client.close()
        return [str(itf.interface_name) for itf in found if itf.sw_if_index != _LOCAL0]

    try:
        return asyncio.run(names())
    except (VppError, TimeoutError):
        return None


def verify(
    config: CliConfig,
    interfaces: Callable[[], Sequence[str] | None],
    granted: Callable[[int], int] = granted_buffer,
) -> list[str]:
    """Check a configuration and return warnings. Raises ConfigRefused.

    `interfaces` returns the names of VPP's interfaces, None if they are unknown now. `granted` has the contract of
    `granted_buffer`.
    """
    wrong = list(config.complaints)
    warnings: list[str] = []
    if config.accelerated and not wrong:
        names = interfaces()
        if names is not None and not names:
            wrong.append(
                f"'{ACCELERATION}' needs an interface that VPP carries: give VPP those through which the peers are reached,"
                " with 'vpp settings interface <name>' or, where VyOS has no such node, in VPP's own startup.conf"
            )
        size = config.settings.netlink.rx_buffer_size
        if (got := granted(size)) < size:
            wrong.append(
                f"The kernel grants a receive buffer of {got} bytes, not {size}: set 'vpp settings lcp netlink rx-buffer-size'"
                f" to {got} or less"
            )
        (wrong if config.settings.offload.unsupported == "drop" else warnings).extend(_esp_complaints(config))
    if wrong:
        raise ConfigRefused(wrong)
    return warnings


def _esp_complaints(config: CliConfig) -> list[str]:
    """Return a sentence for each proposal in use that VPP cannot carry."""
    drop = config.settings.offload.unsupported == "drop"
    remedy = (
        "its traffic would be dropped: change the proposal, or set 'vpp ipsec unsupported kernel'"
        if drop
        else "where it is negotiated, the kernel carries its traffic, more slowly than VPP"
    )
    return [
        f'VPP cannot carry proposal {use.number} ({label_of(use.proposal)}) of esp-group "{use.group}", which {use.user} uses'
        f" ({reason}); {remedy}"
        for use in config.uses
        if (reason := why_not_supported(use.proposal)) is not None
    ]
