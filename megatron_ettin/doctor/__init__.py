"""Floor 5: checks whether this machine is fit to train, and what its gaps cost. Each module returns `Finding`s."""
