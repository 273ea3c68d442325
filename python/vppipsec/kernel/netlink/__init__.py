"""Netlink of any family: sockets, framing and answers. Imports no other package of the service."""
