"""Floor 5: rows of tokens to micro-batches on the device."""
