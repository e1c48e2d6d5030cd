"""Floor 4: writing, verifying and reading checkpoints under any layout."""
