"""The values that everything speaks in: topology, placement, load, balancedness, errors."""
