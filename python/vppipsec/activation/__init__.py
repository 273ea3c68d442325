"""What a commit does: checks the configuration, turns the service on and off. May import `status` and what that may."""
