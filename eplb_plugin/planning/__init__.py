"""From a load to a placement."""
