"""What the IKE daemon is asked for: rekeys and ACQUIREs. May import `desired` and what that may."""
