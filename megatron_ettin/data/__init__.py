"""Text to chunks to rows to positions: the dataset on disk, and the order in which a run reads it. No torch here."""
