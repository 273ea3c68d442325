"""Shared parts of the tests: fake kernels and VPPs, models to compare the service with, rigs.

May import every room.
"""
