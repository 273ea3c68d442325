"""Sends what is planned, and notes what VPP answers. May import `plan` and what that may."""
