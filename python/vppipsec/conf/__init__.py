"""Configuration: typed settings and where they are read from."""
