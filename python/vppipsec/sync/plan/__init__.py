"""From desired and actual state to requests. Pure. May import `actual` and what that may."""
