"""Hooks of the training loop: metrics, checkpoints, evaluation, displays, profiling."""
