"""Netlink without any family: sockets, framing and answers. Imports nothing but itself."""
