"""Floor 3: is this machine fit to train, and what do its gaps cost? Each module makes `Finding`s of one kind."""
