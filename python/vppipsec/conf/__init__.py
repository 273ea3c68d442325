"""Settings, and where they are read from. The ground: imports no other room."""
