"""Floor 4: datasets on disk, chunks to rows, the order of rows, tokenizers."""
