"""Expert weights: from placement to placement."""
