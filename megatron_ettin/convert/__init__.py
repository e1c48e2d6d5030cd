"""To and from Hugging Face folders: one table of names (rules.py), walked in two directions."""
