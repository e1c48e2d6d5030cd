"""Floor 4: one model for both objectives, built from Megatron-Core's layers."""
