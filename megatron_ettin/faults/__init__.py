"""Floor 8: detection and explanation of hangs, bad steps, slow ranks and flipped bits."""
