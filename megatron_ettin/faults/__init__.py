"""Floor 8: what notices and explains hangs, bad steps, slow ranks and flipped bits."""
