"""VPP: its API, the requests that are safe to send, and the state it holds. Knows no Linux and imports no other room."""
