"""Floor 3: what an objective makes of a row of tokens. Encoder and decoder read the same rows; only this differs."""
