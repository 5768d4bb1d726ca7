"""The formats of other projects: recorded loads in, loads and placements out. One file for each."""
