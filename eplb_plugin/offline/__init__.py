"""Recorded and synthetic traffic, and replaying it."""
