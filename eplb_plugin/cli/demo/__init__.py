"""`eplb-plugin demo`: the whole loop on real processes."""
