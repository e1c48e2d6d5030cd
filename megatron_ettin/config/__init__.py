"""Floor 1: the description of a run, as plain values. No module imports torch."""
