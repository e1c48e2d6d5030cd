"""Floor 7: what is drawn and proven from what runs recorded."""
