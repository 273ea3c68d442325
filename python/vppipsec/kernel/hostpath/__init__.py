"""Makes the kernel send the router's own packets to host interfaces. May import `kernel`."""
