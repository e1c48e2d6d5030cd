"""Floor 9: the commands of `ettin`, each in a small file of its own."""
