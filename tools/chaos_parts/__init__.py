"""Parts of tools/chaos.py: faults of runs, killed checkpoint saves, corrupted bytes."""
