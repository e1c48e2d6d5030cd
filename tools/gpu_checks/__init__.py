"""Sections of tools/gpu_validate.py. A promise about GPUs is an item: it passes, fails, or cannot run here."""
