"""Parts of tools/chaos.py: faults for runs, cuts in the publishing of checkpoints, corrupted bytes."""
