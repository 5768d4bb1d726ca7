"""What needs a GPU; one is enough. Skipped where there is none."""
