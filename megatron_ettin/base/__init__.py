"""Floor 0: errors, messages, files and digests, which every room needs. No module imports torch."""
