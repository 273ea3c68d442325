"""What tests share: kernels and VPPs that stand for real ones, models to hold the service against, rigs.

May import every room.
"""
