"""Hooks, which do what happens besides training: metrics, checkpoints, evaluation, displays."""
