"""Floor 8: what `ettin bench` times and what becomes of its results."""
