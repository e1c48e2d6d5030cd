"""Releasing every checkpoint of a run as revisions of one Hugging Face repository."""
