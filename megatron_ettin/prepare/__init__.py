"""Floor 5: text and tokens from anywhere to a dataset."""
