"""A VPP stand-in that speaks VPP's real socket API, for machines without VPP."""
