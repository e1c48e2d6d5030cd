"""Floor 8: the trainer: setup, one step, hooks, saving, resuming."""
