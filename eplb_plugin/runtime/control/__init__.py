"""What ranks say to each other, and when they act."""
