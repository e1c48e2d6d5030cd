"""Floor 6: the run directory: its files, its lock, and the data that its steps read."""
