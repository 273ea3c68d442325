"""Sends planned requests, and records VPP's replies. May import `plan` and whatever `plan` may import."""
