"""Floor 3: what `ettin bench` times and what becomes of its results. The measuring itself is train/measure.py."""
