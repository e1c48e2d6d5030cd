"""Floor 3: ranks, the layout of a run, its process groups and collectives."""
