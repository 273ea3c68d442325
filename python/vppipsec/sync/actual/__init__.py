"""The state of VPP and of the environment, read from VPP and from the kernel's routes.

May import `ike` and whatever `ike` may import.
"""
