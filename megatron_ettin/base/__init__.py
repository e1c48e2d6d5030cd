"""Floor 0: what every room needs: errors, messages, files, digests. No torch here."""
