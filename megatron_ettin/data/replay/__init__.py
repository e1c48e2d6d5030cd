"""Data orders that are recorded in files instead of drawn."""
