"""The kernel's SAs and policies: wire format, socket, and the model of SAD and SPD. May import `kernel`."""
