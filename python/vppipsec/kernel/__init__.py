"""Reads and writes all that is Linux: SAs and policies, links and routes, the router's own packets.

Knows no VPP, and imports no other room.
"""
