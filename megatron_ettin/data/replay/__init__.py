"""Orders that are given in files instead of drawn."""
