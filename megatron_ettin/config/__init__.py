"""Floor 1: the description of a run, as plain values. No torch here."""
