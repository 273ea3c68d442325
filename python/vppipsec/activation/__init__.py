"""Checks a configuration at a commit, and turns the service on and off. May import `status` and all that `status` may import."""
