"""Keeps VPP equal to the kernel.

Its rooms build on each other: desired, ike, actual, plan, apply, engine. May import `kernel`, `vpp` and `conf`.
"""
