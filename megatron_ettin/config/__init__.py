"""Floor 0: what a run is, as plain values. No torch here."""
