"""Floor 5: parameters, memory and speed of a run before it starts."""
