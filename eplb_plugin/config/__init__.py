"""Options, and where they come from."""
