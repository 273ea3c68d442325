"""What VPP holds and what tunnels depend on, read from VPP and from the kernel's routes.

May import `ike` and what that may.
"""
