"""Floor 7: every checkpoint of a run as a revision of one Hugging Face repository."""
