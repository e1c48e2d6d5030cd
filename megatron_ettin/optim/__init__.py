"""Floor 4: optimizers on whole tensors, schedules as functions of tokens."""
