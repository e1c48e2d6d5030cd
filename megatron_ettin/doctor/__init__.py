"""Floor 5: checks of this host for training, and the cost of what it lacks. Each module returns `Finding`s."""
