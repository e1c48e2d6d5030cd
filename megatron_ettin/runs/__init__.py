"""Floor 6: the directory that is a run: what is in it, who may train in it, what its steps read."""
