"""Floor 9: one small file a command."""
