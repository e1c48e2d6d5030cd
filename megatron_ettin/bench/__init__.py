"""Floor 8: the measurements of `ettin bench` and their results."""
