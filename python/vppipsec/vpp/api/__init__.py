"""VPP's binary API: client, codec, and one module of requests for each of VPP's .api files. May import `vpp`."""
