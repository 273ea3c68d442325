"""All about VPP: its API, what it may be asked, and what it holds. Knows no Linux, and imports no other room."""
