"""Reads and writes Linux: SAs and policies, links and routes, the router's own packets.

It does not know VPP, and imports no other package of the service.
"""
