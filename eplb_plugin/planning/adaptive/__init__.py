"""The policy `adaptive`: exchanges from the placement in force, by compiled search."""
