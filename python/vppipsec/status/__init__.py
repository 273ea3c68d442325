"""The operator's view: the status socket and its answers. May import `sync`, and all that `sync` may import."""
