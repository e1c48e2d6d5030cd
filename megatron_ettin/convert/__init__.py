"""Convert checkpoints to and from Hugging Face folders; one table of names (rules.py) serves both directions."""
