"""Settings and their sources. Imports no other package of the service."""
