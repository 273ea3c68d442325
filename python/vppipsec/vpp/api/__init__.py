"""VPP's binary API: client, codec, and the requests by VPP's own .api files. May import `vpp`."""
