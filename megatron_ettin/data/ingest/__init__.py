"""Text and tokens from anywhere -> an indexed dataset: inputs, tasks, the engine that runs them, publishing."""
