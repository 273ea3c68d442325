"""What op mode reads: the status socket and its answers."""
