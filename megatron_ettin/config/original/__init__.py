"""Read the original trainer's configuration: its YAML files and the model that its checkpoints record."""
