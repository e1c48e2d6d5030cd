"""Floor 7: pages, figures and comparisons from the records of runs."""
