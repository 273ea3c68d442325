"""What VPP holds of this service, kept up by each request that VPP accepts. May import `vpp`."""
