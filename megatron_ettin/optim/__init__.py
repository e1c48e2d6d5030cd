"""Floor 4: optimizers, the engines that shard them, and schedules as functions of tokens."""
