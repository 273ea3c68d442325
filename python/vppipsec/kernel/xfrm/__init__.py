"""Reads the kernel's SAs and policies: wire format, socket, and a model of SAD and SPD. May import `kernel`."""
