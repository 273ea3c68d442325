"""What an operator is told: the status socket and its answers. May import `sync` and what that may."""
