"""Requests to the IKE daemon: rekeys and ACQUIREs. May import `desired` and whatever `desired` may import."""
