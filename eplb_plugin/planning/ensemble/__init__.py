"""The policy `ensemble`: the pipeline from scratch with the vectorized ensemble packer at each level."""
