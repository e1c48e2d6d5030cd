"""What happens besides training: metrics, checkpoints, evaluation, displays."""
