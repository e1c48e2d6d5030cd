"""Floor 4: one model for both objectives, on Megatron-Core's layers."""
