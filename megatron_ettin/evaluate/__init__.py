"""Floor 8: loss on held-out rows, logits of a checkpoint, and public evaluations."""
