"""Sections of tools/gpu_validate.py. Each promise about GPUs is an item, which passes, fails, or cannot run here."""
