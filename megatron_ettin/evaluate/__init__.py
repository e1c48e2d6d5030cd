"""Floor 8: loss on held-out rows, logits of a checkpoint, other people's evaluations."""
