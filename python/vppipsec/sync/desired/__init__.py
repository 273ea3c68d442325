"""What VPP should hold, computed from kernel, routes, environment and settings.

Pure. May import `kernel`, `vpp`, `conf`.
"""
