"""Turns desired and actual state into requests. Pure. May import `actual` and whatever `actual` may import."""
