"""Floor 1: what a run is, as plain values. No torch here."""
