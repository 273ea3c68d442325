"""The kernel side: wire formats, netlink socket and the SAD/SPD model. Nothing here knows VPP."""
