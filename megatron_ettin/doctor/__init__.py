"""Floor 5: whether this machine is fit to train, and what its gaps cost. Each module makes `Finding`s."""
