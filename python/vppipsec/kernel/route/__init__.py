"""Reads the kernel's links and routes: wire format, model and follower. May import `kernel`."""
