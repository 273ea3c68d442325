"""The actual state: the service's objects in VPP, updated with each request that VPP accepts. May import `vpp`."""
