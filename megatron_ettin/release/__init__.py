"""Release every checkpoint of a run as a revision of one Hugging Face repository."""
